// A job while it runs: how long already, where, the error of each layer as it comes, what it says.
import { Chart } from "../charts.js";
import { bytes, clock, duration, number, percent, seconds } from "../format.js";
import { usePolled, useAway, useTick } from "../polling.js";
import { Bar, Facts, State } from "../parts.js";
import { html } from "../ui.js";

const TAIL = 8;

/** An event in one line. */
export function inWords({ kind, payload }) {
  if (kind === "checkpoint" && payload.layer !== undefined) {
    const error = payload.error === undefined ? "" : `, relative output error ${number(payload.error, 3)}`;
    return `layer ${payload.layer} of recipe ${payload.recipe_index} is done${error}`;
  }
  if (kind === "state" && payload.state === "running") return `running, attempt ${payload.attempt}${payload.worker ? ` on ${payload.worker}` : ""}`;
  return payload.message || payload.key || payload.stage || payload.state || payload.code || JSON.stringify(payload);
}

/** The errors of the layers that are done, by recipe: [label, [[layer, error], ...]]. */
export function layerErrors(events, labels) {
  const attempt = Math.max(0, ...events.map((event) => event.payload.attempt ?? 0));
  const recipes = new Map();
  for (const { kind, payload } of events) {
    if (kind !== "checkpoint" || payload.error === undefined || payload.attempt < attempt - 1) continue;
    const label = labels[payload.recipe_index] ?? `recipe ${payload.recipe_index}`;
    if (!recipes.has(label)) recipes.set(label, new Map());
    recipes.get(label).set(payload.layer, payload.error);
  }
  return recipes;
}

function LayerErrors({ events, labels }) {
  const recipes = layerErrors(events, labels);
  const layers = [...new Set([...recipes.values()].flatMap((errors) => [...errors.keys()]))].sort((a, b) => a - b);
  if (layers.length === 0) return null;
  const rows = [...recipes.values()].map((errors) => layers.map((layer) => errors.get(layer) ?? null));
  return html`<${Chart} title="Error per layer, as the layers are done" log whole x="layer" y="relative output error" names=${[...recipes.keys()]} data=${[layers, ...rows]} />`;
}

/** What the job's process uses: [title, y, names, columns] of each chart. */
function chartsOf({ memory_bytes: memory, cpu_cores: cores, gpu_memory_bytes: gpu, gpu_share: busy }) {
  const asGb = (values) => values.map((value) => value / 1e9);
  const charts = [
    ["Memory of the job", "GB", ["process", ...(gpu.length ? ["GPU, all its processes"] : [])], [asGb(memory), ...(gpu.length ? [asGb(gpu)] : [])]],
    ["Processor cores in use", "cores", ["cores"], [cores]],
  ];
  return busy.length ? [...charts, ["How busy the GPU is", "%", ["busy"], [busy.map((share) => 100 * share)]]] : charts;
}

function ResourceUse({ use }) {
  if (!use || use.memory_bytes.length < 2) return null;
  const times = use.memory_bytes.map((_, index) => new Date(use.began_at) / 1000 + (index + 1) * use.every_s);
  return html`<div class="charts">${chartsOf(use).map(([title, y, names, columns]) => html`<${Chart} key=${title} title=${title} time
    x="time" y=${y} names=${names} data=${[times, ...columns]} />`)}</div>`;
}

/** The newest sample in words. */
function useInWords(use) {
  if (!use) return [];
  const { memory_bytes: memory, cpu_cores: cores, gpu_memory_bytes: gpu, gpu_share: busy } = use;
  return [
    ["Memory", `${bytes(memory.at(-1))}, at most ${bytes(Math.max(...memory))}`],
    ["Processor", `${number(cores.at(-1), 2)} cores`],
    ["GPU", gpu.length ? `${bytes(gpu.at(-1))}, ${percent(busy.at(-1))} busy` : null],
  ];
}

/** The worker that runs the job, with its device. */
function useDevice(job) {
  const workers = usePolled(job.worker ? "/v1/workers" : null, 10);
  const worker = workers.value?.data.find((each) => each.name === job.worker);
  return worker ? `${worker.device_name || worker.device} (${worker.name})` : job.worker;
}

export function Live({ job, events, labels }) {
  useTick(1);
  const away = useAway();
  const device = useDevice(job);
  const { fraction, layer, layers, eta_s: eta } = job.progress;
  const elapsed = job.started_at && seconds(job.started_at, away ?? new Date());
  const notes = events.filter((event) => event.kind === "note" && event.payload.code !== "prediction");
  return html`<div class="standing"><${State} state=${job.state} /><${Bar} fraction=${fraction} label="Progress of the job" /></div>
    <${Facts} rows=${[
      ["Elapsed", elapsed === null ? null : duration(Math.max(0, elapsed))],
      ["Time left", eta && !away ? `about ${duration(eta)}` : null],
      ["Layer", layers ? `layer ${layer ?? 0} of ${layers}` : null],
      ["Device", device],
      ...useInWords(job.progress.use),
    ]} />
    ${notes.length > 0 && html`<p><small>Last note: ${inWords(notes.at(-1))}</small></p>`}`;
}

/** The charts and the last events of a job that runs. */
export function LiveDetails({ job, events, labels }) {
  return html`<${LayerErrors} events=${events} labels=${labels} />
    <${ResourceUse} use=${job.progress.use} />
    ${events.length > 0 && html`<section class="card" aria-labelledby="log"><h2 id="log">Log</h2>
      <div role="log" aria-label="The last events"><ol class="log">${events.slice(-TAIL).map((event) => html`<li key=${event.id}>
        <time datetime=${event.at}>${clock(event.at)}</time> <strong>${event.kind}</strong> <span>${inWords(event)}</span></li>`)}</ol></div>
    </section>`}`;
}
