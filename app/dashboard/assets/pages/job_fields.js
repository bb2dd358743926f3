// The fields of a job's body beside models, recipes and formats: each with its path in the body, its label and its kind.

const TEMPLATE_USES = [["auto", "of conversations"], ["always", "always: a text is a user's turn"], ["never", "never"]];
const EVENTS = ["job.started", "job.succeeded", "job.failed", "job.cancelled", "artifact.pushed", "artifact.push_failed"];

/** kind: text, number, words (separated by commas), choice, tick, ticks, secret, labels. `initial`: in a new form; an empty
 * field leaves the value to the service. `schema`: whose choices are in the service's description. `scope`: who may fill it. */
export const GROUPS = [
  { name: "Target", isMeasured: true, fields: [
    { path: "target.max_perplexity_ratio", label: "Max perplexity ratio", kind: "number", hint: "1.01 allows one percent more; recipes are added until it is met", placeholder: "no target" },
    { path: "target.max_kl", label: "Max KL divergence", kind: "number", hint: "nats per token", placeholder: "no target" },
    { path: "target.min_recovery", label: "Min share of task scores", kind: "number", hint: "0.99 keeps 99 % of the original's; needs tasks", placeholder: "no target" },
    { path: "target.max_size", label: "Max size of the files", kind: "text", hint: "such as 5GB", placeholder: "no target" },
    { path: "target.on_miss", label: "If nothing meets it", kind: "choice", initial: "fail", options: [["fail", "publish nothing"], ["publish", "publish the best try"]] },
  ] },
  { name: "Calibration", isMeasured: true, fields: [
    { path: "calibration.dataset", label: "Calibration text", kind: "text", initial: "builtin:wikitext2", list: "texts", hint: "built in, on the hub, uploaded, or self: the model's own answers" },
    { path: "calibration.num_samples", label: "Calibration windows", kind: "number", initial: "128" },
    { path: "calibration.sequence_length", label: "Tokens per window", kind: "number", initial: "512" },
    { path: "calibration.chat_template", label: "Chat template", kind: "choice", initial: "auto", options: TEMPLATE_USES },
    { path: "calibration.seed", label: "Seed of the windows", kind: "number", placeholder: "0" },
    { path: "calibration.all_experts", label: "Show every token to every expert", kind: "tick" },
  ] },
  { name: "Evaluation", isMeasured: true, fields: [
    { path: "evaluation.dataset", label: "Evaluation text", kind: "text", list: "texts", placeholder: "builtin:wikitext2" },
    { path: "evaluation.num_samples", label: "Evaluation windows", kind: "number", placeholder: "64" },
    { path: "evaluation.sequence_length", label: "Tokens per evaluation window", kind: "number", placeholder: "as in calibration" },
    { path: "evaluation.chat_template", label: "Chat template in evaluation", kind: "choice", initial: "auto", options: TEMPLATE_USES },
    { path: "evaluation.tasks", label: "Tasks", kind: "words", hint: "of lm-eval, such as arc_easy, or builtin:continuation", placeholder: "none" },
    { path: "evaluation.task_limit", label: "Documents per task", kind: "number", placeholder: "all" },
  ] },
  { name: "Afterwards", fields: [
    { path: "deploy.name", label: "Deploy as", kind: "text", hint: "serve the result under this name", placeholder: "not deployed", scope: "deployments:write" },
    { path: "push.repo_id", label: "Push to", kind: "text", hint: "a hub repository: account/name", placeholder: "not pushed", scope: "artifacts:write" },
    { path: "push.revision", label: "Branch", kind: "text", needs: "push.repo_id", placeholder: "main" },
    { path: "push.commit_message", label: "Commit message", kind: "text", needs: "push.repo_id", placeholder: "what was done" },
    { path: "push.private", label: "Private, if it is new", kind: "tick", initial: true, needs: "push.repo_id" },
    { path: "webhook.url", label: "Webhook", kind: "text", hint: "a URL that is told of the job", placeholder: "none" },
    { path: "webhook.events", label: "Webhook events", kind: "ticks", initial: EVENTS.slice(1, 4), options: EVENTS, needs: "webhook.url" },
  ] },
  { name: "Sources and limits", fields: [
    { path: "adapter", label: "LoRA adapter", kind: "reference", hint: "merged into the weights; a reference like a model's", placeholder: "none" },
    { path: "hub_token", label: "Hub token", kind: "secret", hint: "reads private models and pushes; it is not kept with the job", placeholder: "the service's" },
    { path: "serve_on", label: "Served on", kind: "choice", hint: "notes say what the recipe means there", schema: "serve_on", options: [["", "not said"]] },
    { path: "timeout_s", label: "Time limit (seconds)", kind: "number", initial: "14400", hint: "the job is stopped after it" },
    { path: "queue_timeout_s", label: "Longest wait for a worker (seconds)", kind: "number", placeholder: "any" },
    { path: "priority", label: "Priority", kind: "choice", initial: "normal", options: [["high", "high"], ["normal", "normal"], ["low", "low"]] },
    { path: "labels", label: "Labels", kind: "labels", hint: "team=search, run=7" },
    { path: "force", label: "Compute anew, even if the result exists", kind: "tick" },
  ] },
];

