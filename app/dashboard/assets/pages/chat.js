// A playground for one deployment: streaming, with a stop button and the usual parameters.
import { read, stream } from "../api.js";
import { duration } from "../format.js";
import { Problem, Title } from "../parts.js";
import { html, useEffect, useRef, useState } from "../ui.js";

const PARAMETERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
  ["top_p", "Top p", { min: 0.05, max: 1, step: 0.05 }],
  ["max_tokens", "Longest answer (tokens)", { min: 1, max: 4096, step: 1 }],
];

function useChat(model, parameters) {
  const [messages, setMessages] = useState([]);
  const [error, setError] = useState(null);
  const [running, setRunning] = useState(null);
  const ask = async (text) => {
    const asked = [...messages, { role: "user", content: text }];
    const control = new AbortController();
    setError(null);
    setRunning(control);
    const started = performance.now();
    let answer = "";
    let first = null;
    let pieces = 0;
    setMessages([...asked, { role: "assistant", content: "" }]);
    try {
      for await (const chunk of stream("/v1/chat/completions", { model, messages: asked.map(({ role, content }) => ({ role, content })), stream: true, stream_options: { include_usage: true }, ...parameters }, control.signal)) {
        if (chunk.error) throw chunk.error;
        const piece = chunk.choices[0]?.delta?.content || "";
        if (piece) {
          first ??= performance.now();
          pieces += 1;
        }
        answer += piece;
        const tokens = chunk.usage?.completion_tokens ?? pieces;
        const rate = first && tokens > 1 ? (1000 * (tokens - 1)) / (performance.now() - first) : null;
        setMessages([...asked, { role: "assistant", content: answer, said: { tokens, first: first && first - started, rate } }]);
      }
    } catch (fault) {
      if (!control.signal.aborted) setError(fault);
    } finally {
      setRunning(null);
    }
  };
  return { messages, error, ask, stop: running && (() => running.abort()), clear: () => setMessages([]) };
}

function inWords({ tokens, first, rate }) {
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (rate) parts.push(`${rate.toFixed(1)} per second`);
  if (first) parts.push(`first after ${duration(first / 1000)}`);
  return parts.join(", ");
}

const SOURCES = { model: "the model's own", default: "the usual, as the model names none" };
const UNTIL_READ = { max_tokens: 128 };

/** The parameters that a chat with the model starts with, and who named them. */
function useParameters(model) {
  const [parameters, setParameters] = useState(UNTIL_READ);
  const [source, setSource] = useState(null);
  useEffect(() => {
    const take = ({ value: { sampling } }) => {
      setParameters({ ...UNTIL_READ, ...sampling?.parameters });
      setSource(sampling?.source);
    };
    read(`/v1/models/${encodeURIComponent(model)}`).then(take, () => {});
  }, [model]);
  return [parameters, setParameters, source];
}

function Parameters({ values, source, onChange }) {
  const listed = Object.entries(values).map(([name, value]) => `${name} ${value}`).join(", ");
  return html`<details class="parameters"><summary>Parameters: ${listed}${source && ` (at first ${SOURCES[source]})`}</summary>
    <div class="fields">${PARAMETERS.map(([name, label, limits]) => html`<label key=${name}>${label}
      <input type="number" ...${limits} value=${values[name]}
        onInput=${(event) => event.target.value !== "" && onChange({ ...values, [name]: Number(event.target.value) })} />
    </label>`)}</div>
  </details>`;
}

function Composer({ chat }) {
  const [text, setText] = useState("");
  const submit = (event) => {
    event.preventDefault();
    if (!text.trim() || chat.stop) return;
    chat.ask(text.trim());
    setText("");
  };
  const onKey = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  return html`<form class="composer" onSubmit=${submit}>
    <label class="unseen" for="message">Message</label>
    <textarea id="message" rows="2" placeholder="Write a message; Enter sends it" value=${text}
      onInput=${(event) => setText(event.target.value)} onKeyDown=${onKey}></textarea>
    ${chat.stop
      ? html`<button type="button" class="danger" onClick=${chat.stop}>Stop</button>`
      : html`<button type="submit" class="main">Send</button>`}
  </form>`;
}

export function ChatPage({ id: model }) {
  const [parameters, setParameters, source] = useParameters(model);
  const chat = useChat(model, parameters);
  const end = useRef(null);
  useEffect(() => end.current?.scrollIntoView({ block: "nearest" }), [chat.messages]);
  return html`<${Title} text=${`Chat with ${model}`} aside=${html`<button type="button" class="quiet" onClick=${chat.clear}>Start anew</button>`}>${model}<//>
    <${Parameters} values=${parameters} source=${source} onChange=${setParameters} />
    <div class="messages" role="log" aria-live="polite" aria-label="Conversation">
      ${chat.messages.map((message, index) => html`<div key=${index} class=${`message message-${message.role}`}>
        <small>${message.role === "user" ? "You" : model}</small>
        <p>${message.content || "…"}</p>
        ${message.said && html`<small>${inWords(message.said)}</small>`}
      </div>`)}
      <div ref=${end}></div>
    </div>
    <${Problem} error=${chat.error} title="No answer" />
    <${Composer} chat=${chat} />`;
}
