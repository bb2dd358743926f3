// Components that all pages share.
import { html, useEffect, useRef, useState } from "./ui.js";
import { percent } from "./format.js";

const MARKS = {
  queued: "○", running: "◐", cancelling: "◌", succeeded: "✓", failed: "✕", cancelled: "–",
  starting: "◐", fetching: "◐", loading: "◐", restarting: "◌", ready: "✓", draining: "◌", stopped: "–", idle: "○", busy: "◐",
};

/** A state as a word and a mark, so that colour is never the only sign. */
export function State({ state }) {
  return html`<span class=${`state state-${state}`}><span aria-hidden="true">${MARKS[state] || "•"}</span> ${state}</span>`;
}

export function Bar({ fraction, label }) {
  return html`<span class="bar">
    <progress max="1" value=${fraction} aria-label=${label}></progress>
    <span class="bar-text">${percent(fraction)}</span>
  </span>`;
}

/** An error with its remedy. */
export function Problem({ error, title = "That did not work" }) {
  if (!error) return null;
  return html`<div class="problem" role="alert">
    <strong>${title}</strong>
    <p>${error.message}</p>
    ${error.remedy && html`<p class="remedy"><span>What to do:</span> ${error.remedy}</p>`}
    ${error.code && html`<code>${error.code}</code>`}
  </div>`;
}

export function Empty({ title, children }) {
  return html`<div class="empty"><h2>${title}</h2><p>${children}</p></div>`;
}

/** The page's body once its value has loaded; until then the error or a placeholder. */
export function Loaded({ polled, children }) {
  if (polled.value !== undefined) return children(polled.value);
  if (polled.error) return html`<${Problem} error=${polled.error} title="This cannot be shown" />`;
  return html`<p class="loading" role="status">Loading…</p>`;
}

export function Copy({ text, label }) {
  const [done, setDone] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setDone(true);
    setTimeout(() => setDone(false), 1500);
  };
  return html`<div class="copy">
    <pre tabindex="0" aria-label=${label}>${text}</pre>
    <button type="button" class="quiet" onClick=${copy}>${done ? "Copied" : "Copy"}</button>
  </div>`;
}

/** A button that asks for confirmation in a dialog before it acts. */
export function Confirmed({ label, question, consequence, action, kind = "quiet" }) {
  const dialog = useRef(null);
  const [error, setError] = useState(null);
  const act = async () => {
    try {
      await action();
      dialog.current?.close();
    } catch (fault) {
      setError(fault);
    }
  };
  return html`<button type="button" class=${kind} onClick=${() => dialog.current.showModal()}>${label}</button>
    <dialog ref=${dialog} onClose=${() => setError(null)}>
      <h2>${question}</h2>
      <p>${consequence}</p>
      <${Problem} error=${error} />
      <div class="actions">
        <button type="button" class="quiet" onClick=${() => dialog.current.close()}>Keep it</button>
        <button type="button" class="danger" onClick=${act}>${label}</button>
      </div>
    </dialog>`;
}

/** A page's heading; sets the document's title and takes the focus after a change of page. */
export function Title({ children, text, aside }) {
  const heading = useRef(null);
  useEffect(() => {
    document.title = `${text || children} · Nibble`;
  }, [text, children]);
  useEffect(() => heading.current.focus({ preventScroll: true }), []);
  return html`<div class="title"><h1 tabindex="-1" ref=${heading}>${children}</h1>${aside}</div>`;
}

export function Facts({ rows, wide = false }) {
  return html`<dl class=${wide ? "facts facts-wide" : "facts"}>
    ${rows.filter(([, value]) => value === 0 || value).map(
      ([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`,
    )}
  </dl>`;
}
