// The settings in force, to read: the environment of the service's processes decides them.
import { useQuery } from "../address.js";
import { may } from "../caller.js";
import { Empty, Loaded, Reference } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html } from "../ui.js";
import { Administration } from "./administration.js";
import { Search } from "./jobs.js";

function Value({ setting }) {
  if (setting.value === null) return html`<small>empty</small>`;
  return html`<code class="digest value"><${Reference} text=${setting.value} /></code>${setting.value.includes("***") && html` <small>hidden</small>`}`;
}

const COLUMNS = [
  ["Setting", (setting) => html`<code class="whole">${setting.name}</code>`, "long"],
  ["Value", (setting) => html`<${Value} setting=${setting} />`, "long"],
  ["From", (setting) => (setting.is_set ? html`<strong>set</strong>` : "default")],
  ["Meaning", (setting) => setting.meaning, "long"],
];

function matching(settings, q, isSet) {
  const words = q.toLowerCase().split(/\s+/).filter(Boolean);
  return settings.filter((setting) => (!isSet || setting.is_set)
    && words.every((word) => `${setting.name} ${setting.value ?? ""} ${setting.meaning}`.toLowerCase().includes(word)));
}

export function SettingsPage() {
  const [query, set] = useQuery();
  const polled = usePolled(may("operator") ? "/v1/settings" : null, () => null);
  const [q, isSet] = [query.get("q") || "", Boolean(query.get("set"))];
  return html`<${Administration} area="settings">${() => html`
    <p class="aside">Each process reads them once, when it starts. These are those of the API; workers on other hosts have their own.</p>
    <form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
      <${Search} text=${q} placeholder="Search name, value or meaning" onChange=${(text) => set({ q: text })} />
      <label class="tick"><input type="checkbox" checked=${isSet} onChange=${(event) => set({ set: event.target.checked ? "1" : "" })} /> Only what is set</label>
    </form>
    <${Loaded} polled=${polled}>${(page) => {
      const rows = matching(page.data, q, isSet);
      return rows.length === 0
        ? html`<${Empty} title="No such settings">Change the filter to see others.<//>`
        : html`<${Table} caption="Settings in force" columns=${COLUMNS} rows=${rows} keyOf=${(setting) => setting.name} />`;
    }}<//>`}<//>`;
}
