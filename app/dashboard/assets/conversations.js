// Conversations of the playground, kept in this browser for each tenant: the newest, within a size.
import { whoIsSignedIn } from "./caller.js";
import { randomId } from "./random_id.js";
import { remember } from "./remember.js";

export const MOST = 50;
export const MOST_CHARACTERS = 1_000_000; // a browser gives a site about five times as many
const VERSION = 1;

const place = () => `nibble-conversations ${whoIsSignedIn().tenant}`;

/** One without a turn. `turns`: { question, answers: [{ model, content, said }] }; `parameters`: texts of the fields. */
export const blank = (model) => ({ id: randomId(), at: Date.now(), models: [model], system: "", parameters: {}, turns: [] });

const areAll = (values, kind) => values.every((value) => typeof value === kind);
const isTime = (value) => typeof value === "number" && !Number.isNaN(new Date(value).valueOf());
const isFigure = (value) => value === null || typeof value === "number";

function isAnswer({ model, content, said }) {
  return areAll([model, content], "string") && (!said || (typeof said.tokens === "number" && isFigure(said.first) && isFigure(said.rate)));
}

/** Whether what was stored is a conversation: another version, or another hand, may have written it. */
function isConversation({ id, at, models, system, parameters, turns }) {
  return areAll([id, system, ...models, ...Object.values(parameters)], "string") && isTime(at) && models.length > 0
    && turns.every(({ question, answers }) => typeof question === "string" && answers.every(isAnswer));
}

function readable(conversation) {
  try {
    return isConversation(conversation);
  } catch {
    return false; // a field is absent, or of another kind
  }
}

/** { conversations, lost }: those that are kept, newest first, and whether some can't be read. */
export function load() {
  try {
    const text = localStorage.getItem(place());
    if (text === null) return { conversations: [], lost: false };
    const all = JSON.parse(text).conversations;
    const conversations = all.filter(readable).sort((a, b) => b.at - a.at);
    return { conversations, lost: conversations.length < all.length };
  } catch {
    return { conversations: [], lost: true };
  }
}

/** Stores the newest, as many as there is room for. Returns whether the browser took them. */
function store(conversations) {
  const left = [...conversations].sort((a, b) => b.at - a.at).slice(0, MOST);
  for (; ; left.pop()) {
    const text = JSON.stringify({ version: VERSION, conversations: left });
    if (text.length > MOST_CHARACTERS && left.length > 1) continue;
    if (remember(place(), text)) return true;
    if (left.length < 2) return false;
  }
}

/** Without answers that have not begun. */
const begun = ({ turns, ...rest }) => ({ ...rest, turns: turns.map(({ question, answers }) => ({ question, answers: answers.filter((each) => each.content) })) });

/** Stores the conversation in the place of its last state; the oldest ones go. Returns whether the browser took it. */
export const keep = (conversation) => store([begun(conversation), ...load().conversations.filter((each) => each.id !== conversation.id)]);

export const forget = (id) => store(load().conversations.filter((each) => each.id !== id));

/** What a conversation is listed as: how its first question begins. */
export function titleOf({ turns }) {
  const text = (turns[0]?.question ?? "").replace(/\s+/g, " ").trim();
  return text.length > 60 ? `${text.slice(0, 59)}…` : text;
}

/** The messages that `model` reads before it answers the last turn: of other turns its own answer, else the first. */
export function messagesFor({ system, turns }, model) {
  const before = turns.slice(0, -1).flatMap(({ question, answers }) => {
    const whole = answers.filter((each) => each.content);
    const answer = whole.find((each) => each.model === model) ?? whole[0];
    return answer ? [{ role: "user", content: question }, { role: "assistant", content: answer.content }] : [];
  });
  const last = turns.slice(-1).map(({ question }) => ({ role: "user", content: question }));
  return [...(system.trim() ? [{ role: "system", content: system.trim() }] : []), ...before, ...last];
}

/** The conversation as a file: for each model its messages in the form of OpenAI's API. */
export function exported(conversation) {
  const whole = (model) => {
    const answer = conversation.turns.at(-1)?.answers.find((each) => each.model === model);
    return [...messagesFor(conversation, model), ...(answer ? [{ role: "assistant", content: answer.content }] : [])];
  };
  const conversations = conversation.models.map((model) => ({ model, messages: whole(model) }));
  return { title: titleOf(conversation), at: new Date(conversation.at).toISOString(), parameters: conversation.parameters, conversations };
}
