// What its owner may do with a deployment while it serves: change its options, replace its artifact, pause, delete it.
import { send } from "../api.js";
import { may } from "../caller.js";
import { Confirmed, DialogButton, Problem } from "../parts.js";
import { html, useState } from "../ui.js";
import { Field } from "./form_fields.js";
import { bodyOf, fieldsOf, ServingFields } from "./serving_fields.js";

/** PATCH that is refused if another change came since the page was read. */
function change(deployment, body) {
  return send("PATCH", `/v1/deployments/${deployment.id}`, body, { headers: { "If-Match": `"${deployment.revision}"` } });
}

/** The body that makes `fields` and `artifact` of what the deployment has; null takes an option back. */
export function changesOf(deployment, fields, artifact) {
  const [before, after] = [fieldsOf(deployment), fields].map((each) => bodyOf(each, deployment));
  const differs = (name) => JSON.stringify(before[name]) !== JSON.stringify(after[name]);
  const names = [...new Set(Object.keys({ ...before, ...after }))].filter(differs);
  const body = Object.fromEntries(names.map((name) => [name, after[name] ?? null]));
  if (artifact.trim() && artifact.trim() !== deployment.artifact) body.artifact = artifact.trim();
  return body;
}

function PauseButton({ deployment, onChange }) {
  const paused = deployment.state === "paused";
  if (paused || deployment.state === "failed") {
    const resume = async () => (await change(deployment, { paused: false }), onChange());
    return html`<${DialogButton} label=${paused ? "Resume" : "Try again"} title=${`Start ${deployment.name}?`} action=${resume} failure="Not started">
      <p>A worker starts its servers as soon as it has room.</p><//>`;
  }
  const pause = async () => (await change(deployment, { paused: true }), onChange());
  return html`<${DialogButton} label="Pause" title=${`Pause ${deployment.name}?`} action=${pause} failure="Not paused">
    <p>Running answers are finished. Then requests are refused until it is resumed, and its memory is free.</p><//>`;
}

function ChangeButton({ deployment, onChange }) {
  const [fields, setFields] = useState(() => fieldsOf(deployment));
  const [artifact, setArtifact] = useState(deployment.artifact);
  const set = (field) => (value) => setFields((before) => ({ ...before, [field]: value }));
  const undo = () => (setFields(fieldsOf(deployment)), setArtifact(deployment.artifact));
  const body = changesOf(deployment, fields, artifact);
  const apply = async () => {
    if (Object.keys(body).length > 0) await change(deployment, body);
    onChange();
  };
  return html`<${DialogButton} label="Change" title=${`Change ${deployment.name}`} confirm="Apply" action=${apply} failure="Not changed" onClose=${undo}>${(error) => html`
    <${Field} label="Artifact" path="artifact" error=${error} hint="Another one, by its id or as model@tag, replaces the present one server by server; no request is lost.">
      <input value=${artifact} required onInput=${(event) => setArtifact(event.target.value)} /><//>
    <div class="fields"><${ServingFields} fields=${fields} set=${set} error=${error} /></div>
    <small>A change of the engine or of what stands below it replaces the servers too.</small>`}<//>`;
}

/** What the signed-in key may do with the deployment; `onDelete` once it is gone. */
export function DeploymentActions({ deployment, onChange, onDelete }) {
  const remove = async () => {
    await send("DELETE", `/v1/deployments/${deployment.id}`);
    onDelete();
  };
  return html`<div class="actions">
    ${["ready", "stopped"].includes(deployment.state) && may("inference") && html`<a class="main button" href=${`#/deployments/${encodeURIComponent(deployment.name)}/chat`}>Chat</a>`}
    ${may("deployments:write") && html`<${ChangeButton} key=${deployment.revision} deployment=${deployment} onChange=${onChange} />
      <${PauseButton} deployment=${deployment} onChange=${onChange} />
      <${Confirmed} label="Delete" question=${`Delete ${deployment.name}?`} action=${remove}
        consequence="Running answers are finished first; then clients get 404." />`}
  </div>`;
}

/** Why it does not serve as its owner wants. */
export function Hindrance({ deployment }) {
  if (deployment.error) return html`<${Problem} error=${deployment.error} title="Deployment failed" />`;
  return deployment.reason ? html`<p><small>${deployment.reason}</small></p>` : null;
}

/** What is known of a replacement that is under way, or that failed. */
export function Replacement({ replacement }) {
  if (!replacement) return null;
  const artifact = html`${replacement.served.original && "The original of "}<a href=${`#/artifacts/${replacement.served.artifact}`}>${replacement.served.artifact}</a>`;
  return replacement.error
    ? html`<p><small>${artifact} could not replace it: ${replacement.error.message}. The present one goes on serving.</small></p>`
    : html`<p><small>Being replaced by ${artifact}: ${replacement.ready ?? 0} new servers are ready.</small></p>`;
}
