// The dialog that deploys an artifact.
import { send } from "../api.js";
import { modelName } from "../format.js";
import { Problem } from "../parts.js";
import { html, useRef, useState } from "../ui.js";

export function suggestedName(artifact) {
  const { scheme, bits } = artifact.recipe;
  const numbers = (scheme ?? "wna16") === "wna16" ? `w${bits}` : scheme;
  return `${modelName(artifact.model).split("/").pop()}-${numbers}`.toLowerCase().replace(/[^a-z0-9._-]/g, "-");
}

export function DeployButton({ artifact, suggested, kind = "main" }) {
  const dialog = useRef(null);
  const [name, setName] = useState(suggested);
  const [engine, setEngine] = useState("auto");
  const [error, setError] = useState(null);
  const deploy = async (event) => {
    event.preventDefault();
    try {
      await send("POST", "/v1/deployments", { artifact, name, engine });
      location.hash = "#/deployments";
    } catch (fault) {
      setError(fault);
    }
  };
  return html`<button type="button" class=${kind} onClick=${() => dialog.current.showModal()}>Deploy</button>
    <dialog ref=${dialog}>
      <h2>Serve this model</h2>
      <form class="stack" onSubmit=${deploy}>
        <label>Name that clients ask for
          <input value=${name} required maxlength="64" onInput=${(event) => setName(event.target.value)} /></label>
        <label>Engine
          <select value=${engine} onChange=${(event) => setEngine(event.target.value)}>
            <option value="auto">auto</option><option value="transformers">transformers</option><option value="vllm">vLLM</option>
          </select></label>
        <${Problem} error=${error} title="It was not deployed" />
        <div class="actions">
          <button type="button" class="quiet" onClick=${() => dialog.current.close()}>Not now</button>
          <button type="submit" class="main">Deploy</button>
        </div>
      </form>
    </dialog>`;
}
