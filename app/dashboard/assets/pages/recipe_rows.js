// The recipes of the form: one, or several that are compared in one job.
import { html } from "../ui.js";
import { BLANK_OVERRIDE, BLANK_RECIPE, MOST_RECIPES, fieldsOf, rareFieldsOf, withField } from "./job_form.js";
import { Choice, Field } from "./form_fields.js";

const METHODS = [["awq", "AWQ"], ["gptq", "GPTQ"], ["omniquant", "OmniQuant"], ["rtn", "plain rounding"]];
const SCHEMES = [
  ["wna16", "integers, weights only"], ["fp8", "FP8"], ["fp8-block", "FP8 in blocks"], ["fp8-static", "FP8, static inputs"],
  ["w8a8", "INT8"], ["w8a8-static", "INT8, static inputs"], ["nvfp4", "NVFP4"], ["nvfp4a16", "NVFP4, weights only"],
  ["mxfp4", "MXFP4"], ["mxfp4a16", "MXFP4, weights only"], ["w4a8", "int4 with FP8 inputs"],
];
const BITS = ["2", "3", "4", "8"].map((bits) => [bits, bits]);
const GROUP_SIZES = [["32", "32"], ["64", "64"], ["128", "128"], ["-1", "whole rows"]];
const AS_RECIPE = ["", "as the recipe"];
const YES_NO = [["yes", "yes"], ["no", "no"]];
// Name and path of a recipe's field: its label and its choices, or the placeholder of a field that is typed.
const OPTIONS = {
  method: ["Method", METHODS],
  scheme: ["Scheme", SCHEMES],
  bits: ["Bits", BITS],
  group_size: ["Group size", [["auto", "the largest that fits"], ...GROUP_SIZES]],
  symmetric: ["Grid", [["no", "asymmetric"], ["yes", "symmetric"]]],
  rounding: ["Rounding", [["nearest", "nearest"], ["gptq", "GPTQ"]]],
  "search.strategy": ["Search", [["grid", "grid"], ["evolutionary", "evolutionary"]]],
  kv_cache: ["KV cache", [["", "as in the model"], ["fp8", "FP8, calibrated scales"]]],
  ignore: ["Kept as they are", "none"],
  indivisible: ["Rows that no group divides", [["refuse", "refuse the job"], ["nearest", "a smaller group"], ["skip", "keep their precision"]]],
  "search.grid_points": ["Points of the grid", "20"],
  "search.duo_scaling": ["Scales by weights too", [["both", "try both"], ...YES_NO]],
  "search.clip": ["Clip outliers", YES_NO],
  "search.epochs": ["Epochs", "12"],
  "search.budget": ["Evaluations per group", "96"],
  "search.seed": ["Seed of the search", "0"],
};

function optionsOf(name, recipe, isEvaluated) {
  if (name === "method" && !isEvaluated) return METHODS.filter(([method]) => method === "rtn");
  if (name === "scheme" && recipe.method === "omniquant") return SCHEMES.slice(0, 1);
  return OPTIONS[name][1];
}

function RecipeField({ name, recipe, path, isEvaluated, onChange, error }) {
  const options = optionsOf(name, recipe, isEvaluated);
  const change = (value) => onChange(withField(recipe, name, value));
  return html`<${Field} label=${OPTIONS[name][0]} path=${`${path}.${name}`} error=${error} hint=${name === "ignore" ? "names of linears, or re: and a pattern" : undefined}>
    ${typeof options === "string"
      ? html`<input value=${recipe[name]} placeholder=${options} onInput=${(event) => change(event.target.value)} />`
      : html`<${Choice} value=${recipe[name]} options=${options} onChange=${change} />`}<//>`;
}

