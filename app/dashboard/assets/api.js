// The HTTP API: reads with entity tags, writes, and problem documents as errors.

export class ApiError extends Error {
  constructor(status, problem, retryAfter) {
    super(problem.detail || problem.title || `The service answered ${status}.`);
    this.status = status;
    this.code = problem.code || "";
    this.remedy = problem.remedy || "";
    this.fields = problem.errors || [];
    this.retryAfter = retryAfter;
  }
}

const seen = new Map(); // path -> { tag, value }
const KEPT = 200;
let onSignedOut = () => {};

export function whenSignedOut(action) {
  onSignedOut = action;
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
  const response = await fetch(path, { headers, signal, credentials: "same-origin", cache: "no-store" });
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
  const response = await fetch(path, {
    method,
    signal,
    credentials: "same-origin",
    headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!response.ok) throw await failure(response);
  return response.status === 204 ? null : response.json();
}

/** The parsed `data:` lines of a stream of server-sent events, until `[DONE]`. */
export async function* stream(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    signal,
    credentials: "same-origin",
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
      if (data) yield JSON.parse(data);
    }
  }
}
