// The dialog that runs a job again: with more time, or computed anew.
import { send } from "../api.js";
import { DialogButton } from "../parts.js";
import { html, useState } from "../ui.js";

const MORE = 2; // times as long, after a job that ran out of time

/** A button; the new job's page opens. `isForced`: whether it is computed although there is a result. */
export function RunAgain({ job, label = "Run again", kind = "quiet", isForced = false }) {
  const ranOut = job.error?.code === "deadline_exceeded";
  const [limit, setLimit] = useState(String(ranOut ? MORE * job.spec.timeout_s : job.spec.timeout_s));
  const [force, setForce] = useState(isForced);
  const [token, setToken] = useState("");
  const run = async () => {
    const body = { timeout_s: Number(limit), force, ...(token && { hub_token: token }) };
    const created = await send("POST", `/v1/jobs/${job.id}/retry`, body);
    location.hash = `#/jobs/${created.id}`;
  };
  return html`<${DialogButton} label=${label} title="Run this job again" confirm="Run" kind=${kind} action=${run} failure="The job was not started" onClose=${() => setToken("")}>
    <label>Time limit in seconds
      <input type="number" min="1" max="604800" required value=${limit} onInput=${(event) => setLimit(event.target.value)} /></label>
    <small>${ranOut ? `The last run was stopped after ${job.spec.timeout_s} s. ` : ""}It continues after the last finished layer where there is one.</small>
    <label class="tick"><input type="checkbox" checked=${force} onChange=${(event) => setForce(event.target.checked)} /> Compute anew, even if this result exists</label>
    ${job.has_hub_token && html`<label>Hub token
      <input type="password" autocomplete="off" required value=${token} onInput=${(event) => setToken(event.target.value)} /></label>`}
  <//>`;
}
