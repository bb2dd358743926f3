// The frame around every page, and the routes of the pages.
import { read, whenSignedOut } from "./api.js";
import { clock } from "./format.js";
import { useAway } from "./polling.js";
import { html, render, useEffect, useState } from "./ui.js";
import { ArtifactPage, ArtifactsPage } from "./pages/artifacts.js";
import { ChatPage } from "./pages/chat.js";
import { DeploymentsPage } from "./pages/deployments.js";
import { JobPage } from "./pages/job.js";
import { JobsPage } from "./pages/jobs.js";
import { NewJobPage } from "./pages/new_job.js";
import { SignInPage } from "./pages/sign_in.js";
import { WorkersPage } from "./pages/workers.js";

const ROUTES = [
  [/^\/(?:jobs)?$/, JobsPage, "jobs"],
  [/^\/jobs\/new(?:\/(job_[0-9A-Z]+))?$/, NewJobPage, "jobs"],
  [/^\/jobs\/(job_[0-9A-Z]+)$/, JobPage, "jobs"],
  [/^\/artifacts$/, ArtifactsPage, "artifacts"],
  [/^\/artifacts\/(art_[0-9A-Z]+)$/, ArtifactPage, "artifacts"],
  [/^\/deployments$/, DeploymentsPage, "deployments"],
  [/^\/deployments\/([^/]+)\/chat$/, ChatPage, "deployments"],
  [/^\/workers$/, WorkersPage, "workers"],
];
const SECTIONS = [["jobs", "Jobs"], ["artifacts", "Artifacts"], ["deployments", "Deployments"], ["workers", "Workers"]];

function currentPath() {
  return location.hash.slice(1) || "/jobs";
}

function route(path) {
  for (const [pattern, Page, section] of ROUTES) {
    const match = pattern.exec(path);
    if (match) return { Page, section, id: match[1] && decodeURIComponent(match[1]) };
  }
  return { Page: NotFoundPage, section: "" };
}

function NotFoundPage() {
  return html`<h1>Page not found</h1><p><a href="#/jobs">All jobs</a></p>`;
}

function StaleBanner() {
  const since = useAway();
  return html`<div aria-live="polite">
    ${since && html`<p class="stale">The service has not answered since ${clock(since)}. This page shows its last state.</p>`}
  </div>`;
}

function ThemeButton() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme || "");
  const isDark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const change = () => {
    const next = isDark ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    localStorage.setItem("nibble-theme", next);
    setTheme(next);
    dispatchEvent(new Event("themechange"));
  };
  return html`<button type="button" class="quiet" onClick=${change}>${isDark ? "Light" : "Dark"}</button>`;
}

function Frame({ section, children }) {
  return html`<a class="skip" href="#content" onClick=${(event) => {
      event.preventDefault();
      document.getElementById("content").focus();
    }}>Skip to content</a>
    <header class="top">
      <a class="brand" href="#/jobs"><img src="/assets/icon.svg" alt="" width="24" height="24" /> Nibble</a>
      <nav aria-label="Sections">
        ${SECTIONS.map(([name, label]) => html`<a key=${name} href=${`#/${name}`}
          aria-current=${name === section ? "page" : undefined}>${label}</a>`)}
      </nav>
      <${ThemeButton} />
    </header>
    <${StaleBanner} />
    <main id="content" tabindex="-1">${children}</main>`;
}

function App() {
  const [path, setPath] = useState(currentPath());
  const [isSignedIn, setSignedIn] = useState(null);
  useEffect(() => {
    const onHash = () => setPath(currentPath());
    addEventListener("hashchange", onHash);
    whenSignedOut(() => setSignedIn(false));
    read("/v1/workers").then(() => setSignedIn(true), (error) => setSignedIn(error.status !== 401));
    return () => removeEventListener("hashchange", onHash);
  }, []);
  if (isSignedIn === null) return null;
  if (!isSignedIn) return html`<${SignInPage} />`;
  const { Page, section, id } = route(path);
  return html`<${Frame} section=${section}><${Page} key=${path} id=${id} /><//>`;
}

render(html`<${App} />`, document.getElementById("app"));
