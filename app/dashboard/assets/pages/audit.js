// Who changed what: the tenant's audit log, filtered, page by page.
import { useQuery } from "../address.js";
import { may } from "../caller.js";
import { age, date } from "../format.js";
import { usePagedList } from "../paged_list.js";
import { Empty, Facts, Loaded, Problem } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html, useMemo, useState } from "../ui.js";
import { Administration } from "./administration.js";
import { Choice } from "./form_fields.js";
import { Search } from "./jobs.js";

const PER_PAGE = 50;
const REFRESH_S = 30;
const HOUR_MS = 3_600_000;
const TIMES = [["", "any time"], ["1", "last hour"], ["24", "last 24 hours"], ["168", "last 7 days"], ["720", "last 30 days"]];

/** The address of the entries that the page's query asks for; its times count from when it was chosen. */
function usePath(query) {
  const [q, key, hours, refused] = ["q", "key", "since", "refused"].map((name) => query.get(name) || "");
  return useMemo(() => {
    const asked = new URLSearchParams({ limit: PER_PAGE });
    if (q) asked.set("q", q);
    if (key) asked.set("key", key);
    if (Number(hours) > 0) asked.set("since", new Date(Date.now() - Number(hours) * HOUR_MS).toISOString());
    if (refused) asked.set("refused", "true");
    return `/v1/audit?${asked}`;
  }, [q, key, hours, refused]);
}

const nameOf = (names, key) => (names.get(key) ? `${names.get(key)} (${key})` : key);

function Filters({ query, set, names }) {
  const key = query.get("key") || "";
  const keys = key && !names.has(key) ? [...names.keys(), key] : [...names.keys()];
  return html`<form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
    <${Search} text=${query.get("q") || ""} placeholder="Search method, path, detail or request" onChange=${(q) => set({ q })} />
    <label class="order">Key <${Choice} value=${key} options=${[["", "any"], ...keys.map((each) => [each, nameOf(names, each)])]} onChange=${(chosen) => set({ key: chosen })} /></label>
    <label class="order">Time <${Choice} value=${query.get("since") || ""} options=${TIMES} onChange=${(since) => set({ since })} /></label>
    <label class="tick"><input type="checkbox" checked=${Boolean(query.get("refused"))} onChange=${(event) => set({ refused: event.target.checked ? "1" : "" })} /> Refused only</label>
  </form>`;
}

function Entry({ entry, names }) {
  return html`<details class="entry"><summary><span class="method">${entry.method}</span> <span class="path">${entry.path}</span></summary>
    <${Facts} rows=${[
      ["Time", date(entry.at)], ["Answer", `HTTP ${entry.status}`], ["Key", nameOf(names, entry.key_id)],
      ["Request", html`<code>${entry.request_id}</code>`], ["Entry", html`<code>${entry.id}</code>`], ["Detail", entry.detail],
    ]} />
  </details>`;
}

const columns = (names) => [
  ["Change", (entry) => html`<${Entry} entry=${entry} names=${names} />`, "long"],
  ["Answer", (entry) => (entry.status >= 400 ? html`<span class="bad">refused, ${entry.status}</span>` : html`done, ${entry.status}`)],
  ["Key", (entry) => names.get(entry.key_id) || html`<code>${entry.key_id}</code>`],
  ["When", (entry) => html`<time class="whole" datetime=${entry.at} title=${date(entry.at)}>${age(entry.at)}</time>`],
];

/** A button that adds what is older; `list`: of usePagedList. */
export function More({ list, label }) {
  const [error, setError] = useState(null);
  const ask = () => (setError(null), list.more().catch(setError));
  return list.hasMore && html`<${Problem} error=${error} title="Can't load more" />
    <button type="button" class="quiet wide" onClick=${ask}>${label}</button>`;
}

function Log() {
  const [query, set] = useQuery();
  const isSearched = ["q", "key", "refused"].some((name) => query.get(name)); // which reads the whole log if little matches
  const list = usePagedList(usePath(query), () => (isSearched ? null : REFRESH_S));
  const keys = usePolled("/v1/keys", () => null);
  const names = useMemo(() => new Map((keys.value?.data ?? []).map((key) => [key.id, key.name])), [keys.value]);
  return html`<${Filters} query=${query} set=${set} names=${names} />
    <${Loaded} polled=${list}>${(entries) => (entries.length === 0
      ? html`<${Empty} title="No such changes">Every request that changes something is listed here, and so is every login. Change the filter to see others.<//>`
      : html`<${Table} caption="Changes and logins of this tenant, newest first" columns=${columns(names)} rows=${entries} keyOf=${(entry) => entry.id} />
        <${More} list=${list} label="Show older changes" />`)}<//>`;
}

export function AuditPage() {
  return html`<${Administration} area="audit">${() => may("admin") && html`<${Log} />`}<//>`;
}
