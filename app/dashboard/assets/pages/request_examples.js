// Requests to copy: a deployment's first one in three languages, and any body of this API for curl.
import { Copy } from "../parts.js";
import { html, useState } from "../ui.js";

/** A text in single quotes, as a shell takes it. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const curlOf = (path, body) => `curl ${location.origin}${path} \\
  -H "Authorization: Bearer $NIBBLE_API_KEY" \\
  -H 'Content-Type: application/json' \\
  -d ${quoted(body)}`;

const curl = (name) => curlOf("/v1/chat/completions", `{"model": "${name}", "messages": [{"role": "user", "content": "Hello"}]}`);

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
  return html`<section class="stack" aria-labelledby="use-api"><h2 id="use-api">Use the API</h2>
    <div><div class="filters" role="group" aria-label="Language">${Object.keys(LANGUAGES).map((each) =>
      html`<button type="button" key=${each} class="quiet small" aria-pressed=${each === language ? "true" : "false"} onClick=${() => setLanguage(each)}>${each}</button>`)}</div>
    <${Copy} label=${language} text=${LANGUAGES[language](name)} /></div></section>`;
}

/** What a form is about to send. */
export function AsCurl({ path, body }) {
  return html`<details><summary>As curl</summary><${Copy} label="curl" text=${curlOf(path, JSON.stringify(body, null, 2))} /></details>`;
}
