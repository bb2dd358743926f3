// The form for a job: presets, fields, and an estimate before it is submitted.
import { ApiError, read, send } from "../api.js";
import { bytes, duration, number, parameters } from "../format.js";
import { Facts, Problem, Title } from "../parts.js";
import { html, useEffect, useMemo, useState } from "../ui.js";
import { BLANK, PRESETS, formOf, recipesOf, specOf } from "./job_form.js";

const PAUSE_MS = 500;

/** { value, error } of POST /v1/estimates for the body, once typing pauses. */
function useEstimate(body) {
  const [state, setState] = useState({ value: null, error: null, asking: false });
  useEffect(() => {
    if (!body.model) return undefined;
    const control = new AbortController();
    const timer = setTimeout(async () => {
      setState((before) => ({ ...before, asking: true }));
      try {
        const value = await send("POST", "/v1/estimates", body, { signal: control.signal });
        setState({ value, error: null, asking: false });
      } catch (error) {
        if (!control.signal.aborted) setState({ value: null, error, asking: false });
      }
    }, PAUSE_MS);
    return () => {
      clearTimeout(timer);
      control.abort();
    };
  }, [JSON.stringify(body)]);
  return state;
}

function EstimatePanel({ estimate, hasModel }) {
  const { value, error, asking } = estimate;
  return html`<aside class="card estimate" aria-label="Estimate" aria-live="polite" aria-busy=${asking}>
    <h2>Estimate</h2>
    ${!hasModel && html`<p>Name a model to see time, memory and size before you submit.</p>`}
    <${Problem} error=${error} title="This job would be refused" />
    ${value && html`<${Facts} rows=${[
        ["Time", `${value.time_s.toFixed(1)} s${value.time_s < 90 ? "" : ` (${duration(value.time_s)})`} on a ${value.device === "cuda" ? "GPU" : "CPU"} (${value.basis} rates)`],
        ...Object.entries(value.stages).map(([stage, seconds]) => [`– ${stage}`, `${seconds.toFixed(1)} s`]),
        ["Memory", bytes(value.ram_bytes)],
        ["GPU memory", value.vram_bytes ? bytes(value.vram_bytes) : null],
        ["Disk", bytes(value.disk_bytes)],
        ["Model", `${value.architecture}, ${parameters(value.parameters)} parameters, ${value.layers} layers`],
      ]} />
      <ul class="plain">${value.candidates.map((each) => html`<li key=${each.recipe_index}>
        <strong>${each.label}</strong>: ${bytes(Math.max(...Object.values(each.output_bytes)))},
        ${" "}${number(each.bits_per_weight, 3)} bits per weight</li>`)}</ul>
      ${value.notes.map((note) => html`<p key=${note}><small>${note}</small></p>`)}`}
  </aside>`;
}

/** The messages of a refusal that belong to the field at `path`. */
function messagesFor(error, path) {
  if (!(error instanceof ApiError)) return [];
  return error.fields.filter((field) => field.path === path || field.path.startsWith(`${path}.`)).map((field) => field.message);
}

function Field({ label, path, error, hint, children }) {
  const messages = messagesFor(error, path);
  return html`<div class=${messages.length ? "field field-bad" : "field"}>
    <label><span>${label}</span>${children}</label>
    ${hint && html`<small>${hint}</small>`}
    ${messages.map((message) => html`<small class="bad" role="alert" key=${message}>${message}</small>`)}
  </div>`;
}

function Choice({ value, options, onChange }) {
  return html`<select value=${value} onChange=${(event) => onChange(event.target.value)}>
    ${options.map(([option, text]) => html`<option key=${option} value=${option}>${text}</option>`)}
  </select>`;
}

function Presets({ chosen, onChoose }) {
  return html`<fieldset class="presets"><legend>Recipe</legend>
    ${PRESETS.map((preset) => html`<label key=${preset.name} class="preset">
      <input type="radio" name="preset" checked=${chosen === preset.name} onChange=${() => onChoose(preset)} />
      <span><strong>${preset.name}</strong><small>${preset.text}</small></span>
    </label>`)}
  </fieldset>`;
}

