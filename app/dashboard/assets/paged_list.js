// A list that is read page by page, newest first.
import { read } from "./api.js";
import { useEffect, useRef, useState } from "./ui.js";

const NOTHING = { entries: undefined, next: null, error: null };
const joined = (path, after) => `${path}${path.includes("?") ? "&" : "?"}after=${encodeURIComponent(after)}`;

/** Its newest page in front of what was read before; what is on both counts once, as it is now. */
function merged(page, before) {
  const ids = new Set(page.map((entry) => entry.id));
  return [...page, ...before.filter((entry) => !ids.has(entry.id))];
}

/** { value, error, hasMore, more, ask }: the entries at `path` so far; `everyS` of them is when to ask again, or null. */
export function usePagedList(path, everyS = () => null) {
  const [state, setState] = useState(NOTHING);
  const current = useRef(path);
  const timer = useRef(null);
  current.current = path;
  const ask = async () => {
    clearTimeout(timer.current);
    try {
      const { value } = await read(path);
      if (current.current !== path) return;
      setState((before) => ({ entries: merged(value.data, before.entries ?? []), next: before.entries ? before.next : value.next, error: null }));
      const delayS = everyS(value.data);
      if (delayS !== null) timer.current = setTimeout(() => (document.hidden ? null : ask()), 1000 * delayS);
    } catch (error) {
      if (current.current === path) setState((before) => ({ ...before, error }));
    }
  };
  const more = async () => {
    const { value } = await read(joined(path, state.next));
    if (current.current === path) setState((before) => ({ entries: [...before.entries, ...value.data], next: value.next, error: null }));
  };
  useEffect(() => {
    setState(NOTHING);
    ask();
    return () => clearTimeout(timer.current);
  }, [path]);
  return { value: state.entries, error: state.error, hasMore: state.next !== null, more, ask };
}
