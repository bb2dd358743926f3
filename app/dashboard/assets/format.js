// Formats numbers and times.

const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  let value = count;
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 99.5 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const whole = Math.round(seconds);
  if (whole < 5400) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  const minutes = Math.round(seconds / 60);
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

export function age(time) {
  const seconds = Math.max(0, (Date.now() - new Date(time)) / 1000);
  if (seconds < 45) return "just now";
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

export function clock(time) {
  return new Date(time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
}

export function date(time) {
  return new Date(time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

/** `digits` significant digits, without an exponent if possible. */
export function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(2);
  return String(Number(value.toPrecision(digits)));
}

export function percent(fraction) {
  return `${Math.round(100 * fraction)} %`;
}

/** The change from 1 as a signed percentage: 1.0042 is "+0.42 %". */
export function change(ratio) {
  const points = 100 * (ratio - 1);
  return `${points < 0 ? "−" : "+"}${Math.abs(points).toFixed(2)} %`;
}

/** Of figures beside the original: the change of perplexity, and what its 95 % interval says of it. */
export function ratioInWords({ perplexity_ratio: ratio, perplexity_ratio_interval: interval, beyond_noise: isBeyond }) {
  if (!ratio) return "–";
  if (isBeyond === false) return `${change(ratio)}, within the noise`;
  return interval ? `${change(ratio)} (${change(interval.low)} to ${change(interval.high)})` : change(ratio);
}

/** Whether the evaluation text is too short to tell the perplexity from the original's. */
export const isNoise = (figures) => figures.beyond_noise === false;

/** How many times smaller: 2.5×. */
export const times = (before, after) => `${(before / after).toFixed(before / after < 9.95 ? 1 : 0)}×`;

export const seconds = (from, to) => (from && to ? (new Date(to) - new Date(from)) / 1000 : null);

/** The short name of a model reference. */
export function modelName(reference) {
  const trimmed = reference.replace(/^(hf:|file:\/\/|s3:\/\/)/, "").replace(/\/$/, "");
  return reference.startsWith("hf:") ? trimmed.split("@")[0] : trimmed.split("/").pop();
}

/** `awq w4 g128`, as the service labels recipes. */
export function recipeLabel(recipe) {
  const method = ["awq", "omniquant"].includes(recipe.method) && recipe.rounding === "gptq" ? `${recipe.method}+gptq` : recipe.method;
  if ((recipe.scheme ?? "wna16") !== "wna16") return `${method} ${recipe.scheme}`;
  const group = recipe.group_size === -1 ? "channel" : `g${recipe.group_size}`;
  return `${method} w${recipe.bits} ${group}${recipe.symmetric ? " sym" : ""}`;
}

/** `1 document`, `2,000 documents`. */
export const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** A count of parameters: 5.8 M, 8 B. */
export function parameters(count) {
  return count < 1e9 ? `${number(count / 1e6, 3)} M` : `${number(count / 1e9, 3)} B`;
}
