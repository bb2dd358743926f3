// The frame of the pages of administration: their navigation, and what a key may not see.
import { may } from "../caller.js";
import { Title } from "../parts.js";
import { html } from "../ui.js";

// [area, its name, the scope that opens it]
const AREAS = [
  ["keys", "API keys", "admin"], ["limits", "Limits", "admin"], ["audit", "Audit log", "admin"],
  ["webhooks", "Webhooks", "admin"], ["storage", "Storage", "admin"], ["settings", "Settings", "operator"],
];

/** A page of administration; `children` is called where the key has the scope. */
export function Administration({ area, aside, children }) {
  const [, name, scope] = AREAS.find(([each]) => each === area);
  const mayRead = may(scope);
  return html`<nav class="sections" aria-label="Administration">
      ${AREAS.filter(([, , needed]) => may(needed)).map(([each, label]) => html`<a key=${each} href=${`#/admin/${each}`}
        aria-current=${each === area ? "page" : undefined}>${label}</a>`)}
    </nav>
    <${Title} text=${name} aside=${mayRead && aside}>${name}<//>
    ${mayRead ? children() : html`<p>This key lacks the scope <code>${scope}</code>, which this page needs.</p>`}`;
}
