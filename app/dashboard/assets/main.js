// The frame around every page, and the routes of the pages. Only the first page's modules are loaded at once.
import { onConnection, knock, send, whenSignedOut } from "./api.js";
import { decoded, pathNow } from "./address.js";
import { may, readCaller, whoIsSignedIn } from "./caller.js";
import { clock } from "./format.js";
import { Problem } from "./parts.js";
import { useAway } from "./polling.js";
import { remember } from "./remember.js";
import { html, render, useEffect, useState } from "./ui.js";

// [pattern, module, its component, section]
const ROUTES = [
  [/^\/jobs$/, "jobs", "JobsPage", "jobs"],
  [/^\/jobs\/new(?:\/(job_[0-9A-Z]+))?$/, "new_job", "NewJobPage", "jobs"],
  [/^\/jobs\/(job_[0-9A-Z]+)$/, "job", "JobPage", "jobs"],
  [/^\/compare$/, "compare", "ComparePage", "jobs"],
  [/^\/artifacts$/, "artifacts", "ArtifactsPage", "artifacts"],
  [/^\/artifacts\/(art_[0-9A-Z]+)$/, "artifacts", "ArtifactPage", "artifacts"],
  [/^\/registry$/, "registry", "RegistryPage", "registry"],
  [/^\/deployments$/, "deployments", "DeploymentsPage", "deployments"],
  [/^\/deployments\/([^/]+)$/, "deployment", "DeploymentPage", "deployments"],
  [/^\/deployments\/([^/]+)\/chat$/, "chat", "ChatPage", "deployments"],
  [/^\/workers$/, "workers", "WorkersPage", "workers"],
  [/^\/admin\/keys$/, "keys", "KeysPage", "admin"],
  [/^\/admin\/limits$/, "limits", "LimitsPage", "admin"],
  [/^\/admin\/audit$/, "audit", "AuditPage", "admin"],
  [/^\/admin\/webhooks$/, "webhooks", "WebhooksPage", "admin"],
  [/^\/admin\/storage$/, "storage", "StoragePage", "admin"],
  [/^\/admin\/settings$/, "settings", "SettingsPage", "admin"],
];
// [section, its name, the scope that opens it, its first page]; of two rows of a section the first that may be opened
const SECTIONS = [
  ["jobs", "Jobs", "jobs:read"], ["artifacts", "Artifacts", "artifacts:read"], ["registry", "Registry", "artifacts:read"],
  ["deployments", "Deployments", "deployments:read"], ["workers", "Workers", "jobs:read"],
  ["admin", "Administration", "admin", "admin/keys"], ["admin", "Administration", "operator", "admin/settings"],
];
const KNOCK_S = 5;
const sections = () => SECTIONS.filter(([name, , scope], index) => may(scope) && SECTIONS.findIndex((each) => each[0] === name && may(each[2])) === index);
const mayOpen = (section) => SECTIONS.some(([name, , scope]) => name === section && may(scope));

/** What `/` shows: the first section that may be opened. */
function landing() {
  const [name, , , first = name] = sections()[0] ?? SECTIONS[0];
  return `/${first}`;
}

function route(address) {
  const path = /^\/?$/.test(address) ? landing() : address;
  for (const [pattern, module, component, section] of ROUTES) {
    const match = pattern.exec(path);
    if (match) return { module, component, section, id: match[1] && decoded(match[1]) };
  }
  return { module: null, section: "" };
}

function NotFoundPage() {
  return html`<h1>Page not found</h1><p><a href="#/jobs">All jobs</a></p>`;
}

/** While the service does not answer: since when, and a button for those who can't wait. */
function AwayBanner() {
  const since = useAway();
  const [asking, setAsking] = useState(false);
  useEffect(() => {
    if (!since) return undefined;
    const timer = setInterval(() => !document.hidden && knock(), 1000 * KNOCK_S);
    return () => clearInterval(timer);
  }, [since]);
  const tryNow = async () => {
    setAsking(true);
    await knock();
    setAsking(false);
  };
  return html`<div aria-live="polite">
    ${since && html`<div class="away">
      <p>The service has not answered since ${clock(since)}. This page shows its last state.</p>
      <button type="button" class="quiet small" onClick=${tryNow} aria-disabled=${asking}>${asking ? "Trying…" : "Try now"}</button>
    </div>`}
  </div>`;
}

function ThemeButton() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme || "");
  const isDark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const change = () => {
    const next = isDark ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    remember("nibble-theme", next);
    setTheme(next);
    dispatchEvent(new Event("themechange"));
  };
  return html`<button type="button" class="quiet" onClick=${change}>${isDark ? "Light theme" : "Dark theme"}</button>`;
}

