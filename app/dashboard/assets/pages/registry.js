// Models and what was made of each: versions, tags, where they went.
import { age, bytes, modelName, ratioInWords, recipeLabel } from "../format.js";
import { may } from "../caller.js";
import { Empty, Loaded, Title } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html } from "../ui.js";
import { TagList } from "./push.js";

const VERSIONS = [
  ["Version", (version) => html`<a href=${`#/artifacts/${version.id}`}>${version.summary.label || recipeLabel(version.recipe)}</a>`],
  ["Format", (version) => version.format],
  ["Size", (version) => bytes(version.size), "number"],
  ["Perplexity against original", (version) => ratioInWords(version.summary), "number"],
  ["Tags", (version) => html`<${TagList} tags=${version.tags} />`],
  ["Pushed to", (version) => version.pushes.filter((push) => push.state === "pushed").map((push) => push.repo_id).join(", ") || "–"],
  ["Age", (version) => age(version.created_at)],
];

export function RegistryPage() {
  const polled = usePolled("/v1/registry?limit=200", 15);
  return html`<${Title}>Registry<//>
    <${Loaded} polled=${polled}>${(page) =>
      page.data.length === 0
        ? html`<${Empty} title="No models yet">Finished jobs publish their models here.${may("jobs:write") && html` <a href="#/jobs/new">New job</a>`}<//>`
        : html`${page.data.map((model) => html`<div class="stack" key=${model.model}>
            <${Table} caption=${modelName(model.model)} columns=${VERSIONS} rows=${model.versions} keyOf=${(version) => version.id} />
          </div>`)}
          ${page.has_more && html`<p><small>Older artifacts are not shown: nibble registry lists them.</small></p>`}`}<//>`;
}
