// A job's quality report: candidates side by side, plots, and the time of each stage.
import { Chart } from "../charts.js";
import { bytes, change, duration, isNoise, number } from "../format.js";
import { HeatMap } from "../heat_map.js";
import { Facts, Loaded } from "../parts.js";
import { usePolled } from "../polling.js";
import { QualityPlot, plotted } from "../quality_plot.js";
import { Table } from "../table.js";
import { html, useState } from "../ui.js";
import { Answers } from "./answers.js";
import { intervalInWords, textInWords } from "./figures.js";
import { Hero, bestArtifact } from "./hero.js";

const size = (candidate) => Math.max(...Object.values(candidate.bytes));
const share = (value) => (typeof value === "number" ? `${(100 * value).toFixed(1)} %` : "–");
const sum = (values) => values.reduce((total, value) => total + (value ?? 0), 0);

/** The least and largest scale of the keys and of the values that a cache holds. */
function cacheInWords({ cache }) {
  const range = ([least, largest]) => `${number(least, 3)} to ${number(largest, 3)}`;
  return cache ? `${cache.numbers}, keys ${range(cache.key_scales)}, values ${range(cache.value_scales)}` : "–";
}

function Candidates({ report }) {
  if (report.evaluation === null) return html`<${Unjudged} report=${report} />`;
  const columns = [
    ["Recipe", (each) => html`${each.label}${report.published.length < report.candidates.length && report.published.includes(each.recipe_index) ? html` <span class="label">published</span>` : ""}`, "name"],
    ["Perplexity", (each) => number(each.perplexity, 4), "number"],
    ["Against original (95 %)", intervalInWords, "number"],
    ["KL per token", (each) => number(each.kl, 3), "number"],
    ["KL of 99 %", (each) => number(each.kl_p99, 3), "number"],
    ["Same top token", (each) => share(each.top1_agreement), "number"],
    ["Weights", (each) => bytes(size(each)), "number"],
    ["Bits per weight", (each) => number(each.bits_per_weight, 3), "number"],
    ["Time", (each) => duration(sum(Object.values(each.seconds))), "number"],
    ...(report.candidates.some((each) => each.cache) ? [["Scales of the cache", cacheInWords]] : []),
  ];
  return html`<${Table} caption=${`Candidates; the original has perplexity ${number(report.original.perplexity, 4)} and ${bytes(report.original.bytes)} of weights`}
    columns=${columns} rows=${report.candidates} keyOf=${(each) => each.recipe_index} />
    <p class="aside"><small>Perplexity and KL were measured on ${textInWords(report.evaluation)}.${" "}
      ${report.candidates.some(isNoise) && "“Within the noise” means that this text can't tell the perplexity from the original's: compare the KL. "}
      Weights alone: an artifact's size includes tokenizer and configuration.</small></p>`;
}

const rounded = (candidate) => candidate.linears.filter((linear) => typeof linear.weight_error === "number");

/** Of the errors of a candidate's linears, each relative to its weights. */
function errorsInWords(candidate) {
  const errors = rounded(candidate).map((linear) => linear.weight_error);
  return errors.length ? `${share(Math.min(...errors))} to ${share(Math.max(...errors))}` : "–";
}

/** Candidates of a job without an evaluation: their sizes, and how far rounding moved the weights. */
function Unjudged({ report }) {
  const columns = [
    ["Recipe", (each) => each.label],
    ["Weights", (each) => bytes(size(each)), "number"],
    ["Bits per weight", (each) => number(each.bits_per_weight, 3), "number"],
    ["Error of a linear's weights", errorsInWords, "number"],
  ];
  return html`<${Table} caption=${`Candidates, which were not evaluated; the original has ${bytes(report.original.bytes)}`}
    columns=${columns} rows=${report.candidates} keyOf=${(each) => each.recipe_index} />`;
}

/** The linears of a candidate without an evaluation whose weights rounding moved the most. */
function WeightErrors({ candidate }) {
  const worst = rounded(candidate).sort((a, b) => b.weight_error - a.weight_error).slice(0, 12);
  if (worst.length === 0) return null;
  return html`<${Table} caption="The linears that rounding moved the most" rows=${worst} keyOf=${(each) => each.linear} columns=${[
    ["Linear", (each) => html`<code>${each.linear}</code>`],
    ["Bits", (each) => each.bits, "number"],
    ["Error of its weights", (each) => share(each.weight_error), "number"],
  ]} />`;
}

