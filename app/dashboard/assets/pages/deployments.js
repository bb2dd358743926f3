// The deployments, each with what it serves and what it does now.
import { age } from "../format.js";
import { isChanging } from "../deployment_feed.js";
import { Empty, Loaded, State, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { html, useState } from "../ui.js";
import { DeploymentActions, Hindrance, Replacement } from "./deployment_changes.js";

const pollEvery = (page) => (page.data.some(isChanging) ? 2 : 10);

/** 1 of 2 servers ready, 3 requests running, 1 waiting. */
export function loadInWords({ servers, replicas }) {
  const sum = (key) => servers.reduce((all, each) => all + each[key], 0);
  const ready = servers.filter((each) => each.state === "ready").length;
  const requests = sum("running");
  return `${ready} of ${replicas} server${replicas === 1 ? "" : "s"} ready, ${requests} request${requests === 1 ? "" : "s"} running, ${sum("waiting")} waiting`;
}

function Deployment({ deployment, onChange }) {
  const { name, aliases, state } = deployment;
  return html`<article class="card">
    <div class="title">
      <h2><a href=${`#/deployments/${encodeURIComponent(name)}`}>${name}</a></h2>
      <${State} state=${state} />
      <${DeploymentActions} deployment=${deployment} onChange=${onChange} onDelete=${onChange} />
    </div>
    <p>${loadInWords(deployment)}</p>
    <p><small>
      ${deployment.original && "the original of "}<a href=${`#/artifacts/${deployment.artifact}`}>${deployment.artifact}</a>,
      ${aliases.length > 0 ? ` also ${aliases.join(", ")},` : ""} created ${age(deployment.created_at)}
    </small></p>
    <${Hindrance} deployment=${deployment} />
    <${Replacement} replacement=${deployment.replacement} />
  </article>`;
}

/** Those older than `after`, and behind a button the ones before them. */
function Deployments({ after = "" }) {
  const polled = usePolled(`/v1/deployments${after && `?after=${after}`}`, pollEvery);
  const [isOpen, setOpen] = useState(false);
  return html`<${Loaded} polled=${polled}>${(page) => html`
    ${page.data.map((each) => html`<${Deployment} key=${each.id} deployment=${each} onChange=${polled.ask} />`)}
    ${page.data.length === 0 && !after && html`<${Empty} title="No deployments yet">Open an <a href="#/artifacts">artifact</a> and deploy it.<//>`}
    ${page.has_more && (isOpen ? html`<${Deployments} after=${page.next} />`
      : html`<div class="actions"><button type="button" class="quiet" onClick=${() => setOpen(true)}>Older deployments</button></div>`)}`}<//>`;
}

export function DeploymentsPage() {
  return html`<${Title}>Deployments<//><${Deployments} />`;
}
