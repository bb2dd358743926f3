// Converts the form to the body of POST /v1/jobs and back: models, recipes, presets; other fields are in job_fields.js.
import { INITIAL, numberOr, referenceOf, valuesOf, withFields, wordsOf } from "./job_fields.js";
import { bodyOf as servingOf, fieldsOf as servingFieldsOf } from "./serving_fields.js";

/** One recipe of the form; `template`: the recipe that it came from, of which what has no field is sent as it was. */
export const BLANK_RECIPE = {
  method: "awq", scheme: "wna16", bits: "4", group_size: "auto", rounding: "nearest", symmetric: "no", kv_cache: "",
  ignore: "lm_head", indivisible: "refuse", overrides: [], template: null,
  "search.strategy": "grid", "search.grid_points": "", "search.duo_scaling": "both", "search.clip": "yes", "search.epochs": "", "search.budget": "", "search.seed": "",
};

/** Other numbers for the linears whose name matches. */
export const BLANK_OVERRIDE = { match: "", bits: "", group_size: "", scheme: "" };

export const BLANK = {
  ...INITIAL, models: [""], sweep: "", recipes: [BLANK_RECIPE], formats: ["compressed-tensors"], evaluate: true, serving: null,
  template: null, // the spec that the form came from: what has no field is sent as it was
};

export const MOST_RECIPES = 16;
export const MOST_MODELS = 16;

export const PRESETS = [
  { name: "Balanced", text: "AWQ, 4 bits, the largest groups that fit", recipe: {} },
  { name: "Best at 4 bits", text: "AWQ scales with GPTQ rounding", recipe: { rounding: "gptq" } },
  { name: "Small", text: "3 bits with GPTQ rounding", recipe: { bits: "3", rounding: "gptq" } },
  { name: "Within one percent", text: "the smallest model that loses at most 1 % perplexity", recipe: { bits: "3", rounding: "gptq" }, form: { "target.max_perplexity_ratio": "1.01" } },
  { name: "Nearly lossless", text: "plain rounding to 8 bits, quick", recipe: { method: "rtn", bits: "8" } },
  { name: "FP8", text: "weights and inputs, for many requests at a time on newer GPUs", recipe: { method: "rtn", scheme: "fp8" } },
];

const NO_TARGET = { "target.max_perplexity_ratio": "", "target.max_kl": "", "target.min_recovery": "", "target.max_size": "" };

/** The form with a preset's recipe in the place of its own; the model and what is not of a recipe stay. */
export const withPreset = (form, { name, recipe, form: rest }) => ({
  ...form, preset: name, ...NO_TARGET, ...rest, recipes: [{ ...BLANK_RECIPE, ...recipe }],
});

const searches = ({ method }) => method === "awq" || method === "omniquant";

/** The fields that the method and the scheme of a recipe leave open; the others would be ignored. */
export function fieldsOf(recipe, isEvaluated = true) {
  const grid = recipe.scheme === BLANK_RECIPE.scheme ? ["bits", "group_size", "symmetric"] : [];
  const search = searches(recipe) ? ["rounding", "search.strategy"] : [];
  return ["method", "scheme", ...grid, ...search, ...(isEvaluated ? ["kv_cache"] : [])];
}

/** Those for which the usual value is nearly always right. */
export function rareFieldsOf(recipe) {
  return [
    "ignore", ...(recipe.scheme === BLANK_RECIPE.scheme ? ["indivisible"] : []), ...(searches(recipe) ? ["search.grid_points", "search.duo_scaling"] : []),
    ...(recipe.method === "rtn" ? [] : ["search.clip"]), ...(recipe.method === "omniquant" ? ["search.epochs"] : []),
    ...(searches(recipe) && recipe["search.strategy"] === "evolutionary" ? ["search.budget", "search.seed"] : []),
  ];
}

/** The recipe with a field changed, and what the change rules out set back. */
export function withField(recipe, name, value) {
  const changed = { ...recipe, [name]: value };
  if (changed.method === "omniquant") changed.scheme = BLANK_RECIPE.scheme;
  if (!searches(changed)) Object.assign(changed, { rounding: BLANK_RECIPE.rounding, "search.strategy": BLANK_RECIPE["search.strategy"] });
  return changed;
}

// What reads no text; the rest of a form without an evaluation is for the service to judge.
const UNREAD = { method: "rtn", rounding: "nearest", kv_cache: "" };

