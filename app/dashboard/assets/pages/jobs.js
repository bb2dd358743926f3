// The live list of jobs: search, counts, selection of several.
import { send } from "../api.js";
import { useQuery } from "../address.js";
import { may } from "../caller.js";
import { age, bytes, change, duration, isNoise, modelName, seconds } from "../format.js";
import { isMoving, useJobFeed } from "../job_feed.js";
import { Bar, Confirmed, Empty, Loaded, Problem, State, Title } from "../parts.js";
import { useAway, useTick } from "../polling.js";
import { html, useEffect, useMemo, useRef, useState } from "../ui.js";

const STATES = ["queued", "running", "cancelling", "succeeded", "failed", "cancelled"];
const ORDERS = [["", "newest first"], ["oldest", "oldest first"], ["size", "smallest first"], ["quality", "best quality first"], ["duration", "longest first"]];
const AHEAD = "1500px"; // older jobs are read before the end of the list is seen
const PAUSE_MS = 250;
const MOST_COMPARED = 12;

/** The states with their counts; one of them, or any, is shown. */
function States({ counts, chosen, onChoose }) {
  const total = counts && Object.values(counts).reduce((sum, count) => sum + count, 0);
  const shown = STATES.filter((state) => state === chosen || state !== "cancelling" || counts?.[state]);
  return html`<fieldset class="chips"><legend class="unseen">State</legend>
    ${["", ...shown].map((state) => html`<label key=${state} class="chip">
      <input type="radio" name="state" checked=${chosen === state} onChange=${() => onChoose(state)} />
      <span>${state || "all"}${" "}<span class="count">${counts ? (state ? counts[state] ?? 0 : total) : ""}</span></span></label>`)}
  </fieldset>`;
}

/** A field that keeps what is typed, whatever else happens on the page, and passes it on once typing pauses. */
export function Search({ text, onChange, placeholder = "Search model, recipe, label or id" }) {
  const [typed, setTyped] = useState(text);
  const passed = useRef(text);
  useEffect(() => {
    if (typed === passed.current) return undefined;
    const timer = setTimeout(() => onChange((passed.current = typed)), PAUSE_MS);
    return () => clearTimeout(timer);
  }, [typed]);
  return html`<label class="search"><span class="unseen">Search</span>
    <input type="search" placeholder=${placeholder} value=${typed} onInput=${(event) => setTyped(event.target.value)} /></label>`;
}

function Filters({ query, set, counts }) {
  return html`<form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
    <${States} counts=${counts} chosen=${query.get("state") || ""} onChoose=${(state) => set({ state })} />
    <${Search} text=${query.get("q") || ""} onChange=${(q) => set({ q })} />
    <label class="order">Sort <select value=${query.get("sort") || ""} onChange=${(event) => set({ sort: event.target.value })}>
      ${ORDERS.map(([name, text]) => html`<option key=${name} value=${name}>${text}</option>`)}
    </select></label>
  </form>`;
}

function Running({ job }) {
  const away = useAway();
  const { fraction, layer, layers, eta_s: eta } = job.progress;
  return html`<${Bar} fraction=${fraction} label=${`Progress of ${modelName(job.model)}`} />
    <small>${job.stage}${layers ? `, layer ${layer ?? 0} of ${layers}` : ""}${eta && !away ? `, ${duration(eta)} left` : ""}</small>`;
}

/** What there is to say of a job in one line: progress, the fault, or what came of it. */
function Outcome({ job }) {
  if (job.state === "running" || job.state === "cancelling") return html`<${Running} job=${job} />`;
  if (job.error) return html`<small class="bad">${job.error.message}</small>`;
  const { figures } = job;
  const took = seconds(job.started_at, job.finished_at);
  return html`<span class="figures">
    ${figures && html`<strong>${bytes(figures.bytes)}</strong>`}
    ${figures?.perplexity_ratio && html`<span class="whole" title="perplexity against the original">${change(figures.perplexity_ratio)}${isNoise(figures) ? html` <small>noise</small>` : ""}</span>`}
    ${took !== null && html`<small>took ${duration(took)}</small>`}
  </span>`;
}

