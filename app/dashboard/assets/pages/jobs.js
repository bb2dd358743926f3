// The live list of jobs.
import { read } from "../api.js";
import { age, duration, modelName } from "../format.js";
import { Bar, Empty, Loaded, State, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { html, useEffect, useMemo, useState } from "../ui.js";

const STATES = ["queued", "running", "cancelling", "succeeded", "failed", "cancelled"];
const PAGE = 40;

function listPath({ state, label }, after) {
  const query = new URLSearchParams({ view: "brief", limit: PAGE });
  if (state) query.set("state", state);
  if (label.includes("=")) query.append("label", label);
  if (after) query.set("after", after);
  return `/v1/jobs?${query}`;
}

const isMoving = (job) => ["queued", "running", "cancelling"].includes(job.state);
const pollEvery = (page) => (page.data.some(isMoving) ? 2 : 10);

function Filters({ filter, onChange }) {
  const set = (name) => (event) => onChange({ ...filter, [name]: event.target.value });
  return html`<form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
    <label>State
      <select value=${filter.state} onChange=${set("state")}>
        <option value="">any</option>
        ${STATES.map((state) => html`<option key=${state} value=${state}>${state}</option>`)}
      </select>
    </label>
    <label>Label <input placeholder="team=search" value=${filter.label} onChange=${set("label")} /></label>
  </form>`;
}

function Progress({ job }) {
  if (job.state === "running" || job.state === "cancelling") {
    const { fraction, layer, layers, eta_s: eta } = job.progress;
    return html`<${Bar} fraction=${fraction} label=${`Progress of ${modelName(job.model)}`} />
      <small>${job.stage}${layers ? `, layer ${layer ?? 0} of ${layers}` : ""}${eta ? `, ${duration(eta)} left` : ""}</small>`;
  }
  if (job.error) return html`<small class="bad">${job.error.message}</small>`;
  if (job.started_at && job.finished_at) {
    return html`<small>took ${duration((new Date(job.finished_at) - new Date(job.started_at)) / 1000)}</small>`;
  }
  return null;
}

function JobRow({ job }) {
  return html`<li class="row">
    <${State} state=${job.state} />
    <div class="row-main">
      <a href=${`#/jobs/${job.id}`}>${modelName(job.model)}</a>
      <small>${job.recipes.join(", ")}${Object.entries(job.labels).map(([key, value]) => html` <span class="label">${key}=${value}</span>`)}</small>
    </div>
    <div class="row-progress"><${Progress} job=${job} /></div>
    <small class="row-age" title=${job.created_at}>${age(job.created_at)}</small>
  </li>`;
}

function useOlder(filter, newest) {
  const [older, setOlder] = useState({ jobs: [], next: undefined });
  useEffect(() => setOlder({ jobs: [], next: undefined }), [filter]);
  const next = older.next === undefined ? newest?.next : older.next;
  const more = async () => {
    const { value } = await read(listPath(filter, next));
    setOlder({ jobs: [...older.jobs, ...value.data], next: value.next });
  };
  return { jobs: older.jobs, more: next ? more : null };
}

function JobList({ page, filter }) {
  const older = useOlder(filter, page);
  const jobs = useMemo(() => {
    const known = new Set(page.data.map((job) => job.id));
    return [...page.data, ...older.jobs.filter((job) => !known.has(job.id))];
  }, [page, older.jobs]);
  if (jobs.length === 0) {
    return filter.state || filter.label
      ? html`<${Empty} title="No job matches">Widen the filter to see others.<//>`
      : html`<${Empty} title="No jobs yet">Quantize your first model: <a href="#/jobs/new">new job</a>.<//>`;
  }
  return html`<ul class="rows" aria-label="Jobs, newest first">
      ${jobs.map((job) => html`<${JobRow} key=${job.id} job=${job} />`)}
    </ul>
    ${older.more && html`<button type="button" class="quiet wide" onClick=${older.more}>Show older jobs</button>`}`;
}

export function JobsPage() {
  const [filter, setFilter] = useState({ state: "", label: "" });
  const polled = usePolled(listPath(filter), pollEvery);
  return html`<${Title} aside=${html`<a class="main button" href="#/jobs/new">New job</a>`}>Jobs<//>
    <${Filters} filter=${filter} onChange=${setFilter} />
    <${Loaded} polled=${polled}>${(page) => html`<${JobList} page=${page} filter=${filter} />`}<//>`;
}