/** Who is signed in, the version, the way out. */
function Account({ onSignedOut }) {
  const [error, setError] = useState(null);
  const { tenant, key, scopes, version } = whoIsSignedIn();
  const signOut = () => send("POST", "/v1/logout").then(onSignedOut, setError);
  const close = (event) => {
    if (event.key === "Escape") event.currentTarget.open = false;
    if (event.key === "Escape") event.currentTarget.querySelector("summary").focus();
  };
  return html`<details class="account" onKeyDown=${close}><summary>Account</summary>
    <div class="account-menu">
      <dl class="facts-narrow">
        <div><dt>Tenant</dt><dd>${tenant}</dd></div>
        <div><dt>API key</dt><dd><code>${key}</code></dd></div>
        <div><dt>Rights</dt><dd>${scopes.includes("admin") ? "all of its tenant" : scopes.join(", ")}</dd></div>
        <div><dt>Version</dt><dd>Nibble ${version}</dd></div>
      </dl>
      <a href="/docs">API description</a>
      <a href="/metrics">Metrics</a>
      <${ThemeButton} />
      <${Problem} error=${error} title="Sign-out failed" />
      <button type="button" class="quiet" onClick=${signOut}>Sign out</button>
    </div>
  </details>`;
}

function Frame({ section, onSignedOut, children }) {
  return html`<a class="skip" href="#content" onClick=${(event) => {
      event.preventDefault();
      document.getElementById("content").focus();
    }}>Skip to content</a>
    <header class="top">
      <a class="brand" href="#/"><img src="/assets/icon.svg" alt="" width="24" height="24" /> Nibble</a>
      <nav aria-label="Sections">
        ${sections().map(([name, label, , first = name]) => html`<a key=${name} href=${`#/${first}`}
          aria-current=${name === section ? "page" : undefined}>${label}</a>`)}
      </nav>
      <${Account} onSignedOut=${onSignedOut} />
    </header>
    <${AwayBanner} />
    <main id="content" tabindex="-1">${children}</main>`;
}

/** The path of the address; pages stay as they are when only what stands behind a ? changes. */
function usePath() {
  const [path, setPath] = useState(pathNow());
  useEffect(() => {
    const follow = () => setPath(pathNow());
    follow(); // it may have changed since the first drawing
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  return path;
}

/** The component of a page, once its module is there; null until then. */
function usePage({ module, component }) {
  const [page, setPage] = useState({ component: null, Page: null });
  useEffect(() => {
    if (module === null) return undefined;
    let isAsked = true; // until another page is
    const load = () => import(`./pages/${module}.js`);
    // Once more: a module may be asked for while the service is away.
    load().catch(() => new Promise((resolve) => { const stop = onConnection((since) => since === null && (stop(), resolve(load()))); }))
      .then((loaded) => isAsked && setPage({ component, Page: loaded[component] }));
    return () => {
      isAsked = false;
    };
  }, [module, component]);
  if (module === null) return NotFoundPage;
  return page.component === component ? page.Page : null;
}

/** Loads the other pages' modules while nothing else is to be done. */
function useOtherPages() {
  useEffect(() => {
    const load = () => document.hidden || ROUTES.filter(([, , , section]) => mayOpen(section)).forEach(([, module]) => import(`./pages/${module}.js`).catch(() => {}));
    const timer = setTimeout(load, 1500);
    return () => clearTimeout(timer);
  }, []);
}

function Pages({ onSignedOut }) {
  const path = usePath();
  const shown = route(path);
  const Page = usePage(shown);
  useOtherPages();
  return html`<${Frame} section=${shown.section} onSignedOut=${onSignedOut}>
    ${Page ? html`<${Page} key=${path} id=${shown.id} />` : html`<p class="loading" role="status">Loading…</p>`}
  <//>`;
}

/** The page for those without a session, which others do not load. */
function SignedOut() {
  const Page = usePage({ module: "sign_in", component: "SignInPage" });
  return Page && html`<${Page} />`;
}

/** Until it is known who is signed in: what every page begins with. */
function Starting() {
  return html`<header class="top"><span class="brand"><img src="/assets/icon.svg" alt="" width="24" height="24" /> Nibble</span></header>
    <main><p class="loading" role="status">Loading…</p></main>`;
}

function App() {
  const [isSignedIn, setSignedIn] = useState(null);
  const [error, setError] = useState(null);
  const enter = () => readCaller().then(() => setSignedIn(true), (fault) => (fault.status === 401 ? setSignedIn(false) : setError(fault)));
  useEffect(() => {
    whenSignedOut(() => setSignedIn(false));
    enter();
    return onConnection((since) => since === null && whoIsSignedIn() === null && enter());
  }, []);
  if (isSignedIn === null && !error) return html`<${Starting} />`;
  if (isSignedIn === null) return html`<${AwayBanner} /><main><${Problem} error=${error} title="The dashboard can't start" /></main>`;
  return isSignedIn ? html`<${Pages} onSignedOut=${() => location.assign("/")} />` : html`<${SignedOut} />`;
}

const first = route(pathNow());
if (first.module) import(`./pages/${first.module}.js`).catch(() => {}); // while it is asked who is signed in

render(html`<${App} />`, document.getElementById("app"));