function RecipeFields({ form, set, error }) {
  return html`<div class="fields">
    <${Field} label="Method" path="recipe.method" error=${error}>
      <${Choice} value=${form.method} onChange=${set("method")} options=${[["awq", "AWQ"], ["gptq", "GPTQ"], ["omniquant", "OmniQuant"], ["rtn", "plain rounding"]]} /><//>
    <${Field} label="Scheme" path="recipe.scheme" error=${error}>
      <${Choice} value=${form.scheme} onChange=${set("scheme")} options=${SCHEMES} /><//>
    ${form.scheme === BLANK.scheme && html`<${GridFields} form=${form} set=${set} error=${error} />`}
    <${Field} label="Rounding" path="recipe.rounding" error=${error}>
      <${Choice} value=${form.rounding} onChange=${set("rounding")} options=${[["nearest", "nearest"], ["gptq", "GPTQ"]]} /><//>
    <${Field} label="Search" path="recipe.search.strategy" error=${error}>
      <${Choice} value=${form.strategy} onChange=${set("strategy")} options=${[["grid", "grid"], ["evolutionary", "evolutionary"]]} /><//>
  </div>`;
}

const SCHEMES = [
  ["wna16", "integers, weights alone"], ["fp8", "FP8"], ["fp8-block", "FP8 in blocks"], ["fp8-static", "FP8, one range of inputs"],
  ["w8a8", "INT8"], ["w8a8-static", "INT8, one range of inputs"], ["nvfp4", "NVFP4"], ["nvfp4a16", "NVFP4, weights alone"],
  ["mxfp4", "MXFP4"], ["mxfp4a16", "MXFP4, weights alone"], ["w4a8", "int4 and FP8 inputs"],
];

/** The grid of integers for weights alone. */
function GridFields({ form, set, error }) {
  return html`
    <${Field} label="Bits" path="recipe.bits" error=${error}>
      <${Choice} value=${form.bits} onChange=${set("bits")} options=${[["2", "2"], ["3", "3"], ["4", "4"], ["8", "8"]]} /><//>
    <${Field} label="Group size" path="recipe.group_size" error=${error}>
      <${Choice} value=${form.group_size} onChange=${set("group_size")} options=${[["auto", "the largest that fits"], ["32", "32"], ["64", "64"], ["128", "128"], ["-1", "whole rows"]]} /><//>
    <${Field} label="Grid" path="recipe.symmetric" error=${error}>
      <${Choice} value=${form.symmetric} onChange=${set("symmetric")} options=${[["no", "asymmetric"], ["yes", "symmetric"]]} /><//>`;
}

/** The formats that this service writes, as its own description lists them. */
function useFormats() {
  const [names, setNames] = useState([]);
  useEffect(() => {
    const listed = ({ value }) => setNames(value.components.schemas.JobSpec.properties.formats.items.enum);
    read("/openapi.json").then(listed, () => {});
  }, []);
  return names;
}

function Formats({ form, set, error }) {
  const names = [...new Set([...useFormats(), ...form.formats])];
  const toggle = (name) => (event) =>
    set("formats")(event.target.checked ? [...form.formats, name] : form.formats.filter((each) => each !== name));
  return html`<fieldset><legend>Formats</legend>
    ${names.map((name) => html`<label class="tick" key=${name}>
      <input type="checkbox" checked=${form.formats.includes(name)} onChange=${toggle(name)} /> ${name}</label>`)}
    ${messagesFor(error, "formats").map((message) => html`<small class="bad" key=${message}>${message}</small>`)}
  </fieldset>`;
}

