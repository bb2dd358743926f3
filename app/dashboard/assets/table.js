// A table with a caption. On narrow screens one of two columns scrolls by itself, one of more becomes a list of facts;
// the roles say that it is a table still.
import { html } from "./ui.js";

/** columns: [heading, row -> cell, "number" for right alignment or "long" for a line of its own on narrow screens]. */
export function Table({ caption, columns, rows, keyOf, hideCaption = false }) {
  return html`<div class=${columns.length > 2 ? "table stacked" : "table"} role="region" aria-label=${caption} tabindex="0">
    <table role="table">
      <caption class=${hideCaption ? "unseen" : ""}>${caption}</caption>
      <thead role="rowgroup"><tr role="row">${columns.map(([name, , kind]) => html`<th scope="col" role="columnheader" class=${kind} key=${name}>${name}</th>`)}</tr></thead>
      <tbody role="rowgroup">
        ${rows.map((row, index) => html`<tr role="row" key=${keyOf ? keyOf(row) : index}>
          ${columns.map(([name, cell, kind], column) =>
            column === 0
              ? html`<th scope="row" role="rowheader" class=${kind} key=${name}>${cell(row)}</th>`
              : html`<td role="cell" class=${kind} key=${name} data-name=${name}>${cell(row)}</td>`)}
        </tr>`)}
      </tbody>
    </table>
  </div>`;
}
