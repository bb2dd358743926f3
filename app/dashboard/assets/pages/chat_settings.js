// What a conversation is asked with: the system prompt, and parameters beside what the models' own files name.
import { read } from "../api.js";
import { html, useEffect, useState } from "../ui.js";

const PARAMETERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
  ["top_p", "Top p", { min: 0.05, max: 1, step: 0.05 }],
  ["max_tokens", "Max tokens", { min: 1, max: 4096, step: 1 }],
  ["seed", "Seed", { min: 0, step: 1 }],
];
const SOURCES = { model: "set by the model", default: "defaults, the model sets none" };
const UNTIL_READ = { max_tokens: 128 };

/** Model -> { sampling, isUnknown } of those whose description has been read. */
export function useModels(models) {
  const [seen, setSeen] = useState({});
  useEffect(() => {
    for (const model of models.filter((each) => !seen[each])) {
      const take = (description) => setSeen((before) => ({ ...before, [model]: description }));
      read(`/v1/models/${encodeURIComponent(model)}`).then(({ value }) => take({ sampling: value.sampling }), (fault) => take({ isUnknown: fault.status === 404 }));
    }
  }, [models.join("\n")]);
  return seen;
}

/** The names that other deployments answer to. */
export function useModelNames() {
  const [names, setNames] = useState([]);
  useEffect(() => {
    read("/v1/models").then(({ value }) => setNames(value.data.map((each) => each.id)), () => {});
  }, []);
  return names;
}

/** What is sent beside the messages: the defaults of the model, and over them what the fields say. */
export function parametersFor(sampling, fields) {
  const { stop = "", ...numbers } = fields;
  const named = Object.entries(numbers).filter(([, text]) => text !== "").map(([name, text]) => [name, Number(text)]);
  const stops = stop.split("\n").filter(Boolean);
  return { ...UNTIL_READ, ...sampling?.parameters, ...Object.fromEntries(named), ...(stops.length ? { stop: stops } : {}) };
}

function inWords({ sampling }, fields) {
  const listed = Object.entries(parametersFor(sampling, fields)).map(([name, value]) => `${name} ${Array.isArray(value) ? JSON.stringify(value) : value}`);
  return `${listed.join(", ")}${sampling ? ` (${SOURCES[sampling.source]})` : ""}`;
}

/** What an empty field stands for, of each of the models. */
function meaningOf(name, models) {
  const values = models.map(({ sampling }) => ({ ...UNTIL_READ, ...sampling?.parameters })[name]).filter((value) => value !== undefined);
  return [...new Set(values)].join(" or ");
}

export function ChatSettings({ conversation, seen, onChange }) {
  const { system, parameters, models } = conversation;
  const known = models.map((model) => seen[model]).filter(Boolean);
  const set = (name) => (event) => onChange({ parameters: { ...parameters, [name]: event.target.value } });
  const listed = [...new Set(known.map((each) => inWords(each, parameters)))];
  return html`<div class="settings">
    <details open=${Boolean(system)}><summary>System prompt${!system.trim() && html`<small>: none</small>`}</summary>
      <label class="unseen" for="system">System prompt</label>
      <textarea id="system" rows="3" placeholder="What every answer should heed" value=${system} onInput=${(event) => onChange({ system: event.target.value })}></textarea></details>
    <details><summary>Parameters<small>: ${listed.join("; ")}</small></summary>
      <div class="fields">${PARAMETERS.map(([name, label, limits]) => html`<label key=${name}>${label}
        <input type="number" ...${limits} value=${parameters[name] ?? ""} placeholder=${meaningOf(name, known) || "none"} onInput=${set(name)} /></label>`)}
        <label>Stop at
          <textarea rows="2" value=${parameters.stop ?? ""} placeholder="one text a line" onInput=${set("stop")}></textarea></label></div>
      <small>An empty field takes the model's own value, which it shows.</small></details>
  </div>`;
}
