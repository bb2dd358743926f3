// Draws the fields of a job's body, in groups.
import { may } from "../caller.js";
import { html } from "../ui.js";
import { Choice, Field, messagesFor } from "./form_fields.js";
import { GROUPS, labelFaults } from "./job_fields.js";
import { BLANK as BLANK_SERVING, ServingFields } from "./serving_fields.js";
import { TextUpload, useDatasets } from "./text_upload.js";

/** A box to tick, with its own label. */
export function Tick({ path, label, value, onChange, error }) {
  return html`<div data-path=${path}><label class="tick"><input type="checkbox" checked=${value} onChange=${(event) => onChange(event.target.checked)} /> ${label}</label>
    ${messagesFor(error, path).map((message) => html`<small class="bad" role="alert" key=${message}>${message}</small>`)}</div>`;
}

/** Several boxes under one name; `value` lists the ticked ones. */
export function Ticks({ path, label, value, options, onChange, error }) {
  const toggle = (name) => (event) => onChange(event.target.checked ? [...value, name] : value.filter((each) => each !== name));
  return html`<fieldset data-path=${path}><legend>${label}</legend>
    ${options.map((name) => html`<label class="tick" key=${name}><input type="checkbox" checked=${value.includes(name)} onChange=${toggle(name)} /> ${name}</label>`)}
    ${messagesFor(error, path).map((message) => html`<small class="bad" role="alert" key=${message}>${message}</small>`)}
  </fieldset>`;
}

/** One field by its kind. */
export function FieldOf({ field, value, onChange, error, choices = {} }) {
  const { path, label, kind, hint, placeholder, list } = field;
  if (kind === "tick") return html`<${Tick} path=${path} label=${label} value=${value} onChange=${onChange} error=${error} />`;
  if (kind === "ticks") return html`<${Ticks} path=${path} label=${label} value=${value} options=${field.options} onChange=${onChange} error=${error} />`;
  const typed = (event) => onChange(event.target.value);
  const options = [...(field.options ?? []), ...(choices[field.schema] ?? []).map((name) => [name, name])];
  return html`<${Field} label=${label} path=${path} error=${error} hint=${hint} faults=${kind === "labels" ? labelFaults(value) : []}>
    ${kind === "choice"
      ? html`<${Choice} value=${value} options=${options} onChange=${onChange} />`
      : kind === "secret"
        ? html`<input type="password" autocomplete="off" value=${value} placeholder=${placeholder} onInput=${typed} />`
        : html`<input value=${value} placeholder=${placeholder} list=${list} inputmode=${kind === "number" ? "decimal" : undefined} onInput=${typed} />`}<//>`;
}

function Group({ group, form, set, error, choices, children }) {
  const fields = group.fields.filter(({ needs, scope }) => (!needs || form[needs].trim()) && (!scope || may(scope)));
  return html`<fieldset class="group"><legend>${group.name}</legend>
    <div class="fields">${fields.map((field) => html`<${FieldOf} key=${field.path} field=${field} value=${form[field.path]} onChange=${set(field.path)} error=${error} choices=${choices} />`)}</div>
    ${children}</fieldset>`;
}

/** How the deployment that a job asks for serves. */
function Serving({ form, set, error }) {
  if (!form["deploy.name"].trim() || !may("deployments:write")) return null;
  const fields = form.serving ?? BLANK_SERVING;
  const setOne = (name) => (value) => set("serving")({ ...fields, [name]: value });
  return html`<details><summary>How it is served</summary><div class="fields"><${ServingFields} fields=${fields} set=${setOne} error=${error} under="deploy." /></div></details>`;
}

export function FieldGroups({ form, set, error, choices }) {
  const [datasets, askDatasets] = useDatasets();
  const length = form["calibration.sequence_length"];
  const onUploaded = (reference) => (set("calibration.dataset")(reference), askDatasets());
  return html`<details><summary>${form.evaluate ? "Target, text, limits" : "Limits, labels"}</summary>
    ${GROUPS.filter((group) => form.evaluate || !group.isMeasured).map((group) => html`<${Group} key=${group.name} group=${group} form=${form} set=${set} error=${error} choices=${choices}>
      ${group.name === "Calibration" && html`<${TextUpload} sequenceLength=${/^\d+$/.test(length) ? length : 512} onUploaded=${onUploaded} />`}
      ${group.name === "Afterwards" && html`<${Serving} form=${form} set=${set} error=${error} />`}<//>`)}
    <datalist id="texts"><option value="builtin:wikitext2" />${datasets.map((each) => html`<option key=${each.id} value=${each.reference}>${each.name}</option>`)}</datalist>
  </details>`;
}
