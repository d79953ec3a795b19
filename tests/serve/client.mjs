// What npm's `openai` makes of our answers. Arguments: address, model, key, a token that is a word. Prints how many checks held.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model, apiKey, word] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
let held = 0;
const same = (found, wanted) => (assert.deepEqual(found, wanted), held++);
const holds = (found, what) => (assert.ok(found, what), held++);
const messages = [{ role: "user", content: "hello" }];
const schema = {
  type: "object",
  properties: { city: { enum: ["Rome", "Oslo"] }, warm: { type: "boolean" } },
  required: ["city", "warm"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters: schema } }];
const drawn = { model, max_tokens: 12, temperature: 0, logit_bias: { [word]: 100 } };
const free = { model, max_tokens: 120, temperature: 0, messages };

const listed = [];
for await (const one of await client.models.list()) listed.push(one.id);
same(listed, [model]);
same((await client.models.retrieve(model)).object, "model");

const whole = await client.completions.create({ ...drawn, prompt: "the quick", logprobs: 2 });
same(whole.object, "text_completion");
same(whole.choices[0].finish_reason, "length");
same(whole.usage.completion_tokens, 12);
same(whole.choices[0].logprobs.tokens.join(""), whole.choices[0].text);
let text = "";
for await (const chunk of await client.completions.create({ ...drawn, prompt: "the quick", stream: true }))
  text += chunk.choices[0].text;
same(text, whole.choices[0].text);
const echoed = await client.completions.create({ ...drawn, prompt: "the", echo: true, max_tokens: 0 });
same(echoed.choices[0].text, "the");

const chat = await client.chat.completions.create({ ...drawn, messages, logprobs: true, top_logprobs: 3, n: 2 });
same(chat.object, "chat.completion");
same(chat.choices.map((choice) => choice.index), [0, 1]);
same(chat.choices[0].message.role, "assistant");
same(chat.choices[0].logprobs.content.length, 12);
holds(chat.choices[0].logprobs.content.every((token) => token.top_logprobs.length === 3), "three best ones");
const asked = { ...drawn, messages, stream: true, stream_options: { include_usage: true } };
const chunks = [];
for await (const chunk of await client.chat.completions.create(asked)) chunks.push(chunk);
same(chunks[0].choices[0].delta.role, "assistant");
const said = chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.delta.content ?? "").join("");
same(said, chat.choices[0].message.content);
same(chunks.at(-1).usage.completion_tokens, 12);
const runner = client.chat.completions.stream({ ...drawn, messages, stop: said.slice(-6) });
same(await runner.finalContent(), said.slice(0, said.indexOf(said.slice(-6))));

const format = { type: "json_schema", json_schema: { name: "weather", schema, strict: true } };
const fitting = await client.chat.completions.create({ ...free, response_format: format });
same(Object.keys(JSON.parse(fitting.choices[0].message.content)).sort(), ["city", "warm"]);
const calling = { ...free, tools, tool_choice: "required" };
const called = (await client.chat.completions.create(calling)).choices[0];
same(called.finish_reason, "tool_calls");
same(called.message.tool_calls[0].function.name, "weather");
holds(["Rome", "Oslo"].includes(JSON.parse(called.message.tool_calls[0].function.arguments).city), "a city");
const final = await client.chat.completions.stream(calling).finalChatCompletion();
same(final.choices[0].message.tool_calls[0].function, called.message.tool_calls[0].function);

const response = await client.responses.create({ model, input: "hello", max_output_tokens: 12, temperature: 0 });
const plain = (await client.chat.completions.create({ ...free, max_tokens: 12 })).choices[0].message.content;
same(response.output_text, plain);
same(response.status, "incomplete");
const kinds = [];
let delta = "";
const events = await client.responses.create({ ...{ model, input: "hello", temperature: 0 }, max_output_tokens: 12, stream: true });
for await (const event of events) {
  kinds.push(event.type);
  if (event.type === "response.output_text.delta") delta += event.delta;
}
same(delta, plain);
same([kinds[0], kinds.at(-1)], ["response.created", "response.incomplete"]);

await assert.rejects(client.chat.completions.create({ ...drawn, messages, temperature: 3 }), (error) => {
  same([error.status, error.param], [400, "temperature"]);
  return error instanceof OpenAI.BadRequestError;
});
await assert.rejects(client.completions.create({ ...drawn, model: "other", prompt: "a" }), OpenAI.NotFoundError);
const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
held += 3;
const leaving = await client.chat.completions.create({ ...asked, max_tokens: 200 });
for await (const chunk of leaving) if (chunk.choices.length) break;
same((await client.completions.create({ ...drawn, prompt: "the quick" })).choices[0].text, text);
console.log(`${held} checks held`);