function JobRow({ job, isSelected, onSelect }) {
  const canTick = may("jobs:write");
  return html`<li class=${canTick ? "row row-ticked" : "row"} data-job=${job.id}>
    ${canTick && html`<input type="checkbox" checked=${isSelected} aria-label=${`Select ${job.id}`} onChange=${(event) => onSelect(job.id, event.target.checked)} />`}
    <${State} state=${job.state} />
    <div class="row-main">
      <a href=${`#/jobs/${job.id}`}>${modelName(job.model)}</a>${" "}<span class="recipes">${recipesInWords(job.recipes)}</span>
      <small><code>${job.id}</code>${Object.entries(job.labels).map(([key, value]) => html` <span class="label">${key}=${value}</span>`)}</small>
    </div>
    <div class="row-progress"><${Outcome} job=${job} /></div>
    <small class="row-age" title=${job.created_at}>${age(job.created_at)}</small>
  </li>`;
}

const recipesInWords = (labels) => (labels.length > 2 ? `${labels[0]} and ${labels.length - 1} more` : labels.join(", "));

/** Loads older jobs when it comes near the screen; a button for those who don't scroll. */
function Older({ count, more, isAll }) {
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
    if (isAll) {
      ask();
      return undefined;
    }
    const seen = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && ask(), { rootMargin: AHEAD });
    seen.observe(place.current);
    return () => seen.disconnect();
  }, [count, isAll]);
  return html`<div ref=${place}>
    <${Problem} error=${error} title="Can't load older jobs" />
    <button type="button" class="quiet wide" onClick=${ask}>Show older jobs</button>
  </div>`;
}

/** Rows by job: a job that has not changed keeps its row, which then costs nothing to draw again. */
function useRows(jobs, minute, selection) {
  const rows = useMemo(() => new WeakMap(), [minute, selection.cleared]);
  return jobs.map((job) => {
    if (!rows.has(job)) rows.set(job, html`<${JobRow} key=${job.id} job=${job} isSelected=${selection.ids.has(job.id)} onSelect=${selection.select} />`);
    return rows.get(job);
  });
}

const LAST = Number.MAX_VALUE;
const KEYS = {
  oldest: (job) => Date.parse(job.created_at),
  size: (job) => job.figures?.bytes ?? LAST,
  quality: (job) => job.figures?.kl ?? job.figures?.perplexity_ratio ?? LAST,
  duration: (job) => -(seconds(job.started_at, job.finished_at) ?? 0),
};

/** The jobs in the order that was asked for, of those that have been read. */
export function sorted(jobs, order) {
  const key = KEYS[order];
  return key ? [...jobs].sort((a, b) => key(a) - key(b)) : jobs;
}

function JobList({ feed, order, selection, isFiltered }) {
  const rows = useRows(sorted(feed.jobs, order), useTick(60), selection);
  if (rows.length === 0) {
    return isFiltered
      ? html`<${Empty} title="No matching jobs">Change the filter to see others.<//>`
      : html`<${Empty} title="No jobs yet">${may("jobs:write") ? html`Quantize your first model: <a href="#/jobs/new">new job</a>.` : "Nobody has submitted one."}<//>`;
  }
  return html`<ul class="rows" aria-label=${`Jobs, ${ORDERS.find(([name]) => name === order)?.[1] ?? "newest first"}`}>${rows}</ul>
    ${feed.hasMore && html`<${Older} count=${feed.jobs.length} more=${feed.more} isAll=${Boolean(order)} />`}`;
}

/** The jobs that are ticked: { ids, select, clear, cleared }; `cleared` changes when all ticks are taken away. */
function useSelection() {
  const [state, setState] = useState({ ids: new Set(), cleared: 0 });
  const select = (id, isOn) => setState((before) => {
    const ids = new Set(before.ids);
    if (isOn) ids.add(id);
    else ids.delete(id);
    return { ...before, ids };
  });
  const clear = () => setState((before) => ({ ids: new Set(), cleared: before.cleared + 1 }));
  const fixed = useRef(select); // rows keep the first one
  return { ...state, select: fixed.current, clear };
}

/** Does the same to each job; throws the first refusal, once all were asked. */
async function toEach(jobs, act) {
  const results = await Promise.allSettled(jobs.map(act));
  const refused = results.filter((each) => each.status === "rejected");
  if (refused.length === 0) return;
  const { reason } = refused[0];
  if (refused.length > 1) reason.message = `${refused.length} of ${jobs.length} were refused. The first: ${reason.message}`;
  throw reason;
}

/** What can be done with the ticked jobs. */
function Selected({ feed, selection }) {
  const jobs = feed.jobs.filter((job) => selection.ids.has(job.id));
  if (jobs.length === 0) return null;
  const moving = jobs.filter((job) => isMoving(job) && job.state !== "cancelling");
  const ended = jobs.filter((job) => !isMoving(job));
  const compared = ended.slice(0, MOST_COMPARED).map((job) => job.id).reverse().join(",");
  const inWords = (count) => `${count} job${count === 1 ? "" : "s"}`;
  const run = (chosen, act, isGone) => async () => {
    await toEach(chosen, act);
    if (isGone) feed.drop(new Set(chosen.map((job) => job.id)));
    selection.clear();
    feed.ask();
  };
  return html`<div class="selected card" role="region" aria-label="Selected jobs">
    <strong role="status">${inWords(jobs.length)} selected</strong>
    <div class="actions">
      ${ended.length > 0 && html`<a class="main button" href=${`#/compare?jobs=${compared}`}>Compare</a>`}
      ${moving.length > 0 && html`<${Confirmed} label=${`Cancel ${inWords(moving.length)}`} question=${`Cancel ${inWords(moving.length)}?`} dismiss="Keep running"
        consequence="Their results so far are discarded." action=${run(moving, (job) => send("POST", `/v1/jobs/${job.id}/cancel`))} />`}
      ${ended.length > 0 && html`<${Confirmed} label=${`Delete ${inWords(ended.length)}`} question=${`Delete ${inWords(ended.length)}?`}
        consequence="Their events and reports are removed. Artifacts stay." action=${run(ended, (job) => send("DELETE", `/v1/jobs/${job.id}`), true)} />`}
      <button type="button" class="quiet" onClick=${selection.clear}>Clear selection</button>
    </div>
  </div>`;
}

export function JobsPage() {
  const [query, set] = useQuery();
  const [state, q, order] = ["state", "q", "sort"].map((name) => query.get(name) || "");
  const feed = useJobFeed({ state, q });
  const selection = useSelection();
  const shown = { value: feed.isKnown ? feed : undefined, error: feed.error };
  return html`<${Title} aside=${may("jobs:write") && html`<a class="main button" href="#/jobs/new">New job</a>`}>Jobs<//>
    <${Filters} query=${query} set=${set} counts=${feed.counts} />
    <${Selected} feed=${feed} selection=${selection} />
    <${Loaded} polled=${shown}>${() => html`<${JobList} feed=${feed} order=${order} selection=${selection} isFiltered=${Boolean(state || q)} />`}<//>`;
}
