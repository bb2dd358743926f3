// One deployment: what it serves, how well, its load over time, its servers, how to ask it.
import { may } from "../caller.js";
import { useDeployment } from "../deployment_feed.js";
import { bytes, date, duration, modelName, number, ratioInWords } from "../format.js";
import { Empty, Facts, Loaded, State, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html } from "../ui.js";
import { DeploymentActions, Hindrance, Replacement } from "./deployment_changes.js";
import { DeploymentLoad } from "./deployment_load.js";
import { RequestExamples } from "./request_examples.js";

const SERVERS = [
  ["Server", (server) => server.slot],
  ["State", (server) => html`<${State} state=${server.state} /> <small>${server.note}</small>`],
  ["Engine", (server) => server.engine],
  ["Worker", (server) => server.worker],
  ["Running", (server) => server.running, "number"],
  ["Waiting", (server) => server.waiting, "number"],
  ["Restarts", (server) => server.restarts, "number"],
];

/** The options that its owner named; the others are the model's and the engine's. */
function optionsInWords({ dtype, max_model_len: length, max_num_seqs: most, cache_share: share, vllm }) {
  const inner = Object.entries(vllm ?? {}).filter(([, value]) => value !== null && value !== false);
  const named = [["dtype", dtype], ["longest request", length && `${length} tokens`], ["requests at once", most], ["cache share", share], ...inner];
  return named.filter(([, value]) => value).map(([name, value]) => `${name} ${value}`).join(", ");
}

function Standing({ deployment }) {
  const { servers, replicas, aliases, idle_timeout_s: idle } = deployment;
  return html`<${Facts} rows=${[
    ["Replicas", `${servers.filter((each) => each.state === "ready").length} of ${replicas} ready`],
    ["Engine", deployment.engine],
    ["Further names", aliases.join(", ")],
    ["Unloaded", idle ? `after ${duration(idle)} without requests` : "never"],
    ["Options", optionsInWords(deployment)],
    ["Created", date(deployment.created_at)],
    ["Job", deployment.job && html`<a href=${`#/jobs/${deployment.job}`}>${deployment.job}</a>`],
  ]} />`;
}

/** What is served, with what was measured of it; of the original nothing was. */
function Served({ id, original }) {
  const { value: artifact } = usePolled(may("artifacts:read") ? `/v1/artifacts/${id}` : null, () => null);
  const link = html`<a href=${`#/artifacts/${id}`}>${id}</a>`;
  const { summary } = artifact ?? {};
  return html`<section class="stack" aria-labelledby="served"><h2 id="served">Model</h2>
    <${Facts} rows=${[
      [original ? "Original of" : "Artifact", link],
      ["Model", artifact && modelName(artifact.model)],
      ...(original ? [["Recipe", "not quantized"]] : []),
      ...(artifact && !original ? [
        ["Recipe", `${summary.label}, ${artifact.format}`],
        ["Size of the weights", summary.bytes && bytes(summary.bytes)],
        ["Bits per weight", number(summary.bits_per_weight, 3)],
        ["Perplexity against the original", summary.perplexity_ratio && ratioInWords(summary)],
        ["KL per token", typeof summary.kl === "number" && number(summary.kl, 3)],
        ["Same top token", summary.top1_agreement && `${(100 * summary.top1_agreement).toFixed(1)} %`],
      ] : []),
    ]} /></section>`;
}

function Deployment({ deployment, onChange }) {
  const { name, servers } = deployment;
  const ready = servers.filter((each) => each.state === "ready").map((each) => each.slot);
  return html`<${Title} text=${name} aside=${html`<${State} state=${deployment.state} />
      <${DeploymentActions} deployment=${deployment} onChange=${onChange} onDelete=${() => (location.hash = "#/deployments")} />`}>${name}<//>
    <${Hindrance} deployment=${deployment} />
    <${Replacement} replacement=${deployment.replacement} />
    <${Standing} deployment=${deployment} />
    <${DeploymentLoad} deployment=${deployment.id} slots=${ready} />
    <${Served} id=${deployment.artifact} original=${deployment.original} />
    ${servers.length > 0 && html`<${Table} caption="Servers" columns=${SERVERS} rows=${servers} keyOf=${(server) => server.slot} />`}
    <${RequestExamples} name=${name} />`;
}

export function DeploymentPage({ id: name }) {
  const deployment = useDeployment(name);
  if (deployment.isMissing) return html`<${Title} text="No such deployment">${name}<//><${Empty} title="There is no such deployment">Look for it among the <a href="#/deployments">deployments</a>.<//>`;
  return html`<${Loaded} polled=${deployment}>${(value) => html`<${Deployment} deployment=${value} onChange=${deployment.ask} />`}<//>`;
}
