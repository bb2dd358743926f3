// Webhooks: the secret that signs them, and what was sent about the tenant's jobs.
import { read, send } from "../api.js";
import { useQuery } from "../address.js";
import { age, clock, date, duration } from "../format.js";
import { usePagedList } from "../paged_list.js";
import { Confirmed, Copy, Empty, Loaded, Problem, State } from "../parts.js";
import { Table } from "../table.js";
import { html, useState } from "../ui.js";
import { Administration } from "./administration.js";
import { More } from "./audit.js";
import { Choice } from "./form_fields.js";

const PER_PAGE = 15; // few, as it is polled while one is pending
const STATES = [["", "all"], ["pending", "pending"], ["delivered", "delivered"], ["failed", "failed"]];
const MASK = `whsec_${"•".repeat(24)}`;
const whilePending = (entries) => (entries.some((entry) => entry.state === "pending") ? 5 : null);

function Secret() {
  const [secret, setSecret] = useState(null);
  const [error, setError] = useState(null);
  const show = () => (setError(null), read("/v1/webhook-secret").then(({ value }) => setSecret(value.secret), setError));
  const rotate = async () => setSecret((await send("POST", "/v1/webhook-secret/rotate")).secret);
  return html`<section class="card" aria-labelledby="secret">
    <div class="title"><h2 id="secret">Secret</h2>
      <div class="actions">
        ${secret
          ? html`<button type="button" class="quiet" onClick=${() => setSecret(null)}>Hide</button>`
          : html`<button type="button" class="quiet" onClick=${show}>Show</button>`}
        <${Confirmed} label="Replace" question="Replace the secret?" action=${rotate}
          consequence="Webhooks are signed with the new one from now on, and for a day with the present one too, so that receivers can change over." />
      </div>
    </div>
    <p>Receivers check with it that a webhook comes from this service.</p>
    ${secret ? html`<${Copy} label="The secret of webhooks" text=${secret} />` : html`<p><code>${MASK}</code></p>`}
    <${Problem} error=${error} title="Can't show the secret" />
  </section>`;
}

const answerOf = ({ status, error }) => error || (status ? `HTTP ${status}` : "no answer");

function Tries({ tries }) {
  if (tries.length === 0) return "none yet";
  return html`<details class="entry"><summary>${tries.length}, last: ${answerOf(tries[tries.length - 1])}</summary>
    <ol class="tries">${tries.map((each) => html`<li key=${each.at}><time datetime=${each.at} title=${date(each.at)}>${clock(each.at)}</time> ${answerOf(each)}, after ${duration(each.seconds)}</li>`)}</ol>
  </details>`;
}

function Again({ delivery, onChange }) {
  const [error, setError] = useState(null);
  const again = async () => {
    setError(null);
    try {
      await send("POST", `/v1/jobs/${delivery.job}/webhook-deliveries/${delivery.id}/redeliver`);
      onChange();
    } catch (fault) {
      setError(fault);
    }
  };
  return html`<button type="button" class="quiet small whole" aria-label=${`Send ${delivery.type} of ${delivery.job} again`} onClick=${again}>Send again</button>
    <${Problem} error=${error} title="Not sent" />`;
}

const columns = (onChange) => [
  ["Event", (delivery) => html`<strong>${delivery.type}</strong> <small class="line"><a href=${`#/jobs/${delivery.job}`}><code>${delivery.job}</code></a></small>`, "long"],
  ["State", (delivery) => html`<${State} state=${delivery.state} />`],
  ["To", (delivery) => html`<span class="digest">${delivery.url}</span>`, "long"],
  ["Attempts", (delivery) => html`<${Tries} tries=${delivery.tries} />`, "long"],
  ["When", (delivery) => html`<time class="whole" datetime=${delivery.created_at} title=${date(delivery.created_at)}>${age(delivery.created_at)}</time>`],
  ["Action", (delivery) => html`<${Again} delivery=${delivery} onChange=${onChange} />`],
];

function Deliveries() {
  const [query, set] = useQuery();
  const state = query.get("state") || "";
  const list = usePagedList(`/v1/webhook-deliveries?limit=${PER_PAGE}${state ? `&state=${state}` : ""}`, whilePending);
  return html`<section class="stack" aria-labelledby="deliveries">
    <div class="title"><h2 id="deliveries">Deliveries</h2>
      <label class="order">State <${Choice} value=${state} options=${STATES} onChange=${(chosen) => set({ state: chosen })} /></label></div>
    <${Loaded} polled=${list}>${(entries) => (entries.length === 0
      ? html`<${Empty} title=${state ? "No such webhooks" : "No webhooks yet"}>A job with a webhook tells its URL when it starts and ends. They are listed for 30 days.<//>`
      : html`<${Table} caption="Webhooks of all jobs, newest first" hideCaption columns=${columns(list.ask)} rows=${entries} keyOf=${(delivery) => delivery.id} />
        <${More} list=${list} label="Show older webhooks" />`)}<//>
  </section>`;
}

export function WebhooksPage() {
  return html`<${Administration} area="webhooks">${() => html`<${Secret} /><${Deliveries} />`}<//>`;
}
