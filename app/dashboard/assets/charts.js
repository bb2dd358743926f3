// Charts on a canvas (uPlot), each with its numbers as a table for those who can't see it.
import { number } from "./format.js";
import { Table } from "./table.js";
import { html, useEffect, useRef } from "./ui.js";

const COLORS = ["--series-1", "--series-2", "--series-3", "--series-4"];
const HEIGHT = 240;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(label, extra = {}) {
  return { label, stroke: color("--muted"), grid: { stroke: color("--line") }, ticks: { stroke: color("--line") }, ...extra };
}

function seriesOf(names, kind) {
  const drawn = { bars: uPlot.paths.bars({ size: [1, 100], gap: 0 }), points: () => null, line: undefined }[kind];
  return names.map((label, index) => ({
    label,
    stroke: color(COLORS[index % COLORS.length]),
    fill: kind === "bars" ? `${color(COLORS[index % COLORS.length])}80` : undefined,
    width: 2,
    paths: drawn,
    points: { show: kind !== "bars", size: kind === "points" ? 9 : 4 },
    value: (_, value) => number(value, 4),
  }));
}

function optionsFor({ x, y, names, kind, log, marks, whole }, width) {
  return {
    width,
    height: HEIGHT,
    scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
    axes: [axis(x, whole ? { incrs: [1, 2, 5, 10, 20] } : {}), axis(y, { size: 70, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick, 3))) })],
    series: [{ label: x, value: (_, value) => number(value, 4) }, ...seriesOf(names, kind)],
    hooks: { draw: [(plot) => (marks || []).forEach((mark) => drawMark(plot, mark))] },
  };
}

/** A dashed vertical line at `mark`, in the chart's own units. */
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

/** data: [xs, ys of the first name, ...]; kind: line, points or bars; marks: xs of vertical lines; whole: xs count. */
export function Chart({ title, data, names, x, y, kind = "line", log = false, marks = [], whole = false }) {
  const place = useRef(null);
  useEffect(() => {
    const draw = () => {
      place.current.replaceChildren();
      return new uPlot(optionsFor({ x, y, names, kind, log, marks, whole }, place.current.clientWidth), data, place.current);
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