const scored = (value, error) => (typeof error === "number" ? `${number(value, 4)} ± ${number(error, 2)}` : number(value, 4));

function recoveryInWords({ recovery, recovery_interval: interval }) {
  return `${share(recovery)}${interval ? ` (${share(interval.low)} to ${share(interval.high)})` : ""}`;
}

/** Scores of lm-eval's tasks; each candidate's last row is what a target looks at. */
function Tasks({ report }) {
  const rows = report.candidates.filter((each) => each.tasks).flatMap(({ label, recipe_index: index, tasks }) => [
    ...tasks.scores.map((score) => ({ ...score, label, key: `${index} ${score.task} ${score.metric}` })),
    { ...tasks, label, task: "mean of each task's first metric", key: `${index}` },
  ]);
  if (rows.length === 0) return null;
  const columns = [
    ["Recipe", (each) => each.label],
    ["Task", (each) => each.task],
    ["Metric", (each) => each.metric ?? ""],
    ["Documents", (each) => each.documents ?? "", "number"],
    ["Original", (each) => (each.metric ? scored(each.original, each.original_standard_error) : ""), "number"],
    ["Quantized", (each) => (each.metric ? scored(each.quantized, each.quantized_standard_error) : ""), "number"],
    ["Recovered (95 % interval)", recoveryInWords, "number"],
  ];
  return html`<${Table} caption="Task scores ± standard error" columns=${columns} rows=${rows} keyOf=${(each) => each.key} />`;
}

function Tries({ report }) {
  if (report.tries.length === 0) return null;
  const columns = [
    ["Try", (each) => each.label],
    ["Rung", (each) => each.rung],
    ["Why", (each) => each.reason],
    ["Against original", (each) => change(each.perplexity_ratio), "number"],
    ["KL", (each) => number(each.kl, 3), "number"],
    ["Bits per weight", (each) => number(each.bits_per_weight, 3), "number"],
    ["Target", (each) => `${each.meets_target ? "✓" : "✕"} ${each.verdict || (each.meets_target ? "met" : "missed")}`],
  ];
  return html`<${Table} caption="Search for the target" columns=${columns} rows=${report.tries} />`;
}

/** All candidates beside the original. */
function Quality({ report, nameOf }) {
  const { original, candidates } = report;
  const models = [
    { name: "original", size: original.bytes, value: original.perplexity, said: number(original.perplexity, 4) },
    ...candidates.map((each) => plotted(each, nameOf(each), original.perplexity)),
  ];
  return html`<${QualityPlot} title="Perplexity against size; lines are 95 % intervals of the difference" y="perplexity" models=${models} />`;
}

/** Per layer: the sum over its linears of `pick`. */
function perLayer(candidate, pick) {
  return candidate.layers.map((layer) => sum(layer.linears.map(pick)));
}

function LayerPlots({ candidate }) {
  const layers = candidate.layers.map((layer) => layer.layer);
  const relative = (name) => perLayer(candidate, (linear) => (linear.energy ? (linear[name] ?? linear.loss) / linear.energy : 0));
  const ratios = candidate.layers.map((layer) => {
    const chosen = layer.linears.filter((linear) => linear.ratio !== null);
    return chosen.length ? sum(chosen.map((linear) => linear.ratio)) / chosen.length : null;
  });
  const isPlain = candidate.recipe.method === "rtn"; // both lines would be one
  return html`<div class="charts">
    <${Chart} title=${isPlain ? "Error per layer" : "Error per layer, of plain rounding and as quantized"} log whole x="layer" y="relative output error"
      names=${isPlain ? ["as quantized"] : ["plain rounding", "as quantized"]} data=${[layers, ...(isPlain ? [] : [relative("loss_rounding")]), relative("loss")]} />
    ${ratios.some((ratio) => ratio !== null) && html`<${Chart} title="Chosen ratio per layer, mean over its groups" whole x="layer" y="ratio"
      names=${["ratio"]} data=${[layers, ratios]} />`}
  </div>`;
}

