// One job: its state, events and results.
import { read, send } from "../api.js";
import { may } from "../caller.js";
import { bytes, change, clock, date, duration, modelName, number, recipeLabel, seconds } from "../format.js";
import { Confirmed, Copy, Facts, Loaded, Problem, Reference, State, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html, useEffect, useRef, useState } from "../ui.js";
import { DeployButton, suggestedName } from "./deploy.js";
import { Live, LiveDetails, inWords } from "./live.js";
import { ReportSection } from "./report.js";
import { RunAgain } from "./run_again.js";

const STAGES = ["fetching", "calibrating", "searching", "packing", "verifying", "evaluating", "publishing"];
const isOver = (job) => ["succeeded", "failed", "cancelled"].includes(job.state);
const recipesOf = (spec) => (Array.isArray(spec.recipe) ? spec.recipe : [spec.recipe]);

function Timeline({ job }) {
  const at = job.state === "succeeded" ? STAGES.length : STAGES.indexOf(job.stage);
  return html`<ol class="timeline" aria-label="Stages">
    ${STAGES.map((stage, index) => {
      const where = index < at ? "done" : index === at ? (isOver(job) ? "ended" : "now") : "next";
      return html`<li key=${stage} class=${where} aria-current=${where === "now" ? "step" : undefined}>
        ${stage}<span class="unseen">, ${where}</span></li>`;
    })}
  </ol>`;
}

/** Of a job that runs or waits, or that ended without a result. */
function Standing({ job, events, labels }) {
  const { layer, layers } = job.progress;
  return html`<section class="card" aria-label="Progress">
    ${isOver(job)
      ? html`<div class="title"><${State} state=${job.state} /><small>${layers ? `layer ${layer ?? 0} of ${layers}` : ""}</small></div>`
      : html`<${Live} job=${job} events=${events} labels=${labels} />`}
    <${Timeline} job=${job} />
    <${Problem} error=${job.error} title=${`Job ${job.state}`}>
      ${may("jobs:write") && isOver(job) && html`<${RunAgain} job=${job} label=${job.error?.code === "deadline_exceeded" ? "Run again with more time" : "Run again"} kind="main" />`}
    <//>
  </section>`;
}

