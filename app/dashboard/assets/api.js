// The HTTP API: reads with entity tags, writes, errors in the words of this surface, and whether the service answers.

// What a person at this page can do, where the service's remedy speaks to programs.
const REMEDIES = {
  validation_failed: "Correct the fields that are marked.",
  api_key_unknown: "Check that the whole key was copied; nibble keys list shows the keys that exist.",
  api_key_missing: "Sign in again.",
  session_unknown: "Sign in again.",
  scope_missing: "Sign in with a key that has this right, or ask for one.",
  deadline_exceeded: "Run it again with more time; it continues after the last finished layer.",
};

export class ApiError extends Error {
  /** `problem`: a problem document of the management API, or `error` of OpenAI's shape. */
  constructor(status, problem, retryAfter) {
    super(problem.detail || problem.message || problem.title || `The service answered ${status}.`);
    this.status = status;
    this.code = problem.code || problem.type || "";
    this.remedy = REMEDIES[problem.code] || problem.remedy || "";
    this.fields = problem.errors || [];
    this.retryAfter = retryAfter;
  }
}

/** The service did not answer at all. */
export class Unreachable extends Error {
  constructor() {
    super("The service does not answer.");
    this.code = "";
    this.remedy = "Nothing was changed. Try again once it is back.";
  }
}

/** The remedy that this page shows for a recorded problem. */
export const remedyOf = (problem) => REMEDIES[problem.code] || problem.remedy;

const connection = { since: null, listeners: new Set() };

function setAway(since) {
  if (Boolean(connection.since) === Boolean(since)) return;
  connection.since = since;
  connection.listeners.forEach((listen) => listen(since));
}

/** The time since which the service has not answered; null while it does. */
export const awaySince = () => connection.since;

/** Calls `listen` with that time whenever it changes; returns the function that ends it. */
export function onConnection(listen) {
  connection.listeners.add(listen);
  return () => connection.listeners.delete(listen);
}

const seen = new Map(); // path -> { tag, value }
const KEPT = 200;
let onSignedOut = () => {};

export function whenSignedOut(action) {
  onSignedOut = action;
}

/** The answer of the service. Throws Unreachable, unless `signal` ended the request. */
async function ask(path, options) {
  try {
    const response = await fetch(path, { credentials: "same-origin", ...options });
    // The service's own errors are JSON; a proxy in front of one that is down answers with a page.
    const isProxy = response.status >= 502 && !(response.headers.get("Content-Type") || "").includes("json");
    setAway(isProxy ? new Date() : null);
    return response;
  } catch (fault) {
    if (options.signal?.aborted) throw fault;
    setAway(new Date());
    throw new Unreachable();
  }
}

/** Asks whether the service is there again, which all who wait for it then learn. */
export async function knock() {
  await ask("/healthz", { cache: "no-store" }).catch(() => {});
}

function seconds(response) {
  const text = response.headers.get("Retry-After");
  return text === null || Number.isNaN(Number(text)) ? null : Number(text);
}

async function failure(response) {
  let problem = {};
  try {
    problem = await response.json();
  } catch {
    problem = { title: response.statusText };
  }
  if (response.status === 401) onSignedOut();
  return new ApiError(response.status, problem.error || problem, seconds(response));
}

/** The value at `path` and the seconds until the next poll; a 304 returns the same object as before. */
export async function read(path, signal) {
  const known = seen.get(path);
  const headers = known ? { "If-None-Match": known.tag } : {};
  const response = await ask(path, { headers, signal, cache: "no-store" });
  if (response.status === 304 && known) return { value: known.value, retryAfter: seconds(response) };
  if (!response.ok) throw await failure(response);
  const value = await response.json();
  const tag = response.headers.get("ETag");
  seen.delete(path);
  if (tag) seen.set(path, { tag, value });
  if (seen.size > KEPT) seen.delete(seen.keys().next().value);
  return { value, retryAfter: seconds(response) };
}

/** POST, DELETE and the like; the answer's JSON, or null. */
export async function send(method, path, body, { signal, headers = {} } = {}) {
  const response = await ask(path, {
    method,
    signal,
    headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!response.ok) throw await failure(response);
  return response.status === 204 ? null : response.json();
}

/** POST of a file's content; the answer's JSON. */
export async function upload(path, file) {
  const response = await ask(path, { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file });
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** The parsed `data:` lines of a stream of server-sent events, until `[DONE]`. Throws an ApiError for an error in it. */
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (pending + value).split("\n");
    pending = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data: ") ? line.slice(6).trim() : "";
      if (data === "[DONE]") return;
      if (!data) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(200, chunk.error, null);
      yield chunk;
    }
  }
}
