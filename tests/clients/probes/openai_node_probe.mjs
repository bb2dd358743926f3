// openai for Node, in two generations.
import OpenAI from "openai";
import { base, city, isCity, question, report, same, scene, tooLong } from "./rows.mjs";

const client = new OpenAI({ baseURL: base, apiKey: scene.key, maxRetries: 0 });
const greedy = { model: scene.model, temperature: 0 };
const messages = [{ role: "user", content: question }];
const tool = { type: "function", function: { name: "visit", parameters: city } };
const fn = { type: "function", name: "visit", parameters: city, strict: true };
const format = { type: "json_schema", json_schema: { name: "city", schema: city, strict: true } };

async function calls(choice) {
  const asked = { ...greedy, messages, tools: [tool], tool_choice: choice, parallel_tool_calls: false };
  const whole = await client.chat.completions.create(asked);
  const call = whole.choices[0].message.tool_calls[0].function;
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  const other = streamed.choices[0].message.tool_calls[0].function;
  same([other.name, other.arguments], [call.name, call.arguments]);
  return { name: call.name, arguments: JSON.parse(call.arguments) };
}

await report("openai", (error) => error instanceof OpenAI.APIError && error.status !== undefined, {
  models: async () => {
    const names = [];
    for await (const each of await client.models.list()) names.push(each.id);
    same(names.includes(scene.model), true);
  },
  chat: async () => {
    const answer = await client.chat.completions.create({ ...greedy, messages });
    same([answer.choices[0].message.content, answer.choices[0].finish_reason], [scene.said, "stop"]);
  },
  stream: async () => {
    const options = { stream: true, stream_options: { include_usage: true } };
    let [said, usage] = ["", undefined];
    for await (const chunk of await client.chat.completions.create({ ...greedy, messages, ...options })) {
      said += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    same(said, scene.said);
    same(usage.completion_tokens > 0, true);
  },
  logprobs: async () => {
    const answer = await client.chat.completions.create({ ...greedy, messages, logprobs: true, top_logprobs: 2 });
    same(answer.choices[0].logprobs.content[0].top_logprobs.length, 2);
  },
  completions: async () => {
    const prompt = ["Say:", "Read the result:"];
    const answer = await client.completions.create({ ...greedy, prompt, max_tokens: 30 });
    same(answer.choices.map((each) => each.text.trim()), [scene.said, scene.after]);
  },
  "tools: auto": async () => same(await calls("auto"), scene.called),
  "tools: required": async () => {
    isCity((await calls("required")).arguments);
    const allowed = { type: "allowed_tools", allowed_tools: { mode: "required", tools: [tool] } };
    isCity((await calls(allowed)).arguments);
  },
  "tools: named": async () => isCity((await calls({ type: "function", function: { name: "visit" } })).arguments),
  "tool results": async () => {
    // The client calls the function itself.
    const visit = { ...tool.function, parse: JSON.parse, function: () => "Sunny" };
    const runner = client.chat.completions.runTools({
      ...greedy, messages, tools: [{ type: "function", function: visit }],
    });
    same(await runner.finalContent(), scene.after);
  },
  structured: async () => {
    const answer = await client.chat.completions.parse({ ...greedy, messages, response_format: format });
    isCity(answer.choices[0].message.parsed);
  },
  responses: async () => {
    const answer = await client.responses.create({ ...greedy, input: question });
    same([answer.output_text, answer.status], [scene.said, "completed"]);
    const stream = client.responses.stream({ ...greedy, input: question });
    const kinds = [];
    for await (const event of stream) kinds.push(event.type);
    same(kinds.includes("response.output_text.delta"), true);
    same((await stream.finalResponse()).output_text, scene.said);
    const formatted = await client.responses.parse({
      ...greedy, input: question, text: { format: { type: "json_schema", ...format.json_schema } },
    });
    isCity(formatted.output_parsed);
  },
  "responses: tools": async () => {
    const called = await client.responses.create({ ...greedy, input: question, tools: [fn] });
    const [item] = called.output.filter((each) => each.type === "function_call");
    same({ name: item.name, arguments: JSON.parse(item.arguments) }, scene.called);
    const result = { type: "function_call_output", call_id: item.call_id, output: "Sunny" };
    const input = [{ role: "user", content: question }, ...called.output, result];
    same((await client.responses.create({ ...greedy, input, tools: [fn] })).output_text, scene.after);
  },
  embeddings: () => client.embeddings.create({ model: scene.model, input: "a" }),
  "unknown model": () => client.chat.completions.create({ ...greedy, model: "absent", messages }),
  "wrong key": () => new OpenAI({ baseURL: base, apiKey: "wrong", maxRetries: 0 }).models.list(),
  "too long": () => client.completions.create({ ...greedy, prompt: tooLong }),
});
