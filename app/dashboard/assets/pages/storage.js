// What the tenant stores; for the operator, the collection of what nothing refers to.
import { send } from "../api.js";
import { may } from "../caller.js";
import { bytes, counted } from "../format.js";
import { Confirmed, Facts, Loaded, Problem } from "../parts.js";
import { usePolled } from "../polling.js";
import { html, useState } from "../ui.js";
import { Administration } from "./administration.js";

// [field, one, several, what it is]
const KINDS = [
  ["checkpoints", "checkpoint", "checkpoints", "Checkpoints of jobs that no longer need them"],
  ["artifacts", "artifact", "artifacts", "Artifacts that were never finished or whose job has no result"],
  ["datasets", "upload", "uploads", "Uploads that were interrupted"],
  ["jobs", "job record", "job records", "Records of jobs older than the retention time"],
];
const countOf = (garbage) => KINDS.reduce((sum, [field]) => sum + garbage[field].length, 0);
const inWords = (garbage) => KINDS.filter(([field]) => garbage[field].length > 0)
  .map(([field, one, several]) => `${garbage[field].length} ${garbage[field].length === 1 ? one : several}`).join(", ");

function Found({ garbage, onCollected }) {
  if (countOf(garbage) === 0) return html`<p role="status">Nothing to remove: all that is stored is in use.</p>`;
  const collect = async () => onCollected(await send("POST", "/v1/gc"));
  return html`<div class="stack">
    <p role="status">Can go: <strong>${inWords(garbage)}</strong>, ${bytes(garbage.bytes)} in storage.</p>
    ${KINDS.filter(([field]) => garbage[field].length > 0).map(([field, , , meaning]) => html`<details key=${field}>
      <summary>${meaning} (${garbage[field].length})</summary>
      <ul class="names">${garbage[field].map((name) => html`<li key=${name}><code>${name}</code></li>`)}</ul></details>`)}
    <div class="actions"><${Confirmed} label="Remove them" kind="main" question=${`Remove ${inWords(garbage)}?`} action=${collect}
      consequence="Their files are deleted for good. What came into use meanwhile stays." /></div>
  </div>`;
}

function Collection({ onCollected }) {
  const [found, setFound] = useState(null);
  const [removed, setRemoved] = useState(null);
  const [isAsking, setAsking] = useState(false);
  const [error, setError] = useState(null);
  const look = async () => {
    setAsking(true);
    setError(null);
    setRemoved(null);
    try {
      setFound(await send("POST", "/v1/gc?dry_run=true"));
    } catch (fault) {
      setError(fault);
    }
    setAsking(false);
  };
  const done = (garbage) => {
    setFound(null);
    setRemoved(garbage);
    onCollected();
  };
  return html`<section class="card" aria-labelledby="collection">
    <div class="title"><h2 id="collection">Collection</h2>
      <div class="actions"><button type="button" class="quiet" onClick=${look} aria-disabled=${isAsking}>${isAsking ? "Looking…" : "Find what can go"}</button></div></div>
    <p>Of all tenants: what no job, artifact or dataset refers to. The service removes it by itself from time to time; looking removes nothing.</p>
    <${Problem} error=${error} title="The collection failed" />
    ${found && html`<${Found} garbage=${found} onCollected=${done} />`}
    ${removed && html`<p role="status">Removed: <strong>${inWords(removed) || "nothing, all of it is in use again"}</strong>.</p>`}
  </section>`;
}

const held = ({ count, bytes: size }, noun) => `${bytes(size)}, ${counted(count, noun)}`;

function Stored({ polled }) {
  return html`<${Loaded} polled=${polled}>${(stored) => html`<section class="card" aria-labelledby="stored">
    <h2 id="stored">The tenant ${stored.tenant}</h2>
    <${Facts} rows=${[
      ["Artifacts", html`<a href="#/artifacts">${held(stored.artifacts, "artifact")}</a>`],
      ["Datasets", held(stored.datasets, "dataset")],
      ["Together", bytes(stored.artifacts.bytes + stored.datasets.bytes)],
    ]} />
    ${!stored.is_complete && html`<p><small>Artifacts from before Redis was last empty may be missing here; the next collection counts them.</small></p>`}
  </section>`}<//>`;
}

export function StoragePage() {
  const polled = usePolled(may("admin") ? "/v1/storage" : null, 30);
  return html`<${Administration} area="storage">${() => html`
    <${Stored} polled=${polled} />
    ${may("operator") && html`<${Collection} onCollected=${polled.ask} />`}`}<//>`;
}
