// Throughput and latency of an inference server, from its metrics (Prometheus text under vLLM's names).
import { useEffect, useState } from "./ui.js";

const EVERY_S = 5;
const KEPT = 13; // samples: a minute

/** The sum of a metric over its labels; null if the metric is absent. */
function total(text, name) {
  const lines = text.split("\n").filter((line) => line.startsWith(`${name}{`) || line.startsWith(`${name} `));
  return lines.length ? lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" ") + 1)), 0) : null;
}

function sampleOf(text) {
  const mean = (name) => {
    const count = total(text, `${name}_count`);
    return count ? total(text, `${name}_sum`) / count : null;
  };
  return {
    at: performance.now() / 1000,
    tokens: total(text, "vllm:generation_tokens_total"),
    requests: total(text, "vllm:request_success_total"),
    first: mean("vllm:time_to_first_token_seconds"),
    between: mean("vllm:inter_token_latency_seconds"),
    whole: mean("vllm:e2e_request_latency_seconds"),
  };
}

function rate(samples) {
  const [oldest, newest] = [samples[0], samples.at(-1)];
  return newest.at - oldest.at > 1 ? (newest.tokens - oldest.tokens) / (newest.at - oldest.at) : null;
}

/** { tokens, requests, first, between, whole, perSecond } of a reachable server; null until they have been read. */
export function useServerMetrics(deployment, slot) {
  const [samples, setSamples] = useState([]);
  useEffect(() => {
    const control = new AbortController();
    const ask = async () => {
      if (document.hidden) return;
      try {
        const answer = await fetch(`/v1/deployments/${deployment}/servers/${slot}/metrics`, { signal: control.signal, credentials: "same-origin" });
        if (answer.ok) {
          const sample = sampleOf(await answer.text());
          setSamples((before) => [...before, sample].slice(-KEPT));
        }
      } catch {
        // The list of deployments is polled too and reports an unreachable service.
      }
    };
    ask();
    const timer = setInterval(ask, 1000 * EVERY_S);
    return () => {
      clearInterval(timer);
      control.abort();
    };
  }, [deployment, slot]);
  return samples.length ? { ...samples.at(-1), perSecond: rate(samples) } : null;
}
