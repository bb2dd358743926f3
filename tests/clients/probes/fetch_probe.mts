// openapi-fetch with the types that openapi-typescript generates, as schema.d.ts.
import { createHash } from "node:crypto";
import createClient from "openapi-fetch";
import { report, same, scene } from "./rows.mjs";
import type { components, paths } from "./schema.js";

type Job = components["schemas"]["JobView"];
type Events = components["schemas"]["EventList"];

const client = createClient<paths>({ baseUrl: scene.url, headers: { Authorization: `Bearer ${scene.key}` } });
const jobs: Job[] = [];

function last(): Job {
  const job = jobs.at(-1);
  if (job === undefined) throw new Error("no job was submitted");
  return job;
}

async function submit() {
  const { data, response } = await client.POST("/v1/jobs", {
    body: { model: scene.model },
    params: { header: { "idempotency-key": "three" } },
  });
  same([response.status, data?.state], [202, "queued"]);
  if (data) jobs.push(data);
}

async function poll() {
  const job_id = last().id;
  const first = await client.GET("/v1/jobs/{job_id}", { params: { path: { job_id } } });
  let etag = first.response.headers.get("etag") ?? "";
  const header = { "if-none-match": etag };
  const unchanged = await client.GET("/v1/jobs/{job_id}", { params: { path: { job_id }, header } });
  same(unchanged.response.status, 304);
  for (let tries = 0; last().state !== "succeeded" && tries < 5; tries++) {
    const header = { "if-none-match": etag, prefer: "wait=20" };
    const { data, response } = await client.GET("/v1/jobs/{job_id}", { params: { path: { job_id }, header } });
    etag = response.headers.get("etag") ?? "";
    if (data) jobs.push(data);
  }
  same(last().state, "succeeded");
}

// The route also answers a stream, which is text.
function list(data: Events | string | undefined): Events {
  if (typeof data !== "object") throw new Error("no list of events");
  return data;
}

async function events() {
  const path = { job_id: last().id };
  const route = "/v1/jobs/{job_id}/events";
  const page = list((await client.GET(route, { params: { path, query: { limit: 2 } } })).data);
  same([page.data.length, page.has_more], [2, true]);
  const rest = list((await client.GET(route, { params: { path, query: { after: page.next ?? undefined } } })).data);
  const headers = { Accept: "text/event-stream" };
  const stream = await client.GET(route, { params: { path }, headers, parseAs: "text" });
  const lines = String(stream.data).split("\n").filter((line) => line.startsWith("id: "));
  same(lines.map((line) => line.slice(4)), [...page.data, ...rest.data].map((event) => event.id));
}

async function download() {
  const artifact_id = last().artifacts[0];
  const { data } = await client.GET("/v1/artifacts/{artifact_id}", { params: { path: { artifact_id } } });
  const [file] = data?.files ?? [];
  const path = { artifact_id, path: file.path };
  const answer = await client.GET("/v1/artifacts/{artifact_id}/files/{path}", {
    params: { path },
    parseAs: "arrayBuffer",
  });
  const content = Buffer.from(answer.data ?? new ArrayBuffer(0));
  same([content.length, createHash("sha256").update(content).digest("hex")], [file.size, file.sha256]);
}

async function errors() {
  const job_id = `job_${"0".repeat(26)}`;
  const { error } = await client.GET("/v1/jobs/{job_id}", { params: { path: { job_id } } });
  same([error?.status, error?.code], [404, "job_not_found"]);
}

await report("openapi-typescript", () => false, { submit, poll, events, download, errors });
