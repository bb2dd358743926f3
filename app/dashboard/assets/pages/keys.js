// API keys: the list, a new one, revoking one.
import { send } from "../api.js";
import { may, whoIsSignedIn } from "../caller.js";
import { age, date } from "../format.js";
import { Confirmed, Copy, DialogButton, Loaded } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html, useEffect, useRef, useState } from "../ui.js";
import { Administration } from "./administration.js";
import { Choice } from "./form_fields.js";

// [scope, what it opens]
const SCOPES = [
  ["jobs:read", "see jobs, reports, datasets and workers"], ["jobs:write", "submit, cancel and delete jobs"],
  ["artifacts:read", "see and download artifacts"], ["artifacts:write", "tag, push and delete artifacts"],
  ["deployments:read", "see deployments"], ["deployments:write", "deploy, change and delete deployments"],
  ["inference", "send requests to deployed models"], ["admin", "everything of the tenant, keys included"],
  ["operator", "all tenants, limits, storage and settings"],
];
const DAY_S = 24 * 3600;
const LASTING = [[String(30 * DAY_S), "30 days"], [String(90 * DAY_S), "90 days"], [String(365 * DAY_S), "1 year"], ["", "no expiry"]];
const BLANK = { name: "", scopes: ["jobs:read", "jobs:write"], expires: LASTING[1][0], tenant: "" };

function Scopes({ chosen, onChange }) {
  const toggle = (scope, isOn) => onChange(isOn ? [...chosen, scope] : chosen.filter((each) => each !== scope));
  return html`<fieldset class="scopes"><legend>Scopes</legend>
    ${SCOPES.filter(([scope]) => scope !== "operator" || may("operator")).map(([scope, meaning]) => html`<label class="tick" key=${scope}>
      <input type="checkbox" checked=${chosen.includes(scope)} onChange=${(event) => toggle(scope, event.target.checked)} />
      <span><code>${scope}</code> <small>${meaning}</small></span></label>`)}
  </fieldset>`;
}

function NewKeyButton({ onCreated }) {
  const [fields, setFields] = useState(BLANK);
  const set = (name) => (event) => setFields({ ...fields, [name]: event.target.value });
  const create = async () => {
    if (fields.scopes.length === 0) throw new Error("Choose at least one scope: without one a key may do nothing.");
    onCreated(await send("POST", "/v1/keys", {
      name: fields.name.trim(), scopes: fields.scopes,
      expires_in_s: fields.expires ? Number(fields.expires) : null, tenant: fields.tenant.trim() || null,
    }));
  };
  return html`<${DialogButton} label="New key" title="New API key" confirm="Create" kind="main" action=${create} failure="No key was created" onClose=${() => setFields(BLANK)}>
    <label>Name <input value=${fields.name} maxlength="64" placeholder="what it is for" onInput=${set("name")} /></label>
    <${Scopes} chosen=${fields.scopes} onChange=${(scopes) => setFields({ ...fields, scopes })} />
    <label>Expires <${Choice} value=${fields.expires} options=${LASTING} onChange=${(expires) => setFields({ ...fields, expires })} /></label>
    ${may("operator") && html`<label>Tenant <input value=${fields.tenant} placeholder=${whoIsSignedIn().tenant} pattern="[a-z0-9][a-z0-9_\\-]*" title="small letters, digits, - and _" maxlength="63" onInput=${set("tenant")} /></label>`}
  <//>`;
}

/** The secret of a new key, which no later answer shows. */
function NewSecret({ created, onDone }) {
  const heading = useRef(null);
  useEffect(() => heading.current?.focus(), [created]);
  return html`<section class="card notice" aria-labelledby="new-key">
    <h2 id="new-key" tabindex="-1" ref=${heading}>Copy the key ${created.name || created.id} now</h2>
    <p>It is shown this once. Whoever has it may act with its scopes.</p>
    <${Copy} label="The new key" text=${created.key} />
    <div class="actions"><button type="button" class="main" onClick=${onDone}>I have copied it</button></div>
  </section>`;
}

function Revoke({ item, onChange }) {
  const isOwn = item.id === whoIsSignedIn().key;
  const revoke = async () => {
    await send("DELETE", `/v1/keys/${encodeURIComponent(item.id)}`);
    onChange();
  };
  return html`<${Confirmed} label="Revoke" kind="quiet small" question=${`Revoke ${item.name || item.id}?`} action=${revoke}
    consequence=${`Whoever uses it is refused at once, and its sessions end.${isOwn ? " You are signed in with it: you will be signed out." : ""}`} />`;
}

const columns = (onChange) => [
  ["Name", (item) => html`${item.name || "–"}${item.id === whoIsSignedIn().key && html` <span class="label">yours</span>`}`],
  ["Id", (item) => html`<code>${item.id}</code>`, "long"],
  ["Scopes", (item) => html`<span class="scope-list">${item.scopes.join(", ")}</span>`, "long"],
  ...(may("operator") ? [["Tenant", (item) => item.tenant]] : []),
  ["Created", (item) => html`<span class="whole" title=${date(item.created_at)}>${age(item.created_at)}</span>`],
  ["Last used", (item) => (item.last_used_at ? html`<span class="whole" title=${date(item.last_used_at)}>${age(item.last_used_at)}</span>` : "never")],
  ["Expires", (item) => (item.expired ? html`<span class="bad">expired</span>` : item.expires_at ? date(item.expires_at) : "never")],
  ["Action", (item) => html`<${Revoke} item=${item} onChange=${onChange} />`],
];

export function KeysPage() {
  const polled = usePolled(may("admin") ? "/v1/keys" : null, () => null);
  const [created, setCreated] = useState(null);
  const take = (answer) => {
    setCreated(answer);
    polled.ask();
  };
  return html`<${Administration} area="keys" aside=${html`<${NewKeyButton} onCreated=${take} />`}>${() => html`
    ${created && html`<${NewSecret} created=${created} onDone=${() => setCreated(null)} />`}
    <${Loaded} polled=${polled}>${(page) => html`<${Table} caption=${may("operator") ? "Keys of all tenants, oldest first" : "Keys of this tenant, oldest first"}
      columns=${columns(polled.ask)} rows=${page.data} keyOf=${(item) => item.id} />`}<//>`}<//>`;
}
