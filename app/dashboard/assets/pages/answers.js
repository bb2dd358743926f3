// What a job's quantized model answers beside its original, word for word, at temperature 0.
import { answerStream, paceInWords } from "../answer_stream.js";
import { read, send } from "../api.js";
import { may } from "../caller.js";
import { modelName } from "../format.js";
import { Problem, State } from "../parts.js";
import { usePolled } from "../polling.js";
import { remember } from "../remember.js";
import { html, useEffect, useRef, useState } from "../ui.js";
import { suggestedName } from "./deploy.js";

const PROMPTS = [
  "Explain in two sentences why the sky is blue.",
  "What is the capital of Australia, and what is it known for?",
  "A train leaves at 9:40 and arrives at 12:15. How long does the journey take?",
  "Write a Python function that returns the n-th Fibonacci number.",
  "Translate into French: The library opens at ten and closes at six.",
];
const GREEDY = { temperature: 0, max_tokens: 96 };
const IDLE_S = 600; // after which what was served for this ends by itself
const STORED = "nibble-prompts";
const SIDES = ["original", "quantized"];
const NAMES = { original: "the original", quantized: "the quantized model" };
const SERVED = ["ready", "starting", "stopped"];

/** The prompts, kept in this browser. */
function usePrompts() {
  const [prompts, setPrompts] = useState(() => {
    try {
      const stored = JSON.parse(localStorage.getItem(STORED));
      return PROMPTS.map((usual, index) => (typeof stored?.[index] === "string" ? stored[index] : usual));
    } catch {
      return PROMPTS;
    }
  });
  const keep = (next) => (remember(STORED, JSON.stringify(next)), setPrompts(next));
  return [prompts, keep];
}

/** The deployment of each side: the artifact's, and one of its job's original, which all its artifacts share. */
function servedOf(deployments, artifact, artifacts) {
  const ids = artifacts.map((each) => each.id);
  const first = (fits) => {
    const fitting = deployments.filter((each) => fits(each) && each.state !== "draining");
    return fitting.find((each) => SERVED.includes(each.state)) ?? fitting[0];
  };
  return {
    original: first((each) => each.original && ids.includes(each.artifact)),
    quantized: first((each) => !each.original && each.artifact === artifact.id),
  };
}

