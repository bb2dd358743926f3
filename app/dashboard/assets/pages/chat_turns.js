// The turns of a conversation: questions, and the answers of one or two models beside each other.
import { paceInWords } from "../answer_stream.js";
import { CopyButton, Problem } from "../parts.js";
import { html, useEffect, useRef } from "../ui.js";

function Answer({ answer, again, isRunning }) {
  const { model, content, said } = answer;
  return html`<div class="message message-assistant">
    <small>${model}</small>
    <p>${content || (isRunning ? "…" : html`<em>An empty answer</em>`)}</p>
    <div class="message-foot">
      ${said && html`<small>${paceInWords(said)}</small>`}
      ${content && html`<${CopyButton} text=${content} kind="link" />`}
      ${again && html`<button type="button" class="link" onClick=${again}>Regenerate</button>`}
    </div>
  </div>`;
}

/** The place of one model's answer: what it said, and why it says no more. */
function Place({ turn, model, chat, isLast }) {
  const answer = turn.answers.find((each) => each.model === model);
  const error = isLast ? chat.errors[model] : null;
  const again = isLast && !chat.stop ? () => chat.again([model]) : null;
  return html`<div class="answer">
    ${answer && html`<${Answer} answer=${answer} again=${error ? null : again} isRunning=${isLast && chat.stop} />`}
    <${Problem} error=${error} title="No answer"><button type="button" class="main" onClick=${again}>Try again</button><//>
    ${again && !answer && !error && html`<button type="button" class="quiet small" onClick=${again}>Ask ${model}</button>`}
  </div>`;
}

function Turn({ turn, chat, isLast }) {
  const answered = turn.answers.map((each) => each.model);
  const models = isLast ? [...new Set([...chat.conversation.models, ...answered])] : answered;
  return html`<div class="turn">
    <div class="message message-user">
      <small>You</small>
      <p>${turn.question}</p>
      <div class="message-foot"><${CopyButton} text=${turn.question} kind="link" />
        ${isLast && !chat.stop && html`<button type="button" class="link" onClick=${chat.edit}>Edit</button>`}</div>
    </div>
    <div class=${models.length > 1 ? "answers answers-beside" : "answers"}>
      ${models.map((model) => html`<${Place} key=${model} turn=${turn} model=${model} chat=${chat} isLast=${isLast} />`)}
    </div>
  </div>`;
}

export function Turns({ chat }) {
  const end = useRef(null);
  const { turns } = chat.conversation;
  useEffect(() => end.current?.scrollIntoView({ block: "nearest" }), [turns, chat.errors]);
  return html`<div class="messages" role="log" aria-live="polite" aria-label="Conversation">
    ${turns.map((turn, index) => html`<${Turn} key=${index} turn=${turn} chat=${chat} isLast=${index === turns.length - 1} />`)}
    <div ref=${end}></div>
  </div>`;
}
