// The playground of a deployment: conversations with it, or with it and another one beside it.
import { answerStream } from "../answer_stream.js";
import { useQuery } from "../address.js";
import { may } from "../caller.js";
import { blank, forget, keep, load, messagesFor } from "../conversations.js";
import { useDeployment } from "../deployment_feed.js";
import { Empty, Problem, State, Title, useFirstFocus } from "../parts.js";
import { useRecording } from "../server_metrics.js";
import { html, useEffect, useRef, useState } from "../ui.js";
import { ChatList } from "./chat_list.js";
import { ChatSettings, parametersFor, useModelNames, useModels } from "./chat_settings.js";
import { Turns } from "./chat_turns.js";

/** The conversation on the page, and those with the model that are kept; the open one's id is in the address. */
function useConversations(model) {
  const [query, setQuery] = useQuery();
  const [{ conversations, lost }, setKept] = useState(load);
  const [isFull, setFull] = useState(false);
  const listed = conversations.filter((each) => each.models[0] === model);
  const [conversation, setConversation] = useState(() => listed.find((each) => each.id === query.get("conversation")) ?? blank(model));
  const latest = useRef(conversation);
  const update = (changes) => setConversation((latest.current = { ...latest.current, ...changes }));
  const save = () => {
    if (latest.current.turns.length === 0) return;
    setFull(!keep(latest.current));
    setKept({ ...load(), lost: false });
  };
  const show = (next) => {
    setConversation((latest.current = next));
    setQuery({ conversation: next.turns.length ? next.id : "" });
  };
  const remove = (id) => {
    forget(id);
    setKept(load());
    show(blank(model));
  };
  return { latest, conversation, listed, lost, isFull, update, save, show, remove, setQuery };
}

/** Answers that stream into the last turn: { errors, stop, answer }; one for each model that is asked. */
function useAnswers({ latest, update, save }, parametersOf) {
  const [errors, setErrors] = useState({});
  const [running, setRunning] = useState(null);
  const control = useRef(null);
  const write = (id, answer) => {
    if (latest.current.id !== id) return; // another conversation is open
    const { turns } = latest.current;
    const { question, answers } = turns.at(-1);
    const index = answers.findIndex((each) => each.model === answer.model);
    const written = index < 0 ? [...answers, answer] : answers.with(index, answer);
    update({ turns: turns.with(-1, { question, answers: written.filter((each) => each.content !== null) }) });
  };
  const one = async (model, signal) => {
    const conversation = latest.current;
    let isEmpty = true;
    write(conversation.id, { model, content: "" });
    try {
      for await (const soFar of answerStream({ model, messages: messagesFor(conversation, model), ...parametersOf(model) }, signal)) {
        isEmpty = !soFar.content;
        write(conversation.id, { model, ...soFar });
      }
    } catch (fault) {
      if (!signal.aborted) setErrors((before) => ({ ...before, [model]: fault }));
      // No empty bubble; what was said until then stays.
      if (isEmpty) write(conversation.id, { model, content: null });
    }
  };
  const answer = async (models) => {
    const own = (control.current = new AbortController());
    setErrors({});
    setRunning(own);
    save();
    await Promise.all(models.map((model) => one(model, own.signal)));
    if (control.current !== own) return; // the page, or the conversation, was left
    setRunning(null);
    save();
  };
  const leave = () => {
    control.current?.abort();
    control.current = null;
    setRunning(null);
    setErrors({});
  };
  useEffect(() => () => control.current && (leave(), save()), []);
  return { errors, answer, leave, stop: running && (() => running.abort()) };
}

function useChat(model, seen) {
  const conversations = useConversations(model);
  const { latest, conversation, update, save, show, setQuery } = conversations;
  const [isEdited, setEdited] = useState(false);
  const answers = useAnswers(conversations, (name) => parametersFor(seen.current[name]?.sampling, latest.current.parameters));
  const leaving = (next) => () => (answers.leave(), save(), setEdited(false), next());
  const ask = (question) => {
    const turns = isEdited ? latest.current.turns.slice(0, -1) : latest.current.turns;
    setEdited(false);
    update({ at: Date.now(), turns: [...turns, { question, answers: [] }] });
    setQuery({ conversation: latest.current.id });
    answers.answer(latest.current.models);
  };
  const change = (changes) => (update(changes), answers.stop || save());
  return {
    ...conversations, ...answers, isEdited, ask, change, again: answers.answer,
    edit: () => setEdited(true), keepAsItIs: () => setEdited(false),
    open: (next) => leaving(() => show(next))(), fresh: leaving(() => show({ ...blank(model), models: conversation.models, system: conversation.system, parameters: conversation.parameters })),
    remove: (id) => (answers.leave(), setEdited(false), conversations.remove(id)),
  };
}

