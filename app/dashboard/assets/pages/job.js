// One job: its state, events and results.
import { read, send } from "../api.js";
import { bytes, change, clock, date, duration, modelName, number, recipeLabel } from "../format.js";
import { Bar, Confirmed, Copy, Facts, Loaded, Problem, State, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html, useEffect, useRef, useState } from "../ui.js";
import { DeployButton, suggestedName } from "./deploy.js";
import { ReportSection } from "./report.js";

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

function Standing({ job }) {
  const { fraction, layer, layers, eta_s: eta } = job.progress;
  return html`<section class="card" aria-label="Progress">
    <div class="title"><${State} state=${job.state} />
      ${!isOver(job) && html`<${Bar} fraction=${fraction} label="Progress of the job" />`}
      <small>${layers ? `layer ${layer ?? 0} of ${layers}` : ""}${eta && !isOver(job) ? `, about ${duration(eta)} left` : ""}</small>
    </div>
    <${Timeline} job=${job} />
    <${Problem} error=${job.error} title=${`It ${job.state}`} />
  </section>`;
}

function Actions({ job, onChange }) {
  const cancel = async () => {
    await send("POST", `/v1/jobs/${job.id}/cancel`);
    onChange();
  };
  const retry = async () => {
    const created = await send("POST", `/v1/jobs/${job.id}/retry`);
    location.hash = `#/jobs/${created.id}`;
  };
  const remove = async () => {
    await send("DELETE", `/v1/jobs/${job.id}`);
    location.hash = "#/jobs";
  };
  return html`<div class="actions">
    <a class="quiet button" href=${`#/jobs/new/${job.id}`}>Use as template</a>
    ${isOver(job)
      ? html`<button type="button" class="quiet" onClick=${retry}>Run again</button>
          <${Confirmed} label="Delete" question="Delete this job?" consequence="Its events and report are removed. Artifacts stay." action=${remove} />`
      : html`<${Confirmed} label="Cancel job" question="Cancel this job?" consequence="Its results so far are discarded." action=${cancel} />`}
  </div>`;
}

function inWords(event) {
  const { payload } = event;
  return payload.message || payload.key || payload.stage || payload.state || payload.code || JSON.stringify(payload);
}

/** All events so far, read again whenever the job changes. */
function useEvents(job) {
  const [events, setEvents] = useState([]);
  const last = useRef(null);
  const asking = useRef(false);
  useEffect(() => {
    if (asking.current) return;
    asking.current = true;
    const path = `/v1/jobs/${job.id}/events?limit=500${last.current ? `&after=${last.current}` : ""}`;
    read(path)
      .then(({ value }) => {
        last.current = value.next;
        if (value.data.length) setEvents((before) => [...before, ...value.data]);
      }, () => {})
      .finally(() => {
        asking.current = false;
      });
  }, [job]);
  return events;
}

function Events({ job }) {
  const events = useEvents(job);
  return html`<details class="card" open=${!isOver(job)}>
    <summary>Events (${events.length})</summary>
    <ol class="events">${[...events].reverse().map((event) => html`<li key=${event.id}>
      <time datetime=${event.at}>${clock(event.at)}</time> <strong>${event.kind}</strong> <span>${inWords(event)}</span>
    </li>`)}</ol>
  </details>`;
}

function Spec({ job }) {
  const { spec } = job;
  const took = job.started_at && job.finished_at ? (new Date(job.finished_at) - new Date(job.started_at)) / 1000 : null;
  return html`<${Facts} rows=${[
      ["Model", spec.model],
      ["Recipe", recipesOf(spec).map(recipeLabel).join(", ")],
      ["Formats", spec.formats.join(", ")],
      ["Target", spec.target && targetInWords(spec.target)],
      ["Created", date(job.created_at)],
      ["Took", took === null ? null : duration(took)],
      ["Attempt", job.attempt > 1 ? job.attempt : null],
      ["Labels", Object.entries(job.labels).map(([key, value]) => `${key}=${value}`).join(", ")],
      ["Repeats", job.retry_of && html`<a href=${`#/jobs/${job.retry_of}`}>${job.retry_of}</a>`],
      ["Artifacts of", job.reused_from && html`<a href=${`#/jobs/${job.reused_from}`}>${job.reused_from}</a>`],
    ]} />
    <details><summary>As a request</summary><${Copy} label="The same job with curl" text=${asRequest(spec)} /></details>`;
}

function asRequest(spec) {
  const body = JSON.stringify(spec, null, 2).replaceAll("'", "'\\''");
  return `curl ${location.origin}/v1/jobs -H "Authorization: Bearer $NIBBLE_API_KEY" \\
  -H 'Content-Type: application/json' -d '${body}'`;
}

function targetInWords({ max_perplexity_ratio: ratio, max_kl: kl, min_recovery: recovery, on_miss: onMiss }) {
  const parts = [
    ratio && `perplexity at most ${change(ratio)}`, kl && `KL at most ${number(kl)}`,
    recovery && `at least ${number(100 * recovery, 4)} % of the task scores`,
  ].filter(Boolean);
  return `${parts.join(" and ")}, else ${onMiss === "fail" ? "nothing is published" : "the best try is published"}`;
}

/** The artifacts of these ids; an id whose artifact was deleted is left out. */
function useArtifacts(ids) {
  const [artifacts, setArtifacts] = useState([]);
  useEffect(() => {
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
  ["Size", (artifact) => bytes(artifact.size), "number"],
  ["Download", (artifact) => artifact.files.filter((file) => file.path.endsWith(".safetensors")).map((file) =>
    html`<a class="line" key=${file.path} href=${`/v1/artifacts/${artifact.id}/files/${file.path}`} download>${file.path}</a>`)],
  ["Serve", (artifact) => html`<${DeployButton} artifact=${artifact.id} suggested=${suggestedName(artifact)} kind="quiet small" />`],
];

function Artifacts({ ids }) {
  const artifacts = useArtifacts(ids);
  if (artifacts.length === 0) return null;
  return html`<${Table} caption="Artifacts" columns=${ARTIFACTS} rows=${artifacts} keyOf=${(artifact) => artifact.id} />`;
}

function Job({ job, onChange }) {
  const recipes = recipesOf(job.spec);
  return html`<${Title} text=${modelName(job.spec.model)} aside=${html`<${Actions} job=${job} onChange=${onChange} />`}>
      ${modelName(job.spec.model)} <small>${recipes.length > 2 ? `${recipes.length} recipes` : recipes.map(recipeLabel).join(", ")}</small><//>
    <${Standing} job=${job} />
    <${Spec} job=${job} />
    <${Artifacts} ids=${job.artifacts} />
    ${job.links.report && html`<${ReportSection} path=${job.links.report} />`}
    <${Events} job=${job} />`;
}

export function JobPage({ id }) {
  const polled = usePolled(`/v1/jobs/${id}`, (job, hint) => (isOver(job) ? null : hint ?? 2));
  return html`<${Loaded} polled=${polled}>${(job) => html`<${Job} job=${job} onChange=${polled.ask} />`}<//>`;
}
