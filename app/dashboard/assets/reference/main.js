// The description of the API for people: what /openapi.json says, by subject, with a search and a request for curl.
import { read } from "../api.js";
import { Problem } from "../parts.js";
import { html, render, useEffect, useState } from "../ui.js";
import { Operation } from "./operation.js";
import { Prose } from "./prose.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

/** [{ name, description, operations }] in the document's order; an operation has its method and path. */
export function subjects(document) {
  const all = Object.entries(document.paths).flatMap(([path, methods]) =>
    METHODS.filter((method) => methods[method]).map((method) => ({ ...methods[method], method: method.toUpperCase(), path })));
  return document.tags.map((tag) => ({ ...tag, operations: all.filter((operation) => operation.tags[0] === tag.name) }));
}

function matches(operation, words) {
  const text = `${operation.method} ${operation.path} ${operation.description ?? ""}`.toLowerCase();
  return words.every((word) => text.includes(word));
}

function filtered(all, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  return all.map((subject) => ({ ...subject, operations: subject.operations.filter((each) => matches(each, words)) }))
    .filter((subject) => subject.operations.length > 0);
}

const capital = (name) => name[0].toUpperCase() + name.slice(1);

function Contents({ shown, query, onQuery }) {
  const count = shown.reduce((sum, subject) => sum + subject.operations.length, 0);
  return html`<nav class="contents" aria-label="Subjects">
    <label class="search"><span class="unseen">Search routes</span>
      <input type="search" placeholder="Search routes" value=${query} onInput=${(event) => onQuery(event.target.value)} /></label>
    <p role="status"><small>${count} route${count === 1 ? "" : "s"}</small></p>
    <ul class="plain">${shown.map((subject) => html`<li key=${subject.name}><a href=${`#${subject.name}`}>${capital(subject.name)} <small>${subject.operations.length}</small></a></li>`)}</ul>
  </nav>`;
}

/** What the address names: a subject or an operation, which is opened and seen. */
function useTarget(isThere) {
  const [target, setTarget] = useState(location.hash.slice(1));
  useEffect(() => {
    const follow = () => setTarget(location.hash.slice(1));
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  useEffect(() => {
    if (isThere && target) document.getElementById(target)?.scrollIntoView();
  }, [isThere, target]);
  return target;
}

function Page({ document: api }) {
  const [query, setQuery] = useState("");
  const target = useTarget(true);
  const shown = filtered(subjects(api), query);
  return html`<header class="top">
      <a class="brand" href="/"><img src="/assets/icon.svg" alt="" width="24" height="24" /> Nibble</a>
      <nav aria-label="Service"><a href="/">Dashboard</a><a href="/openapi.json" download="openapi.json">OpenAPI document</a></nav>
    </header>
    <main id="content" class="reference" tabindex="-1">
      <${Contents} shown=${shown} query=${query} onQuery=${setQuery} />
      <div class="stack">
        <div><h1>API <small>version ${api.info.version}</small></h1>
          <p><${Prose} text=${api.info.description} /></p>
          <p>Send an API key as <code>Authorization: Bearer …</code>. Errors have a stable <code>code</code> and a <code>remedy</code>.</p></div>
        ${shown.length === 0 && html`<div class="empty"><h2>No such routes</h2><p>Search for a path or a word of the description.</p></div>`}
        ${shown.map((subject) => html`<section key=${subject.name} aria-labelledby=${subject.name}>
          <h2 id=${subject.name}>${capital(subject.name)}</h2><p><${Prose} text=${subject.description} /></p>
          ${subject.operations.map((operation) => html`<${Operation} key=${operation.operationId} operation=${operation} schemas=${api.components.schemas} isTarget=${target === operation.operationId} />`)}
        </section>`)}
      </div>
    </main>`;
}

function App() {
  const [state, setState] = useState({ document: null, error: null });
  useEffect(() => {
    read("/openapi.json").then(({ value }) => setState({ document: value, error: null }), (error) => setState({ document: null, error }));
  }, []);
  if (state.document) return html`<${Page} document=${state.document} />`;
  return html`<main><h1>API</h1>${state.error
    ? html`<${Problem} error=${state.error} title="Can't load the description of the API" />`
    : html`<p class="loading" role="status">Loading…</p>`}</main>`;
}

render(html`<${App} />`, document.getElementById("app"));
