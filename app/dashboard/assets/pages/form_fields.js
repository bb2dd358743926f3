// Fields with a label, a hint and what the service says of them.
import { ApiError } from "../api.js";
import { html } from "../ui.js";

/** The messages of a refusal that belong to the field at `path`. */
export function messagesFor(error, path) {
  if (!(error instanceof ApiError)) return [];
  return error.fields.filter((field) => field.path === path || field.path.startsWith(`${path}.`)).map((field) => field.message);
}

/** `faults`: what this page itself finds wrong. */
export function Field({ label, path, error, hint, faults = [], children }) {
  const messages = [...faults, ...messagesFor(error, path)];
  return html`<div class=${messages.length ? "field field-bad" : "field"} data-path=${path}>
    <label><span>${label}</span>${children}</label>
    ${hint && html`<small>${hint}</small>`}
    ${messages.map((message) => html`<small class="bad" role="alert" key=${message}>${message}</small>`)}
  </div>`;
}

export function Choice({ value, options, onChange }) {
  return html`<select value=${value} onChange=${(event) => onChange(event.target.value)}>
    ${options.map(([option, text]) => html`<option key=${option} value=${option}>${text}</option>`)}
  </select>`;
}
