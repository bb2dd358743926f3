// A table with a caption, that scrolls by itself on narrow screens.
import { html } from "./ui.js";

/** columns: [heading, row -> cell, "number" for right alignment]. */
export function Table({ caption, columns, rows, keyOf, hideCaption = false }) {
  return html`<div class="table" role="region" aria-label=${caption} tabindex="0">
    <table>
      <caption class=${hideCaption ? "unseen" : ""}>${caption}</caption>
      <thead><tr>${columns.map(([name, , kind]) => html`<th scope="col" class=${kind} key=${name}>${name}</th>`)}</tr></thead>
      <tbody>
        ${rows.map((row, index) => html`<tr key=${keyOf ? keyOf(row) : index}>
          ${columns.map(([name, cell, kind], column) =>
            column === 0
              ? html`<th scope="row" class=${kind} key=${name}>${cell(row)}</th>`
              : html`<td class=${kind} key=${name}>${cell(row)}</td>`)}
        </tr>`)}
      </tbody>
    </table>
  </div>`;
}
