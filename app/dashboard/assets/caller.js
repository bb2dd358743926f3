// Who is signed in, and what its key may do: a page shows no button that the service would refuse.
import { read } from "./api.js";

let caller = null;

/** Reads and remembers the caller. */
export async function readCaller() {
  caller = (await read("/v1/whoami")).value;
  return caller;
}

/** Whether the signed-in key has the scope. */
export const may = (scope) => Boolean(caller?.scopes.includes(scope));

/** { key, tenant, scopes, version } of who is signed in. */
export const whoIsSignedIn = () => caller;
