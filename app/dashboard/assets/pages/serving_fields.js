// How a deployment serves: the fields of its form, and the body that they make.
import { html } from "../ui.js";
import { Choice, Field } from "./form_fields.js";

const ENGINES = [["auto", "auto"], ["transformers", "built-in"], ["vllm", "vLLM"]];
const DTYPES = [["", "the model's"], ["bfloat16", "bfloat16"], ["float16", "float16"], ["float32", "float32"]];
const ANY = ENGINES.map(([engine]) => engine);

// [path in the body, label, hint, the engines that read it, what an empty field means]
const OPTIONS = [
  ["max_model_len", "Longest request", "tokens of a prompt and its answer", ANY, "the model's"],
  ["max_num_seqs", "Requests at once", "others wait", ANY, "the engine's"],
  ["cache_share", "Cache share", "of the memory beside the weights, such as 0.5", ["transformers"], "the engine's"],
  ["vllm.tensor_parallel_size", "Tensor parallel", "GPUs that share a layer", ["vllm"], "1"],
  ["vllm.pipeline_parallel_size", "Pipeline parallel", "GPUs or hosts in a row", ["vllm"], "1"],
  ["vllm.gpu_memory_utilization", "GPU memory share", "of all memory, with the weights, such as 0.9", ["vllm"], "vLLM's"],
];

export const BLANK = { replicas: "1", idle_timeout_s: "", aliases: "", engine: "auto", dtype: "", ...Object.fromEntries(OPTIONS.map(([path]) => [path, ""])) };

const namesIn = (text) => text.split(",").map((name) => name.trim()).filter(Boolean);

/** A number where there is one; other text stays, so that the service's error names the field. */
const numberOf = (text) => (Number.isNaN(Number(text)) ? text.trim() : Number(text));

const read = (body, path) => path.split(".").reduce((value, key) => value?.[key], body);

/** The fields of a deployment as the service shows it. */
export function fieldsOf(deployment) {
  const numbers = ["replicas", "idle_timeout_s", ...OPTIONS.map(([path]) => path)];
  return {
    ...Object.fromEntries(numbers.map((path) => [path, String(read(deployment, path) ?? "")])),
    aliases: deployment.aliases.join(", "), engine: deployment.engine, dtype: deployment.dtype ?? "",
  };
}

/** What the fields ask for; what is empty, or what the engine does not read, is absent. `template`: options without a field. */
export function bodyOf(fields, template = {}) {
  const body = { engine: fields.engine, replicas: fields.replicas.trim() ? numberOf(fields.replicas) : 1, aliases: namesIn(fields.aliases) };
  if (fields.idle_timeout_s.trim()) body.idle_timeout_s = numberOf(fields.idle_timeout_s);
  if (fields.dtype) body.dtype = fields.dtype;
  const vllm = fields.engine === "vllm" ? { ...template.vllm } : {};
  for (const [path, , , engines] of OPTIONS) {
    const [name, inner] = path.split(".");
    if (inner) delete vllm[inner];
    if (!engines.includes(fields.engine) || !fields[path].trim()) continue;
    if (inner) vllm[inner] = numberOf(fields[path]);
    else body[name] = numberOf(fields[path]);
  }
  if (Object.keys(vllm).length > 0) body.vllm = vllm;
  return body;
}

/** The body of `fields` without what would be so anyway. */
export function askedFor(fields) {
  const usual = bodyOf(BLANK);
  return Object.fromEntries(Object.entries(bodyOf(fields)).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(usual[name])));
}

/** Labels, hints and refusals of `fields`; `set(name)` takes the value of one; `under`: where they are in the body. */
export function ServingFields({ fields, set, error, under = "" }) {
  const input = (name, more = {}) => html`<input value=${fields[name]} inputmode="decimal" onInput=${(event) => set(name)(event.target.value)} ...${more} />`;
  return html`<${Field} label="Replicas" path=${`${under}replicas`} error=${error} hint="servers, each with a copy of the model">${input("replicas")}<//>
    <${Field} label="Idle timeout (seconds)" path=${`${under}idle_timeout_s`} error=${error} hint="unloaded after it; the next request loads it">${input("idle_timeout_s", { placeholder: "never unloaded" })}<//>
    <${Field} label="Further names" path=${`${under}aliases`} error=${error} hint="separated by commas">${input("aliases", { inputmode: "text" })}<//>
    <${Field} label="Engine" path=${`${under}engine`} error=${error}><${Choice} value=${fields.engine} onChange=${set("engine")} options=${ENGINES} /><//>
    <${Field} label="Dtype" path=${`${under}dtype`} error=${error} hint="of what is computed, and of the cache"><${Choice} value=${fields.dtype} onChange=${set("dtype")} options=${DTYPES} /><//>
    ${OPTIONS.filter(([, , , engines]) => engines.includes(fields.engine)).map(([path, label, hint, , blank]) =>
      html`<${Field} key=${path} label=${label} path=${`${under}${path}`} error=${error} hint=${hint}>${input(path, { placeholder: blank })}<//>`)}`;
}
