// What becomes of an artifact: tags, and pushes to a hub.
import { send } from "../api.js";
import { may } from "../caller.js";
import { bytes, date } from "../format.js";
import { DialogButton, Problem, State } from "../parts.js";
import { Table } from "../table.js";
import { html, useState } from "../ui.js";

export function TagList({ tags }) {
  if (tags.length === 0) return "–";
  return html`<span class="tags">${tags.map((tag) => html`<code key=${tag}>${tag}</code> `)}</span>`;
}

/** The artifact's tags, with a field for another one and a button to take each. */
export function Tags({ artifact, onChange }) {
  const [name, setName] = useState("");
  const [error, setError] = useState(null);
  const change = async (body) => {
    try {
      await send("PATCH", `/v1/artifacts/${artifact.id}`, body);
      setError(null);
      setName("");
      onChange();
    } catch (fault) {
      setError(fault);
    }
  };
  const add = (event) => {
    event.preventDefault();
    change({ add_tags: [name] });
  };
  return html`<section class="stack" aria-labelledby="tags">
    <h2 id="tags">Tags</h2>
    <p><small>A tag points to one version of the model: added here, it moves from the other one.</small></p>
    <ul class="plain">${artifact.tags.map((tag) => html`<li key=${tag}><code>${tag}</code>${" "}
      ${may("artifacts:write") && html`<button type="button" class="quiet small" aria-label=${`Remove the tag ${tag}`} onClick=${() => change({ remove_tags: [tag] })}>Remove</button>`}</li>`)}</ul>
    ${may("artifacts:write") && html`<form class="actions" onSubmit=${add}>
      <label>New tag <input value=${name} required maxlength="64" onInput=${(event) => (setError(null), setName(event.target.value))} /></label>
      <button type="submit" class="quiet">Add</button>
    </form>`}
    <${Problem} error=${error} title="Tags not changed" />
  </section>`;
}

export function PushButton({ artifact, onPushed }) {
  const [repository, setRepository] = useState("");
  const [token, setToken] = useState("");
  const [isPrivate, setPrivate] = useState(true);
  const push = async () => {
    const body = { repo_id: repository, private: isPrivate, ...(token && { hub_token: token }) };
    await send("POST", `/v1/artifacts/${artifact}/push`, body);
    onPushed();
  };
  return html`<${DialogButton} label="Push" title="Push to a hub repository" action=${push} failure="Push refused" onClose=${() => setToken("")}>
    <label>Repository
      <input value=${repository} required placeholder="account/name" onInput=${(event) => setRepository(event.target.value)} /></label>
    <label>Hub token
      <input type="password" autocomplete="off" value=${token} onInput=${(event) => setToken(event.target.value)} /></label>
    <small>It is kept until the push has ended. Operators may leave it empty: the service's own is used.</small>
    <label class="tick"><input type="checkbox" checked=${isPrivate} onChange=${(event) => setPrivate(event.target.checked)} /> Private, if it is new</label>
  <//>`;
}

const isLink = (url) => /^https?:\/\//.test(url || "");
const PUSHES = [
  ["Repository", (push) => (isLink(push.commit_url) ? html`<a href=${push.commit_url} rel="noreferrer">${push.repo_id}</a>` : push.repo_id)],
  ["State", (push) => html`<${State} state=${push.state} />`],
  ["Sent", (push) => bytes(push.sent_bytes), "number"],
  ["Since", (push) => date(push.finished_at || push.created_at)],
  ["Why", (push) => (push.error ? `${push.error.message} ${push.error.remedy}` : "")],
];

export function Pushes({ artifact }) {
  if (artifact.pushes.length === 0) return null;
  return html`<${Table} caption="Pushes" columns=${PUSHES} rows=${[...artifact.pushes].reverse()} keyOf=${(push) => push.id} />`;
}
