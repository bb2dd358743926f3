// Polls values of the service: at its interval, paused in hidden tabs and while the service does not answer.
import { awaySince, onConnection, read } from "./api.js";
import { useEffect, useRef, useState } from "./ui.js";

const LONGEST_S = 60;

/** The time since which the service has not answered; null while it does. */
export function useAway() {
  const [since, setSince] = useState(awaySince());
  useEffect(() => onConnection(setSince), []);
  return since;
}

class Poll {
  constructor(path, everyS, tell) {
    Object.assign(this, { path, everyS, tell, failures: 0, timer: null, isAsking: false, control: new AbortController() });
    this.onVisible = () => !document.hidden && this.ask();
    document.addEventListener("visibilitychange", this.onVisible);
    // Whoever learns first that the service is back, all ask at once.
    this.forget = onConnection((since) => since === null && !this.isAsking && this.ask());
    this.ask();
  }

  stop() {
    document.removeEventListener("visibilitychange", this.onVisible);
    this.forget();
    clearTimeout(this.timer);
    this.control.abort();
  }

  async ask() {
    clearTimeout(this.timer);
    if (document.hidden) return; // asked again as soon as the tab is seen
    this.isAsking = true;
    try {
      const { value, retryAfter } = await read(this.path, this.control.signal);
      this.failures = 0;
      this.tell({ value, error: null });
      this.later(typeof this.everyS === "function" ? this.everyS(value, retryAfter) : retryAfter ?? this.everyS);
    } catch (error) {
      if (this.control.signal.aborted) return;
      this.failed(error);
    } finally {
      this.isAsking = false;
    }
  }

  failed(error) {
    this.failures += 1;
    this.tell({ error });
    const isRefused = error.status && error.status < 500 && error.status !== 429;
    if (!isRefused) this.later(Math.min(LONGEST_S, 2 ** this.failures));
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

/** A number that grows every `seconds`, for what is shown by the clock. */
export function useTick(seconds) {
  const [tick, setTick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => !document.hidden && setTick((before) => before + 1), 1000 * seconds);
    return () => clearInterval(timer);
  }, [seconds]);
  return tick;
}
