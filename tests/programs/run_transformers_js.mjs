// SPDX-License-Identifier: Apache-2.0
// A consumer: greedy tokens from an exported folder by transformers.js in Node.
//
//     node run_transformers_js.mjs FOLDER_HOLDING_node_modules
//
// Reads {"folder", "prompts", "new_tokens"} as JSON from stdin, writes {"versions", "tokens"} to stdout.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";

const modules = createRequire(join(process.argv[2], "package.json"));
const { AutoModelForCausalLM, Tensor, env } = modules("@huggingface/transformers");
const request = JSON.parse(readFileSync(0, "utf8"));

env.allowRemoteModels = false;
env.localModelPath = dirname(request.folder);

function tensor(values) {
  return new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

// What to load, and that its weights are in a file beside it, stands in config.json.
const model = await AutoModelForCausalLM.from_pretrained(basename(request.folder));
const tokens = [];
for (const prompt of request.prompts) {
  const made = await model.generate({
    inputs: tensor(prompt),
    attention_mask: tensor(prompt.map(() => 1)),
    do_sample: false,
    max_new_tokens: request.new_tokens,
  });
  tokens.push(Array.from(made.data.slice(prompt.length), Number));
}
await model.dispose();

const installed = (name) => JSON.parse(readFileSync(join(process.argv[2], "node_modules", name, "package.json"))).version;
const versions = {
  "transformers.js": env.version,
  "onnxruntime-node": installed("onnxruntime-node"),
  node: process.version,
};
process.stdout.write(JSON.stringify({ versions, tokens }));
