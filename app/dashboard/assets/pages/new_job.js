// The form for a job: presets, fields, and an estimate before it is submitted.
import { ApiError, Unreachable, read, send } from "../api.js";
import { may } from "../caller.js";
import { bytes, duration, modelName, number, parameters } from "../format.js";
import { Empty, Facts, Problem, Title, useFirstFocus } from "../parts.js";
import { useAway } from "../polling.js";
import { randomId } from "../random_id.js";
import { html, useEffect, useMemo, useRef, useState } from "../ui.js";
import { FieldGroups, Ticks } from "./field_groups.js";
import { messagesFor } from "./form_fields.js";
import { labelFaults, referenceOf } from "./job_fields.js";
import { BLANK, PRESETS, bodiesOf, formOf, withEvaluation, withPreset } from "./job_form.js";
import { ModelRows, SweepName } from "./model_rows.js";
import { RecipeRows } from "./recipe_rows.js";

const PAUSE_MS = 500;
const LEAST_S = 0.05; // of a stage that is shown
const NOTHING = { value: null, error: null, asking: false };

/** { value, error, asking } of POST /v1/estimates for each body, once typing pauses, and again when the service is back. */
function useEstimates(bodies) {
  const [states, setStates] = useState({}); // by model
  const [asking, setAsking] = useState(false);
  const last = useRef(NOTHING); // of the only model, while another one is typed
  const isAway = Boolean(useAway());
  const key = JSON.stringify(bodies);
  useEffect(() => {
    if (isAway) return undefined;
    const control = new AbortController();
    const ask = async (body, text) => {
      const answer = await send("POST", "/v1/estimates", body, { signal: control.signal }).then((value) => ({ value, error: null }), (error) => ({ value: null, error }));
      if (!control.signal.aborted) setStates((before) => ({ ...before, [body.model]: { ...answer, text } }));
    };
    const timer = setTimeout(async () => {
      const fresh = bodies.map((body) => [body, JSON.stringify(body)]).filter(([body, text]) => body.model && (states[body.model]?.text !== text || states[body.model].error));
      setAsking(fresh.length > 0);
      await Promise.all(fresh.map(([body, text]) => ask(body, text)));
      if (!control.signal.aborted) setAsking(false);
    }, PAUSE_MS);
    return () => {
      clearTimeout(timer);
      control.abort();
    };
  }, [key, isAway]);
  if (bodies.length === 1 && states[bodies[0].model]) last.current = states[bodies[0].model];
  return bodies.map(({ model }) => ({ ...(states[model] ?? (model && bodies.length === 1 ? last.current : NOTHING)), asking }));
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

/** What a sweep would submit: each model with its estimate, or why it would be refused. */
function SweepPanel({ bodies, estimates }) {
  const known = estimates.filter(({ value }) => value);
  const recipes = [bodies[0].recipe].flat().length;
  return html`<aside class="card estimate" aria-label="Estimate" aria-live="polite" aria-busy=${estimates[0].asking}>
    <h2>Estimate</h2>
    <p><strong>${bodies.length} jobs</strong>${recipes > 1 ? ` with ${recipes} recipes each` : ""}${known.length > 0 ? `, ${duration(known.reduce((sum, { value }) => sum + value.time_s, 0))} of one worker` : ""}</p>
    <ul class="plain sweep">${bodies.map(({ model }, index) => html`<li key=${model}><strong>${modelName(model)}</strong> <${InShort} estimate=${estimates[index]} /></li>`)}</ul>
  </aside>`;
}

function InShort({ estimate: { value, error } }) {
  if (error) return html`<small class="bad">${error instanceof ApiError && error.status < 500 ? "would be refused" : "no estimate"}: ${error.message}</small>`;
  if (!value) return html`<small>…</small>`;
  const sizes = value.candidates.map((each) => Math.max(...Object.values(each.output_bytes)));
  const memory = value.vram_bytes ? `${bytes(value.vram_bytes)} of GPU memory` : `${bytes(value.ram_bytes)} of memory`;
  return html`<small>${duration(value.time_s)}, ${memory}, ${[...new Set([Math.min(...sizes), Math.max(...sizes)].map(bytes))].join(" to ")} of weights</small>`;
}

function Presets({ chosen, onChoose }) {
  return html`<fieldset class="presets"><legend>Recipe</legend>
    ${PRESETS.map((preset) => html`<label key=${preset.name} class="preset">
      <input type="radio" name="preset" checked=${chosen === preset.name} onChange=${() => onChoose(preset)} />
      <span><strong>${preset.name}</strong><small>${preset.text}</small></span>
    </label>`)}
  </fieldset>`;
}

/** What this service has to choose from, as its own description lists it: { formats, serve_on }. */
function useChoices() {
  const [choices, setChoices] = useState({ formats: [], serve_on: [] });
  useEffect(() => {
    const listed = ({ value }) => {
      const { formats, serve_on: devices } = value.components.schemas.JobSpec.properties;
      setChoices({ formats: formats.items.enum, serve_on: (devices.enum ?? devices.anyOf.flatMap((each) => each.enum ?? [])).filter(Boolean) });
    };
    read("/openapi.json").then(listed, () => {});
  }, []);
  return choices;
}

function Formats({ form, set, error, names }) {
  const all = [...new Set([...names, ...form.formats])];
  return html`<${Ticks} path="formats" label="Formats" value=${form.formats} options=${all} onChange=${set("formats")} error=${error} />`;
}

function Evaluation({ form, onChange, error }) {
  return html`<fieldset data-path="evaluation"><legend>Evaluation</legend>
    <label class="tick">
      <input type="checkbox" checked=${form.evaluate} onChange=${(event) => onChange(event.target.checked)} /> Compare with the original</label>
    ${!form.evaluate && html`<small>Plain rounding of any checkpoint, without text; nothing will be known of the model's quality.</small>`}
    ${messagesFor(error, "evaluation").map((message) => html`<small class="bad" role="alert" key=${message}>${message}</small>`)}
  </fieldset>`;
}

/** A name for a sweep that is made now. */
function sweepName() {
  const now = new Date();
  return `sweep-${now.toISOString().slice(5, 16).replace(/[-:]/g, "").replace("T", "-")}`;
}

/** The form's state; with the id of a job, that job's spec. */
function useForm(template) {
  const [form, setForm] = useState({ ...BLANK, preset: PRESETS[0].name, sweep: sweepName() });
  const [error, setError] = useState(null);
  useEffect(() => {
    if (template) read(`/v1/jobs/${template}`).then(({ value }) => setForm({ ...formOf(value.spec), sweep: sweepName() }), setError);
  }, [template]);
  const set = (name) => (value) => setForm((before) => ({ ...before, [name]: value }));
  return { form, setForm, set, error };
}

/** What came of the bodies that were sent: `results` by body { job } or { error }, gone as soon as a body is another one. */
function useSubmission(bodies) {
  const [results, setResults] = useState([]);
  const [sending, setSending] = useState(false);
  const keys = useRef(new Map()); // the same for every try of one body, so that a lost answer does not make two jobs
  const texts = bodies.map((body) => JSON.stringify(body));
  useEffect(() => setResults([]), [texts.join("\n")]);
  const sendOne = async (body, text) => {
    if (!keys.current.has(text)) keys.current.set(text, randomId());
    try {
      return { job: await send("POST", "/v1/jobs", body, { headers: { "Idempotency-Key": keys.current.get(text) } }) };
    } catch (error) {
      return { error };
    }
  };
  const submit = async () => {
    setSending(true);
    const all = [];
    for (const [index, body] of bodies.entries()) all.push(results[index]?.job ? results[index] : await sendOne(body, texts[index]));
    setSending(false);
    if (all.some(({ error }) => error)) setResults(all);
    else location.hash = all.length === 1 ? `#/jobs/${all[0].job.id}` : `#/jobs?q=${encodeURIComponent(`sweep=${bodies[0].labels.sweep}`)}`;
  };
  return { results, sending, submit };
}

