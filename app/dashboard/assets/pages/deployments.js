// The deployments, with their servers and a link to the chat.
import { send } from "../api.js";
import { may } from "../caller.js";
import { age, duration, number } from "../format.js";
import { Confirmed, Empty, Facts, Loaded, Problem, State, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { useServerMetrics } from "../server_metrics.js";
import { Table } from "../table.js";
import { html } from "../ui.js";
import { ChangeButton, PauseButton, Replacement } from "./deployment_changes.js";
import { RequestExamples } from "./request_examples.js";

const pollEvery = (page) => (page.data.some((each) => ["starting", "draining"].includes(each.state) || each.replacement) ? 2 : 10);

const SERVERS = [
  ["Server", (server) => server.slot],
  ["State", (server) => html`<${State} state=${server.state} /> <small>${server.note}</small>`],
  ["Engine", (server) => server.engine],
  ["Worker", (server) => server.worker],
  ["Running", (server) => server.running, "number"],
  ["Waiting", (server) => server.waiting, "number"],
  ["Restarts", (server) => server.restarts, "number"],
];

/** A server's totals since its start, and its current speed. */
function Speed({ deployment, server, isOnly }) {
  const metrics = useServerMetrics(deployment.id, server.slot);
  if (metrics === null) return null;
  const mean = (seconds) => (seconds === null ? "–" : duration(seconds));
  return html`<section aria-label=${`Speed of server ${server.slot}`}>
    ${!isOnly && html`<h3>Server ${server.slot}</h3>`}
    <${Facts} rows=${[
      ["Throughput, last minute", metrics.perSecond === null ? "…" : `${number(metrics.perSecond, 3)} tokens/s`],
      ["Answers", String(metrics.requests ?? 0)],
      ["Tokens written", String(metrics.tokens ?? 0)],
      ["First token, mean", mean(metrics.first)],
      ["Between tokens, mean", mean(metrics.between)],
      ["Whole answer, mean", mean(metrics.whole)],
    ]} />
  </section>`;
}

function Deployment({ deployment, onChange }) {
  const remove = async () => {
    await send("DELETE", `/v1/deployments/${deployment.id}`);
    onChange();
  };
  const { servers, state } = deployment;
  return html`<article class="card">
    <div class="title">
      <h2>${deployment.name}</h2>
      <${State} state=${state} />
      <div class="actions">
        ${["ready", "stopped"].includes(state) && may("inference") && html`<a class="main button" href=${`#/deployments/${encodeURIComponent(deployment.name)}/chat`}>Chat</a>`}
        ${may("deployments:write") && html`<${ChangeButton} key=${deployment.revision} deployment=${deployment} onChange=${onChange} />
          <${PauseButton} deployment=${deployment} onChange=${onChange} />`}
        ${may("deployments:write") && html`<${Confirmed} label="Delete" question=${`Delete ${deployment.name}?`} action=${remove}
          consequence="Running answers are finished first; then clients get 404." />`}
      </div>
    </div>
    <p><small>
      <a href=${`#/artifacts/${deployment.artifact}`}>${deployment.artifact}</a>, engine ${deployment.engine},
      ${deployment.aliases.length > 0 ? `also ${deployment.aliases.join(", ")}, ` : ""}created ${age(deployment.created_at)}${deployment.idle_timeout_s ? `, unloads after ${duration(deployment.idle_timeout_s)} without requests` : ""}
    </small></p>
    ${deployment.error
      ? html`<${Problem} error=${deployment.error} title="Deployment failed" />`
      : deployment.reason && html`<p><small>${deployment.reason}</small></p>`}
    <${Replacement} replacement=${deployment.replacement} />
    ${servers.length > 0 && html`<${Table} caption=${`Servers of ${deployment.name}`} hideCaption columns=${SERVERS} rows=${servers} />`}
    ${servers.filter((server) => server.state === "ready").map((server) =>
      html`<${Speed} key=${server.slot} deployment=${deployment} server=${server} isOnly=${servers.length === 1} />`)}
    <${RequestExamples} name=${deployment.name} />
  </article>`;
}

export function DeploymentsPage() {
  const polled = usePolled("/v1/deployments", pollEvery);
  return html`<${Title}>Deployments<//>
    <${Loaded} polled=${polled}>${(page) =>
      page.data.length === 0
        ? html`<${Empty} title="No deployments yet">Open an <a href="#/artifacts">artifact</a> and deploy it.<//>`
        : page.data.map((each) => html`<${Deployment} key=${each.id} deployment=${each} onChange=${polled.ask} />`)}<//>`;
}