/** What stays at the foot of the page. */
function Composer({ chat }) {
  const [text, setText] = useState("");
  const field = useFirstFocus();
  useEffect(() => {
    if (!chat.isEdited) return;
    setText(chat.conversation.turns.at(-1).question);
    field.current.focus();
  }, [chat.isEdited]);
  const cancel = () => (setText(""), chat.keepAsItIs());
  const submit = (event) => {
    event.preventDefault();
    if (!text.trim() || chat.stop) return;
    chat.ask(text.trim());
    setText("");
  };
  const onKey = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
    if (event.key === "Escape" && chat.isEdited) cancel();
  };
  return html`<div class="composer">
    ${chat.isEdited && html`<p class="edited"><small>Your last question, to be asked anew.</small> <button type="button" class="link" onClick=${cancel}>Cancel</button></p>`}
    <form onSubmit=${submit}>
      <label class="unseen" for="message">Message</label>
      <textarea id="message" ref=${field} rows="2" placeholder="Write a message; Enter sends it" value=${text}
        onInput=${(event) => setText(event.target.value)} onKeyDown=${onKey}></textarea>
      ${chat.stop
        ? html`<button key="stop" type="button" class="danger" onClick=${chat.stop}>Stop</button>`
        : html`<button key="send" type="submit" class="main">Send</button>`}
    </form>
  </div>`;
}

/** The deployment that answers beside the first. */
function Beside({ chat, names }) {
  const [first, second = ""] = chat.conversation.models;
  const others = [...new Set([...names.filter((name) => name !== first), ...(second ? [second] : [])])];
  if (others.length === 0) return null;
  return html`<label class="beside-choice">Compare with
    <select value=${second} disabled=${Boolean(chat.stop)} onChange=${(event) => chat.change({ models: event.target.value ? [first, event.target.value] : [first] })}>
      <option value="">no other model</option>
      ${others.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
    </select></label>`;
}

function Notes({ chat }) {
  if (chat.isFull) return html`<p class="note"><small>This browser has no room for this conversation: it is lost when the page is closed.</small></p>`;
  return chat.lost && html`<p class="note"><small>Some conversations that this browser kept can't be read. They go with the next message.</small></p>`;
}

function Playground({ model }) {
  const seen = useRef({});
  const chat = useChat(model, seen);
  const names = useModelNames();
  seen.current = useModels(chat.conversation.models);
  const deployment = useDeployment(may("deployments:read") ? model : null).value;
  // So that the charts of its page show what is asked here.
  useRecording(deployment?.id, deployment ? deployment.servers.filter((each) => each.state === "ready").map((each) => each.slot) : []);
  if (seen.current[model]?.isUnknown) return html`<${Title} text="No such deployment">${model}<//><${Empty} title="There is no such deployment">Look for it among the <a href="#/deployments">deployments</a>.<//>`;
  return html`<${Title} text=${`Chat with ${model}`} isFocused=${false} aside=${html`${deployment && html`<${State} state=${deployment.state} />`}
      <div class="actions"><${Beside} chat=${chat} names=${names} />
      ${deployment && html`<a class="quiet button" href=${`#/deployments/${encodeURIComponent(deployment.name)}`}>Deployment</a>`}
      <button type="button" class="quiet" onClick=${chat.fresh}>New chat</button></div>`}>${model}<//>
    <div class="playground">
      <${ChatList} chat=${chat} />
      <div class="chat">
        <${Notes} chat=${chat} />
        <${ChatSettings} conversation=${chat.conversation} seen=${seen.current} onChange=${chat.change} />
        <${Turns} chat=${chat} />
        <${Composer} chat=${chat} />
      </div>
    </div>`;
}

export function ChatPage({ id: model }) {
  if (!may("inference")) return html`<${Title}>${model}<//><${Empty} title="No right to chat">Sign in with a key that has the right inference.<//>`;
  return html`<${Playground} model=${model} />`;
}
