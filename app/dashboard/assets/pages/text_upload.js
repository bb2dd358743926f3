// A text of one's own for calibration: chosen or dropped, uploaded, and shown as the service reads it.
import { read, upload } from "../api.js";
import { bytes, counted } from "../format.js";
import { Problem } from "../parts.js";
import { html, useEffect, useState } from "../ui.js";

const KINDS = ".jsonl,.ndjson,.json,.csv,.tsv,.txt,.gz";

/** The tenant's uploaded texts, newest first, for the field's suggestions; none where they can't be read. */
export function useDatasets() {
  const [datasets, setDatasets] = useState([]);
  const ask = () => read("/v1/datasets?limit=50").then(({ value }) => setDatasets(value.data), () => {});
  useEffect(() => {
    ask();
  }, []);
  return [datasets, ask];
}

function Preview({ dataset }) {
  const about = dataset.is_estimate ? "about " : "";
  const counts = [
    bytes(dataset.size),
    dataset.documents !== null && `${about}${counted(dataset.documents, "document")}`,
    dataset.conversations && `${dataset.conversations} of them conversations`,
    dataset.windows !== null && `about ${counted(dataset.windows, "window")} of ${dataset.sequence_length} tokens`,
  ].filter(Boolean);
  return html`<div role="status"><p><strong>${dataset.name}</strong>: ${counts.join(", ")}</p>
    <ul class="plain first-texts">${dataset.first.map((text, index) => html`<li key=${index}>${text}</li>`)}</ul></div>`;
}

/** `onUploaded` gets the reference by which a job names the text. */
export function TextUpload({ sequenceLength, onUploaded }) {
  const [dataset, setDataset] = useState(null);
  const [error, setError] = useState(null);
  const [name, setName] = useState("");
  const [isOver, setOver] = useState(false);
  const take = async (file) => {
    if (!file) return;
    setError(null);
    setDataset(null);
    setName(file.name);
    try {
      const query = new URLSearchParams({ name: file.name, sequence_length: sequenceLength });
      const stored = await upload(`/v1/datasets?${query}`, file);
      setDataset(stored);
      onUploaded(stored.reference);
    } catch (fault) {
      setError(fault);
    } finally {
      setName("");
    }
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    take(event.dataTransfer.files[0]);
  };
  const over = (event) => (event.preventDefault(), setOver(true));
  return html`<div class=${isOver ? "drop drop-over" : "drop"} onDragOver=${over} onDragLeave=${() => setOver(false)} onDrop=${drop}>
    <label>Your own text: choose a file or drop it here
      <input type="file" accept=${KINDS} onChange=${(event) => take(event.target.files[0])} /></label>
    ${name && html`<p role="status">Uploading ${name}…</p>`}
    <${Problem} error=${error} title="The text was not taken" />
    ${dataset && html`<${Preview} dataset=${dataset} />`}
  </div>`;
}
