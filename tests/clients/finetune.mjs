// A fine-tuning script for OpenAI's Node SDK: node finetune.mjs BASE_URL KEY MODEL FILE. Prints the model's name.
import assert from "node:assert/strict";
import fs from "node:fs";
import OpenAI, { NotFoundError } from "openai";

const [baseURL, apiKey, model, path] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

const file = await client.files.create({ file: fs.createReadStream(path), purpose: "fine-tune" });
let job = await client.fineTuning.jobs.create({
  model,
  training_file: file.id,
  validation_file: file.id,
  suffix: "node",
  seed: 7,
  metadata: { team: "node" },
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 2, batch_size: 4 } } },
});
while (!["succeeded", "failed"].includes(job.status)) {
  await pause(200);
  job = await client.fineTuning.jobs.retrieve(job.id);
}
assert.equal(job.status, "succeeded", JSON.stringify(job.error));
assert.deepEqual([job.seed, job.metadata, job.method.supervised.hyperparameters.n_epochs], [7, { team: "node" }, 2]);

const messages = [];
for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 3 })) messages.push(event.message);
assert.ok(messages.length > 6 && messages.some((text) => text === `New fine-tuned model created: ${job.fine_tuned_model}`));
const checkpoints = [];
for await (const one of client.fineTuning.jobs.checkpoints.list(job.id, { limit: 1 })) checkpoints.push(one);
assert.ok(checkpoints.length >= 2 && checkpoints[0].step_number > checkpoints[1].step_number);
const csv = await (await client.files.content(job.result_files[0])).text();
assert.ok(csv.startsWith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"));

const stream = await client.chat.completions.create({
  model: job.fine_tuned_model, messages: [{ role: "user", content: "is it good" }], max_tokens: 4, stream: true,
});
let parts = 0;
for await (const part of stream) parts += part.choices.length;
assert.ok(parts > 0);

const other = await client.fineTuning.jobs.create({ model, training_file: file.id, hyperparameters: { n_epochs: 10_000 } });
while ((await client.fineTuning.jobs.retrieve(other.id)).status !== "running") await pause(50);
await client.fineTuning.jobs.pause(other.id);
while ((await client.fineTuning.jobs.retrieve(other.id)).status !== "paused") await pause(50);
await client.fineTuning.jobs.resume(other.id);
await client.fineTuning.jobs.cancel(other.id);
await assert.rejects(client.fineTuning.jobs.retrieve("ftjob-none"), NotFoundError);
assert.equal((await client.files.delete(file.id)).deleted, true);
console.log(job.fine_tuned_model);
