// The models of the form: what is typed is completed from recent jobs, folders and the hub; several make a sweep.
import { decoded } from "../address.js";
import { read } from "../api.js";
import { counted } from "../format.js";
import { html, useEffect, useRef, useState } from "../ui.js";
import { Field, messagesFor } from "./form_fields.js";
import { MOST_MODELS } from "./job_form.js";

const PAUSE_MS = 200;

/** What the service has for the text, as { data, hub }, once typing pauses; nothing while the list is closed. */
function useSources(text, isOpen) {
  const [answer, setAnswer] = useState({ data: [], hub: "not_asked" });
  useEffect(() => {
    if (!isOpen) return undefined;
    const control = new AbortController();
    const timer = setTimeout(() => {
      read(`/v1/sources?q=${encodeURIComponent(text.trim())}`, control.signal).then(({ value }) => setAnswer(value), () => {});
    }, PAUSE_MS);
    return () => {
      clearTimeout(timer);
      control.abort();
    };
  }, [text, isOpen]);
  return answer;
}

/** A reference as people write it: a folder as its path, a hub's model as its id. */
const shownAs = (reference) => (reference.startsWith("file://") ? decoded(reference.slice(7)) : reference.replace(/^hf:/, ""));

function Option({ source, id, isActive, onChoose }) {
  return html`<li role="option" id=${id} aria-selected=${isActive} onMouseDown=${(event) => (event.preventDefault(), onChoose(source))}>
    <span>${shownAs(source.reference)}</span> <small>${source.origin}${source.downloads ? `, ${counted(source.downloads, "download")}` : ""}</small></li>`;
}

/** A text field with a list of what may be meant, by the pattern of a combobox: arrows, Enter, Escape. */
function ModelInput({ id, value, onChange, onPaste, input }) {
  const [isOpen, setOpen] = useState(false);
  const [active, setActive] = useState(-1);
  const { data, hub } = useSources(value, isOpen);
  const sources = data.filter((source) => ![source.reference, shownAs(source.reference)].includes(value.trim()));
  const isShown = isOpen && sources.length > 0;
  const choose = (source) => (onChange(shownAs(source.reference)), close());
  const close = () => (setOpen(false), setActive(-1));
  const move = (step) => {
    setOpen(true);
    if (isShown) setActive(step > 0 ? (active + 1) % sources.length : (active <= 0 ? sources.length : active) - 1);
  };
  const onKey = (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") (event.preventDefault(), move(event.key === "ArrowDown" ? 1 : -1));
    else if (event.key === "Escape") close();
    else if (event.key === "Enter" && isShown && sources[active]) (event.preventDefault(), choose(sources[active]));
  };
  const list = `${id}-list`;
  return html`<div class="combo">
    <input id=${id} role="combobox" aria-autocomplete="list" aria-expanded=${isShown} aria-controls=${list} aria-activedescendant=${isShown && active >= 0 ? `${list}-${active}` : undefined}
      autocomplete="off" autocapitalize="none" spellcheck=${false} required ref=${input} value=${value} placeholder="Qwen/Qwen3-0.6B"
      onInput=${(event) => (setOpen(true), setActive(-1), onChange(event.target.value))} onClick=${() => setOpen(true)} onKeyDown=${onKey} onBlur=${close} onPaste=${onPaste} />
    <div class="combo-list" hidden=${!isShown}>
      <ul role="listbox" id=${list} aria-label="Models">
        ${sources.map((source, index) => html`<${Option} key=${source.reference} source=${source} id=${`${list}-${index}`} isActive=${index === active} onChoose=${choose} />`)}
      </ul>
      ${hub === "no_answer" && html`<small role="status">The hub does not answer: recent models and folders alone are listed.</small>`}
    </div>
  </div>`;
}

/** `onChange` gets the models, changed; lines that are pasted become rows. */
export function ModelRows({ models, onChange, errors, first }) {
  const [leftOut, setLeftOut] = useState(0);
  const change = (index) => (text) => onChange(models.map((each, at) => (at === index ? text : each)));
  const onPaste = (index) => (event) => {
    const lines = event.clipboardData.getData("text").split(/\s*\n\s*/).filter(Boolean);
    if (lines.length < 2) return;
    event.preventDefault();
    const all = [...new Set([...models.slice(0, index), ...lines, ...models.slice(index + 1)])];
    onChange(all.slice(0, MOST_MODELS));
    setLeftOut(Math.max(0, all.length - MOST_MODELS));
  };
  return html`<div class="models">
    ${models.map((model, index) => html`<div class=${messagesFor(errors[index], "model").length ? "field field-bad" : "field"} data-path="model" key=${index}>
      <div class="model-row"><label for=${`model-${index}`}><span>${index === 0 ? "Model" : `Model ${index + 1}`}</span></label>
        <${ModelInput} id=${`model-${index}`} value=${model} input=${index === 0 ? first : undefined} onChange=${change(index)} onPaste=${onPaste(index)} />
        ${models.length > 1 && html`<button type="button" class="quiet small" aria-label=${`Remove model ${index + 1}`} onClick=${() => (setLeftOut(0), onChange(models.filter((_, at) => at !== index)))}>Remove</button>`}</div>
      ${index === 0 && html`<small>org/name on the hub, s3://bucket/prefix, or a folder under an allowed root</small>`}
      ${messagesFor(errors[index], "model").map((message) => html`<small class="bad" role="alert" key=${message}>${message}</small>`)}
    </div>`)}
    <p class="add"><button type="button" class="quiet small" disabled=${models.length >= MOST_MODELS} onClick=${() => onChange([...models, ""])}>Add a model</button>
      <small> Each model is a job of its own with the same settings.</small></p>
    ${leftOut > 0 && html`<p class="bad" role="alert"><small>A sweep has at most ${MOST_MODELS} models: the last ${leftOut} of those that were pasted are left out.</small></p>`}
  </div>`;
}

/** The name that the jobs of a sweep share as a label. */
export function SweepName({ value, onChange, error }) {
  return html`<${Field} label="Name of the sweep" path="labels.sweep" error=${error} hint="the label sweep of each job, by which they are found">
    <input required value=${value} maxlength="128" onInput=${(event) => onChange(event.target.value)} /><//>`;
}
