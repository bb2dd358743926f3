// Converts the form's fields to the body of POST /v1/jobs and back.

export const BLANK = {
  model: "", method: "awq", scheme: "wna16", bits: "4", group_size: "auto", rounding: "nearest", symmetric: "no", strategy: "grid",
  formats: ["compressed-tensors"], ratio: "", num_samples: "128", sequence_length: "512",
  dataset: "builtin:wikitext2", priority: "normal", labels: "",
  template: null, // the spec that the form came from: what has no field is sent as it was
};

export const PRESETS = [
  { name: "Balanced", text: "AWQ, 4 bits, the largest groups that fit", form: {} },
  { name: "Best at 4 bits", text: "AWQ scales with GPTQ rounding", form: { rounding: "gptq" } },
  { name: "Small", text: "3 bits with GPTQ rounding", form: { bits: "3", rounding: "gptq" } },
  { name: "Within one percent", text: "the smallest model that loses at most 1 % perplexity", form: { bits: "3", rounding: "gptq", ratio: "1.01" } },
  { name: "Nearly lossless", text: "plain rounding to 8 bits, quick", form: { method: "rtn", bits: "8" } },
  { name: "FP8", text: "weights and inputs, for many requests at a time on newer GPUs", form: { method: "rtn", scheme: "fp8" } },
];

// What other schemes than integers for weights alone say themselves.
const OF_SCHEME = { bits: undefined, group_size: undefined, symmetric: undefined };

function numberOr(text, whenBlank) {
  if (text.trim() === "") return whenBlank;
  return Number.isNaN(Number(text)) ? text : Number(text);
}

function labelsOf(text) {
  const pairs = text.split(",").map((pair) => pair.trim()).filter(Boolean).map((pair) => pair.split("="));
  return Object.fromEntries(pairs.map(([key, ...value]) => [key.trim(), value.join("=").trim()]));
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

function targetOf(form) {
  const before = form.template?.target;
  if (form.ratio.trim()) return { ...before, max_perplexity_ratio: numberOr(form.ratio, null) };
  return typeof (before?.max_kl ?? before?.min_recovery) === "number" ? { ...before, max_perplexity_ratio: null } : undefined;
}

/** The body to send. Text that is not a number stays text, so that the service's error names the field. */
export function specOf(form) {
  const before = form.template && recipesOf(form.template)[0];
  const grid = { bits: Number(form.bits), group_size: numberOr(form.group_size, "auto"), symmetric: form.symmetric === "yes" };
  const recipe = {
    ...before, method: form.method, scheme: form.scheme, ...(form.scheme === BLANK.scheme ? grid : OF_SCHEME),
    rounding: form.rounding, search: { ...before?.search, strategy: form.strategy },
  };
  return {
    ...form.template, model: form.model.trim(), recipe, formats: form.formats, priority: form.priority,
    labels: labelsOf(form.labels), calibration: calibrationOf(form), target: targetOf(form),
  };
}

/** The form for a job's spec; of several recipes the first. */
export function formOf(spec) {
  const recipe = recipesOf(spec)[0];
  return {
    ...BLANK, preset: null, template: spec, model: spec.model, method: recipe.method, scheme: recipe.scheme ?? BLANK.scheme, bits: String(recipe.bits),
    group_size: String(recipe.group_size), rounding: recipe.rounding, symmetric: recipe.symmetric ? "yes" : "no",
    strategy: recipe.search.strategy, formats: spec.formats, priority: spec.priority,
    ratio: spec.target?.max_perplexity_ratio ? String(spec.target.max_perplexity_ratio) : "",
    num_samples: String(spec.calibration.num_samples), sequence_length: String(spec.calibration.sequence_length),
    dataset: spec.calibration.dataset || (spec.calibration.texts ? "" : BLANK.dataset),
    labels: Object.entries(spec.labels).map(([key, value]) => `${key}=${value}`).join(", "),
  };
}
