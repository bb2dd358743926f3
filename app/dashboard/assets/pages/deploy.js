// The dialog that deploys an artifact.
import { send } from "../api.js";
import { modelName } from "../format.js";
import { DialogButton } from "../parts.js";
import { html, useState } from "../ui.js";
import { Field } from "./form_fields.js";
import { AsCurl } from "./request_examples.js";
import { askedFor, BLANK, ServingFields } from "./serving_fields.js";

export function suggestedName(artifact) {
  const { scheme, bits } = artifact.recipe;
  const numbers = (scheme ?? "wna16") === "wna16" ? `w${bits}` : scheme;
  return `${modelName(artifact.model).split("/").pop()}-${numbers}`.toLowerCase().replace(/[^a-z0-9._-]/g, "-");
}

export function DeployButton({ artifact, suggested, kind = "main" }) {
  const [name, setName] = useState(suggested);
  const [fields, setFields] = useState(BLANK);
  const [isOpen, setOpen] = useState(false);
  const set = (field) => (value) => setFields((before) => ({ ...before, [field]: value }));
  const [original, setOriginal] = useState(false);
  const body = { artifact, name, ...(original && { original }), ...askedFor(fields) };
  const deploy = async () => {
    await send("POST", "/v1/deployments", body);
    location.hash = `#/deployments/${encodeURIComponent(name)}`;
  };
  return html`<${DialogButton} label="Deploy" title="Deploy this model" kind=${kind} action=${deploy} failure="Not deployed">${(error) => html`
    <${Field} label="Model name" path="name" error=${error} hint="What clients send as “model”.">
      <input value=${name} required maxlength="96" onInput=${(event) => setName(event.target.value)} /><//>
    <label class="tick"><input type="checkbox" checked=${original} onChange=${(event) => setOriginal(event.target.checked)} /> Serve the original instead, not quantized, as a baseline</label>
    <details open=${isOpen || Boolean(error)} onToggle=${(event) => setOpen(event.currentTarget.open)}><summary>Options</summary><div class="fields"><${ServingFields} fields=${fields} set=${set} error=${error} /></div></details>
    <${AsCurl} path="/v1/deployments" body=${body} />`}<//>`;
}
