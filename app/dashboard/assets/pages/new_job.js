// The form for a job: presets, fields, and an estimate before it is submitted.
import { ApiError, Unreachable, read, send } from "../api.js";
import { may } from "../caller.js";
import { bytes, duration, number, parameters } from "../format.js";
import { Empty, Facts, Problem, Title, useFirstFocus } from "../parts.js";
import { useAway } from "../polling.js";
import { html, useEffect, useMemo, useRef, useState } from "../ui.js";
import { Choice, Field, messagesFor } from "./form_fields.js";
import { BLANK, PRESETS, formOf, labelFaults, specOf, withEvaluation, withPreset } from "./job_form.js";
import { RecipeRows } from "./recipe_rows.js";
import { TextUpload, useDatasets } from "./text_upload.js";

const PAUSE_MS = 500;
const LEAST_S = 0.05; // of a stage that is shown

/** { value, error, asking } of POST /v1/estimates for the body, once typing pauses, and again when the service is back. */
function useEstimate(body) {
  const [state, setState] = useState({ value: null, error: null, asking: false });
  const isAway = Boolean(useAway());
  useEffect(() => {
    if (!body.model || isAway) return undefined;
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
  }, [JSON.stringify(body), isAway]);
  return state;
}

function EstimatePanel({ estimate, hasModel }) {
  const { value, error, asking } = estimate;
  return html`<aside class="card estimate" aria-label="Estimate" aria-live="polite" aria-busy=${asking}>
    <h2>Estimate</h2>
    ${!hasModel && html`<p>Name a model to see time, memory and size before you submit.</p>`}
    <${Problem} error=${error} title=${error instanceof ApiError && error.status < 500 ? "This job would be refused" : "No estimate"} />
    ${value && html`<${Facts} rows=${[
        ["Time", html`<strong>${duration(value.time_s)}</strong>`],
        ...Object.entries(value.stages).filter(([, spent]) => spent >= LEAST_S).map(([stage, spent]) => [`– ${stage}`, duration(spent)]),
        ["Device", `${value.device === "cuda" ? "GPU" : "CPU"}, rates ${value.basis}`],
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

function Presets({ chosen, onChoose }) {
  return html`<fieldset class="presets"><legend>Recipe</legend>
    ${PRESETS.map((preset) => html`<label key=${preset.name} class="preset">
      <input type="radio" name="preset" checked=${chosen === preset.name} onChange=${() => onChoose(preset)} />
      <span><strong>${preset.name}</strong><small>${preset.text}</small></span>
    </label>`)}
  </fieldset>`;
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

function Evaluation({ form, onChange, error }) {
  return html`<fieldset><legend>Evaluation</legend>
    <label class="tick">
      <input type="checkbox" checked=${form.evaluate} onChange=${(event) => onChange(event.target.checked)} /> Compare with the original</label>
    ${!form.evaluate && html`<small>Plain rounding of any checkpoint, without text; nothing will be known of the model's quality.</small>`}
    ${messagesFor(error, "evaluation").map((message) => html`<small class="bad" role="alert" key=${message}>${message}</small>`)}
  </fieldset>`;
}

function MoreFields({ form, set, error }) {
  const [datasets, askDatasets] = useDatasets();
  const input = (name, more) => html`<input value=${form[name]} onInput=${(event) => set(name)(event.target.value)} ...${more} />`;
  return html`<details><summary>${form.evaluate ? "Target, text, limits" : "Limits, labels"}</summary><div class="fields">
    ${form.evaluate && html`<${Field} label="Max perplexity ratio" path="target.max_perplexity_ratio" error=${error}
      hint="1.01 allows one percent more; recipes are added until it is met">${input("ratio", { inputmode: "decimal", placeholder: "no target" })}<//>
    <${Field} label="Max KL divergence" path="target.max_kl" error=${error} hint="nats per token">${input("kl", { inputmode: "decimal", placeholder: "no target" })}<//>
    <${Field} label="Calibration windows" path="calibration.num_samples" error=${error}>${input("num_samples", { inputmode: "numeric" })}<//>
    <${Field} label="Tokens per window" path="calibration.sequence_length" error=${error}>${input("sequence_length", { inputmode: "numeric" })}<//>
    <${Field} label="Calibration text" path="calibration.dataset" error=${error} hint="built in, on the hub, or uploaded">${input("dataset", { list: "texts" })}<//>
    <${Field} label="Evaluation text" path="evaluation.dataset" error=${error}>${input("judged_on", { list: "texts", placeholder: "builtin:wikitext2" })}<//>
    <${Field} label="Evaluation windows" path="evaluation.num_samples" error=${error}>${input("judged_windows", { inputmode: "numeric", placeholder: "64" })}<//>`}
    <${Field} label="Time limit (seconds)" path="timeout_s" error=${error} hint="the job is stopped after it">${input("timeout_s", { inputmode: "numeric" })}<//>
    <${Field} label="Priority" path="priority" error=${error}>
      <${Choice} value=${form.priority} onChange=${set("priority")} options=${[["high", "high"], ["normal", "normal"], ["low", "low"]]} /><//>
    <${Field} label="Labels" path="labels" error=${error} hint="team=search, run=7" faults=${labelFaults(form.labels)}>${input("labels", {})}<//>
    ${may("deployments:write") && html`<${Field} label="Deploy as" path="deploy" error=${error} hint="serve the result under this name">${input("deploy", { placeholder: "not deployed" })}<//>`}
    </div>
    ${form.evaluate && html`<${TextUpload} sequenceLength=${/^\d+$/.test(form.sequence_length) ? form.sequence_length : 512} onUploaded=${(reference) => (set("dataset")(reference), askDatasets())} />`}
    <datalist id="texts"><option value="builtin:wikitext2" />${datasets.map((each) => html`<option key=${each.id} value=${each.reference}>${each.name}</option>`)}</datalist>
    <label class="tick"><input type="checkbox" checked=${form.force} onChange=${(event) => set("force")(event.target.checked)} /> Compute anew, even if the result exists</label>
  </details>`;
}

/** The form's state; with the id of a job, that job's spec. */
function useForm(template) {
  const [form, setForm] = useState({ ...BLANK, preset: PRESETS[0].name });
  const [error, setError] = useState(null);
  useEffect(() => {
    if (template) read(`/v1/jobs/${template}`).then(({ value }) => setForm(formOf(value.spec)), setError);
  }, [template]);
  const set = (name) => (value) => setForm((before) => ({ ...before, [name]: value }));
  return { form, setForm, set, error };
}

/** The refusal of the last submission; gone as soon as the body is another one. */
function useSubmission(body) {
  const [refusal, setRefusal] = useState(null);
  const [sending, setSending] = useState(false);
  const key = useRef(null); // the same for every try of one body, so that a lost answer does not make two jobs
  useEffect(() => {
    setRefusal(null);
    key.current = crypto.randomUUID();
  }, [JSON.stringify(body)]);
  const submit = async () => {
    setSending(true);
    try {
      const job = await send("POST", "/v1/jobs", body, { headers: { "Idempotency-Key": key.current } });
      location.hash = `#/jobs/${job.id}`;
    } catch (fault) {
      setRefusal(fault);
      setSending(false);
    }
  };
  return { refusal, sending, submit };
}

/** Why the job can't be submitted as it is; empty if it can. */
function obstacle(form, error) {
  if (labelFaults(form.labels).length > 0) return "Correct the labels first.";
  if (form.recipes.length === 0) return "Add a recipe first.";
  return error instanceof ApiError && error.status < 500 ? "Correct what is marked first." : "";
}

function JobForm({ template }) {
  const { form, setForm, set, error: unread } = useForm(template);
  const first = useFirstFocus();
  const body = useMemo(() => specOf(form), [form]);
  const estimate = useEstimate(body);
  const { refusal, sending, submit } = useSubmission(body);
  const error = refusal || estimate.error;
  const why = obstacle(form, estimate.error);
  const setRecipes = (recipes) => setForm((before) => ({ ...before, preset: null, recipes }));
  const onSubmit = (event) => {
    event.preventDefault();
    if (!why) submit();
  };
  return html`<div class="beside">
    <form class="stack" onSubmit=${onSubmit}>
      <${Problem} error=${unread} title="Can't read the job to copy" />
      <${Field} label="Model" path="model" error=${error} hint="org/name on the hub, s3://bucket/prefix, or a folder under an allowed root">
        <input required ref=${first} value=${form.model} placeholder="Qwen/Qwen3-0.6B" onInput=${(event) => set("model")(event.target.value)} /><//>
      <${Presets} chosen=${form.preset} onChoose=${(preset) => setForm((before) => withPreset(before, preset))} />
      <details open=${form.preset === null || form.recipes.length > 1}><summary>${form.recipes.length > 1 ? `${form.recipes.length} recipes` : "Customize, or compare several recipes"}</summary>
        <${RecipeRows} recipes=${form.recipes} isEvaluated=${form.evaluate} onChange=${setRecipes} error=${error} /></details>
      <${Formats} form=${form} set=${set} error=${error} />
      <${Evaluation} form=${form} onChange=${(evaluate) => setForm((before) => withEvaluation(before, evaluate))} error=${error} />
      <${MoreFields} form=${form} set=${set} error=${error} />
      <${Problem} error=${refusal} title=${refusal instanceof Unreachable ? "Not submitted" : "The job was refused"} />
      <div class="actions">
        ${why && html`<small id="why" class="bad">${why}</small>`}
        <button type="submit" class="main" disabled=${sending || Boolean(why)} aria-describedby=${why ? "why" : undefined}>Submit job</button>
      </div>
    </form>
    <${EstimatePanel} estimate=${estimate} hasModel=${Boolean(form.model)} />
  </div>`;
}

export function NewJobPage({ id: template }) {
  const isAllowed = may("jobs:write") && may("jobs:read");
  return html`<${Title} isFocused=${!isAllowed}>New job<//>
    ${isAllowed ? html`<${JobForm} template=${template} />` : html`<${Empty} title="Read-only">This key can't submit jobs.<//>`}`;
}