/** A deployment for one side: the present one, started again if it rests for good, or a new one. */
function serve(side, present, artifact) {
  if (present && SERVED.includes(present.state)) return present;
  if (present) return send("PATCH", `/v1/deployments/${present.id}`, { paused: false });
  const mark = artifact.id.slice(-5).toLowerCase();
  const base = `${modelName(artifact.model).split("/").pop()}-original`.toLowerCase().replace(/[^a-z0-9._-]/g, "-");
  const name = `${side === "original" ? base : suggestedName(artifact)}-${mark}`;
  return send("POST", "/v1/deployments", { name, artifact: artifact.id, original: side === "original", idle_timeout_s: IDLE_S });
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

/** Waits for a deployment that starts; throws the error of one that can't. A stopped one is woken by a request. */
async function awaitServers(id, signal, show) {
  for (;;) {
    const { value, retryAfter } = await read(`/v1/deployments/${id}`, signal);
    if (["ready", "stopped"].includes(value.state)) return;
    if (value.state !== "starting") throw { remedy: "", code: "", message: value.reason, ...value.error };
    show({ content: "", waits: value.reason });
    await pause(retryAfter ?? 1, signal);
  }
}

/** Streams one answer into `show`, once there is a server for it. */
async function answer(deployment, prompt, signal, show) {
  for (;;) {
    await awaitServers(deployment.id, signal, show);
    const request = { model: deployment.name, messages: [{ role: "user", content: prompt }], ...GREEDY };
    try {
      for await (const soFar of answerStream(request, signal)) show(soFar);
      return;
    } catch (fault) {
      if (fault.status !== 503 || !fault.retryAfter) throw fault;
      await pause(fault.retryAfter, signal);
    }
  }
}

/** { answers, isRunning, compare, stop }: `answers` by prompt, then by side. One prompt after the other, both models at once. */
function useComparison(prompts) {
  const [answers, setAnswers] = useState([]);
  const [control, setControl] = useState(null);
  const running = useRef(null);
  useEffect(() => () => running.current?.abort(), []);
  const show = (index, side) => (news) => setAnswers((before) => {
    const next = [...before];
    next[index] = { ...next[index], [side]: { ...next[index]?.[side], waits: null, ...news } };
    return next;
  });
  const one = async (index, side, deployment, signal) => {
    const tell = show(index, side);
    try {
      await answer(deployment, prompts[index], signal, tell);
      tell({ isOver: true });
    } catch (error) {
      tell(signal.aborted ? {} : { error });
    }
  };
  const compare = async (deployments) => {
    const { signal } = (running.current = new AbortController());
    setControl(running.current);
    setAnswers([]);
    for (let index = 0; index < prompts.length && !signal.aborted; index += 1) {
      if (prompts[index].trim()) await Promise.all(SIDES.map((side) => one(index, side, deployments[side], signal)));
    }
    setControl(null);
  };
  return { answers, compare, isRunning: control !== null, stop: () => running.current.abort() };
}

const wordsOf = (text) => text.match(/\s*\S+/g) ?? [];

/** The index of the first word in which two answers differ; -1 while there is none. The last word of a growing one is not complete. */
function firstDifference(one, other) {
  const [a, b] = [one, other].map(({ content, isOver }) => wordsOf(content).slice(0, isOver ? undefined : -1));
  const end = one.isOver && other.isOver ? Math.max(a.length, b.length) : Math.min(a.length, b.length);
  for (let index = 0; index < end; index += 1) if (a[index]?.trim() !== b[index]?.trim()) return index;
  return -1;
}

function Words({ content, differs }) {
  const words = wordsOf(content);
  if (differs < 0) return content.trimStart();
  const [space, word] = differs < words.length ? [/^\s*/.exec(words[differs])[0], words[differs].trim()] : [" ", "(ends here)"];
  return html`${words.slice(0, differs).join("").trimStart()}${differs > 0 ? space : ""}<mark>${word}</mark>${words.slice(differs + 1).join("")}`;
}

function Answer({ side, said, differs }) {
  return html`<div class="message">
    <small>${side === "original" ? "Original" : "Quantized"}</small>
    ${said.waits ? html`<p><small>Starting: ${said.waits}</small></p><progress aria-label=${`Starting ${NAMES[side]}`}></progress>`
      : (said.content || !said.error) && html`<p>${said.content ? html`<${Words} content=${said.content} differs=${differs} />` : "…"}</p>`}
    ${said.said && html`<small>${paceInWords(said.said)}</small>`}
    <${Problem} error=${said.error} title="No answer" />
  </div>`;
}

function Pair({ number, pair }) {
  const { original, quantized } = pair;
  const differs = original?.content && quantized?.content ? firstDifference(original, quantized) : -1;
  const isOver = original?.isOver && quantized?.isOver;
  const verdict = differs >= 0 ? `The answers differ from word ${differs + 1} on.` : isOver ? "Both answers are the same." : "";
  return html`<div class="pair" role="group" aria-label=${`Answers to prompt ${number}`}>
    ${SIDES.map((side) => pair[side] && html`<${Answer} key=${side} side=${side} said=${pair[side]} differs=${differs} />`)}
    ${verdict && html`<p class="verdict"><small>${verdict}</small></p>`}
  </div>`;
}

function Sides({ served }) {
  return html`<ul class="plain sides">${SIDES.map((side) => html`<li key=${side}>
    ${side === "original" ? "Original" : "Quantized"}: ${served[side]
      ? html`<a href=${`#/deployments/${encodeURIComponent(served[side].name)}`}>${served[side].name}</a> <${State} state=${served[side].state} />`
      : "not served"}</li>`)}</ul>`;
}

const isChanging = (page) => page.data.some((each) => each.state === "starting");

/** `label` of what starts a comparison, and `missing`, the sides for which it must start a server first. */
function startOf(served) {
  const missing = SIDES.filter((side) => !SERVED.includes(served[side]?.state));
  const what = missing.length === 2 ? "both" : NAMES[missing[0]];
  return { missing, label: missing.length ? `Serve ${what} and compare` : "Compare answers" };
}

function Comparison({ artifact, artifacts }) {
  const [prompts, setPrompts] = usePrompts();
  const [error, setError] = useState(null);
  const [isServing, setServing] = useState(false);
  const deployments = usePolled("/v1/deployments?limit=100", (page) => (isChanging(page) ? 2 : 10));
  const { answers, compare, isRunning, stop } = useComparison(prompts);
  if (deployments.value === undefined) return deployments.error ? html`<${Problem} error=${deployments.error} title="Can't load this" />` : html`<p class="loading" role="status">Loading…</p>`;
  const served = servedOf(deployments.value.data, artifact, artifacts);
  const { missing, label } = startOf(served);
  const isAllowed = missing.length === 0 || may("deployments:write");
  const start = async (event) => {
    event.preventDefault();
    if (isServing || isRunning || !isAllowed) return;
    setError(null);
    setServing(true);
    try {
      const both = await Promise.all(SIDES.map((side) => serve(side, served[side], artifact)));
      compare({ original: both[0], quantized: both[1] });
    } catch (fault) {
      setError(fault);
    }
    setServing(false);
    deployments.ask();
  };
  return html`<form class="stack" onSubmit=${start}>
    <${Sides} served=${served} />
    ${missing.length > 0 && html`<p><small>${isAllowed
      ? `What is started here ends by itself after ${IDLE_S / 60} minutes without a question.`
      : "Your key may not start what is missing: that needs the right deployments:write."}</small></p>`}
    <${Problem} error=${error} title="Not served" />
    <div class="actions">
      ${isRunning
        ? html`<button key="stop" type="button" class="danger" onClick=${stop}>Stop</button>`
        : isAllowed && html`<button key="start" type="submit" class="main" aria-disabled=${isServing}>${label}</button>`}
      <button type="button" class="quiet" onClick=${() => setPrompts(PROMPTS)}>Reset prompts</button>
    </div>
    ${prompts.map((prompt, index) => html`<div class="stack prompt" key=${index}>
      <label>Prompt ${index + 1}
        <textarea rows="2" value=${prompt} readonly=${isRunning}
          onInput=${(event) => setPrompts(prompts.map((each, at) => (at === index ? event.target.value : each)))}></textarea></label>
      ${answers[index] && html`<${Pair} number=${index + 1} pair=${answers[index]} />`}
    </div>`)}
  </form>`;
}

/** `artifact`, the job's best one, is chosen first among its `artifacts`. Nothing is asked for while it is closed. */
export function Answers({ artifact, artifacts }) {
  const [isOpen, setOpen] = useState(false);
  const [id, setId] = useState(artifact.id);
  if (!may("inference") || !may("deployments:read")) return null;
  return html`<details class="card" onToggle=${(event) => setOpen(event.currentTarget.open)}>
    <summary>Answers beside the original</summary>
    ${isOpen && html`<div class="stack">
      <p>Both models answer your prompts at temperature 0. The first word in which they differ is marked.</p>
      ${artifacts.length > 1 && html`<label>Quantized model <select value=${id} onChange=${(event) => setId(event.target.value)}>
        ${artifacts.map((each) => html`<option key=${each.id} value=${each.id}>${each.summary.label}, ${each.format}</option>`)}
      </select></label>`}
      <${Comparison} key=${id} artifact=${artifacts.find((each) => each.id === id)} artifacts=${artifacts} />
    </div>`}
  </details>`;
}
