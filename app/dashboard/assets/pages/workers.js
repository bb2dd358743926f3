// Who executes jobs.
import { age } from "../format.js";
import { Empty, Loaded, State, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html } from "../ui.js";

const COLUMNS = [
  ["Worker", (worker) => worker.name],
  ["State", (worker) => html`<${State} state=${worker.state} />`],
  ["Takes", (worker) => (worker.queue === "serve" ? "deployments" : "jobs")],
  ["Device", (worker) => html`${worker.device} <small>${worker.device_name}</small>`],
  ["Runs", (worker) => (worker.job ? html`<a href=${`#/jobs/${worker.job}`}>${worker.job}</a>` : "–")],
  ["Host", (worker) => worker.host],
  ["Heartbeat", (worker) => age(worker.heartbeat_at)],
  ["Started", (worker) => age(worker.started_at)],
];

export function WorkersPage() {
  const polled = usePolled("/v1/workers", 5);
  return html`<${Title}>Workers<//>
    <${Loaded} polled=${polled}>${(page) =>
      page.data.length === 0
        ? html`<${Empty} title="No worker lives">Jobs wait until one is started: <code>nibble worker --device auto</code>.<//>`
        : html`<${Table} caption="Workers that live" columns=${COLUMNS} rows=${page.data} keyOf=${(worker) => worker.name} />`}<//>`;
}
