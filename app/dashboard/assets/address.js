// The address of a page: a path behind the #, and what is filtered or chosen there, behind a ?.
import { useEffect, useState } from "./ui.js";

/** The text that `encoded` stands for; itself where it stands for none: anybody can type an address. */
export function decoded(encoded) {
  try {
    return decodeURIComponent(encoded);
  } catch {
    return encoded;
  }
}

/** The path, without what stands behind a ?. */
export function pathNow() {
  return location.hash.slice(1).split("?")[0] || "/";
}

function queryNow() {
  return location.hash.split("?")[1] || "";
}

/** [parameters, set]: those of the address; `set` replaces some, without a new entry in the browser's history. */
export function useQuery() {
  const [text, setText] = useState(queryNow());
  useEffect(() => {
    const follow = () => setText(queryNow());
    follow(); // it may have changed since the first drawing
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  const set = (changes) => {
    const query = new URLSearchParams(queryNow());
    for (const [name, value] of Object.entries(changes)) {
      if (value) query.set(name, value);
      else query.delete(name);
    }
    const shown = String(query);
    history.replaceState(history.state, "", `#${pathNow()}${shown ? `?${shown}` : ""}`);
    setText(shown);
  };
  return [new URLSearchParams(text), set];
}
