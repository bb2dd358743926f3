// Sign-in for browsers without a login link: an API key opens the same session.
import { send } from "../api.js";
import { Problem, Title, useFirstFocus } from "../parts.js";
import { html, useState } from "../ui.js";

export function SignInPage() {
  const [key, setKey] = useState("");
  const [error, setError] = useState(null);
  const first = useFirstFocus();
  const submit = async (event) => {
    event.preventDefault();
    try {
      const link = await send("POST", "/v1/login-links", undefined, { headers: { Authorization: `Bearer ${key.trim()}` } });
      location.assign(link.path);
    } catch (fault) {
      setError(fault);
    }
  };
  const type = (event) => {
    setError(null);
    setKey(event.target.value);
  };
  return html`<main class="sign-in">
    <img src="/assets/icon.svg" alt="" width="56" height="56" />
    <${Title} isFocused=${false}>Sign in<//>
    <p>Open the link that <code>nibble up</code> or <code>nibble login</code> prints, or paste an API key. This browser
      keeps a session, not the key.</p>
    <form onSubmit=${submit}>
      <label for="key">API key</label>
      <input id="key" ref=${first} type="password" autocomplete="current-password" required value=${key} onInput=${type} />
      <${Problem} error=${error} title="Sign-in failed" />
      <button type="submit" class="main">Sign in</button>
    </form>
  </main>`;
}
