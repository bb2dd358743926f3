// Charts on a canvas (uPlot), each with its numbers as a table for those who can't see it.
import { clock, number } from "./format.js";
import { Table } from "./table.js";
import { html, useEffect, useRef, useState } from "./ui.js";

const COLORS = Array.from({ length: 8 }, (_, index) => `--plot-${index + 1}`);
const DASHES = [[], [8, 4], [2, 3]]; // for more lines than colours
const HEIGHT = 240;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(label, extra = {}) {
  return { label, stroke: color("--muted"), grid: { stroke: color("--line") }, ticks: { stroke: color("--line") }, ...extra };
}

function seriesOf(names, kind, time) {
  const drawn = { bars: uPlot.paths.bars({ size: [1, 100], gap: 0 }), steps: uPlot.paths.stepped({ align: -1 }) }[kind];
  return names.map((label, index) => ({
    label,
    stroke: color(COLORS[index % COLORS.length]),
    fill: kind === "bars" ? `${color(COLORS[index % COLORS.length])}80` : undefined,
    width: 2,
    dash: DASHES[Math.floor(index / COLORS.length) % DASHES.length],
    paths: drawn,
    value: (_, value) => number(value, 4),
    // Over time, where there are many, those alone that no line reaches.
    points: { ...(time ? {} : { show: kind !== "bars" }), size: 5, fill: color(COLORS[index % COLORS.length]) },
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

const clocks = (_, ticks) => ticks.map((tick) => clock(1000 * tick));

function axesFor({ x, y, log, whole, time }) {
  const values = (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick, log ? 3 : 6)));
  const vertical = axis(y, { size: 70, values, ...(log ? { filter: roundOnes } : {}) });
  if (log) vertical.grid.filter = roundOnes;
  const horizontal = whole ? { incrs: [1, 2, 5, 10, 20] } : {};
  return [time ? axis(null, { values: clocks, space: 80, size: 30 }) : axis(x, horizontal), vertical];
}

/** From the first moment to the last; around the only one there is. */
const moments = (_, first, last) => (last > first ? [first, last] : [first - 30, last + 30]);

function optionsFor({ x, y, names, kind, log, marks, levels, whole, time }, width) {
  const known = levels.map((level) => level.value);
  const around = (_, low, high) => (low === null ? [0, 1] : padded(Math.min(low, ...known), Math.max(high, ...known), log));
  const range = time ? (_, low, high) => [0, 1.12 * high || 1] : around;
  const draws = [
    (plot) => marks.forEach((mark) => drawMark(plot, mark)),
    (plot) => levels.forEach((level) => drawLevel(plot, level)),
  ];
  return {
    width,
    height: HEIGHT,
    padding: time ? [null, 24, null, null] : undefined, // the last clock time is whole
    legend: { live: kind !== "bars", show: kind !== "bars" },
    scales: { x: time ? { time, range: moments } : { time }, y: { ...(log ? { distr: 3 } : {}), ...(kind === "bars" ? {} : { range }) } },
    axes: axesFor({ x, y, log, whole, time }),
    series: [{ label: x, ...(time ? { value: (_, at) => (at === null ? "–" : clock(1000 * at)) } : {}) }, ...seriesOf(names, kind, time)],
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

/** The figures of a chart; of one over time the newest first. */
function Numbers({ title, data, names, x, time }) {
  const [isOpen, setOpen] = useState(false);
  const rows = data[0].map((_, index) => data.map((column) => column[index]));
  const columns = [x, ...names].map((name, column) => [name, (row) => (time && column === 0 ? clock(1000 * row[0]) : number(row[column], 5)), "number"]);
  return html`<details onToggle=${(event) => setOpen(event.currentTarget.open)}><summary>Numbers</summary>
    ${isOpen && html`<div class="numbers"><${Table} caption=${title} hideCaption columns=${columns} rows=${time ? rows.reverse() : rows} /></div>`}</details>`;
}

/** data: [xs, ys of the first name, ...]; kind: line, bars, or steps for what holds since the x before; marks: xs of vertical lines; levels: named
 * horizontal ones; whole: xs count; time: xs are seconds since 1970, and ys begin at zero. */
export function Chart({ title, data, names, x, y, kind = "line", log = false, marks = [], levels = [], whole = false, time = false }) {
  const place = useRef(null);
  const plot = useRef(null);
  const latest = useRef(data);
  latest.current = data;
  // Once it is drawn: of a chart over time the newest figures stand below it, until the pointer asks for others.
  const showNewest = () => time && requestAnimationFrame(() => {
    if (plot.current && typeof plot.current.cursor.idx !== "number") plot.current.setLegend({ idx: latest.current[0].length - 1 });
  });
  useEffect(() => {
    const draw = () => {
      if (place.current === null) return; // the page was left: listeners end after the next frame
      plot.current?.destroy();
      place.current.replaceChildren();
      plot.current = new uPlot(optionsFor({ x, y, names, kind, log, marks, levels, whole, time }, place.current.clientWidth), latest.current, place.current);
      showNewest();
    };
    draw();
    addEventListener("resize", draw);
    addEventListener("themechange", draw);
    return () => {
      removeEventListener("resize", draw);
      removeEventListener("themechange", draw);
      plot.current.destroy();
      plot.current = null;
    };
  }, [JSON.stringify([names, marks, levels]), log]);
  useEffect(() => {
    plot.current.setData(data);
    showNewest();
  }, [JSON.stringify(data)]);
  return html`<figure>
    <figcaption>${title}</figcaption>
    <div ref=${place} role="img" aria-label=${`${title}; the numbers are in the table below`}></div>
    <${Numbers} title=${title} data=${data} names=${names} x=${x} time=${time} />
  </figure>`;
}
