// The dialog that deploys an artifact.
import { send } from "../api.js";
import { modelName } from "../format.js";
import { DialogButton } from "../parts.js";
import { html, useState } from "../ui.js";

export function suggestedName(artifact) {
  const { scheme, bits } = artifact.recipe;
  const numbers = (scheme ?? "wna16") === "wna16" ? `w${bits}` : scheme;
  return `${modelName(artifact.model).split("/").pop()}-${numbers}`.toLowerCase().replace(/[^a-z0-9._-]/g, "-");
}

export function DeployButton({ artifact, suggested, kind = "main" }) {
  const [name, setName] = useState(suggested);
  const [engine, setEngine] = useState("auto");
  const deploy = async () => {
    await send("POST", "/v1/deployments", { artifact, name, engine });
    location.hash = "#/deployments";
  };
  return html`<${DialogButton} label="Deploy" title="Deploy this model" kind=${kind} action=${deploy} failure="Not deployed">
    <label>Model name
      <input value=${name} required maxlength="96" onInput=${(event) => setName(event.target.value)} /></label>
    <small>What clients send as “model”.</small>
    <label>Engine
      <select value=${engine} onChange=${(event) => setEngine(event.target.value)}>
        <option value="auto">auto</option><option value="transformers">transformers</option><option value="vllm">vLLM</option>
      </select></label>
  <//>`;
}
