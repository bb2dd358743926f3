// Jobs side by side: every candidate in one table and one plot, with what differs between the jobs.
import { read } from "../api.js";
import { useQuery } from "../address.js";
import { bytes, change, duration, modelName, number, seconds } from "../format.js";
import { Empty, Problem, State, Title } from "../parts.js";
import { QualityPlot } from "../quality_plot.js";
import { Table } from "../table.js";
import { html, useEffect, useState } from "../ui.js";
import { intervalInWords, textInWords } from "./figures.js";

const MOST = 12;
const size = (candidate) => Math.max(...Object.values(candidate.bytes));

/** A job with its report, or with the fault that kept either from being read. */
async function readOne(id, signal) {
  try {
    const { value: job } = await read(`/v1/jobs/${id}`, signal);
    if (!job.links.report) return { id, job, report: null };
    const { value: report } = await read(job.links.report, signal);
    return { id, job, report: report.complete ? report : null };
  } catch (error) {
    return { id, error };
  }
}

function useRuns(ids) {
  const [runs, setRuns] = useState(null);
  useEffect(() => {
    const control = new AbortController();
    Promise.all(ids.map((id) => readOne(id, control.signal))).then((all) => control.signal.aborted || setRuns(all));
    return () => control.abort();
  }, [ids.join()]);
  return runs;
}

/** The last characters of an id tell jobs apart. */
const short = (id) => `…${id.slice(-5)}`;

/** Every candidate of every run as a row. */
export function rowsOf(runs) {
  return runs.filter((run) => run.report).flatMap((run) => run.report.candidates.map((candidate) => ({ ...run, candidate, key: `${run.id} ${candidate.recipe_index}` })));
}

const least = (rows, pick) => Math.min(...rows.map(pick).filter((value) => typeof value === "number"));

/** The value, marked if it is the best of its column. */
const marked = (text, isBest) => (isBest ? html`<strong>${text} <span class="label">best</span></strong>` : text);

function columnsOf(rows) {
  const best = { kl: least(rows, (row) => row.candidate.kl), size: least(rows, (row) => size(row.candidate)) };
  const isBest = (value, name) => rows.length > 1 && value === best[name];
  const hasModels = new Set(rows.map((row) => row.job.spec.model)).size > 1;
  return [
    ["Recipe", ({ candidate, report }) => html`${candidate.label}${report.published.includes(candidate.recipe_index) ? "" : html` <small>not published</small>`}`, "name"],
    ["Job", ({ id }) => html`<a href=${`#/jobs/${id}`} title=${id}>${short(id)}</a>`, "name"],
    ...(hasModels ? [["Model", ({ job }) => modelName(job.spec.model)]] : []),
    ["Weights", ({ candidate }) => marked(bytes(size(candidate)), isBest(size(candidate), "size")), "number"],
    ["Bits per weight", ({ candidate }) => number(candidate.bits_per_weight, 3), "number"],
    ["Perplexity", ({ candidate }) => number(candidate.perplexity, 4), "number"],
    ["Against original (95 %)", ({ candidate }) => intervalInWords(candidate), "number"],
    ["KL per token", ({ candidate }) => marked(number(candidate.kl, 3), isBest(candidate.kl, "kl")), "number"],
    ["Same top token", ({ candidate }) => (typeof candidate.top1_agreement === "number" ? `${(100 * candidate.top1_agreement).toFixed(1)} %` : "–"), "number"],
    ["Whole job took", ({ job }) => duration(seconds(job.started_at, job.finished_at)), "number"],
  ];
}

function Plot({ rows }) {
  const judged = rows.filter((row) => row.candidate.perplexity_ratio);
  if (judged.length === 0) return null;
  const originals = new Map(judged.map((row) => [row.job.spec.model, row.report.original.bytes]));
  const hasModels = originals.size > 1;
  const nameOf = ({ candidate, job, id }) => `${hasModels ? `${modelName(job.spec.model)}, ` : ""}${candidate.label} ${short(id)}`;
  const points = judged.map((row) => {
    const { perplexity_ratio: ratio, perplexity_ratio_interval: interval } = row.candidate;
    const spread = interval ? { low: 100 * (interval.low - 1), high: 100 * (interval.high - 1) } : {};
    return { name: nameOf(row), short: row.candidate.label, size: size(row.candidate), value: 100 * (ratio - 1), ...spread, said: change(ratio) };
  });
  const smallest = Math.min(...originals.values());
  const original = { name: hasModels ? "original of the smallest" : "original", short: "original", size: smallest, value: 0, said: "±0 %" };
  return html`<${QualityPlot} title="Change of perplexity against size; lines are 95 % intervals" y="change of perplexity, %" models=${[original, ...points]} />`;
}

const ASPECTS = [
  ["Model", ({ job }) => job.spec.model],
  ["Calibration", ({ report }) => textInWords(report.calibration)],
  ["Evaluation", ({ report }) => textInWords(report.evaluation) || "none"],
  ["Device", ({ report }) => report.environment.device],
];

/** What the jobs do not have in common, which a comparison must not overlook. */
function Differences({ runs }) {
  const whole = runs.filter((run) => run.report);
  const aspects = ASPECTS.filter(([, of]) => new Set(whole.map(of)).size > 1);
  if (aspects.length === 0) return html`<p class="aside"><small>All jobs have the same model, texts and device.</small></p>`;
  const isJudgedApart = aspects.some(([name]) => name === "Evaluation");
  return html`<${Table} caption="What differs between the jobs" rows=${whole} keyOf=${(run) => run.id}
      columns=${[["Job", (run) => html`<a href=${`#/jobs/${run.id}`}>${short(run.id)}</a>`], ...aspects]} />
    ${isJudgedApart && html`<p class="aside"><small>The jobs were measured on different texts: their perplexities can't be compared, their changes only roughly.</small></p>`}`;
}

function Unread({ runs }) {
  return runs.filter((run) => !run.report).map((run) => (run.error
    ? html`<${Problem} key=${run.id} error=${run.error} title=${`Can't read ${run.id}`} />`
    : html`<div class="card" key=${run.id}><p><${State} state=${run.job.state} /> <a href=${`#/jobs/${run.id}`}>${run.id}</a> has no report of a result.</p></div>`));
}

export function ComparePage() {
  const [query] = useQuery();
  const ids = (query.get("jobs") || "").split(",").filter(Boolean).slice(0, MOST);
  const runs = useRuns(ids);
  if (ids.length === 0) return html`<${Title}>Compare<//><${Empty} title="No jobs chosen">Tick some in the <a href="#/jobs">list of jobs</a>.<//>`;
  const rows = runs === null ? [] : rowsOf(runs);
  return html`<${Title} text="Compare jobs">Compare ${ids.length} job${ids.length === 1 ? "" : "s"}<//>
    ${runs === null
      ? html`<p class="loading" role="status">Loading…</p>`
      : html`<${Unread} runs=${runs} />
          ${rows.length > 0 && html`<${Plot} rows=${rows} />
            <${Table} caption="All candidates" columns=${columnsOf(rows)} rows=${rows} keyOf=${(row) => row.key} />
            <${Differences} runs=${runs} />`}`}`;
}
