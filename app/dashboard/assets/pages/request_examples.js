// A deployment's first request in three languages.
import { Copy } from "../parts.js";
import { html, useState } from "../ui.js";

const curl = (name) => `curl ${location.origin}/v1/chat/completions -H "Authorization: Bearer $NIBBLE_API_KEY" \\
  -H 'Content-Type: application/json' \\
  -d '{"model": "${name}", "messages": [{"role": "user", "content": "Hello"}]}'`;

const python = (name) => `import os
from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ["NIBBLE_API_KEY"])
answer = client.chat.completions.create(
    model="${name}", messages=[{"role": "user", "content": "Hello"}]
)
print(answer.choices[0].message.content)`;

const javascript = (name) => `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${location.origin}/v1", apiKey: process.env.NIBBLE_API_KEY });
const answer = await client.chat.completions.create({
  model: "${name}", messages: [{ role: "user", content: "Hello" }],
});
console.log(answer.choices[0].message.content);`;

const LANGUAGES = { curl, Python: python, JavaScript: javascript };

export function RequestExamples({ name }) {
  const [language, setLanguage] = useState("curl");
  return html`<details><summary>Use the API</summary>
    <div class="filters" role="group" aria-label="Language">${Object.keys(LANGUAGES).map((each) =>
      html`<button type="button" key=${each} aria-pressed=${each === language ? "true" : "false"} onClick=${() => setLanguage(each)}>${each}</button>`)}</div>
    <${Copy} label=${language} text=${LANGUAGES[language](name)} /></details>`;
}