function Actions({ job, onChange }) {
  const cancel = async () => {
    await send("POST", `/v1/jobs/${job.id}/cancel`);
    onChange();
  };
  const remove = async () => {
    await send("DELETE", `/v1/jobs/${job.id}`);
    location.hash = "#/jobs";
  };
  if (!may("jobs:write")) return null;
  return html`<div class="actions">
    <a class="quiet button" href=${`#/jobs/new/${job.id}`}>Use as template</a>
    ${isOver(job)
      ? html`${!job.error && html`<${RunAgain} job=${job} />`}
          <${Confirmed} label="Delete" question="Delete this job?" consequence="Its events and report are removed. Artifacts stay." action=${remove} />`
      : html`<${Confirmed} label="Cancel job" question="Cancel this job?" consequence="Its results so far are discarded." dismiss="Keep running" action=${cancel} />`}
  </div>`;
}

/** Of a job whose result was there before: nothing was computed. */
function Reused({ job }) {
  if (!job.reused_from) return null;
  return html`<div class="card notice" role="status">
    <p><strong>This result existed already.</strong> Nothing was computed: the artifacts are those of
      <a href=${`#/jobs/${job.reused_from}`}>${job.reused_from}</a>, which had the same model, text and recipe.</p>
    ${may("jobs:write") && html`<div class="actions"><${RunAgain} job=${job} label="Compute anew" isForced /></div>`}
  </div>`;
}

/** All events so far, read again whenever the job changes. */
function useEvents(job) {
  const [events, setEvents] = useState([]);
  const last = useRef(null);
  const asking = useRef(false);
  useEffect(() => {
    if (asking.current) return;
    asking.current = true;
    const ask = async () => {
      const { value } = await read(`/v1/jobs/${job.id}/events?limit=500${last.current ? `&after=${last.current}` : ""}`);
      last.current = value.next;
      if (value.data.length) setEvents((before) => [...before, ...value.data]);
      if (value.has_more) await ask();
    };
    ask().catch(() => {}).finally(() => {
      asking.current = false;
    });
  }, [job]);
  return events;
}

function Events({ events }) {
  return html`<details class="card">
    <summary>Events (${events.length})</summary>
    <ol class="events">${[...events].reverse().map((event) => html`<li key=${event.id}>
      <time datetime=${event.at}>${clock(event.at)}</time> <strong>${event.kind}</strong> <span>${inWords(event)}</span>
    </li>`)}</ol>
  </details>`;
}

function Spec({ job }) {
  const { spec } = job;
  const took = seconds(job.started_at, job.finished_at);
  return html`<${Facts} rows=${[
      ["Job", html`<code>${job.id}</code>`],
      ["Model", html`<${Reference} text=${spec.model} />`],
      ["Recipe", recipesOf(spec).map(recipeLabel).join(", ")],
      ["Formats", spec.formats.join(", ")],
      ["Target", spec.target && targetInWords(spec.target)],
      ["Created", date(job.created_at)],
      ["Took", took === null ? null : duration(took)],
      ["Worker", isOver(job) && job.worker],
      ["Attempt", job.attempt > 1 ? job.attempt : null],
      ["Labels", Object.entries(job.labels).map(([key, value]) => `${key}=${value}`).join(", ")],
      ["Hub token", job.has_hub_token && "sent with the job and not kept: running it again needs it"],
      ["Repeats", job.retry_of && html`<a href=${`#/jobs/${job.retry_of}`}>${job.retry_of}</a>`],
    ]} />
    <details><summary>As a request</summary><${Copy} label="The same job with curl" text=${asRequest(spec)} /></details>`;
}

function asRequest(spec) {
  const body = JSON.stringify(spec, null, 2).replaceAll("'", "'\\''");
  return `curl ${location.origin}/v1/jobs -H "Authorization: Bearer $NIBBLE_API_KEY" \\
  -H 'Content-Type: application/json' -d '${body}'`;
}

function targetInWords({ max_perplexity_ratio: ratio, max_kl: kl, min_recovery: recovery, max_size: size, on_miss: onMiss }) {
  const limits = [
    ratio && `perplexity at most ${change(ratio)}`, kl && `KL at most ${number(kl)}`,
    recovery && `at least ${number(100 * recovery, 4)} % of the task scores`, size && `at most ${bytes(size)}`,
  ].filter(Boolean);
  return `${limits.join(" and ")}, else ${onMiss === "fail" ? "nothing is published" : "the best try is published"}`;
}

/** The artifacts of these ids; an id whose artifact was deleted is left out. */
function useArtifacts(ids) {
  const [artifacts, setArtifacts] = useState([]);
  useEffect(() => {
    if (!may("artifacts:read")) return undefined;
    const control = new AbortController();
    Promise.all(ids.map((id) => read(`/v1/artifacts/${id}`, control.signal).then(({ value }) => value, () => null)))
      .then((found) => control.signal.aborted || setArtifacts(found.filter(Boolean)));
    return () => control.abort();
  }, [ids.join()]);
  return artifacts;
}

const ARTIFACTS = [
  ["Recipe", (artifact) => html`<a href=${`#/artifacts/${artifact.id}`}>${artifact.summary.label || recipeLabel(artifact.recipe)}</a>`],
  ["Format", (artifact) => artifact.format],
  ["Size with tokenizer", (artifact) => bytes(artifact.size), "number"],
  ["Weights", (artifact) => artifact.files.filter((file) => /\.(safetensors|gguf)$/.test(file.path)).map((file) =>
    html`<a class="line" key=${file.path} href=${`/v1/artifacts/${artifact.id}/files/${file.path}`} download>${file.path}</a>`)],
  ["Serve", (artifact) => (may("deployments:write") ? html`<${DeployButton} artifact=${artifact.id} suggested=${suggestedName(artifact)} kind="quiet small" />` : "–")],
];

function Artifacts({ artifacts }) {
  if (artifacts.length === 0) return null;
  return html`<${Table} caption="Artifacts" columns=${ARTIFACTS} rows=${artifacts} keyOf=${(artifact) => artifact.id} />`;
}

function Job({ job, onChange }) {
  const recipes = recipesOf(job.spec);
  const labels = recipes.map(recipeLabel);
  const events = useEvents(job);
  const artifacts = useArtifacts(job.artifacts);
  const hasResult = job.state === "succeeded";
  return html`<${Title} text=${modelName(job.spec.model)} aside=${html`<${Actions} job=${job} onChange=${onChange} />`}>
      ${modelName(job.spec.model)} <small>${recipes.length > 2 ? `${recipes.length} recipes` : labels.join(", ")}</small>
      ${hasResult && html` <${State} state=${job.state} />`}<//>
    ${!hasResult && html`<${Standing} job=${job} events=${events} labels=${labels} />`}
    <${Reused} job=${job} />
    ${!isOver(job) && html`<${LiveDetails} job=${job} events=${events} labels=${labels} />`}
    <${ReportSection} path=${job.links.report ?? null} artifacts=${artifacts}>
      <${Artifacts} artifacts=${artifacts} />
      <${Spec} job=${job} />
    <//>
    <${Events} events=${events} />`;
}

export function JobPage({ id }) {
  const polled = usePolled(`/v1/jobs/${id}`, (job, hint) => (isOver(job) ? null : hint ?? 2));
  return html`<${Loaded} polled=${polled}>${(job) => html`<${Job} job=${job} onChange=${polled.ask} />`}<//>`;
}