const isRefused = ({ error }) => error instanceof ApiError && error.status < 500;

/** Why nothing can be submitted as it is; empty if something can. */
function obstacle(form, bodies, estimates) {
  if (labelFaults(form.labels).length > 0) return "Correct the labels first.";
  if (form.recipes.length === 0) return "Add a recipe first.";
  const named = ["deploy.name", "push.repo_id"].find((path) => form[path].trim());
  if (bodies.length > 1 && named) return `${named === "deploy.name" ? "“Deploy as”" : "“Push to”"} names one result: leave it empty for several models.`;
  return estimates.every(isRefused) ? "Correct what is marked first." : "";
}

/** Of a sweep that was not taken as a whole: what became of each model. */
function SweepResults({ bodies, results }) {
  const refused = results.filter(({ error }) => error).length;
  return html`<div class="problem" role="alert"><strong>${refused} of ${results.length} jobs were not submitted</strong>
    <ul class="plain">${results.map(({ job, error }, index) => html`<li key=${bodies[index].model}>${modelName(bodies[index].model)}: ${job
      ? html`submitted as <a href=${`#/jobs/${job.id}`}>${job.id}</a>` : html`${error.message} <span class="remedy">${error.remedy}</span>`}</li>`)}</ul>
    <p>Submitting again sends those that are missing alone.</p></div>`;
}

function Refusal({ bodies, results }) {
  if (!results.some(({ error }) => error)) return null;
  if (bodies.length > 1) return html`<${SweepResults} bodies=${bodies} results=${results} />`;
  const [{ error }] = results;
  return html`<${Problem} error=${error} title=${error instanceof Unreachable ? "Not submitted" : "The job was refused"} />`;
}

function JobForm({ template }) {
  const { form, setForm, set, error: unread } = useForm(template);
  const first = useFirstFocus();
  const choices = useChoices();
  const bodies = useMemo(() => bodiesOf(form), [form]);
  const estimates = useEstimates(bodies);
  const { results, sending, submit } = useSubmission(bodies);
  const errors = bodies.map((_, index) => results[index]?.error ?? estimates[index].error);
  const error = errors.find(Boolean) ?? null;
  const why = obstacle(form, bodies, estimates);
  const modelErrors = form.models.map((model) => errors[bodies.findIndex((body) => body.model === referenceOf(model))] ?? null);
  const setRecipes = (recipes) => setForm((before) => ({ ...before, preset: null, recipes }));
  const onSubmit = (event) => {
    event.preventDefault();
    if (!why) submit();
  };
  return html`<div class="beside">
    <form class="stack" onSubmit=${onSubmit}>
      <${Problem} error=${unread} title="Can't read the job to copy" />
      <${ModelRows} models=${form.models} onChange=${set("models")} errors=${modelErrors} first=${first} />
      ${bodies.length > 1 && html`<${SweepName} value=${form.sweep} onChange=${set("sweep")} error=${error} />`}
      <${Presets} chosen=${form.preset} onChoose=${(preset) => setForm((before) => withPreset(before, preset))} />
      <details open=${form.preset === null || form.recipes.length > 1}><summary>${form.recipes.length > 1 ? `${form.recipes.length} recipes` : "Customize, or compare several recipes"}</summary>
        <${RecipeRows} recipes=${form.recipes} isEvaluated=${form.evaluate} onChange=${setRecipes} error=${error} /></details>
      <${Formats} form=${form} set=${set} error=${error} names=${choices.formats} />
      <${Evaluation} form=${form} onChange=${(evaluate) => setForm((before) => withEvaluation(before, evaluate))} error=${error} />
      <${FieldGroups} form=${form} set=${set} error=${error} choices=${choices} />
      <${Refusal} bodies=${bodies} results=${results} />
      <div class="actions">
        ${why && html`<small id="why" class="bad">${why}</small>`}
        <button type="submit" class="main" disabled=${sending || Boolean(why)} aria-describedby=${why ? "why" : undefined}>${bodies.length > 1 ? `Submit ${bodies.length} jobs` : "Submit job"}</button>
      </div>
    </form>
    ${bodies.length > 1 ? html`<${SweepPanel} bodies=${bodies} estimates=${estimates} />` : html`<${EstimatePanel} estimate=${estimates[0]} hasModel=${Boolean(bodies[0].model)} />`}
  </div>`;
}

export function NewJobPage({ id: template }) {
  const isAllowed = may("jobs:write") && may("jobs:read");
  return html`<${Title} isFocused=${!isAllowed}>New job<//>
    ${isAllowed ? html`<${JobForm} template=${template} />` : html`<${Empty} title="Read-only">This key can't submit jobs.<//>`}`;
}
