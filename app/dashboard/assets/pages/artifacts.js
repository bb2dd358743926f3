// Published models: the list, and one with its files.
import { send } from "../api.js";
import { age, bytes, change, date, modelName, number, recipeLabel } from "../format.js";
import { Confirmed, Copy, Empty, Facts, Loaded, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html } from "../ui.js";
import { DeployButton, suggestedName } from "./deploy.js";

const LIST = [
  ["Model", (artifact) => html`<a href=${`#/artifacts/${artifact.id}`}>${modelName(artifact.model)}</a>`],
  ["Recipe", (artifact) => artifact.summary.label || recipeLabel(artifact.recipe)],
  ["Format", (artifact) => artifact.format],
  ["Size", (artifact) => bytes(artifact.size), "number"],
  ["Bits per weight", (artifact) => number(artifact.summary.bits_per_weight, 3), "number"],
  ["Perplexity against original", (artifact) => (artifact.summary.perplexity_ratio ? change(artifact.summary.perplexity_ratio) : "–"), "number"],
  ["Age", (artifact) => age(artifact.created_at)],
];
const FILES = (artifact) => [
  ["File", (file) => html`<a href=${`/v1/artifacts/${artifact.id}/files/${file.path}`} download>${file.path}</a>`],
  ["Size", (file) => bytes(file.size), "number"],
  ["SHA-256", (file) => html`<code class="digest">${file.sha256}</code>`],
];

export function ArtifactsPage() {
  const polled = usePolled("/v1/artifacts?limit=100", 15);
  return html`<${Title}>Artifacts<//>
    <${Loaded} polled=${polled}>${(page) =>
      page.data.length === 0
        ? html`<${Empty} title="Nothing published yet">Successful jobs publish their models here. <a href="#/jobs/new">New job</a><//>`
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

function Artifact({ artifact }) {
  const { summary } = artifact;
  const remove = async () => {
    await send("DELETE", `/v1/artifacts/${artifact.id}`);
    location.hash = "#/artifacts";
  };
  return html`<${Title} text=${modelName(artifact.model)} aside=${html`<div class="actions">
      <${DeployButton} artifact=${artifact.id} suggested=${suggestedName(artifact)} />
      <${Confirmed} label="Delete" question="Delete this artifact?" consequence="Its files are removed from storage. Deployments of it keep running until they are loaded anew." action=${remove} />
    </div>`}>${modelName(artifact.model)} <small>${summary.label || recipeLabel(artifact.recipe)}</small><//>
    <${Facts} rows=${[
      ["Format", artifact.format],
      ["Size", bytes(artifact.size)],
      ["Bits per weight", number(summary.bits_per_weight, 3)],
      ["Perplexity", number(summary.perplexity, 5)],
      ["Against the original", summary.perplexity_ratio && change(summary.perplexity_ratio)],
      ["KL per token", number(summary.kl, 3)],
      ["Same top token", summary.top1_agreement && `${(100 * summary.top1_agreement).toFixed(1)} %`],
      ["Published", date(artifact.created_at)],
    ]} />
    <${Use} artifact=${artifact} />
    <section class="stack" aria-labelledby="provenance">
      <h2 id="provenance">Where it comes from</h2>
      <${Facts} wide rows=${[
        ["Job", html`<a href=${`#/jobs/${artifact.job}`}>${artifact.job}</a>`],
        ["Model", artifact.model],
        ["Digest of the model's files", html`<code class="digest">${artifact.model_digest}</code>`],
      ]} />
      <details><summary>Recipe</summary><${Copy} label="The recipe as JSON" text=${JSON.stringify(artifact.recipe, null, 2)} /></details>
    </section>
    <${Table} caption="Files" columns=${FILES(artifact)} rows=${artifact.files} keyOf=${(file) => file.path} />`;
}

export function ArtifactPage({ id }) {
  const polled = usePolled(`/v1/artifacts/${id}`, () => null);
  return html`<${Loaded} polled=${polled}>${(artifact) => html`<${Artifact} artifact=${artifact} />`}<//>`;
}
