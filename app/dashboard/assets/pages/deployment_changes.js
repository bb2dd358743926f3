// What its owner may change of a deployment while it serves: replicas, names, the artifact, a pause.
import { send } from "../api.js";
import { DialogButton } from "../parts.js";
import { html, useState } from "../ui.js";

/** PATCH that is refused if another change came since the page was read. */
function change(deployment, body) {
  return send("PATCH", `/v1/deployments/${deployment.id}`, body, { headers: { "If-Match": `"${deployment.revision}"` } });
}

const names = (text) => text.split(",").map((name) => name.trim()).filter(Boolean);

/** The fields that differ from what the deployment has. */
export function changesOf(deployment, { replicas, aliases, artifact }) {
  const body = {};
  if (Number(replicas) !== deployment.replicas) body.replicas = Number(replicas);
  if (names(aliases).join() !== deployment.aliases.join()) body.aliases = names(aliases);
  if (artifact.trim() && artifact.trim() !== deployment.artifact) body.artifact = artifact.trim();
  return body;
}

export function PauseButton({ deployment, onChange }) {
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

export function ChangeButton({ deployment, onChange }) {
  const before = () => ({
    replicas: String(deployment.replicas), aliases: deployment.aliases.join(", "), artifact: deployment.artifact,
  });
  const [fields, setFields] = useState(before);
  const set = (name) => (event) => setFields({ ...fields, [name]: event.target.value });
  const apply = async () => {
    const body = changesOf(deployment, fields);
    if (Object.keys(body).length > 0) await change(deployment, body);
    onChange();
  };
  return html`<${DialogButton} label="Change" title=${`Change ${deployment.name}`} confirm="Apply" action=${apply} failure="Not changed" onClose=${() => setFields(before())}>
    <label>Replicas
      <input type="number" min="1" max="16" required value=${fields.replicas} onInput=${set("replicas")} /></label>
    <label>Artifact
      <input value=${fields.artifact} required onInput=${set("artifact")} /></label>
    <small>Another one, by its id or as model@tag, replaces the present one server by server; no request is lost.</small>
    <label>Further names
      <input value=${fields.aliases} onInput=${set("aliases")} /></label>
    <small>Separated by commas; clients may send them as “model”.</small>
  <//>`;
}

/** What is known of a replacement that is under way, or that failed. */
export function Replacement({ replacement }) {
  if (!replacement) return null;
  const artifact = html`<a href=${`#/artifacts/${replacement.served.artifact}`}>${replacement.served.artifact}</a>`;
  return replacement.error
    ? html`<p><small>${artifact} could not replace it: ${replacement.error.message}. The present one goes on serving.</small></p>`
    : html`<p><small>Being replaced by ${artifact}: ${replacement.ready ?? 0} new servers are ready.</small></p>`;
}
