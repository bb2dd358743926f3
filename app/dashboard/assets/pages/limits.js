// A tenant's limits beside what it uses; the operator sets them, and sees those of every tenant.
import { read, send } from "../api.js";
import { useQuery } from "../address.js";
import { may, whoIsSignedIn } from "../caller.js";
import { bytes, percent } from "../format.js";
import { DialogButton, Loaded } from "../parts.js";
import { usePolled } from "../polling.js";
import { Table } from "../table.js";
import { html, useEffect, useState } from "../ui.js";
import { Administration } from "./administration.js";
import { Choice } from "./form_fields.js";

const GB = 1e9;
const whole = (count) => String(count);
// [limit, the figure of use beside it, name, how both are written, one unit of the field, its label]
const LIMITS = [
  ["active_jobs", "active_jobs", "Jobs that have not ended", whole, 1, "Jobs that have not ended"],
  ["running_jobs", "running_jobs", "Jobs queued or running", whole, 1, "Jobs queued or running"],
  ["storage_bytes", "storage_bytes", "Storage of artifacts and datasets", bytes, GB, "Storage in GB"],
  ["requests_per_minute", null, "Requests per minute", whole, 1, "Requests per minute"],
];

function Share({ used, most, name }) {
  if (!most || used === null) return "–";
  const share = used / most;
  return html`<span class="share-of"><meter class="share" min="0" max="1" value=${Math.min(1, share)} aria-label=${`${name}: share in use`}></meter> ${percent(share)}</span>`;
}

const columns = ({ limits, usage }) => [
  ["What", ([, , name]) => name],
  ["In use", ([, use, , write]) => (use ? write(usage[use]) : "–"), "number"],
  ["Limit", ([limit, , , write]) => (limits[limit] ? write(limits[limit]) : "no limit"), "number"],
  ["Share", ([limit, use, name]) => html`<${Share} used=${use && usage[use]} most=${limits[limit]} name=${name} />`],
];

const written = (limits) => Object.fromEntries(LIMITS.map(([limit, , , , unit]) => [limit, String(limits[limit] / unit)]));

/** Sends what was changed here over what holds by then, so that another's change stays. */
async function change(path, before, fields) {
  const { value } = await read(path);
  const changed = LIMITS.filter(([limit]) => fields[limit] !== before[limit]);
  const limits = Object.fromEntries(changed.map(([limit, , , , unit]) => [limit, Math.round(Number(fields[limit]) * unit)]));
  await send("PUT", path, { ...value.limits, ...limits });
}

function ChangeButton({ path, answer, onChange }) {
  const before = written(answer.limits);
  const [fields, setFields] = useState(before);
  const apply = async () => {
    await change(path, before, fields);
    onChange();
  };
  return html`<${DialogButton} label="Change limits" title=${`Limits of ${answer.tenant}`} confirm="Apply" kind="main" action=${apply} failure="Not changed" onClose=${() => setFields(before)}>
    ${LIMITS.map(([limit, , , , unit, label]) => html`<label key=${limit}>${label}
      <input type="number" min="0" step=${unit === 1 ? 1 : "any"} required value=${fields[limit]} onInput=${(event) => setFields({ ...fields, [limit]: event.target.value })} /></label>`)}
    <small>0 is no limit. Jobs over a lower limit go on; new ones are refused.</small>
  <//>`;
}

/** The tenants that have keys, for the operator; for others their own. */
function useTenants() {
  const [tenants, setTenants] = useState([whoIsSignedIn().tenant]);
  useEffect(() => {
    if (may("operator") && may("admin")) {
      read("/v1/keys").then(({ value }) => setTenants((own) => [...new Set([...own, ...value.data.map((key) => key.tenant)])].sort()), () => {});
    }
  }, []);
  return tenants;
}

export function LimitsPage() {
  const [query, set] = useQuery();
  const own = whoIsSignedIn().tenant;
  const tenant = query.get("tenant") || own;
  const path = `/v1/tenants/${encodeURIComponent(tenant)}/limits`;
  const polled = usePolled(may("admin") ? path : null, 10);
  const tenants = [...new Set([...useTenants(), tenant])];
  const aside = may("operator") && polled.value && html`<${ChangeButton} key=${JSON.stringify(polled.value.limits) + tenant} path=${path} answer=${polled.value} onChange=${polled.ask} />`;
  return html`<${Administration} area="limits" aside=${aside}>${() => html`
    ${tenants.length > 1 && html`<div class="filters"><label class="order">Tenant
      <${Choice} value=${tenant} options=${tenants.map((each) => [each, each])} onChange=${(chosen) => set({ tenant: chosen === own ? "" : chosen })} /></label></div>`}
    <${Loaded} polled=${polled}>${(answer) => html`<${Table} caption=${`What the tenant ${answer.tenant} may use`} columns=${columns(answer)} rows=${LIMITS} keyOf=${([limit]) => limit} />`}<//>
    ${!may("operator") && html`<p><small>The operator of the service sets limits.</small></p>`}`}<//>`;
}
