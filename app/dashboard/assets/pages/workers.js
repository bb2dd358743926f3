// The workers and their devices.
import { age, bytes } from "../format.js";
import { Empty, Loaded, State, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html } from "../ui.js";

function runs(worker) {
  if (worker.job) return html`<a href=${`#/jobs/${worker.job}`}>${worker.job}</a>`;
  if (worker.state !== "busy") return "–";
  return worker.queue === "serve" ? `${worker.servers} server${worker.servers === 1 ? "" : "s"}` : "a job of another tenant";
}

const COLUMNS = [
  ["Worker", (worker) => worker.name],
  ["State", (worker) => html`<${State} state=${worker.state} />`],
  ["Runs", (worker) => (worker.queue === "serve" ? "deployments" : "jobs")],
  ["Device", (worker) => html`${worker.device} <small>${worker.device_name}</small>`],
  ["Rates", (worker) => worker.rates || "–"],
  ["Memory in use", (worker) => (worker.memory_total ? `${bytes(worker.memory_bytes)} of ${bytes(worker.memory_total)}` : "–")],
  ["Current work", runs],
  ["Host", (worker) => worker.host],
  ["Heartbeat", (worker) => age(worker.heartbeat_at)],
  ["Started", (worker) => age(worker.started_at)],
];

export function WorkersPage() {
  const polled = usePolled("/v1/workers", 5);
  return html`<${Title}>Workers<//>
    <${Loaded} polled=${polled}>${(page) =>
      page.data.length === 0
        ? html`<${Empty} title="No workers">Jobs wait until you start one: <code>nibble worker --device auto</code>.<//>`
        : html`<${Table} caption="Workers" columns=${COLUMNS} rows=${page.data} keyOf=${(worker) => worker.name} />`}<//>`;
}