/** Linears with other numbers than the recipe's. */
function Overrides({ overrides, path, onChange, error }) {
  const set = (index, name) => (value) => onChange(overrides.map((each, at) => (at === index ? { ...each, [name]: value } : each)));
  return html`${overrides.map((each, index) => html`<fieldset class="recipe" key=${index}><legend>Exception ${index + 1}</legend>
      <div class="fields">
        <${Field} label="Linears" path=${`${path}.${index}.match`} error=${error} hint="a name's end, or re: and a pattern">
          <input value=${each.match} placeholder="down_proj" onInput=${(event) => set(index, "match")(event.target.value)} /><//>
        <${Field} label="Their scheme" path=${`${path}.${index}.scheme`} error=${error}><${Choice} value=${each.scheme} options=${[AS_RECIPE, ...SCHEMES]} onChange=${set(index, "scheme")} /><//>
        ${!each.scheme && html`<${Field} label="Their bits" path=${`${path}.${index}.bits`} error=${error}><${Choice} value=${each.bits} options=${[AS_RECIPE, ...BITS]} onChange=${set(index, "bits")} /><//>
        <${Field} label="Their group size" path=${`${path}.${index}.group_size`} error=${error}><${Choice} value=${each.group_size} options=${[AS_RECIPE, ...GROUP_SIZES]} onChange=${set(index, "group_size")} /><//>`}
      </div>
      <button type="button" class="quiet small" aria-label=${`Remove exception ${index + 1}`} onClick=${() => onChange(overrides.filter((_, at) => at !== index))}>Remove</button>
    </fieldset>`)}
    <p><button type="button" class="quiet small" onClick=${() => onChange([...overrides, BLANK_OVERRIDE])}>Add an exception</button>
      <small> Some linears with other bits than the rest.</small></p>`;
}

function Row({ recipe, path, isEvaluated, onChange, error }) {
  const field = (name) => html`<${RecipeField} key=${name} name=${name} recipe=${recipe} path=${path} isEvaluated=${isEvaluated} onChange=${onChange} error=${error} />`;
  return html`<div class="fields">${fieldsOf(recipe, isEvaluated).map(field)}</div>
    <details class="rare"><summary>Search, exceptions</summary><div class="fields">${rareFieldsOf(recipe).map(field)}</div>
      <${Overrides} overrides=${recipe.overrides} path=${`${path}.overrides`} error=${error} onChange=${(overrides) => onChange({ ...recipe, overrides })} /></details>`;
}

/** `onChange` gets the recipes, changed. */
export function RecipeRows({ recipes, isEvaluated, onChange, error }) {
  const replace = (index, row) => onChange(recipes.map((each, at) => (at === index ? row : each)));
  if (recipes.length === 1) {
    return html`<${Row} recipe=${recipes[0]} path="recipe" isEvaluated=${isEvaluated} error=${error} onChange=${(row) => replace(0, row)} />
      <${Add} recipes=${recipes} isEvaluated=${isEvaluated} onChange=${onChange} />`;
  }
  return html`${recipes.map((recipe, index) => html`<fieldset class="recipe" key=${index}>
      <legend>Recipe ${index + 1}</legend>
      <${Row} recipe=${recipe} path=${`recipe.${index}`} isEvaluated=${isEvaluated} error=${error} onChange=${(row) => replace(index, row)} />
      <button type="button" class="quiet small" aria-label=${`Remove recipe ${index + 1}`} onClick=${() => onChange(recipes.filter((_, at) => at !== index))}>Remove</button>
    </fieldset>`)}
    <${Add} recipes=${recipes} isEvaluated=${isEvaluated} onChange=${onChange} />`;
}

/** Adds a copy of the last recipe, to be changed. */
function Add({ recipes, isEvaluated, onChange }) {
  const last = recipes.at(-1) ?? { ...BLANK_RECIPE, ...(isEvaluated ? {} : { method: "rtn" }) };
  return html`<p class="add"><button type="button" class="quiet" disabled=${recipes.length >= MOST_RECIPES} onClick=${() => onChange([...recipes, { ...last }])}>Add a recipe</button>
    <small> Several recipes share one calibration and are compared in one report.</small></p>`;
}
