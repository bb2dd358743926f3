// Texts of the description.
import { html } from "../ui.js";

/** A text with its `code` between backticks. */
export function Prose({ text }) {
  return text.split(/`([^`]*)`/).map((each, index) => (index % 2 ? html`<code key=${index}>${each}</code>` : each));
}
