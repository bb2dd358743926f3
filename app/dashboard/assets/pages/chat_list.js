// The conversations with one model that this browser keeps.
import { age } from "../format.js";
import { exported, MOST, MOST_CHARACTERS, titleOf } from "../conversations.js";
import { Confirmed } from "../parts.js";
import { html } from "../ui.js";

function save(conversation) {
  const text = JSON.stringify(exported(conversation), null, 2);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const name = titleOf(conversation).toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40) || "conversation";
  Object.assign(document.createElement("a"), { href: url, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000); // once the download has begun
}

function Listed({ conversation, isOpen, chat }) {
  const title = titleOf(conversation);
  return html`<li class=${isOpen ? "listed listed-open" : "listed"}>
    <button type="button" class="listed-title" aria-current=${isOpen ? "true" : undefined} title=${title} onClick=${() => chat.open(conversation)}>${title}</button>
    <small>${age(conversation.at)}${conversation.models.length > 1 ? `, beside ${conversation.models[1]}` : ""}</small>
    ${isOpen && html`<div class="message-foot">
      <button type="button" class="link" onClick=${() => save(conversation)}>Export</button>
      <${Confirmed} label="Delete" kind="link" question="Delete this conversation?" consequence=${`“${title}” is kept in this browser alone.`} action=${() => chat.remove(conversation.id)} /></div>`}
  </li>`;
}

/** Beside the conversation on wide screens, folded above it on narrow ones. */
export function ChatList({ chat }) {
  const { listed, conversation } = chat;
  return html`<aside class="conversations" aria-label="Conversations"><details open=${innerWidth > 736}><summary>Conversations (${listed.length})</summary>
    ${listed.length === 0 && html`<p><small>None with this model yet.</small></p>`}
    <ul class="plain">${listed.map((each) => html`<${Listed} key=${each.id} conversation=${each} isOpen=${each.id === conversation.id} chat=${chat} />`)}</ul>
    <small>Kept in this browser: the newest ${MOST} of all models, at most ${MOST_CHARACTERS / 1e6} MB. The oldest go.</small></details></aside>`;
}
