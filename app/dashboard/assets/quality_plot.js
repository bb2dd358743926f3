// Quality against size: one mark for each model, each with a name that stays with it.
import { bytes, change, number } from "./format.js";
import { Table } from "./table.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "./ui.js";

const HEIGHT = 320;
const EDGE = { left: 64, right: 20, top: 16, bottom: 44 };
const NAME = { height: 16, gap: 11, character: 6.6 };
const MARKS = ["circle", "square", "triangle", "diamond", "cross", "down", "plus"];
const COLORS = 8; // coprime to the number of marks: 56 pairs of colour and mark

/** The mark and colour of the model at `index`: its own among 56. */
export const lookOf = (index) => ({ mark: MARKS[index % MARKS.length], color: `var(--plot-${(index % COLORS) + 1})` });

const SHAPES = {
  square: "M-5,-5H5V5H-5Z", triangle: "M0,-6.5L6,5H-6Z", diamond: "M0,-7L7,0L0,7L-7,0Z", down: "M0,6.5L6,-5H-6Z",
  cross: "M-6,-4L-4,-6L0,-2L4,-6L6,-4L2,0L6,4L4,6L0,2L-4,6L-6,4L-2,0Z", plus: "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
  star: "M0,-8L2.1,-2.6L7.6,-2.5L3.3,1.1L4.7,6.5L0,3.4L-4.7,6.5L-3.3,1.1L-7.6,-2.5L-2.1,-2.6Z",
};

function Mark({ mark, color }) {
  return mark === "circle" ? html`<circle r="5.5" style=${{ fill: color }} />` : html`<path d=${SHAPES[mark]} style=${{ fill: color }} />`;
}

function Swatch({ look }) {
  return html`<svg width="16" height="16" viewBox="-8 -8 16 16" aria-hidden="true"><${Mark} ...${look} /></svg>`;
}

/** Round values within a range, about `count` of them. */
export function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((each) => each * power >= raw);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

function padded(values, share) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = share * (high - low || Math.abs(high) / 5 || 1);
  return [low - room, high + room];
}

const overlaps = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

/** Where the names of points go: the first place beside each point that nothing else takes; null where there is none.
 *
 * points: { x, y, name }; a place is { x, y, anchor } of the text.
 */
export function placed(points, width, height) {
  const taken = points.map(({ x, y }) => ({ left: x - 7, right: x + 7, top: y - 7, bottom: y + 7 }));
  return points.map(({ x, y, name }) => {
    const long = name.length * NAME.character;
    const places = [
      { left: x + NAME.gap, top: y - NAME.height / 2, anchor: "start" },
      { left: x - NAME.gap - long, top: y - NAME.height / 2, anchor: "end" },
      { left: x - long / 2, top: y - NAME.gap - NAME.height, anchor: "middle" },
      { left: x - long / 2, top: y + NAME.gap, anchor: "middle" },
    ];
    for (const { left, top, anchor } of places) {
      const box = { left, right: left + long, top, bottom: top + NAME.height };
      const isInside = left >= EDGE.left + 4 && box.right <= width - 2 && top >= 2 && box.bottom <= height - EDGE.bottom;
      if (!isInside || taken.some((other) => overlaps(box, other))) continue;
      taken.push(box);
      return { x: { start: left, end: box.right, middle: x }[anchor], y: top + 12, anchor };
    }
    return null;
  });
}

function useWidth(place) {
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => setWidth(place.current.clientWidth), []);
  useEffect(() => {
    const seen = new ResizeObserver(() => setWidth(place.current?.clientWidth ?? 0));
    seen.observe(place.current);
    return () => seen.disconnect();
  }, []);
  return width;
}