function Sensitivity({ candidate }) {
  const linears = candidate.layers.flatMap((layer) => layer.linears.filter((linear) => linear.energy)
    .map((linear) => ({ name: `${layer.layer}.${linear.linear}`, bits: linear.bits, error: linear.loss / linear.energy, gain: linear.clip_gain })));
  const worst = linears.sort((a, b) => b.error - a.error).slice(0, 12);
  return html`<${Table} caption="The most sensitive linears" rows=${worst} keyOf=${(each) => each.name} columns=${[
    ["Linear", (each) => html`<code>${each.name}</code>`],
    ["Bits", (each) => each.bits, "number"],
    ["Relative output error", (each) => number(each.error, 3), "number"],
    ["Relative to the worst", (each) => html`<meter class="share" max=${worst[0].error} value=${each.error} aria-label=${`Error of ${each.name} relative to the worst`}></meter>`],
    ["Gain of clipping", (each) => (each.gain === null ? "–" : `${(100 * each.gain).toFixed(1)} %`), "number"],
  ]} />`;
}

/** Where the candidate's integers end, else where all but a thousandth of the weights lie. */
function boundsOf(histogram, candidate) {
  const linear = candidate?.layers.flatMap((layer) => layer.linears.map((each) => ({ ...each, layer: layer.layer })))
    .find((each) => histogram.linear === each.linear || histogram.linear.endsWith(`layers.${each.layer}.${each.linear}`));
  if (typeof linear?.clip_low === "number") return { marks: [linear.clip_low, linear.clip_high], said: "; lines at the clip bounds, medians over groups" };
  const marks = ["p0.1", "p99.9"].map((key) => histogram.percentiles[key]).filter((value) => value !== undefined);
  return { marks, said: marks.length ? "; lines at the 0.1 and 99.9 percentiles" : "" };
}

function Histogram({ histograms, candidate }) {
  const [name, setName] = useState(histograms[0].linear);
  const chosen = histograms.find((each) => each.linear === name);
  const width = (chosen.high - chosen.low) / chosen.counts.length;
  const centres = chosen.counts.map((_, index) => chosen.low + (index + 0.5) * width);
  const { marks, said } = boundsOf(chosen, candidate);
  return html`<div class="stack">
    <label>Weights of <select value=${name} onChange=${(event) => setName(event.target.value)}>
      ${histograms.map((each) => html`<option key=${each.linear} value=${each.linear}>${each.linear}</option>`)}
    </select></label>
    <${Chart} title=${`Weights of ${name}${said}`} kind="bars"
      x="weight" y="count" names=${["count"]} data=${[centres, chosen.counts]} marks=${marks} />
  </div>`;
}

/** A size beside the one that was estimated. */
const besideEstimate = (measured, estimated) => (estimated ? `${bytes(measured)}, estimated ${bytes(estimated)}` : bytes(measured));

/** How many cores worked on average, by the stages whose processor time is known. */
function coresInWords({ cpu_seconds: cpu = {}, stages }) {
  const spent = sum(Object.keys(cpu).map((stage) => stages[stage]));
  return spent > 0 ? `${number(sum(Object.values(cpu)) / spent, 2)} cores on average` : null;
}

/** Time and memory beside what was estimated before the run. */
function Cost({ report }) {
  const { prediction } = report;
  const predicted = prediction?.seconds || {};
  const rows = [...new Set([...Object.keys(predicted), ...Object.keys(report.stages)])].map((stage) => [stage, report.stages[stage]]);
  const total = ["total", sum(Object.values(report.stages))];
  const expected = prediction ? { ...predicted, total: sum(Object.values(predicted)) } : {};
  return html`<${Table} caption="Time per stage" rows=${[...rows, total]} keyOf=${([stage]) => stage} columns=${[
      ["Stage", ([stage]) => stage],
      ["Time", ([, spent]) => duration(spent), "number"],
      ["Estimated", ([stage]) => duration(expected[stage]), "number"],
    ]} />
    <${Facts} rows=${[
      ["Peak memory", besideEstimate(report.peak_rss_bytes, prediction?.ram_bytes)],
      ["Peak GPU memory", report.peak_vram_bytes ? besideEstimate(report.peak_vram_bytes, prediction?.vram_bytes) : null],
      ["Processor", coresInWords(report)],
      ["Resumed at layer", report.resumed_at_layer || null],
      ["Device", report.environment.device],
    ]} />`;
}

