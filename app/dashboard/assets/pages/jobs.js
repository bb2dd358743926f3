// The live list of jobs.
import { age, duration, modelName } from "../format.js";
import { useJobFeed } from "../job_feed.js";
import { Bar, Empty, Loaded, Problem, State, Title } from "../parts.js";
import { html, useEffect, useMemo, useRef, useState } from "../ui.js";

const STATES = ["queued", "running", "cancelling", "succeeded", "failed", "cancelled"];
const AHEAD = "1500px"; // older jobs are read before the end of the list is seen
let lastFilter = { state: "", label: "" };

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
  return html`<li class="row" data-job=${job.id}>
    <${State} state=${job.state} />
    <div class="row-main">
      <a href=${`#/jobs/${job.id}`}>${modelName(job.model)}</a>
      <small>${job.recipes.join(", ")}${Object.entries(job.labels).map(([key, value]) => html` <span class="label">${key}=${value}</span>`)}</small>
    </div>
    <div class="row-progress"><${Progress} job=${job} /></div>
    <small class="row-age" title=${job.created_at}>${age(job.created_at)}</small>
  </li>`;
}

/** Loads older jobs when it comes near the screen; a button for those who don't scroll. */
function Older({ count, more }) {
  const place = useRef(null);
  const asking = useRef(false);
  const [error, setError] = useState(null);
  const ask = async () => {
    if (asking.current) return;
    asking.current = true;
    setError(null);
    await more().catch(setError);
    asking.current = false;
  };
  useEffect(() => {
    const seen = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && ask(), { rootMargin: AHEAD });
    seen.observe(place.current);
    return () => seen.disconnect();
  }, [count]);
  return html`<div ref=${place}>
    <${Problem} error=${error} title="Older jobs can't be read" />
    <button type="button" class="quiet wide" onClick=${ask}>Show older jobs</button>
  </div>`;
}

/** Rows by job: a job that has not changed keeps its row, which then costs nothing to draw again. */
function useRows(jobs, minute) {
  const rows = useMemo(() => new WeakMap(), [minute]);
  return jobs.map((job) => {
    if (!rows.has(job)) rows.set(job, html`<${JobRow} key=${job.id} job=${job} />`);
    return rows.get(job);
  });
}

function useMinute() {
  const [minute, setMinute] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => setMinute((before) => before + 1), 60_000);
    return () => clearInterval(timer);
  }, []);
  return minute;
}

function JobList({ feed, isFiltered }) {
  const rows = useRows(feed.jobs, useMinute());
  if (rows.length === 0) {
    return isFiltered
      ? html`<${Empty} title="No job matches">Widen the filter to see others.<//>`
      : html`<${Empty} title="No jobs yet">Quantize your first model: <a href="#/jobs/new">new job</a>.<//>`;
  }
  return html`<ul class="rows" aria-label="Jobs, newest first">${rows}</ul>
    ${feed.hasMore && html`<${Older} count=${rows.length} more=${feed.more} />`}`;
}

export function JobsPage() {
  const [filter, setFilter] = useState(lastFilter);
  const change = (chosen) => {
    lastFilter = chosen;
    setFilter(chosen);
  };
  const feed = useJobFeed(filter);
  const shown = { value: feed.isKnown ? feed : undefined, error: feed.error };
  return html`<${Title} aside=${html`<a class="main button" href="#/jobs/new">New job</a>`}>Jobs<//>
    <${Filters} filter=${filter} onChange=${change} />
    <${Loaded} polled=${shown}>${() => html`<${JobList} feed=${feed} isFiltered=${Boolean(filter.state || filter.label)} />`}<//>`;
}
