// A list that is read page by page, newest first; its newest page may be polled.
import { read } from "./api.js";
import { usePolled } from "./polling.js";
import { useEffect, useState } from "./ui.js";

const joined = (path, after) => `${path}${path.includes("?") ? "&" : "?"}after=${encodeURIComponent(after)}`;

/** The newest page in front of what was read before; what is on both counts once, as it is now. */
function merged(page, before) {
  const ids = new Set(page.map((entry) => entry.id));
  return [...page, ...before.filter((entry) => !ids.has(entry.id))];
}

/** { value, error, hasMore, more, ask }: the entries at `path` so far. `everyS`: from the newest page's entries to the
 * seconds until it is asked for again, or null. */
export function usePagedList(path, everyS = () => null) {
  const polled = usePolled(path, (page) => everyS(page.data));
  const [seen, setSeen] = useState({ path, entries: undefined, next: null });
  const page = polled.value;
  useEffect(() => {
    if (page === undefined) return;
    setSeen((before) => (before.path === path && before.entries
      ? { ...before, entries: merged(page.data, before.entries) }
      : { path, entries: page.data, next: page.next }));
  }, [page]);
  const more = async () => {
    const { value } = await read(joined(path, seen.next));
    setSeen((before) => (before.path === path ? { path, entries: [...before.entries, ...value.data], next: value.next } : before));
  };
  const current = seen.path === path ? seen : { entries: undefined, next: null };
  return { value: current.entries, error: polled.error, hasMore: current.next !== null, more, ask: polled.ask };
}
