// One deployment by a name of it, polled.
import { read } from "./api.js";
import { usePolled } from "./polling.js";
import { useEffect, useState } from "./ui.js";

export const isChanging = (deployment) => ["starting", "draining"].includes(deployment.state) || Boolean(deployment.replacement && !deployment.replacement.error);

async function idOf(name) {
  for (let after = ""; after !== null; ) {
    const { value: page } = await read(`/v1/deployments?limit=100${after && `&after=${after}`}`);
    const named = page.data.find((each) => each.name === name || each.aliases.includes(name));
    if (named) return named.id;
    after = page.next;
  }
  return null;
}

/** { value, error, ask, isMissing } of the deployment with that name; nothing is asked for null. */
export function useDeployment(name) {
  const [named, setNamed] = useState({ id: null, isMissing: false, error: null });
  useEffect(() => {
    if (name !== null) idOf(name).then((id) => setNamed({ id, isMissing: id === null, error: null }), (error) => setNamed({ id: null, isMissing: false, error }));
  }, [name]);
  const polled = usePolled(named.id && `/v1/deployments/${named.id}`, (deployment, hint) => hint ?? (isChanging(deployment) ? 2 : 10));
  return { ...polled, error: named.error ?? polled.error, isMissing: named.isMissing || polled.error?.status === 404 };
}
