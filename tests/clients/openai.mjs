// The official `openai` package for Node against a proxy: node openai.mjs BASE_URL; prints what it got, as JSON.
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const ask = { model: "demo", temperature: 0, max_tokens: 12 };
const messages = [{ role: "user", content: "Hello" }];
const seen = {};

const failure = async (call) => {
  try {
    await call();
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, message: error.message };
  }
  return null;
};

const listed = [];
for await (const model of client.models.list()) listed.push([model.id, model.tier]);
seen.models = listed;

const chat = await client.chat.completions.create({ ...ask, messages });
seen.chat = chat.choices[0].message.content;
seen.streamed = "";
const stream = await client.chat.completions.create({
  ...ask, messages, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  seen.streamed += chunk.choices[0]?.delta?.content ?? "";
  seen.usage = chunk.usage ?? seen.usage;
}
seen.wholeUsage = chat.usage;

const { data, response } = await client.completions.create({ ...ask, prompt: "Hello" }).withResponse();
seen.completion = data.choices[0].text;
seen.requestId = [data._request_id, response.headers.get("x-request-id")];

const embedded = await client.embeddings.create({ model: "demo", input: ["a", "b"] });
seen.dimensions = embedded.data.map((d) => d.embedding.length);

const made = await client.responses.create({ model: "demo", input: "Hello", temperature: 0, max_output_tokens: 12 });
seen.response = made.output_text;
seen.again = (await client.responses.retrieve(made.id)).output_text;
seen.events = [];
for await (const event of await client.responses.create({
  model: "demo", input: "Hello", temperature: 0, max_output_tokens: 12, stream: true,
})) {
  seen.events.push(event.type);
  if (event.type === "response.output_text.done") seen.responseStreamed = event.text;
}

const file = await toFile(Buffer.alloc(100_000, 7), "a.wav");
seen.heard = (await client.audio.transcriptions.create({ model: "demo", file })).text;

seen.missing = await failure(() => client.chat.completions.create({ model: "other", messages }));
seen.bad = await failure(() => client.chat.completions.create({ ...ask, messages, max_tokens: -1 }));
seen.broken = await failure(async () => {
  const broken = await client.completions.create({
    ...ask, prompt: "x", stream: true, max_tokens: 100, ignore_eos: true, vllm_xargs: { fault: "die_mid_stream" },
  });
  for await (const _ of broken);
});
const controller = new AbortController();
const left = await client.completions.create(
  { ...ask, prompt: "x", stream: true, max_tokens: 1000, ignore_eos: true }, { signal: controller.signal },
);
for await (const _ of left) controller.abort();

console.log(JSON.stringify(seen));
