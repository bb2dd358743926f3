// The error of every linear in every layer, as a map.
import { number } from "./format.js";
import { html } from "./ui.js";

const CELL = { most: 44, least: 7, height: 20 };
const NAMES = 150;

/** Linears by name, experts of a layer under one: [name, error of each layer, the worst of its experts]. */
export function rowsOf(layers) {
  const rows = new Map();
  layers.forEach((layer, column) => {
    for (const linear of layer.linears) {
      if (!linear.energy || linear.loss === null) continue;
      const name = linear.linear.replace(/\.\d+\./g, ".*.");
      const errors = rows.get(name) ?? rows.set(name, new Array(layers.length).fill(null)).get(name);
      errors[column] = Math.max(errors[column] ?? 0, linear.loss / linear.energy);
    }
  });
  return [...rows];
}

/** The share of the colour at an error, on a logarithmic scale from the least to the worst. */
function shade(error, least, worst) {
  if (error === null) return 0;
  return worst > least ? 0.08 + 0.92 * (Math.log(error / least) / Math.log(worst / least)) : 1;
}

export function HeatMap({ layers }) {
  const rows = rowsOf(layers);
  const errors = rows.flatMap(([, row]) => row).filter((error) => error > 0);
  if (errors.length === 0) return null;
  const [least, worst] = [errors.reduce((a, b) => Math.min(a, b)), errors.reduce((a, b) => Math.max(a, b))];
  const cell = Math.max(CELL.least, Math.min(CELL.most, 900 / layers.length));
  const title = "Error of each linear, by layer";
  return html`<figure>
    <figcaption>${title}</figcaption>
    <div class="drawing" tabindex="0" role="region" aria-label=${title}>
      <svg class="heat" width=${NAMES + cell * layers.length} height=${CELL.height * (rows.length + 1)} role="img"
        aria-label=${`${title}: from ${number(least, 2)} to ${number(worst, 2)}; the worst are in the table of sensitive linears`}>
        ${rows.map(([name, row], line) => html`<g key=${name} transform=${`translate(0 ${line * CELL.height})`}>
          <text x=${NAMES - 8} y="14" text-anchor="end">${name.split(".").slice(-2).join(".")}</text>
          ${row.map((error, column) => error !== null && html`<rect key=${column} x=${NAMES + column * cell} width=${cell - 1} height=${CELL.height - 1}
            style=${{ fill: "var(--series-2)", fillOpacity: shade(error || least, least, worst) }}><title>${`layer ${layers[column].layer}, ${name}: ${number(error, 3)}`}</title></rect>`)}
        </g>`)}
        ${layers.map((layer, column) => (column % Math.ceil(30 / cell) === 0) && html`<text key=${column} x=${NAMES + (column + 0.5) * cell} y=${CELL.height * rows.length + 14} text-anchor="middle">${layer.layer}</text>`)}
      </svg>
    </div>
    <small>Relative output error, from ${number(least, 2)} (pale) to ${number(worst, 2)} (full colour), on a logarithmic scale.</small>
  </figure>`;
}
