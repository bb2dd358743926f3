// Published models: the list, and one with its files.
import { send } from "../api.js";
import { may } from "../caller.js";
import { age, bytes, date, modelName, number, ratioInWords, recipeLabel } from "../format.js";
import { Confirmed, Copy, Empty, Facts, Loaded, Reference, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html } from "../ui.js";
import { DeployButton, suggestedName } from "./deploy.js";
import { PushButton, Pushes, TagList, Tags } from "./push.js";

const LIST = [
  ["Model", (artifact) => html`<a href=${`#/artifacts/${artifact.id}`}>${modelName(artifact.model)}</a>`],
  ["Recipe", (artifact) => artifact.summary.label || recipeLabel(artifact.recipe)],
  ["Format", (artifact) => artifact.format],
  ["Size with tokenizer", (artifact) => bytes(artifact.size), "number"],
  ["KL per token", (artifact) => number(artifact.summary.kl, 3), "number"],
  ["Bits per weight", (artifact) => number(artifact.summary.bits_per_weight, 3), "number"],
  ["Perplexity against original", (artifact) => ratioInWords(artifact.summary), "number"],
  ["Tags", (artifact) => html`<${TagList} tags=${artifact.tags} />`],
  ["Age", (artifact) => age(artifact.created_at)],
];
const FILES = (artifact) => [
  ["File", (file) => html`<a href=${`/v1/artifacts/${artifact.id}/files/${file.path}`} download>${file.path}</a>`],
  ["Size", (file) => bytes(file.size), "number"],
  ["SHA-256", (file) => html`<code class="digest">${file.sha256}</code>`, "long"],
];

export function ArtifactsPage() {
  const polled = usePolled("/v1/artifacts?limit=100", 15);
  return html`<${Title}>Artifacts<//>
    <${Loaded} polled=${polled}>${(page) =>
      page.data.length === 0
        ? html`<${Empty} title="No artifacts yet">Finished jobs publish their models here.${may("jobs:write") && html` <a href="#/jobs/new">New job</a>`}<//>`
        : html`<${Table} caption="Quantized models, newest first" columns=${LIST} rows=${page.data} keyOf=${(artifact) => artifact.id} />`}<//>`;
}

function inTransformers(folder) {
  return `from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("${folder}")
model = AutoModelForCausalLM.from_pretrained("${folder}")
prompt = tokenizer("The river", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))`;
}

function Use({ artifact }) {
  const folder = `./${modelName(artifact.model).split("/").pop()}-${artifact.format}`;
  return html`<section aria-labelledby="use">
    <h2 id="use">Use it</h2>
    <h3>Download</h3>
    <${Copy} label="Download" text=${`nibble artifacts download ${artifact.id} -o ${folder}`} />
    <h3>vLLM</h3>
    <${Copy} label="vLLM" text=${`vllm serve ${folder}`} />
    <h3>transformers</h3>
    <${Copy} label="transformers" text=${inTransformers(folder)} />
  </section>`;
}

function Artifact({ artifact, onChange }) {
  const { summary } = artifact;
  const hasTags = artifact.tags.length > 0;
  const remove = async () => {
    await send("DELETE", `/v1/artifacts/${artifact.id}${hasTags ? "?force=true" : ""}`);
    location.hash = "#/artifacts";
  };
  return html`<${Title} text=${modelName(artifact.model)} aside=${html`<div class="actions">
      ${may("deployments:write") && html`<${DeployButton} artifact=${artifact.id} suggested=${suggestedName(artifact)} />`}
      ${may("artifacts:write") && html`<${PushButton} artifact=${artifact.id} onPushed=${onChange} />
      <${Confirmed} label="Delete" question="Delete this artifact?" consequence=${`${hasTags ? `It has the tags ${artifact.tags.join(", ")}, which go with it. ` : ""}Its files are removed from storage. Deployments of it keep running until they are restarted.`} action=${remove} />`}
    </div>`}>${modelName(artifact.model)} <small>${summary.label || recipeLabel(artifact.recipe)}</small><//>
    <${Facts} rows=${[
      ["Format", artifact.format],
      ["Size of all files", `${bytes(artifact.size)}${summary.bytes ? `, ${bytes(summary.bytes)} of them weights` : ""}`],
      ["Bits per weight", number(summary.bits_per_weight, 3)],
      ["Perplexity", summary.perplexity && number(summary.perplexity, 4)],
      ["Against the original", summary.perplexity_ratio && ratioInWords(summary)],
      ["KL per token", typeof summary.kl === "number" && number(summary.kl, 3)],
      ["Same top token", summary.top1_agreement && `${(100 * summary.top1_agreement).toFixed(1)} %`],
      ["Published", date(artifact.created_at)],
    ]} />
    <${Pushes} artifact=${artifact} />
    <${Tags} artifact=${artifact} onChange=${onChange} />
    <${Use} artifact=${artifact} />
    <section class="stack" aria-labelledby="provenance">
      <h2 id="provenance">Provenance</h2>
      <${Facts} wide rows=${[
        ["Job", html`<a href=${`#/jobs/${artifact.job}`}>${artifact.job}</a>`],
        ["Model", html`<${Reference} text=${artifact.model} />`],
        ["Digest of the model's files", html`<code class="digest">${artifact.model_digest}</code>`],
      ]} />
      <details><summary>Recipe</summary><${Copy} label="The recipe as JSON" text=${JSON.stringify(artifact.recipe, null, 2)} /></details>
    </section>
    <${Table} caption="Files" columns=${FILES(artifact)} rows=${artifact.files} keyOf=${(file) => file.path} />`;
}

export function ArtifactPage({ id }) {
  const polled = usePolled(`/v1/artifacts/${id}`, (artifact) => (artifact.pushes.some((push) => !push.finished_at) ? 2 : null));
  return html`<${Loaded} polled=${polled}>${(artifact) => html`<${Artifact} artifact=${artifact} onChange=${polled.ask} />`}<//>`;
}
