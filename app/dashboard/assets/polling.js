// Polls values of the service: at its interval, paused in hidden tabs, slower while it is unreachable.
import { read } from "./api.js";
import { useEffect, useRef, useState } from "./ui.js";

const LONGEST_S = 60;
const away = { since: null, listeners: new Set() };

function setAway(since) {
  if (away.since === since) return;
  away.since = since;
  away.listeners.forEach((tell) => tell(since));
}

/** The time since which the service has not answered; null while it does. */
export function useAway() {
  const [since, setSince] = useState(away.since);
  useEffect(() => {
    away.listeners.add(setSince);
    return () => away.listeners.delete(setSince);
  }, []);
  return since;
}

class Poll {
  constructor(path, everyS, tell) {
    Object.assign(this, { path, everyS, tell, failures: 0, timer: null, control: new AbortController() });
    this.onVisible = () => !document.hidden && this.ask();
    document.addEventListener("visibilitychange", this.onVisible);
    this.ask();
  }

  stop() {
    document.removeEventListener("visibilitychange", this.onVisible);
    clearTimeout(this.timer);
    this.control.abort();
  }

  async ask() {
    clearTimeout(this.timer);
    if (document.hidden) return; // asked again as soon as the tab is seen
    try {
      const { value, retryAfter } = await read(this.path, this.control.signal);
      this.failures = 0;
      setAway(null);
      this.tell({ value, error: null });
      this.later(typeof this.everyS === "function" ? this.everyS(value, retryAfter) : retryAfter ?? this.everyS);
    } catch (error) {
      if (this.control.signal.aborted) return;
      this.failed(error);
    }
  }

  failed(error) {
    this.failures += 1;
    const refused = error.status && error.status < 500 && error.status !== 429;
    if (!refused) setAway(away.since ?? new Date());
    this.tell({ error });
    if (!refused) this.later(Math.min(LONGEST_S, 2 ** this.failures));
  }

  later(delayS) {
    if (delayS === null || this.control.signal.aborted) return;
    const jitter = 0.9 + 0.2 * Math.random();
    this.timer = setTimeout(() => this.ask(), 1000 * delayS * jitter);
  }
}

/** { value, error, ask }: `value` stays while an error lasts. `everyS` may be (value, hint) -> seconds or null. */
export function usePolled(path, everyS = 5) {
  const [state, setState] = useState({ path, value: undefined, error: null });
  const poll = useRef(null);
  useEffect(() => {
    setState({ path, value: undefined, error: null });
    if (path === null) return undefined;
    poll.current = new Poll(path, everyS, (change) => setState((before) => ({ ...before, ...change, path })));
    return () => poll.current.stop();
  }, [path]);
  const current = state.path === path ? state : { value: undefined, error: null };
  return { ...current, ask: () => poll.current?.ask() };
}
