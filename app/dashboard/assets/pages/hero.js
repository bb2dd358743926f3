// What a job has won, above all else on its page: size, quality, speed, and what to do with it.
import { may } from "../caller.js";
import { bytes, change, duration, isNoise, number, times } from "../format.js";
import { usePolled } from "../polling.js";
import { useServerMetrics } from "../server_metrics.js";
import { html } from "../ui.js";
import { DeployButton, suggestedName } from "./deploy.js";
import { textInWords } from "./figures.js";

function Tile({ value, name, children }) {
  return html`<div class="tile"><dt>${name}</dt><dd><strong>${value}</strong><small>${children}</small></dd></div>`;
}

/** The perplexity's change, with its uncertainty: beside no change at all if the text can't tell. */
function Perplexity({ best, evaluation }) {
  const { perplexity_ratio: ratio, perplexity_ratio_interval: interval } = best;
  const range = interval ? `95\u00a0%: ${change(interval.low)} to ${change(interval.high)}` : "no interval: one window";
  return html`<${Tile} name="Perplexity" value=${change(ratio)}>
    ${isNoise(best) && html`<span class="label">within the noise</span> `}${range}, on ${textInWords(evaluation)}
  <//>`;
}

const readySlot = (deployment) => deployment?.servers.find((each) => each.state === "ready")?.slot;

/** Beside the quantized model's speed that of its original, where it is served too. */
function BesideOriginal({ original, speed }) {
  const metrics = useServerMetrics(original.id, readySlot(original));
  if (!metrics?.between) return null;
  return html`, original ${number(1 / metrics.between, 3)} (${times(speed * metrics.between, 1)})`;
}

/** Tokens per second of one answer, of the server that serves the artifact. */
function Speed({ deployment, original }) {
  const metrics = useServerMetrics(deployment.id, readySlot(deployment));
  if (!metrics?.between) return null;
  const speed = 1 / metrics.between;
  return html`<${Tile} name="Speed of one answer" value=${`${number(speed, 3)} tokens/s`}>
    measured by ${deployment.name}, first token after ${duration(metrics.first)}${readySlot(original) !== undefined && html`<${BesideOriginal} original=${original} speed=${speed} />`}<//>`;
}

function Actions({ artifact, deployment }) {
  const served = deployment && ["ready", "stopped"].includes(deployment.state);
  return html`<div class="actions">
    ${served && may("inference")
      ? html`<a class="main button" href=${`#/deployments/${encodeURIComponent(deployment.name)}/chat`}>Chat</a>`
      : may("deployments:write") && html`<${DeployButton} artifact=${artifact.id} suggested=${suggestedName(artifact)} />`}
    <a class="quiet button" href=${`#/artifacts/${artifact.id}`}>Download</a>
  </div>`;
}

const NEAR = 1.01; // times the original's perplexity

/** [candidate, why]: of the published ones the smallest within a percent of the original, else the nearest to it. */
export function bestOf(report) {
  const published = report.candidates.filter((each) => report.published.includes(each.recipe_index));
  const size = (each) => Math.max(...Object.values(each.bytes));
  const cost = (each) => each.kl ?? Infinity;
  const near = published.filter((each) => each.perplexity_ratio && each.perplexity_ratio <= NEAR);
  const best = near.length
    ? near.sort((a, b) => size(a) - size(b) || cost(a) - cost(b))[0]
    : [...published].sort((a, b) => cost(a) - cost(b) || size(a) - size(b))[0];
  const of = `of ${published.length} recipes`;
  return [best, published.length < 2 ? "" : near.length ? `, the smallest ${of} within 1 % of the original's perplexity` : `, the nearest to the original ${of}`];
}

/** The artifact of the candidate that `bestOf` finds. */
export function bestArtifact(report, artifacts) {
  const [best] = bestOf(report);
  return artifacts.find((artifact) => artifact.summary.label === best?.label) ?? artifacts[0];
}

export function Hero({ report, artifacts }) {
  const [best, why] = bestOf(report);
  const deployments = usePolled(may("deployments:read") ? "/v1/deployments?limit=100" : null, 15);
  if (!best) return null;
  const artifact = bestArtifact(report, artifacts);
  const weights = Math.max(...Object.values(best.bytes));
  const serving = (deployments.value?.data ?? []).filter((each) => each.artifact === artifact?.id);
  const [deployment, original] = [serving.find((each) => !each.original), serving.find((each) => each.original)];
  const speaks = readySlot(deployment) !== undefined;
  return html`<section class="hero" aria-labelledby="result">
    <div class="title"><h2 id="result">Result <small>${best.label}${why}</small></h2>
      ${artifact && html`<${Actions} artifact=${artifact} deployment=${deployment} />`}</div>
    <dl class="tiles">
      <${Tile} name="Size" value=${`${times(report.original.bytes, weights)} smaller`}>
        ${bytes(report.original.bytes)} → ${bytes(weights)} of weights, ${number(best.bits_per_weight, 3)} bits each<//>
      ${best.perplexity_ratio && html`<${Perplexity} best=${best} evaluation=${report.evaluation} />`}
      ${typeof best.kl === "number" && html`<${Tile} name="KL divergence" value=${number(best.kl, 3)}>
        nats per token from the original${best.kl_interval ? `, 95\u00a0%: ${number(best.kl_interval.low, 2)} to ${number(best.kl_interval.high, 2)}` : ""}<//>`}
      ${typeof best.top1_agreement === "number" && html`<${Tile} name="Same top token" value=${`${(100 * best.top1_agreement).toFixed(1)} %`}>
        of the original's likeliest tokens<//>`}
      ${report.evaluation === null && html`<${Tile} name="Quality" value="not measured">the job asked for no evaluation<//>`}
      ${speaks && html`<${Speed} deployment=${deployment} original=${original} />`}
    </dl>
  </section>`;
}