function MoreFields({ form, set, error }) {
  const input = (name, more) => html`<input value=${form[name]} onInput=${(event) => set(name)(event.target.value)} ...${more} />`;
  return html`<details><summary>Target, text, priority</summary><div class="fields">
    <${Field} label="Highest ratio" path="target.max_perplexity_ratio" error=${error}
      hint="of perplexity: 1.01 allows one percent more; recipes are added until it is met">${input("ratio", { inputmode: "decimal", placeholder: "no target" })}<//>
    <${Field} label="Calibration windows" path="calibration.num_samples" error=${error}>${input("num_samples", { inputmode: "numeric" })}<//>
    <${Field} label="Tokens per window" path="calibration.sequence_length" error=${error}>${input("sequence_length", { inputmode: "numeric" })}<//>
    <${Field} label="Calibration text" path="calibration.dataset" error=${error}>${input("dataset", {})}<//>
    <${Field} label="Priority" path="priority" error=${error}>
      <${Choice} value=${form.priority} onChange=${set("priority")} options=${[["high", "high"], ["normal", "normal"], ["low", "low"]]} /><//>
    <${Field} label="Labels" path="labels" error=${error} hint="team=search, run=7">${input("labels", {})}<//>
  </div></details>`;
}

/** The form's state; with the id of a job, that job's spec. */
function useForm(template) {
  const [form, setForm] = useState({ ...BLANK, preset: PRESETS[0].name });
  useEffect(() => {
    if (template) read(`/v1/jobs/${template}`).then(({ value }) => setForm(formOf(value.spec)), () => {});
  }, [template]);
  const set = (name) => (value) => setForm((before) => ({ ...before, preset: null, [name]: value }));
  return [form, setForm, set];
}

function FirstOfSeveral({ template }) {
  const count = template ? recipesOf(template).length : 1;
  return count > 1 && html`<div class="card">${`That job had ${count} recipes. This form has the first; for all of them use “Run again” on its page,
    or its body, which is there under “As a request”.`}</div>`;
}

export function NewJobPage({ id: template }) {
  const [form, setForm, set] = useForm(template);
  const [refusal, setRefusal] = useState(null);
  const [sending, setSending] = useState(false);
  const body = useMemo(() => specOf(form), [form]);
  const estimate = useEstimate(body);
  const error = refusal || estimate.error;
  const submit = async (event) => {
    event.preventDefault();
    setSending(true);
    try {
      const job = await send("POST", "/v1/jobs", body, { headers: { "Idempotency-Key": crypto.randomUUID() } });
      location.hash = `#/jobs/${job.id}`;
    } catch (fault) {
      setRefusal(fault);
      setSending(false);
    }
  };
  const setModel = (event) => {
    setRefusal(null);
    setForm((before) => ({ ...before, model: event.target.value }));
  };
  return html`<${Title}>New job<//>
    <div class="beside">
      <form class="stack" onSubmit=${submit}>
        <${Field} label="Model" path="model" error=${error} hint="org/name on the hub, s3://bucket/prefix, or file:///folder under an allowed root">
          <input required value=${form.model} placeholder="Qwen/Qwen3-0.6B" onInput=${setModel} autofocus /><//>
        <${FirstOfSeveral} template=${form.template} />
        <${Presets} chosen=${form.preset} onChoose=${(preset) => setForm({ ...form, ...BLANK, ...preset.form, model: form.model, formats: preset.form.formats || form.formats, preset: preset.name })} />
        <details open=${form.preset === null}><summary>Adjust the recipe</summary><${RecipeFields} form=${form} set=${set} error=${error} /></details>
        <${Formats} form=${form} set=${set} error=${error} />
        <${MoreFields} form=${form} set=${set} error=${error} />
        <${Problem} error=${refusal} title="The job was refused" />
        <div class="actions"><button type="submit" class="main" disabled=${sending}>Submit job</button></div>
      </form>
      <${EstimatePanel} estimate=${estimate} hasModel=${Boolean(form.model)} />
    </div>`;
}
