// Converts the form's fields to the body of POST /v1/jobs and back.

/** One recipe of the form; `template`: the recipe that it came from, of which what has no field is sent as it was. */
export const BLANK_RECIPE = {
  method: "awq", scheme: "wna16", bits: "4", group_size: "auto", rounding: "nearest", symmetric: "no", strategy: "grid", kv_cache: "", template: null,
};

export const BLANK = {
  model: "", recipes: [BLANK_RECIPE], formats: ["compressed-tensors"], ratio: "", kl: "", num_samples: "128", sequence_length: "512",
  dataset: "builtin:wikitext2", judged_on: "", judged_windows: "", priority: "normal", labels: "", timeout_s: "14400", force: false, deploy: "", evaluate: true,
  template: null, // the spec that the form came from: what has no field is sent as it was
};

export const MOST_RECIPES = 16;

export const PRESETS = [
  { name: "Balanced", text: "AWQ, 4 bits, the largest groups that fit", recipe: {} },
  { name: "Best at 4 bits", text: "AWQ scales with GPTQ rounding", recipe: { rounding: "gptq" } },
  { name: "Small", text: "3 bits with GPTQ rounding", recipe: { bits: "3", rounding: "gptq" } },
  { name: "Within one percent", text: "the smallest model that loses at most 1 % perplexity", recipe: { bits: "3", rounding: "gptq" }, form: { ratio: "1.01" } },
  { name: "Nearly lossless", text: "plain rounding to 8 bits, quick", recipe: { method: "rtn", bits: "8" } },
  { name: "FP8", text: "weights and inputs, for many requests at a time on newer GPUs", recipe: { method: "rtn", scheme: "fp8" } },
];

/** The form with a preset's recipe in the place of its own; the model and what is not of a recipe stay. */
export const withPreset = (form, { name, recipe, form: rest }) => ({
  ...form, preset: name, ratio: "", kl: "", ...rest, recipes: [{ ...BLANK_RECIPE, ...recipe }],
});

const searches = ({ method }) => method === "awq" || method === "omniquant";

/** The fields that the method and the scheme of a recipe leave open; the others would be ignored. */
export function fieldsOf(recipe, isEvaluated = true) {
  const grid = recipe.scheme === BLANK_RECIPE.scheme ? ["bits", "group_size", "symmetric"] : [];
  const search = searches(recipe) ? ["rounding", "strategy"] : [];
  return ["method", "scheme", ...grid, ...search, ...(isEvaluated ? ["kv_cache"] : [])];
}

/** The recipe with a field changed, and what the change rules out set back. */
export function withField(recipe, name, value) {
  const changed = { ...recipe, [name]: value };
  if (changed.method === "omniquant") changed.scheme = BLANK_RECIPE.scheme;
  if (!searches(changed)) Object.assign(changed, { rounding: BLANK_RECIPE.rounding, strategy: BLANK_RECIPE.strategy });
  return changed;
}

// What reads no text; the rest of a form without an evaluation is for the service to judge.
const UNREAD = { method: "rtn", rounding: "nearest", kv_cache: "" };

/** The form with its evaluation switched on or off. */
export const withEvaluation = (form, evaluate) => ({
  ...form, preset: null, evaluate, ...(evaluate ? {} : { ratio: "", kl: "", recipes: form.recipes.map((recipe) => ({ ...recipe, ...UNREAD })) }),
});

function numberOr(text, whenBlank) {
  if (text.trim() === "") return whenBlank;
  return Number.isNaN(Number(text)) ? text : Number(text);
}

const pairsOf = (text) => text.split(",").map((pair) => pair.trim()).filter(Boolean);

/** What is wrong with the labels as they are written; empty if nothing is. */
export function labelFaults(text) {
  return pairsOf(text).filter((pair) => !/^[^=]+=/.test(pair)).map((pair) => `“${pair}” has no value: write key=value, such as team=search`);
}

function labelsOf(text) {
  const pairs = pairsOf(text).filter((pair) => pair.includes("=")).map((pair) => pair.split("="));
  return Object.fromEntries(pairs.map(([key, ...value]) => [key.trim(), value.join("=").trim()]));
}

