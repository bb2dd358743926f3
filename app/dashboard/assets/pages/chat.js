// A playground for one deployment: streaming, with a stop button and the usual parameters.
import { answerStream, paceInWords } from "../answer_stream.js";
import { read } from "../api.js";
import { may } from "../caller.js";
import { Empty, Problem, Title, useFirstFocus } from "../parts.js";
import { html, useEffect, useRef, useState } from "../ui.js";

const PARAMETERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
  ["top_p", "Top p", { min: 0.05, max: 1, step: 0.05 }],
  ["max_tokens", "Max tokens", { min: 1, max: 4096, step: 1 }],
];

const place = (model) => `nibble-chat ${model}`;

/** The messages of the chat with `model`, kept until the tab is closed. */
function useMessages(model) {
  const [messages, setMessages] = useState(() => JSON.parse(sessionStorage.getItem(place(model)) || "[]"));
  useEffect(() => {
    const whole = messages.filter((message) => message.content); // no answer that has not begun
    if (whole.length) sessionStorage.setItem(place(model), JSON.stringify(whole));
    else sessionStorage.removeItem(place(model));
  }, [messages]);
  return [messages, setMessages];
}

function useChat(model, parameters) {
  const [messages, setMessages] = useMessages(model);
  const [error, setError] = useState(null);
  const [running, setRunning] = useState(null);
  const answer = async (asked) => {
    const control = new AbortController();
    setError(null);
    setRunning(control);
    setMessages([...asked, { role: "assistant", content: "" }]);
    let content = "";
    try {
      for await (const soFar of answerStream({ model, messages: asked, ...parameters }, control.signal)) {
        ({ content } = soFar);
        setMessages([...asked, { role: "assistant", ...soFar }]);
      }
    } catch (fault) {
      if (!control.signal.aborted) setError(fault);
      // No empty bubble; what was said until then stays.
      if (!content) setMessages(asked);
    } finally {
      setRunning(null);
    }
  };
  const clear = () => (setMessages([]), setError(null));
  return {
    messages, error, clear, ask: (text) => answer([...messages, { role: "user", content: text }]),
    again: () => answer(messages.slice(0, messages.findLastIndex((message) => message.role === "user") + 1)),
    stop: running && (() => running.abort()),
  };
}

const SOURCES = { model: "set by the model", default: "defaults, the model sets none" };
const UNTIL_READ = { max_tokens: 128 };

/** What a chat with the model starts with: parameters, who named them; or the fault that there is no such model. */
function useModel(model) {
  const [parameters, setParameters] = useState(UNTIL_READ);
  const [source, setSource] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    const take = ({ value: { sampling } }) => {
      setParameters({ ...UNTIL_READ, ...sampling?.parameters });
      setSource(sampling?.source);
    };
    read(`/v1/models/${encodeURIComponent(model)}`).then(take, setError);
  }, [model]);
  return { parameters, setParameters, source, isUnknown: error?.status === 404 };
}

function Parameters({ values, source, onChange }) {
  const listed = Object.entries(values).map(([name, value]) => `${name} ${value}`).join(", ");
  return html`<details class="parameters"><summary>Parameters: ${listed}${source && ` (${SOURCES[source]})`}</summary>
    <div class="fields">${PARAMETERS.map(([name, label, limits]) => html`<label key=${name}>${label}
      <input type="number" ...${limits} value=${values[name]}
        onInput=${(event) => event.target.value !== "" && onChange({ ...values, [name]: Number(event.target.value) })} />
    </label>`)}</div>
  </details>`;
}

/** What stays at the foot of the page: the last fault, and the field. */
function Composer({ chat }) {
  const [text, setText] = useState("");
  const first = useFirstFocus();
  const submit = (event) => {
    event.preventDefault();
    if (!text.trim() || chat.stop) return;
    chat.ask(text.trim());
    setText("");
  };
  const onKey = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  return html`<div class="composer">
    <${Problem} error=${chat.error} title="No answer"><button type="button" class="main" onClick=${chat.again}>Try again</button><//>
    <form onSubmit=${submit}>
      <label class="unseen" for="message">Message</label>
      <textarea id="message" ref=${first} rows="2" placeholder="Write a message; Enter sends it" value=${text}
        onInput=${(event) => setText(event.target.value)} onKeyDown=${onKey}></textarea>
      ${chat.stop
        ? html`<button type="button" class="danger" onClick=${chat.stop}>Stop</button>`
        : html`<button type="submit" class="main">Send</button>`}
    </form>
  </div>`;
}

function Messages({ chat, model }) {
  const end = useRef(null);
  useEffect(() => end.current?.scrollIntoView({ block: "nearest" }), [chat.messages, chat.error]);
  return html`<div class="messages" role="log" aria-live="polite" aria-label="Conversation">
    ${chat.messages.map((message, index) => html`<div key=${index} class=${`message message-${message.role}`}>
      <small>${message.role === "user" ? "You" : model}</small>
      <p>${message.content || "…"}</p>
      ${message.said && html`<small>${paceInWords(message.said)}</small>`}
    </div>`)}
    <div ref=${end}></div>
  </div>`;
}

export function ChatPage({ id: model }) {
  const { parameters, setParameters, source, isUnknown } = useModel(model);
  const chat = useChat(model, parameters);
  if (!may("inference")) return html`<${Title}>${model}<//><${Empty} title="No right to chat">Sign in with a key that has the right inference.<//>`;
  if (isUnknown) return html`<${Title} text="No such deployment">${model}<//><${Empty} title="There is no such deployment">Look for it among the <a href="#/deployments">deployments</a>.<//>`;
  return html`<${Title} text=${`Chat with ${model}`} isFocused=${false} aside=${html`<button type="button" class="quiet" onClick=${chat.clear}>New chat</button>`}>${model}<//>
    <${Parameters} values=${parameters} source=${source} onChange=${setParameters} />
    <${Messages} chat=${chat} model=${model} />
    <${Composer} chat=${chat} />`;
}