/** The form with its evaluation switched on or off. */
export const withEvaluation = (form, evaluate) => ({
  ...form, preset: null, evaluate, ...(evaluate ? {} : { ...NO_TARGET, recipes: form.recipes.map((recipe) => ({ ...recipe, ...UNREAD })) }),
});

/** All recipes of a job: one or a list in its spec. */
export const recipesOf = (spec) => [spec.recipe].flat();

// What other schemes than integers for weights alone say themselves.
const OF_SCHEME = { bits: undefined, group_size: undefined, symmetric: undefined };
const DUO = { both: "both", yes: true, no: false };

function overrideOf({ match, bits, group_size: size, scheme }) {
  return { match: match.trim(), ...(scheme ? { scheme } : { bits: numberOr(bits, undefined), group_size: numberOr(size, undefined) }) };
}

function searchOf(row) {
  const counted = ["grid_points", "epochs", "budget", "seed"].map((name) => [name, numberOr(row[`search.${name}`], undefined)]);
  return {
    ...row.template?.search, strategy: row["search.strategy"], duo_scaling: DUO[row["search.duo_scaling"]], clip: row["search.clip"] === "yes",
    ...Object.fromEntries(counted),
  };
}

function recipeOf(row) {
  const grid = { bits: Number(row.bits), group_size: numberOr(row.group_size, "auto"), symmetric: row.symmetric === "yes" };
  return {
    ...row.template, method: row.method, scheme: row.scheme, ...(row.scheme === BLANK_RECIPE.scheme ? grid : OF_SCHEME),
    rounding: row.rounding, kv_cache: row.kv_cache || null, ignore: wordsOf(row.ignore), indivisible: row.indivisible,
    overrides: row.overrides.filter((each) => each.match.trim()).map(overrideOf), search: searchOf(row),
  };
}

/** The models that are named, each once. */
export const modelsOf = (form) => [...new Set(form.models.map(referenceOf).filter(Boolean))];

/** The bodies to send, one for each model; several share the label sweep=NAME. */
export function bodiesOf(form) {
  const models = modelsOf(form);
  if (models.length < 2) return [bodyOf(form, models[0] ?? "")];
  return models.map((model) => {
    const body = bodyOf(form, model);
    return { ...body, labels: { ...body.labels, sweep: form.sweep } };
  });
}

function bodyOf(form, model) {
  const recipes = form.recipes.map(recipeOf);
  const body = withFields({ ...form.template }, form);
  if (body.deploy) body.deploy = form.serving ? { name: body.deploy.name, ...servingOf(form.serving, form.template?.deploy ?? {}) } : body.deploy;
  if (!form.evaluate) Object.assign(body, { evaluation: null, calibration: undefined, target: undefined });
  return { ...body, model, recipe: recipes.length === 1 ? recipes[0] : recipes, formats: form.formats };
}

const text = (value) => (typeof value === "number" ? String(value) : "");

function rowOf(recipe) {
  const { search } = recipe;
  return {
    ...BLANK_RECIPE, method: recipe.method, scheme: recipe.scheme ?? BLANK_RECIPE.scheme, bits: String(recipe.bits), group_size: String(recipe.group_size),
    rounding: recipe.rounding, symmetric: recipe.symmetric ? "yes" : "no", kv_cache: recipe.kv_cache ?? "", ignore: recipe.ignore.join(", "),
    indivisible: recipe.indivisible, template: recipe,
    overrides: recipe.overrides.map((each) => ({ match: each.match, bits: text(each.bits), group_size: text(each.group_size), scheme: each.scheme ?? "" })),
    "search.strategy": search.strategy, "search.duo_scaling": { both: "both", true: "yes", false: "no" }[search.duo_scaling], "search.clip": search.clip ? "yes" : "no",
    ...Object.fromEntries(["grid_points", "epochs", "budget", "seed"].map((name) => [`search.${name}`, text(search[name])])),
  };
}

/** The form for a job's spec. */
export function formOf(spec) {
  return {
    ...BLANK, ...valuesOf(spec), preset: null, template: spec, models: [spec.model], recipes: recipesOf(spec).map(rowOf), formats: spec.formats,
    evaluate: spec.evaluation !== null, serving: spec.deploy ? servingFieldsOf(spec.deploy) : null,
  };
}
