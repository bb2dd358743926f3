// Charts on a canvas (uPlot), each with its numbers as a table for those who can't see it.
import { number } from "./format.js";
import { Table } from "./table.js";
import { html, useEffect, useRef } from "./ui.js";

const COLORS = Array.from({ length: 8 }, (_, index) => `--plot-${index + 1}`);
const DASHES = [[], [8, 4], [2, 3]]; // for more lines than colours
const HEIGHT = 240;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(label, extra = {}) {
  return { label, stroke: color("--muted"), grid: { stroke: color("--line") }, ticks: { stroke: color("--line") }, ...extra };
}

function seriesOf(names, kind) {
  const drawn = kind === "bars" ? uPlot.paths.bars({ size: [1, 100], gap: 0 }) : undefined;
  return names.map((label, index) => ({
    label,
    stroke: color(COLORS[index % COLORS.length]),
    fill: kind === "bars" ? `${color(COLORS[index % COLORS.length])}80` : undefined,
    width: 2,
    dash: DASHES[Math.floor(index / COLORS.length) % DASHES.length],
    paths: drawn,
    value: (_, value) => number(value, 4),
    points: { show: kind !== "bars", size: 5, fill: color(COLORS[index % COLORS.length]) },
  }));
}

/** Pads the range of values a little; on a logarithmic axis too, where uPlot would take whole decades. */
function padded(low, high, log) {
  if (low === null || high === null) return [0, 1];
  if (log) return [low / 1.5, high * 1.5];
  const room = 0.12 * (high - low || Math.abs(high) / 5 || 1);
  return [low - room, high + room];
}

const isRound = (value) => [1, 2, 5].some((step) => Math.abs(Math.log10(value / step) % 1) < 1e-6);
const roundOnes = (_, ticks) => ticks.map((tick) => (tick !== null && isRound(tick) ? tick : null));

function axesFor({ x, y, log, whole }) {
  const values = (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick, log ? 3 : 6)));
  const vertical = axis(y, { size: 70, values, ...(log ? { filter: roundOnes } : {}) });
  if (log) vertical.grid.filter = roundOnes;
  return [axis(x, whole ? { incrs: [1, 2, 5, 10, 20] } : {}), vertical];
}

function optionsFor({ x, y, names, kind, log, marks, levels, whole }, width) {
  const known = levels.map((level) => level.value);
  const range = (_, low, high) => (low === null ? [0, 1] : padded(Math.min(low, ...known), Math.max(high, ...known), log));
  const draws = [
    (plot) => marks.forEach((mark) => drawMark(plot, mark)),
    (plot) => levels.forEach((level) => drawLevel(plot, level)),
  ];
  return {
    width,
    height: HEIGHT,
    legend: { live: kind !== "bars", show: kind !== "bars" },
    scales: { x: { time: false }, y: { ...(log ? { distr: 3 } : {}), ...(kind === "bars" ? {} : { range }) } },
    axes: axesFor({ x, y, log, whole }),
    series: [{ label: x }, ...seriesOf(names, kind)],
    hooks: { draw: draws },
  };
}

function drawing(plot, draw) {
  plot.ctx.save();
  plot.ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
  draw(plot.ctx);
  plot.ctx.restore();
}

/** Draws a dashed, named horizontal line if it is within the chart. */
function drawLevel(plot, { value, name }) {
  const { left, width, top, height } = plot.bbox;
  const at = plot.valToPos(value, "y", true);
  if (at < top || at > top + height) return;
  drawing(plot, (ctx) => {
    ctx.strokeStyle = ctx.fillStyle = color("--muted");
    ctx.setLineDash([6, 4]);
    ctx.beginPath();
    ctx.moveTo(left, at);
    ctx.lineTo(left + width, at);
    ctx.stroke();
    ctx.textAlign = "center";
    ctx.fillText(name, left + width / 2, at - 5 * devicePixelRatio);
  });
}

/** Draws a dashed vertical line at `mark`, in units of the x axis. */
function drawMark(plot, mark) {
  const at = plot.valToPos(mark, "x", true);
  const { top, height } = plot.bbox;
  plot.ctx.save();
  plot.ctx.strokeStyle = color("--bad");
  plot.ctx.setLineDash([6, 4]);
  plot.ctx.beginPath();
  plot.ctx.moveTo(at, top);
  plot.ctx.lineTo(at, top + height);
  plot.ctx.stroke();
  plot.ctx.restore();
}

/** data: [xs, ys of the first name, ...]; kind: line or bars; marks: xs of vertical lines; levels: named
 * horizontal ones; whole: xs count. */
export function Chart({ title, data, names, x, y, kind = "line", log = false, marks = [], levels = [], whole = false }) {
  const place = useRef(null);
  useEffect(() => {
    const draw = () => {
      place.current.replaceChildren();
      return new uPlot(optionsFor({ x, y, names, kind, log, marks, levels, whole }, place.current.clientWidth), data, place.current);
    };
    let plot = draw();
    const redraw = () => {
      plot.destroy();
      plot = draw();
    };
    addEventListener("resize", redraw);
    addEventListener("themechange", redraw);
    return () => {
      removeEventListener("resize", redraw);
      removeEventListener("themechange", redraw);
      plot.destroy();
    };
  }, [JSON.stringify(data), log, JSON.stringify(marks)]);
  const rows = data[0].map((_, index) => data.map((column) => column[index]));
  const columns = [x, ...names].map((name, column) => [name, (row) => number(row[column], 5), "number"]);
  return html`<figure>
    <figcaption>${title}</figcaption>
    <div ref=${place} role="img" aria-label=${`${title}; the numbers are in the table below`}></div>
    <details><summary>Numbers</summary><${Table} caption=${title} hideCaption columns=${columns} rows=${rows} /></details>
  </figure>`;
}
