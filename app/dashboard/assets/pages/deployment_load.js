// The load of a deployment, all its servers together: figures since their start, and charts of the last minutes.
import { Chart } from "../charts.js";
import { clock, duration } from "../format.js";
import { Facts } from "../parts.js";
import { EVERY_S, loadOf, mean, useRecording } from "../server_metrics.js";
import { html } from "../ui.js";

// [title, unit, keys of the load, names of the lines, how they are drawn]
const CHARTS = [
  ["Throughput", "tokens per second", ["tokens"], ["tokens/s"], "steps"],
  ["Time to first token, mean", "seconds", ["first"], ["first token"]],
  ["Requests", "requests", ["running", "waiting"], ["running", "waiting"]],
  ["Cache in use", "% of the fullest server", ["cache"], ["cache"]],
];

/** Sums and means over the servers, each since its start. */
function Totals({ servers }) {
  const sum = (key) => servers.reduce((all, each) => all + each[key], 0);
  const inTime = (key) => duration(mean(servers.map((each) => each[key])));
  return html`<${Facts} rows=${[
    ["Answers", `${sum("answers").toLocaleString()}, with ${sum("tokens").toLocaleString()} tokens`],
    ["First token, mean", inTime("first")],
    ["Between tokens, mean", inTime("between")],
    ["Whole answer, mean", inTime("whole")],
  ]} />`;
}

export function DeploymentLoad({ deployment, slots }) {
  const points = useRecording(deployment, slots);
  if (points.length === 0) return null;
  const load = loadOf(points);
  const ready = slots.map((slot) => points.at(-1).servers[slot]).filter(Boolean);
  const column = (key) => load.map((each) => each[key]);
  return html`<section class="stack" aria-labelledby="load"><h2 id="load">Load</h2>
    <small>Figures since the servers' start. Charts since ${clock(1000 * points[0].at)}, read every ${EVERY_S} seconds while this page or the chat is open in this tab:
      the last half hour.</small>
    ${ready.length > 0 && html`<${Totals} servers=${ready} />`}
    <div class="charts">${CHARTS.map(([title, unit, keys, names, kind]) =>
      html`<${Chart} key=${title} time kind=${kind} title=${title} data=${[column("at"), ...keys.map(column)]} names=${names} x="Time" y=${unit} />`)}</div>
  </section>`;
}
