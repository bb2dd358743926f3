// One route: what it takes, what it answers, and a request for curl.
import { Copy } from "../parts.js";
import { Table } from "../table.js";
import { html, useEffect, useRef, useState } from "../ui.js";
import { Prose } from "./prose.js";
import { Schema, example, typeInWords } from "./schema.js";

const PARAMETERS = [
  ["Parameter", (each) => html`<code>${each.name}</code>${each.required && html` <strong>required</strong>`}`],
  ["In", (each) => each.in],
  ["Type", (each) => typeInWords(each.schema)],
  ["Meaning", (each) => (each.description ? html`<${Prose} text=${each.description} />` : "–"), "long"],
];

const jsonOf = (content) => content?.["application/json"]?.schema ?? null;

/** A request with what the route requires; the parameters of the path in capitals. */
export function curlOf({ method, path, requestBody, parameters = [], security }, schemas) {
  const query = parameters.filter((each) => each.in === "query" && each.required).map((each) => `${each.name}=VALUE`).join("&");
  const address = `${location.origin}${path.replace(/\{(\w+)\}/g, (_, name) => name.toUpperCase())}${query ? `?${query}` : ""}`;
  const body = jsonOf(requestBody?.content);
  const lines = [`curl ${method === "GET" ? "" : `-X ${method} `}'${address}'`];
  if (security) lines.push(`-H "Authorization: Bearer $NIBBLE_API_KEY"`);
  if (body) lines.push("-H 'Content-Type: application/json'", `-d '${JSON.stringify(example(body, schemas))}'`);
  else if (requestBody) lines.push("--data-binary @FILE");
  return lines.join(" \\\n  ");
}

function Answers({ responses, schemas }) {
  const entries = Object.entries(responses);
  const good = entries.filter(([status]) => Number(status) < 400);
  const problems = entries.filter(([status]) => Number(status) >= 400);
  return html`<h4>Answers</h4>
    ${good.map(([status, answer]) => html`<div key=${status}><p><strong>${status}</strong> ${answer.description === "Successful Response" ? "" : answer.description}
        ${Object.keys(answer.content ?? {}).map((type) => html` <small key=${type}>${type}</small>`)}</p>
      ${jsonOf(answer.content) && html`<${Schema} schema=${jsonOf(answer.content)} schemas=${schemas} />`}</div>`)}
    <p><small>Refusals: ${problems.map(([status, answer]) => `${status} ${answer.description.replace(/\.$/, "")}`).join(", ")}.</small></p>`;
}

function Body({ requestBody, schemas }) {
  if (!requestBody) return null;
  const body = jsonOf(requestBody.content);
  return html`<h4>Body</h4>${body
    ? html`<${Schema} schema=${body} schemas=${schemas} />`
    : html`<p>${Object.keys(requestBody.content ?? {}).join(", ") || "bytes"}</p>`}`;
}

/** Closed, one line; what it says is drawn once it is opened. */
export function Operation({ operation, schemas, isTarget }) {
  const [isOpen, setOpen] = useState(isTarget);
  const line = useRef(null);
  useEffect(() => {
    if (!isTarget) return;
    setOpen(true);
    line.current.focus({ preventScroll: true });
  }, [isTarget]);
  const { method, path, operationId, description = "", parameters = [] } = operation;
  return html`<details class="card operation" id=${operationId} open=${isOpen} onToggle=${(event) => setOpen(event.currentTarget.open)}>
    <summary ref=${line}><h3><span class=${`method method-${method.toLowerCase()}`}>${method}</span> <span class="path">${path}</span></h3>
      <span class="first-line"><${Prose} text=${description.split("\n")[0]} /></span></summary>
    ${isOpen && html`<div class="operation-body">
      ${description.includes("\n") && html`<p><${Prose} text=${description.slice(description.indexOf("\n")).trim()} /></p>`}
      ${!operation.security && html`<p><small>Needs no key.</small></p>`}
      <${Copy} label=${`curl for ${method} ${path}`} text=${curlOf(operation, schemas)} />
      ${parameters.length > 0 && html`<${Table} caption=${`Parameters of ${method} ${path}`} hideCaption columns=${PARAMETERS} rows=${parameters} keyOf=${(each) => each.in + each.name} />`}
      <${Body} requestBody=${operation.requestBody} schemas=${schemas} />
      <${Answers} responses=${operation.responses} schemas=${schemas} />
      <p><a href=${`#${operationId}`}>Link to this route</a></p>
    </div>`}
  </details>`;
}
