// A schema of the OpenAPI document as a list of fields, and as an example.
import { html, useState } from "../ui.js";
import { Prose } from "./prose.js";

const NAME = /^#\/components\/schemas\/(.+)$/;
const nameOf = (schema) => NAME.exec(schema.$ref ?? "")?.[1] ?? null;
// [the least, the most, of what]
const LIMITS = [["minimum", "maximum", ""], ["minLength", "maxLength", " characters"], ["minItems", "maxItems", " items"], ["minProperties", "maxProperties", " fields"]];

const branches = (schema) => schema.anyOf ?? schema.oneOf ?? schema.allOf ?? null;

/** The type in words: `integer or null`, `list of Recipe`, "one of …" for an enumeration. */
export function typeInWords(schema) {
  const name = nameOf(schema);
  if (name) return name;
  if (branches(schema)) return [...new Set(branches(schema).map(typeInWords))].join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array") return schema.items ? `list of ${typeInWords(schema.items)}` : "list";
  return schema.format ? `${schema.type}, ${schema.format}` : schema.type ?? "any value";
}

/** The names of the schemas that a schema mentions, itself or in its branches and items. */
function mentioned(schema) {
  if (!schema) return [];
  const name = nameOf(schema);
  if (name) return [name];
  return [...(branches(schema) ?? []), schema.items, typeof schema.additionalProperties === "object" ? schema.additionalProperties : null].flatMap(mentioned);
}

const counted = (count, what) => `${count}${count === 1 ? what.replace(/s$/, "") : what}`;

function rangesOf(schema) {
  const ranges = LIMITS.map(([least, most, what]) => [schema[least], schema[most], what]).filter(([low, high]) => low !== undefined || high !== undefined)
    .map(([low, high, what]) => (high === undefined ? `at least ${counted(low, what)}` : low === undefined ? `at most ${counted(high, what)}` : `${low} to ${counted(high, what)}`));
  if (schema.exclusiveMinimum !== undefined) ranges.push(`more than ${schema.exclusiveMinimum}`);
  if (schema.exclusiveMaximum !== undefined) ranges.push(`less than ${schema.exclusiveMaximum}`);
  return ranges;
}

function limitsInWords(schema) {
  const limits = [schema, ...(branches(schema) ?? [])].flatMap(rangesOf);
  const isPlain = schema.default !== undefined && schema.default !== null && (typeof schema.default !== "object" || Array.isArray(schema.default));
  return [...limits, ...(isPlain ? [`default ${JSON.stringify(schema.default)}`] : [])].join("; ");
}

function Field({ name, schema, isRequired, schemas, depth }) {
  const limits = limitsInWords(schema);
  return html`<li><p><code>${name}</code> <span class="type">${typeInWords(schema)}</span>${isRequired && html` <strong>required</strong>`}
      ${limits && html` <small>${limits}</small>`}${schema.description && html`<br /><${Prose} text=${schema.description} />`}</p>
    ${[...new Set(mentioned(schema))].map((each) => html`<${Named} key=${each} name=${each} schemas=${schemas} depth=${depth + 1} />`)}
  </li>`;
}

/** A named schema behind a line that opens it; its fields are drawn when it is opened. */
function Named({ name, schemas, depth }) {
  const [isOpen, setOpen] = useState(false);
  if (!schemas[name]?.properties) return null;
  return html`<details class="schema" onToggle=${(event) => setOpen(event.currentTarget.open)}><summary>${name}</summary>
    ${isOpen && html`<${Fields} schema=${schemas[name]} schemas=${schemas} depth=${depth} />`}</details>`;
}

function Fields({ schema, schemas, depth }) {
  const required = new Set(schema.required ?? []);
  const names = Object.keys(schema.properties ?? {}).sort((a, b) => required.has(b) - required.has(a));
  return html`${schema.description && html`<p><${Prose} text=${schema.description} /></p>`}
    <ul class="schema-fields">${names.map((name) => html`<${Field} key=${name} name=${name} schema=${schema.properties[name]} isRequired=${required.has(name)} schemas=${schemas} depth=${depth} />`)}</ul>`;
}

/** A schema: the fields of a named one, the words for another, with what it mentions to open. */
export function Schema({ schema, schemas }) {
  const name = nameOf(schema);
  const whole = name ? schemas[name] : schema;
  if (whole?.properties) return html`<${Fields} schema=${whole} schemas=${schemas} depth=${0} />`;
  return html`<p class="type">${typeInWords(schema)}</p>
    ${[...new Set(mentioned(schema))].map((each) => html`<${Named} key=${each} name=${each} schemas=${schemas} depth=${1} />`)}`;
}

const PLAIN = { string: "…", integer: 1, number: 1, boolean: true, array: [], object: {} };

/** A value that has the required fields of a schema, as deep as they go. */
export function example(schema, schemas) {
  const name = nameOf(schema);
  if (name) return example(schemas[name], schemas);
  if (schema.default !== undefined && schema.default !== null) return schema.default;
  if (schema.const !== undefined) return schema.const;
  if (schema.enum) return schema.enum[0];
  if (branches(schema)) return example(branches(schema)[0], schemas);
  if (schema.type === "array" && schema.minItems && schema.items) return [example(schema.items, schemas)];
  if (schema.properties) return Object.fromEntries((schema.required ?? []).map((field) => [field, example(schema.properties[field], schemas)]));
  return PLAIN[schema.type] ?? null;
}
