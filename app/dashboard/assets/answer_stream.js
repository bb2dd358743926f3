// One answer of a deployment as it streams, with its pace.
import { stream } from "./api.js";
import { duration } from "./format.js";

const BURST_MS = 50; // what came within it was sent earlier: its pace is that of the whole answer

/** Counts what a stream brings: { tokens, first, rate }, times in milliseconds, tokens per second. */
class Meter {
  constructor() {
    Object.assign(this, { started: performance.now(), first: null, chunks: 0 });
  }

  take(chunk) {
    const text = chunk.choices[0]?.delta?.content || "";
    if (text) {
      this.first ??= performance.now();
      this.chunks += 1;
    }
    const tokens = chunk.usage?.completion_tokens ?? this.chunks;
    const now = performance.now();
    const since = now - this.first < BURST_MS ? this.started : this.first;
    const rate = this.first && tokens > 1 ? (1000 * (tokens - 1)) / (now - since) : null;
    return { text, said: { tokens, first: this.first && this.first - this.started, rate } };
  }
}

/**
 * The answer to `messages` so far, { content, said }, after each chunk.
 *
 * `request` has `model`, `messages` and the parameters. Throws what `stream` throws; `signal` ends it.
 */
export async function* answerStream({ messages, ...request }, signal) {
  const meter = new Meter();
  let content = "";
  const asked = messages.map(({ role, content: text }) => ({ role, content: text }));
  const body = { ...request, messages: asked, stream: true, stream_options: { include_usage: true } };
  for await (const chunk of stream("/v1/chat/completions", body, signal)) {
    const { text, said } = meter.take(chunk);
    content += text;
    yield { content, said };
  }
}

/** The pace of an answer: 12 tokens, 30.1 per second, first after 80 ms. */
export function paceInWords({ tokens, first, rate }) {
  const figures = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (rate) figures.push(`${rate.toFixed(1)} per second`);
  if (first) figures.push(`first after ${duration(first / 1000)}`);
  return figures.join(", ");
}
