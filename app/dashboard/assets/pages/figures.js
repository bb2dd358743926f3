// Figures of a report in words that several pages share.
import { change, counted, isNoise } from "../format.js";
import { html } from "../ui.js";

/** A text's size in words: 64 windows of 512 tokens of builtin:wikitext2. */
export function textInWords(entry) {
  if (!entry) return "";
  const { windows, sequence_length: length, dataset } = entry;
  return `${counted(windows, "window")} of ${length} tokens of ${dataset}`;
}

/** The perplexity's change with its 95 % interval, and whether the text can tell it from none. */
export function intervalInWords(figures) {
  const { perplexity_ratio: ratio, perplexity_ratio_interval: interval } = figures;
  if (!ratio) return "–";
  return html`${change(ratio)}${interval && html` <small class="line">${change(interval.low)} to ${change(interval.high)}</small>`}
    ${isNoise(figures) && html`<span class="label">within the noise</span>`}`;
}