function Axes({ scale, width, y }) {
  const bottom = HEIGHT - EDGE.bottom;
  return html`<g class="axes">
    ${ticks(...scale.ys, 5).map((value) => html`<g key=${`y${value}`}>
      <line x1=${EDGE.left} x2=${width - EDGE.right} y1=${scale.y(value)} y2=${scale.y(value)} />
      <text x=${EDGE.left - 8} y=${scale.y(value) + 4} text-anchor="end">${number(value, 5)}</text></g>`)}
    ${ticks(...scale.xs, Math.max(2, Math.floor(width / 110))).map((value) => html`<g key=${`x${value}`}>
      <line x1=${scale.x(value)} x2=${scale.x(value)} y1=${EDGE.top} y2=${bottom} />
      <text x=${scale.x(value)} y=${bottom + 18} text-anchor="middle">${bytes(value)}</text></g>`)}
    <text class="axis-name" x=${(EDGE.left + width - EDGE.right) / 2} y=${HEIGHT - 6} text-anchor="middle">size of the weights</text>
    <text class="axis-name" transform=${`translate(14 ${(EDGE.top + bottom) / 2}) rotate(-90)`} text-anchor="middle">${y}</text>
  </g>`;
}

function scaleOf(points, width) {
  const xs = padded(points.map((each) => each.size), 0.08);
  const ys = padded(points.flatMap((each) => [each.value, each.low, each.high]).filter((value) => value !== undefined), 0.08);
  const bottom = HEIGHT - EDGE.bottom;
  return {
    xs: [Math.max(0, xs[0]), xs[1]], ys,
    x: (value) => EDGE.left + ((value - Math.max(0, xs[0])) / (xs[1] - Math.max(0, xs[0]))) * (width - EDGE.left - EDGE.right),
    y: (value) => bottom - ((value - ys[0]) / (ys[1] - ys[0])) * (bottom - EDGE.top),
  };
}

function Drawing({ points, width, y, title }) {
  const scale = scaleOf(points, width);
  const at = points.map((each) => ({ x: scale.x(each.size), y: scale.y(each.value), name: each.short ?? each.name }));
  const names = placed(at, width, HEIGHT);
  return html`<svg class="quality" width=${width} height=${HEIGHT} role="img" aria-label=${`${title}; the numbers are in the table below`}>
    <${Axes} scale=${scale} width=${width} y=${y} />
    ${points.map((each, index) => html`<g key=${index} class="point" data-name=${each.name} transform=${`translate(${at[index].x} ${at[index].y})`}>
      ${each.low !== undefined && html`<line class="interval" y1=${scale.y(each.low) - at[index].y} y2=${scale.y(each.high) - at[index].y} style=${{ stroke: each.look.color }} />`}
      <${Mark} ...${each.look} /><title>${`${each.name}: ${bytes(each.size)}, ${each.said}`}</title></g>`)}
    ${names.map((place, index) => place && html`<text key=${index} class="point-name" data-name=${points[index].name}
      x=${place.x} y=${place.y} text-anchor=${place.anchor}>${at[index].name}</text>`)}
  </svg>`;
}

/** models: [{ name, size, value, said, low, high }], the first of them the original; y: what `value` is. */
export function QualityPlot({ title, models, y }) {
  const place = useRef(null);
  const width = useWidth(place);
  const points = models.map((each, index) => ({ ...each, look: index === 0 ? { mark: "star", color: "var(--ink)" } : lookOf(index - 1) }));
  const columns = [
    ["Model", (each) => html`<span class="swatched"><${Swatch} look=${each.look} /> ${each.name}</span>`],
    ["Size of the weights", (each) => bytes(each.size), "number"],
    [y, (each) => each.said, "number"],
  ];
  return html`<figure>
    <figcaption>${title}</figcaption>
    <div ref=${place} class="drawing">${width > 0 && html`<${Drawing} points=${points} width=${width} y=${y} title=${title} />`}</div>
    <ul class="legend" aria-hidden="true">${points.map((each, index) => html`<li key=${index}><${Swatch} look=${each.look} /> ${each.name}</li>`)}</ul>
    <details><summary>Numbers</summary><${Table} caption=${title} hideCaption columns=${columns} rows=${points} /></details>
  </figure>`;
}

/** A candidate of a report for the plot. */
export function plotted(candidate, name, original) {
  const interval = candidate.perplexity_ratio_interval;
  const spread = interval && original ? { low: original * interval.low, high: original * interval.high } : {};
  return { name, size: Math.max(...Object.values(candidate.bytes)), value: candidate.perplexity, ...spread, said: `${number(candidate.perplexity, 4)}, ${change(candidate.perplexity_ratio)}` };
}
