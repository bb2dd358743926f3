// The load of a deployment's servers over time, from their metrics (under vLLM's names).
import { useEffect, useState } from "./ui.js";

export const EVERY_S = 5;
const MOST = 360; // points: half an hour

// Of histograms the sum and the count, whose quotient is the mean.
const TOTALS = {
  tokens: "generation_tokens_total", answers: "request_success_total", running: "num_requests_running",
  waiting: "num_requests_waiting", cache: "kv_cache_usage_perc",
};
const MEANS = { first: "time_to_first_token_seconds", between: "inter_token_latency_seconds", whole: "e2e_request_latency_seconds" };
const NAMES = [...Object.values(TOTALS), ...Object.values(MEANS).flatMap((name) => [`${name}_sum`, `${name}_count`])];
const QUERY = new URLSearchParams(NAMES.map((name) => ["name[]", `vllm:${name}`]));

/** The sum of a metric over its labels; null if the metric is absent. */
function total(text, name) {
  const lines = text.split("\n").filter((line) => line.startsWith(`vllm:${name}{`) || line.startsWith(`vllm:${name} `));
  return lines.length ? lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" ") + 1)), 0) : null;
}

/** A server's counters since its start, and what it does now; of means { sum, count }. */
function sampleOf(text) {
  const totals = Object.entries(TOTALS).map(([key, name]) => [key, total(text, name)]);
  const means = Object.entries(MEANS).map(([key, name]) => [key, { sum: total(text, `${name}_sum`), count: total(text, `${name}_count`) }]);
  return Object.fromEntries([...totals, ...means]);
}

async function readSample(deployment, slot, signal) {
  try {
    const answer = await fetch(`/v1/deployments/${deployment}/servers/${slot}/metrics?${QUERY}`, { signal, credentials: "same-origin" });
    return answer.ok ? [[slot, sampleOf(await answer.text())]] : [];
  } catch {
    return []; // The deployment is polled too, and reports an unreachable service.
  }
}

// Deployment -> its points, until the tab is closed: who comes back to a page finds them.
const recordings = new Map();

/** The points { at, servers: slot -> sample } of a deployment; more come while the page that asks is seen. */
export function useRecording(deployment, slots) {
  const [, setCount] = useState(0);
  const asked = slots.join();
  useEffect(() => {
    if (!asked) return undefined;
    const control = new AbortController();
    const ask = async () => {
      if (document.hidden) return;
      const samples = await Promise.all(asked.split(",").map((slot) => readSample(deployment, slot, control.signal)));
      const servers = Object.fromEntries(samples.flat());
      if (control.signal.aborted || Object.keys(servers).length === 0) return;
      recordings.set(deployment, [...(recordings.get(deployment) ?? []), { at: Date.now() / 1000, servers }].slice(-MOST));
      setCount((count) => count + 1);
    };
    ask();
    const timer = setInterval(ask, 1000 * EVERY_S);
    return () => {
      clearInterval(timer);
      control.abort();
    };
  }, [deployment, asked]);
  return recordings.get(deployment) ?? [];
}

/** The quotient of sums over servers, null without a count. */
export function mean(sums) {
  const count = sums.reduce((all, each) => all + each.count, 0);
  return count ? sums.reduce((all, each) => all + each.sum, 0) / count : null;
}

/** { first, between } in seconds, means since the start of one server; null until they have been read. */
export function useServerMetrics(deployment, slot) {
  const sample = useRecording(deployment, [slot]).at(-1)?.servers[slot];
  return sample ? { first: mean([sample.first]), between: mean([sample.between]) } : null;
}

const WITHOUT = { tokens: null, first: null, running: null, waiting: null, cache: null };

/** What happened between two points: tokens per second, the mean time to first token; and what goes on at the second. */
function between(before, { at, servers }) {
  const now = Object.values(servers);
  // A server that was started between them counts from zero again.
  const pairs = Object.entries(servers).map(([slot, after]) => [before?.servers[slot], after]).filter(([old, after]) => old && after.tokens >= old.tokens);
  const sum = (key) => now.reduce((all, each) => all + each[key], 0);
  return {
    at,
    tokens: pairs.length ? pairs.reduce((all, [old, after]) => all + after.tokens - old.tokens, 0) / (at - before.at) : null,
    first: mean(pairs.map(([old, after]) => ({ sum: after.first.sum - old.first.sum, count: after.first.count - old.first.count }))),
    running: sum("running"), waiting: sum("waiting"), cache: 100 * Math.max(...now.map((each) => each.cache)),
  };
}

/** The points as { at, tokens, first, running, waiting, cache }; nulls where nothing was read for a while. */
export function loadOf(points) {
  return points.flatMap((point, index) => {
    const before = points[index - 1];
    const isGap = before && point.at - before.at > 3 * EVERY_S;
    return isGap ? [{ ...WITHOUT, at: (before.at + point.at) / 2 }, between(null, point)] : [between(before, point)];
  });
}
