// Vercel's AI SDK with its providers openai, which asks /v1/responses by default, and openai-compatible.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embed, generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import { base, city, isCity, question, report, same, scene, tooLong } from "./rows.mjs";

const options = { baseURL: base, apiKey: scene.key };
const openai = createOpenAI(options);
const compatible = createOpenAICompatible({ ...options, name: "nibble", includeUsage: true, supportsStructuredOutputs: true });
const model = compatible.chatModel(scene.model);
const greedy = { temperature: 0, maxRetries: 0, prompt: question };
const schema = jsonSchema(city);
const visit = tool({ description: "Visits.", inputSchema: schema, execute: async () => "Sunny" });
const unexecuted = tool({ description: "Visits.", inputSchema: schema });

async function said(model) {
  const answer = await generateText({ ...greedy, model });
  same(answer.text, scene.said);
  same(answer.usage.outputTokens > 0, true);
}

async function streamed(model) {
  let text = "";
  for await (const each of streamText({ ...greedy, model }).textStream) text += each;
  same(text, scene.said);
}

async function calls(toolChoice, model) {
  const answer = await generateText({ ...greedy, model, tools: { visit: unexecuted }, toolChoice });
  return { name: answer.toolCalls[0].toolName, arguments: answer.toolCalls[0].input };
}

async function agent(model) {
  const answer = await generateText({ ...greedy, model, tools: { visit }, stopWhen: stepCountIs(3) });
  same(answer.text, scene.after);
}

await report("ai", (error) => APICallError.isInstance(error), {
  chat: async () => {
    await said(model);
    await said(openai.chat(scene.model));
  },
  stream: async () => {
    await streamed(model);
    await streamed(openai.chat(scene.model));
  },
  completions: async () => {
    for (const each of [openai.completion(scene.model), compatible.completionModel(scene.model)]) {
      const answer = await generateText({ ...greedy, model: each, prompt: "Say:", maxOutputTokens: 30 });
      same(answer.text.length > 0, true);
    }
  },
  "tools: auto": async () => same(await calls("auto", model), scene.called),
  "tools: required": async () => isCity((await calls("required", model)).arguments),
  "tools: named": async () => isCity((await calls({ type: "tool", toolName: "visit" }, model)).arguments),
  "tool results": () => agent(model),
  structured: async () => {
    const output = Output.object({ schema });
    isCity((await generateText({ ...greedy, model, output })).output);
    let last;
    const stream = streamText({ ...greedy, model: openai.chat(scene.model), output });
    for await (const each of stream.partialOutputStream) last = each;
    isCity(last);
  },
  responses: async () => {
    await said(openai(scene.model));
    await streamed(openai(scene.model));
    isCity((await generateText({ ...greedy, model: openai(scene.model), output: Output.object({ schema }) })).output);
  },
  "responses: tools": async () => {
    same(await calls("auto", openai(scene.model)), scene.called);
    await agent(openai(scene.model));
  },
  embeddings: () => embed({ model: compatible.textEmbeddingModel(scene.model), value: "a", maxRetries: 0 }),
  "unknown model": () => generateText({ ...greedy, model: compatible.chatModel("absent") }),
  "wrong key": () => generateText({ ...greedy, model: createOpenAI({ baseURL: base, apiKey: "wrong" })(scene.model) }),
  "too long": () => generateText({ ...greedy, model, prompt: tooLong }),
});
