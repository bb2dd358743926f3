// Sign-in for browsers without a login link: an API key opens the same session.
import { send } from "../api.js";
import { Problem, Title } from "../parts.js";
import { html, useState } from "../ui.js";

export function SignInPage() {
  const [key, setKey] = useState("");
  const [error, setError] = useState(null);
  const submit = async (event) => {
    event.preventDefault();
    try {
      const link = await send("POST", "/v1/login-links", undefined, { headers: { Authorization: `Bearer ${key.trim()}` } });
      location.assign(link.path);
    } catch (fault) {
      setError(fault);
    }
  };
  return html`<main class="sign-in">
    <img src="/assets/icon.svg" alt="" width="56" height="56" />
    <${Title}>Sign in<//>
    <p>Open the link that <code>nibble up</code> prints, or paste an API key. It is kept by this browser
      as a session only.</p>
    <form onSubmit=${submit}>
      <label for="key">API key</label>
      <input id="key" type="password" autocomplete="current-password" required value=${key}
        onInput=${(event) => setKey(event.target.value)} />
      <${Problem} error=${error} title="The key was refused" />
      <button type="submit" class="main">Sign in</button>
    </form>
  </main>`;
}
