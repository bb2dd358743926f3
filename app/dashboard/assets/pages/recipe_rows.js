// The recipes of the form: one, or several that are compared in one job.
import { html } from "../ui.js";
import { BLANK_RECIPE, MOST_RECIPES, fieldsOf, withField } from "./job_form.js";
import { Choice, Field } from "./form_fields.js";

const METHODS = [["awq", "AWQ"], ["gptq", "GPTQ"], ["omniquant", "OmniQuant"], ["rtn", "plain rounding"]];
const SCHEMES = [
  ["wna16", "integers, weights only"], ["fp8", "FP8"], ["fp8-block", "FP8 in blocks"], ["fp8-static", "FP8, static inputs"],
  ["w8a8", "INT8"], ["w8a8-static", "INT8, static inputs"], ["nvfp4", "NVFP4"], ["nvfp4a16", "NVFP4, weights only"],
  ["mxfp4", "MXFP4"], ["mxfp4a16", "MXFP4, weights only"], ["w4a8", "int4 with FP8 inputs"],
];
const OPTIONS = {
  method: ["Method", "method", METHODS],
  scheme: ["Scheme", "scheme", SCHEMES],
  bits: ["Bits", "bits", [["2", "2"], ["3", "3"], ["4", "4"], ["8", "8"]]],
  group_size: ["Group size", "group_size", [["auto", "the largest that fits"], ["32", "32"], ["64", "64"], ["128", "128"], ["-1", "whole rows"]]],
  symmetric: ["Grid", "symmetric", [["no", "asymmetric"], ["yes", "symmetric"]]],
  rounding: ["Rounding", "rounding", [["nearest", "nearest"], ["gptq", "GPTQ"]]],
  strategy: ["Search", "search.strategy", [["grid", "grid"], ["evolutionary", "evolutionary"]]],
  kv_cache: ["KV cache", "kv_cache", [["", "as in the model"], ["fp8", "FP8, calibrated scales"]]],
};

function optionsOf(name, recipe, isEvaluated) {
  if (name === "method" && !isEvaluated) return METHODS.filter(([method]) => method === "rtn");
  if (name === "scheme" && recipe.method === "omniquant") return SCHEMES.slice(0, 1);
  return OPTIONS[name][2];
}

function Row({ recipe, path, isEvaluated, onChange, error }) {
  return html`<div class="fields">${fieldsOf(recipe, isEvaluated).map((name) => html`<${Field} key=${name} label=${OPTIONS[name][0]} path=${`${path}.${OPTIONS[name][1]}`} error=${error}>
    <${Choice} value=${recipe[name]} options=${optionsOf(name, recipe, isEvaluated)} onChange=${(value) => onChange(withField(recipe, name, value))} /><//>`)}</div>`;
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
