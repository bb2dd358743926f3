// The list of jobs, however long: its newest page is polled, older ones are read as the list is scrolled, and asked
// for again only while they are in view and a job of theirs still moves.
import { read } from "./api.js";
import { usePolled } from "./polling.js";
import { useEffect, useLayoutEffect, useRef, useState } from "./ui.js";

const PAGE = 25; // about 12 kB
const MOVING_S = 2;
const RESTING_S = 10;
const EMPTY = { jobs: [], hasMore: false, isKnown: false };
// The last list shown, restored when the user returns to it.
let left = { path: "", list: EMPTY, scroll: 0 };

export const isMoving = (job) => ["queued", "running", "cancelling"].includes(job.state);
const pollEvery = (page) => (page.data.some(isMoving) ? MOVING_S : RESTING_S);

function listPath({ state, q }) {
  const query = new URLSearchParams({ view: "brief", limit: PAGE });
  if (state) query.set("state", state);
  if (q.trim()) query.set("q", q.trim());
  return `/v1/jobs?${query}`;
}

/** Merges `page`, the jobs older than `after`, into the list. Ids sort by time; unchanged jobs stay the same objects. */
function merged(list, page, after) {
  const known = new Map(list.jobs.map((job) => [job.id, job]));
  const fresh = page.data.map((job) => {
    const before = known.get(job.id);
    return before && JSON.stringify(before) === JSON.stringify(job) ? before : job;
  });
  if (!page.has_more) return { jobs: [...list.jobs.filter((job) => after && job.id >= after), ...fresh], hasMore: false, isKnown: true };
  const last = page.data.at(-1).id;
  // More new jobs than a page holds: the gap is unknown, so older jobs are read again.
  const hasGap = !after && list.jobs.length > 0 && list.jobs[0].id < last;
  const newer = list.jobs.filter((job) => after && job.id >= after);
  const older = hasGap ? [] : list.jobs.filter((job) => job.id < last);
  return { jobs: [...newer, ...fresh, ...older], hasMore: list.hasMore || older.length === 0, isKnown: true };
}

/** The cursor of the page with the row in the middle of the screen; null if that row needs no polling. */
function pageInView(jobs) {
  const row = document.elementFromPoint(innerWidth / 2, innerHeight / 2)?.closest("li[data-job]");
  const index = row ? jobs.findIndex((job) => job.id === row.dataset.job) : -1;
  const start = index - (index % PAGE);
  return start >= PAGE && jobs.slice(start, start + PAGE).some(isMoving) ? jobs[start - 1].id : null;
}

function useRefreshInView(path, list, update) {
  const latest = useRef(null);
  latest.current = list;
  useEffect(() => {
    const control = new AbortController();
    const timer = setInterval(async () => {
      const after = document.hidden ? null : pageInView(latest.current.jobs);
      if (after === null) return;
      try {
        update((await read(`${path}&after=${after}`, control.signal)).value, after);
      } catch {
        // The newest page is polled too and reports an unreachable service.
      }
    }, 1000 * MOVING_S);
    return () => {
      clearInterval(timer);
      control.abort();
    };
  }, [path]);
}

function useRemembered(path, list) {
  const latest = useRef(null);
  latest.current = list;
  // Before the first paint, so that the page does not jump.
  useLayoutEffect(() => {
    if (left.path === path) scrollTo(0, left.scroll);
    const remember = () => {
      left = { path, list: latest.current, scroll: scrollY };
    };
    addEventListener("scroll", remember, { passive: true });
    return () => removeEventListener("scroll", remember);
  }, [path]);
  if (left.path === path) left.list = list;
}

/** { jobs, hasMore, isKnown, counts, error, more, ask, drop }: `more` reads a further page of older jobs. */
export function useJobFeed(filter) {
  const path = listPath(filter);
  const newest = usePolled(`${path}&counts=true`, pollEvery);
  const counts = useRef(null); // those of the filter before stay until the first answer
  if (newest.value) counts.current = newest.value.counts;
  const [state, setState] = useState({ path, list: left.path === path ? left.list : EMPTY });
  const list = state.path === path ? state.list : EMPTY;
  const update = (page, after) => setState((before) => ({ path, list: merged(before.path === path ? before.list : EMPTY, page, after) }));
  useEffect(() => newest.value && update(newest.value, ""), [newest.value]);
  useRefreshInView(path, list, update);
  useRemembered(path, list);
  const more = async (signal) => {
    const after = list.jobs.at(-1).id;
    update((await read(`${path}&after=${after}`, signal)).value, after);
  };
  const drop = (ids) => setState((before) => ({ ...before, list: { ...before.list, jobs: before.list.jobs.filter((job) => !ids.has(job.id)) } }));
  return { ...list, counts: counts.current, error: newest.error, more, ask: newest.ask, drop };
}
