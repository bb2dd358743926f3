// What is served, and where to talk to it.
import { send } from "../api.js";
import { age, duration } from "../format.js";
import { Confirmed, Copy, Empty, Loaded, State, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { html } from "../ui.js";

const pollEvery = (page) => (page.data.some((each) => ["starting", "draining"].includes(each.state)) ? 2 : 10);

function example(name) {
  return `curl ${location.origin}/v1/chat/completions -H "Authorization: Bearer $NIBBLE_API_KEY" \\
  -H 'Content-Type: application/json' \\
  -d '{"model": "${name}", "messages": [{"role": "user", "content": "Hello"}]}'`;
}

function Deployment({ deployment, onChange }) {
  const remove = async () => {
    await send("DELETE", `/v1/deployments/${deployment.id}`);
    onChange();
  };
  const busy = deployment.servers.reduce((sum, each) => sum + each.running, 0);
  return html`<article class="card">
    <div class="title">
      <h2>${deployment.name}</h2>
      <${State} state=${deployment.state} />
      <div class="actions">
        ${deployment.state === "ready" && html`<a class="main button" href=${`#/deployments/${encodeURIComponent(deployment.name)}/chat`}>Chat</a>`}
        <${Confirmed} label="Stop" question=${`Stop ${deployment.name}?`} action=${remove}
          consequence="Answers that are being written are finished first; then clients get 404." />
      </div>
    </div>
    <p><small>
      <a href=${`#/artifacts/${deployment.artifact}`}>${deployment.artifact}</a>, engine ${deployment.engine},
      made ${age(deployment.created_at)}, ${busy} requests running${deployment.idle_timeout_s ? `, unloads after ${duration(deployment.idle_timeout_s)} without requests` : ""}
    </small></p>
    ${deployment.reason && html`<p class=${deployment.state === "failed" ? "bad" : "note"}>${deployment.reason}</p>`}
    <details><summary>Call it</summary><${Copy} label="curl" text=${example(deployment.name)} /></details>
  </article>`;
}

export function DeploymentsPage() {
  const polled = usePolled("/v1/deployments", pollEvery);
  return html`<${Title}>Deployments<//>
    <${Loaded} polled=${polled}>${(page) =>
      page.data.length === 0
        ? html`<${Empty} title="Nothing is served">Open an <a href="#/artifacts">artifact</a> and deploy it.<//>`
        : page.data.map((each) => html`<${Deployment} key=${each.id} deployment=${each} onChange=${polled.ask} />`)}<//>`;
}