export const FIELDS = GROUPS.flatMap((group) => group.fields);

/** The section of a body without which the others of it mean nothing. */
const ESSENTIAL = { deploy: "name", push: "repo_id", webhook: "url" };

const emptyOf = ({ kind }) => (kind === "tick" ? false : kind === "ticks" ? [] : "");

/** The values of a new form, by path. */
export const INITIAL = Object.fromEntries(FIELDS.map((field) => [field.path, field.initial ?? emptyOf(field)]));

export function numberOr(text, whenBlank) {
  if (text.trim() === "") return whenBlank;
  return Number.isNaN(Number(text)) ? text.trim() : Number(text);
}

/** Words between commas, but not those of a pattern such as {1,2}. */
export const wordsOf = (text) => text.split(/,(?![^{]*\})/).map((word) => word.trim()).filter(Boolean);

/** What is wrong with the labels as they are written; empty if nothing is. */
export function labelFaults(text) {
  return wordsOf(text).filter((pair) => !/^[^=]+=/.test(pair)).map((pair) => `“${pair}” has no value: write key=value, such as team=search`);
}

function labelsOf(text) {
  const pairs = wordsOf(text).filter((pair) => pair.includes("=")).map((pair) => pair.split("="));
  return Object.fromEntries(pairs.map(([key, ...value]) => [key.trim(), value.join("=").trim()]));
}

/** A model as the service writes it: a folder becomes its file:// address. */
export function referenceOf(text) {
  const model = text.trim().replace(/(?<=[^/])\/+$/, "");
  return model.startsWith("/") ? `file://${model.split("/").map(encodeURIComponent).join("/")}` : model;
}

const READERS = {
  number: (text) => numberOr(text, undefined), words: (text) => (wordsOf(text).length ? wordsOf(text) : undefined), labels: labelsOf, reference: (text) => referenceOf(text) || undefined,
  tick: (value) => value, ticks: (values) => (values.length ? values : undefined),
};

/** What a field says; undefined where it leaves the value to the service, whose own choice a form begins with. */
function valueOf({ kind, initial }, value) {
  if (kind === "choice" && value === initial) return undefined;
  return READERS[kind] ? READERS[kind](value) : value.trim() || undefined;
}

const WRITERS = {
  words: (value) => value.join(", "), tick: (value) => value, ticks: (value) => value,
  labels: (value) => Object.entries(value).map(([key, each]) => `${key}=${each}`).join(", "),
};

export const readAt = (body, path) => path.split(".").reduce((value, key) => value?.[key], body);

/** Sets the value at `path`; undefined takes it away, but a null that was there stays. */
function putAt(body, path, value) {
  const [name, inner] = path.split(".");
  if (inner) {
    body[name] = { ...body[name] };
    putAt(body[name], inner, value);
  } else if (value !== undefined) {
    body[name] = value;
  } else if (body[name] !== null) {
    delete body[name];
  }
}

/** The values of a spec, by path. */
export function valuesOf(spec) {
  return Object.fromEntries(FIELDS.map((field) => {
    const value = readAt(spec, field.path);
    return [field.path, value === undefined || value === null ? emptyOf(field) : (WRITERS[field.kind] ?? String)(value)];
  }));
}

/** `body` with what the form's fields say; text that is no number stays text, so that the service's error names the field. */
export function withFields(body, form) {
  const filled = { ...body };
  for (const field of FIELDS) putAt(filled, field.path, valueOf(field, form[field.path]));
  for (const section of ["calibration", "evaluation"]) {
    if (filled[section].dataset) delete filled[section].texts;
    if (Object.keys(filled[section]).length === 0) delete filled[section];
  }
  for (const [section, name] of Object.entries(ESSENTIAL)) {
    if (!filled[section][name]) delete filled[section];
  }
  const { max_perplexity_ratio: ratio, max_kl: kl, min_recovery: recovery, max_size: size } = filled.target;
  if ([ratio, kl, recovery, size].every((limit) => limit === null || limit === undefined)) delete filled.target;
  return filled;
}