function Notes({ notes }) {
  if (notes.length === 0) return null;
  return html`<div><h3>Notes</h3><ul>${notes.map((note) => html`<li key=${note}>${note}</li>`)}</ul></div>`;
}

/** What was decided in the layers of one candidate. */
function Details({ candidate, histograms }) {
  return html`${candidate.layers.length
      ? html`<${LayerPlots} candidate=${candidate} /><${HeatMap} layers=${candidate.layers} /><${Sensitivity} candidate=${candidate} />`
      : html`<${WeightErrors} candidate=${candidate} />`}
    ${histograms.length > 0 && html`<${Histogram} histograms=${histograms} candidate=${candidate} />`}`;
}

function ReportBody({ report }) {
  const [index, setIndex] = useState(report.published.at(-1) ?? report.candidates[0]?.recipe_index);
  const candidate = report.candidates.find((each) => each.recipe_index === index);
  // Tries for a target may share a label.
  const nameOf = (each) => {
    const rung = report.tries.find((one) => one.recipe_index === each.recipe_index)?.rung;
    return rung ? `${each.label}, ${rung}` : each.label;
  };
  return html`<section class="stack" aria-labelledby="report">
    <h2 id="report">Report</h2>
    ${report.evaluation !== null && html`<${Quality} report=${report} nameOf=${nameOf} />`}
    <${Candidates} report=${report} />
    <${Tasks} report=${report} />
    <${Tries} report=${report} />
    ${report.candidates.length > 1 && html`<label>Details of <select value=${index} onChange=${(event) => setIndex(Number(event.target.value))}>
        ${report.candidates.map((each) => html`<option key=${each.recipe_index} value=${each.recipe_index}>${nameOf(each)}</option>`)}
      </select></label>`}
    ${candidate && html`<${Details} candidate=${candidate} histograms=${report.histograms} />`}
    <${Cost} report=${report} />
    <${Notes} notes=${report.notes} />
  </section>`;
}

/** Of a job that ended without a result. */
function Unfinished({ report }) {
  const predicted = report.prediction?.seconds || {};
  const layers = report.finished_layers === null ? null : `${report.finished_layers} of ${report.layers} finished`;
  return html`<section class="stack" aria-labelledby="report">
    <h2 id="report">What was done until then</h2>
    <${Facts} rows=${[
      ["Ended in", report.stage || (report.attempts ? "no stage" : "the queue: no worker had started it")],
      ["Layers", layers],
      ["Attempts", report.attempts || null],
      ["Waited", duration(report.waited_s)],
      ["Most memory seen", report.peak_rss_bytes ? besideEstimate(report.peak_rss_bytes, report.prediction?.ram_bytes) : null],
    ]} />
    <${Table} caption="Time per stage" rows=${Object.entries(report.stages)} keyOf=${([stage]) => stage} columns=${[
      ["Stage", ([stage]) => stage],
      ["Time", ([, spent]) => duration(spent), "number"],
      ["Estimated for the whole job", ([stage]) => duration(predicted[stage]), "number"],
    ]} />
    <${Notes} notes=${report.notes} />
    ${report.output && html`<div><h3>Last output</h3><pre>${report.output}</pre></div>`}
  </section>`;
}

/** The report at `path`, null while there is none; `children`, facts on the job, stand below what was won. */
export function ReportSection({ path, artifacts, children }) {
  const polled = usePolled(path, () => null);
  if (path === null) return children;
  const best = polled.value?.complete && bestArtifact(polled.value, artifacts);
  return html`${polled.value?.complete && html`<${Hero} report=${polled.value} artifacts=${artifacts} />`}
    ${best && html`<${Answers} key=${best.id} artifact=${best} artifacts=${artifacts} />`}
    ${children}
    <${Loaded} polled=${polled}>${(report) => (report.complete === false ? html`<${Unfinished} report=${report} />` : html`<${ReportBody} report=${report} />`)}<//>`;
}
