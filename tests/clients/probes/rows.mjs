// What a client's features come to against one server: node probe.mjs SCENE OUTPUT (see rows.py).
import { readFileSync, writeFileSync } from "node:fs";

export const scene = JSON.parse(readFileSync(process.argv[2], "utf8"));
export const base = scene.base;
export const question = "Tell me about a city.";
export const city = {
  type: "object",
  properties: { city: { type: "string", enum: ["Rome", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
export const tooLong = "a word and ".repeat(3000);

export function same(actual, expected) {
  const [a, b] = [JSON.stringify(actual), JSON.stringify(expected)];
  if (a !== b) throw new Error(`${a}, not ${b}`);
}

export function isCity(value) {
  if (!["Rome", "Oslo"].includes(value?.city)) throw new Error(`${JSON.stringify(value)} is no city`);
}

// `isRefusal` says whether an error is the client's for a refusal of the server.
export async function report(name, isRefusal, features) {
  const rows = [];
  for (const [feature, use] of Object.entries(features)) {
    const row = { feature, outcome: "ok", detail: "" };
    try {
      await use();
    } catch (error) {
      row.outcome = isRefusal(error) ? "refused" : "failed";
      row.detail = row.outcome === "refused" ? `${error.constructor.name}: ${error.message}` : String(error.stack);
      row.detail = row.detail.slice(0, 1500);
    }
    rows.push(row);
  }
  const manifest = new URL(`./node_modules/${name}/package.json`, import.meta.url);
  const { version } = JSON.parse(readFileSync(manifest, "utf8"));
  writeFileSync(process.argv[3], JSON.stringify({ version, rows }));
}