/** A model as the service writes it: a folder becomes its file:// address. */
export function referenceOf(text) {
  const model = text.trim();
  return model.startsWith("/") ? `file://${encodeURI(model)}` : model;
}

/** All recipes of a job: one or a list in its spec. */
export const recipesOf = (spec) => [spec.recipe].flat();

function calibrationOf(form) {
  const named = form.dataset.trim();
  const text = named ? { dataset: named, texts: undefined } : {};
  return {
    ...form.template?.calibration, ...text, num_samples: numberOr(form.num_samples, 128),
    sequence_length: numberOr(form.sequence_length, 512),
  };
}

function evaluationOf(form) {
  const named = form.judged_on.trim();
  const text = named ? { dataset: named, texts: undefined } : {};
  const windows = numberOr(form.judged_windows, undefined);
  const asked = { ...form.template?.evaluation, ...text, ...(windows === undefined ? {} : { num_samples: windows }) };
  return Object.keys(asked).length > 0 ? asked : undefined;
}

/** The sections of a body that say what is read and measured. */
function measuresOf(form) {
  if (!form.evaluate) return { evaluation: null, calibration: undefined, target: undefined };
  return { evaluation: evaluationOf(form), calibration: calibrationOf(form), target: targetOf(form) };
}

function targetOf(form) {
  const target = { ...form.template?.target, max_perplexity_ratio: numberOr(form.ratio, null), max_kl: numberOr(form.kl, null) };
  const limits = [target.max_perplexity_ratio, target.max_kl, target.min_recovery, target.max_size];
  return limits.some((limit) => limit !== null && limit !== undefined) ? target : undefined;
}

// What other schemes than integers for weights alone say themselves.
const OF_SCHEME = { bits: undefined, group_size: undefined, symmetric: undefined };

function recipeOf(row) {
  const grid = { bits: Number(row.bits), group_size: numberOr(row.group_size, "auto"), symmetric: row.symmetric === "yes" };
  return {
    ...row.template, method: row.method, scheme: row.scheme, ...(row.scheme === BLANK_RECIPE.scheme ? grid : OF_SCHEME),
    rounding: row.rounding, kv_cache: row.kv_cache || null, search: { ...row.template?.search, strategy: row.strategy },
  };
}

/** The body to send. Text that is not a number stays text, so that the service's error names the field. */
export function specOf(form) {
  const recipes = form.recipes.map(recipeOf);
  return {
    ...form.template, model: referenceOf(form.model), recipe: recipes.length === 1 ? recipes[0] : recipes, formats: form.formats,
    priority: form.priority, labels: labelsOf(form.labels), timeout_s: numberOr(form.timeout_s, 14400), force: form.force,
    deploy: form.deploy.trim() ? { ...form.template?.deploy, name: form.deploy.trim() } : undefined, ...measuresOf(form),
  };
}

function rowOf(recipe) {
  return {
    method: recipe.method, scheme: recipe.scheme ?? BLANK_RECIPE.scheme, bits: String(recipe.bits), group_size: String(recipe.group_size),
    rounding: recipe.rounding, symmetric: recipe.symmetric ? "yes" : "no", strategy: recipe.search.strategy, kv_cache: recipe.kv_cache ?? "", template: recipe,
  };
}

/** The form for a job's spec. */
export function formOf(spec) {
  const text = (value) => (typeof value === "number" ? String(value) : "");
  return {
    ...BLANK, preset: null, template: spec, model: spec.model, recipes: recipesOf(spec).map(rowOf), formats: spec.formats, priority: spec.priority,
    evaluate: spec.evaluation !== null, ratio: text(spec.target?.max_perplexity_ratio), kl: text(spec.target?.max_kl),
    num_samples: String(spec.calibration.num_samples), sequence_length: String(spec.calibration.sequence_length),
    dataset: spec.calibration.dataset || (spec.calibration.texts ? "" : BLANK.dataset),
    judged_on: spec.evaluation?.dataset ?? "", judged_windows: text(spec.evaluation?.num_samples),
    timeout_s: String(spec.timeout_s), force: spec.force, deploy: spec.deploy?.name ?? "",
    labels: Object.entries(spec.labels).map(([key, value]) => `${key}=${value}`).join(", "),
  };
}
