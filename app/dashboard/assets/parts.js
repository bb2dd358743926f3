// Components that all pages share.
import { remedyOf } from "./api.js";
import { html, useEffect, useRef, useState } from "./ui.js";
import { percent } from "./format.js";

const MARKS = {
  queued: "○", running: "◐", cancelling: "◌", succeeded: "✓", failed: "✕", cancelled: "–",
  starting: "◐", fetching: "◐", loading: "◐", restarting: "◌", ready: "✓", draining: "◌", stopped: "–", paused: "‖", idle: "○", busy: "◐",
  pending: "○", pushing: "◐", pushed: "✓", delivered: "✓",
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

/** An error with its remedy; `children`: what can be done here. */
export function Problem({ error, title = "Something went wrong", children }) {
  if (!error) return null;
  const remedy = remedyOf(error);
  return html`<div class="problem" role="alert">
    <strong>${title}</strong>
    <p>${error.message}</p>
    ${remedy && html`<p class="remedy"><span>What to do:</span> ${remedy}</p>`}
    ${error.code && html`<code>${error.code}</code>`}
    ${children && html`<div class="actions">${children}</div>`}
  </div>`;
}

export function Empty({ title, children }) {
  return html`<div class="empty"><h2>${title}</h2><p>${children}</p></div>`;
}

/** The page's body once its value has loaded; until then the error or a placeholder. */
export function Loaded({ polled, children }) {
  if (polled.value !== undefined) return children(polled.value);
  if (polled.error) return html`<${Problem} error=${polled.error} title="Can't load this" />`;
  return html`<p class="loading" role="status">Loading…</p>`;
}

/** Copies `text`; where a page has no clipboard, over plain HTTP, by selecting it. */
async function copyText(text, beside) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = Object.assign(document.createElement("textarea"), { value: text });
  beside.after(area); // in the dialog, if it stands in one
  area.select();
  document.execCommand("copy");
  area.remove();
  return beside.focus();
}

export function CopyButton({ text, kind = "quiet" }) {
  const [done, setDone] = useState(false);
  const copy = async (event) => {
    await copyText(text, event.currentTarget);
    setDone(true);
    setTimeout(() => setDone(false), 1500);
  };
  return html`<button type="button" class=${kind} onClick=${copy}>${done ? "Copied" : "Copy"}</button>`;
}

export function Copy({ text, label }) {
  return html`<div class="copy">
    <pre tabindex="0" aria-label=${label}>${text}</pre>
    <${CopyButton} text=${text} />
  </div>`;
}

/** A dialog and the button that opens it; `action` is run by its form, and closes it unless it throws. `children`
 * may be a function of the fault that it threw. */
export function DialogButton({ label, title, action, confirm = label, kind = "quiet", confirmKind = "main", dismiss = "Cancel", failure, onClose, children }) {
  const dialog = useRef(null);
  const [error, setError] = useState(null);
  const act = async (event) => {
    event.preventDefault();
    try {
      await action();
      dialog.current?.close();
    } catch (fault) {
      setError(fault);
    }
  };
  return html`<button type="button" class=${kind} onClick=${() => dialog.current.showModal()}>${label}</button>
    <dialog ref=${dialog} onClose=${() => (setError(null), onClose?.())} aria-label=${title}>
      <h2>${title}</h2>
      <form class="stack" onSubmit=${act} onInput=${() => setError(null)}>
        ${typeof children === "function" ? children(error) : children}
        <${Problem} error=${error} title=${failure} />
        <div class="actions">
          <button type="button" class="quiet" onClick=${() => dialog.current.close()}>${dismiss}</button>
          <button type="submit" class=${confirmKind}>${confirm}</button>
        </div>
      </form>
    </dialog>`;
}

/** A button that asks for confirmation in a dialog before it acts. */
export function Confirmed({ label, question, consequence, action, kind = "quiet", dismiss = "Cancel" }) {
  return html`<${DialogButton} label=${label} title=${question} action=${action} kind=${kind} confirmKind="danger" dismiss=${dismiss}>
    <p>${consequence}</p>
  <//>`;
}

/** A reference to a control that takes the focus when its page opens. */
export function useFirstFocus() {
  const control = useRef(null);
  useEffect(() => control.current?.focus({ preventScroll: true }), []);
  return control;
}

/** A page's heading; sets the document's title and, unless a control of the page does, takes the focus when it opens. */
export function Title({ children, text, aside, isFocused = true }) {
  const heading = useRef(null);
  useEffect(() => {
    document.title = `${text || children} · Nibble`;
  }, [text, children]);
  useEffect(() => isFocused && heading.current.focus({ preventScroll: true }), []);
  return html`<div class="title"><h1 tabindex="-1" ref=${heading}>${children}</h1>${aside}</div>`;
}

export function Facts({ rows, wide = false }) {
  return html`<dl class=${wide ? "facts facts-wide" : "facts"}>
    ${rows.filter(([, value]) => value === 0 || value).map(
      ([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`,
    )}
  </dl>`;
}

/** A reference that wraps behind its slashes, not within words. */
export function Reference({ text }) {
  return text.split(/(?<=\/)/).map((step, index) => html`<span key=${index}>${step}<wbr /></span>`);
}
