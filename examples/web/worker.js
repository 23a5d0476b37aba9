// SPDX-License-Identifier: Apache-2.0
// The model behind index.html: loads an exported folder with transformers.js and completes text, off the page's thread.
//
// Asked:    load {library, wasm, model}, count {text, id}, complete {text, newTokens, recompute}, stop
// Answers:  loading {loaded, total}, ready {…facts}, counted {tokens, id}, reading {tokens, again}, token {text, total},
//           done {prompt, tokens, reason, seconds}, failed {during, message, detail}

let AutoModelForCausalLM, AutoTokenizer, InterruptableStoppingCriteria, Tensor, env;
let model, tokenizer, facts, interruption;

/** A failure in words for the person in front of the page. */
class Trouble extends Error {}

self.onmessage = async ({ data }) => {
  try {
    await actions[data.do](data);
  } catch (error) {
    const message = error instanceof Trouble ? error.message : inWords(error);
    self.postMessage({ type: "failed", during: data.do, message, detail: String(error.cause ?? error) });
  }
};

const actions = {
  async load({ library, wasm, model: address }) {
    try {
      ({ AutoModelForCausalLM, AutoTokenizer, InterruptableStoppingCriteria, Tensor, env } = await import(library));
    } catch (error) {
      throw new Trouble(`transformers.js can't be loaded from ${library}. README.md says how to get it.`, { cause: error });
    }
    // A path and no address: transformers.js takes what begins with http: for a file of the Hub.
    const folder = new URL(address).pathname.replace(/\/+$/, "");
    const name = folder.slice(folder.lastIndexOf("/") + 1);
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
    env.localModelPath = folder.slice(0, -name.length);
    // A folder that is exported anew has the same name: the browser asks the server, which knows what changed.
    env.useBrowserCache = false;
    const runtime = env.backends.onnx.versions.web;
    const build = wasm.replace("{version}", runtime);
    env.backends.onnx.wasm.wasmPaths = { mjs: `${build}.mjs`, wasm: `${build}.wasm` };
    const config = await json(folder, "config.json");
    if (!config) {
      throw new Trouble(`There is no exported model at ${folder}/: it has no config.json.`);
    }
    tokenizer = await AutoTokenizer.from_pretrained(name);
    model = await AutoModelForCausalLM.from_pretrained(name, {
      device: "wasm",
      progress_callback: ({ status, loaded, total }) => {
        if (status === "progress_total") {
          self.postMessage({ type: "loading", loaded, total });
        }
      },
    });
    listenBetweenPasses(model);
    interruption = new InterruptableStoppingCriteria();
    facts = {
      name: config._name_or_path || name,
      family: config.model_type,
      window: config.max_position_embeddings,
      boundaries: boundariesOf(config),
      library: env.version,
      runtime,
    };
    self.postMessage({ type: "ready", ...facts });
  },

  async count({ text, id }) {
    self.postMessage({ type: "counted", tokens: encoded(text).length, id });
  },

  async stop() {
    interruption?.interrupt();
  },

  async complete({ text, newTokens, recompute }) {
    const prompt = encoded(text);
    const enough = prompt.length + newTokens;
    if (prompt.length === 0) {
      throw new Trouble("There is no text to complete.");
    }
    if (enough > facts.window) {
      throw new Trouble(
        `The text has ${prompt.length} tokens; with ${newTokens} new ones that is ${enough - facts.window} more than ` +
          `the window of ${facts.window} holds. Shorten one of them.`,
      );
    }
    interruption.reset();
    const started = performance.now();
    const sequence = [...prompt];
    const ends = [model.generation_config?.eos_token_id ?? []].flat().map(Number);
    let reason = "enough";
    while (reason === "enough" && sequence.length < enough) {
      self.postMessage({ type: "reading", tokens: sequence.length, again: sequence.length > prompt.length });
      await generate(sequence, legOf(sequence.length, enough, recompute), () => {
        const continuation = tokenizer.decode(sequence.slice(prompt.length), { skip_special_tokens: true });
        self.postMessage({ type: "token", text: continuation, total: sequence.length });
      });
      if (interruption.interrupted) {
        reason = "stopped";
      } else if (ends.includes(sequence.at(-1))) {
        reason = "ended";
      }
    }
    const seconds = (performance.now() - started) / 1000;
    self.postMessage({ type: "done", prompt: prompt.length, tokens: sequence.slice(prompt.length), reason, seconds });
  },
};

/**
 * How many tokens the next call of `generate` may make.
 *
 * A pass over n tokens chooses its factor set by n and makes token n + 1. Keys in the cache keep the set that they were
 * made with, so a call that went on past a boundary would mix two sets. To recompute, a call ends with the last token
 * that a pass within the boundary makes; the next call reads everything again, with the set of the longer text.
 */
function legOf(length, enough, recompute) {
  const boundary = recompute ? facts.boundaries.find((tokens) => length <= tokens) : undefined;
  return Math.min(enough, (boundary ?? Infinity) + 1) - length;
}

/** Extend `sequence` by greedy decoding; `made` is called after every token. */
async function generate(sequence, newTokens, made) {
  let reading = true;
  await model.generate({
    inputs: row(sequence),
    attention_mask: row(sequence.map(() => 1)),
    do_sample: false,
    max_new_tokens: newTokens,
    stopping_criteria: interruption,
    streamer: {
      put([ids]) {
        if (!reading) {
          sequence.push(...ids.map(Number));
          made();
        }
        reading = false; // the first call brings the prompt
      },
      end() {},
    },
  });
}

/** Where the factor set changes: the longest length of every tier but the last. */
function boundariesOf(config) {
  const tiers = config.longrope?.tiers;
  if (tiers) {
    return tiers.slice(0, -1).map((tier) => tier.max_length);
  }
  const scaling = config.rope_scaling ?? config.rope_parameters ?? {};
  const original = scaling.original_max_position_embeddings ?? config.original_max_position_embeddings;
  return original && original < config.max_position_embeddings ? [original] : [];
}

/** Passes over the model follow each other without a pause in which a worker could hear that it should stop. */
function listenBetweenPasses(loaded) {
  const forward = loaded.forward.bind(loaded);
  loaded.forward = async (inputs) => {
    await new Promise((resolve) => setTimeout(resolve));
    return forward(inputs);
  };
}

function encoded(text) {
  return text ? tokenizer.encode(text) : [];
}

function row(values) {
  return new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

async function json(folder, file) {
  const response = await fetch(`${folder}/${file}`, { cache: "no-cache" });
  return response.ok ? response.json() : null;
}

function inWords(error) {
  const text = String(error?.message ?? error);
  if (/memory|bad_alloc|allocat|Array buffer|Invalid typed array length/i.test(text)) {
    return "The browser ran out of memory. WebAssembly has at most 4 GB: try a smaller model, or a shorter text.";
  }
  if (/integer overflow/i.test(text)) {
    return (
      "The text is too long for the standard attention operator in WebAssembly, which keeps a score for every pair of " +
      "tokens. An export with --attention gqa does without."
    );
  }
  if (/could not locate file|404|not found/i.test(text)) {
    return "A file of the exported folder is missing on the server.";
  }
  if (/failed to fetch|networkerror|load failed/i.test(text)) {
    return "The server does not answer any more, or a file was not sent whole.";
  }
  if (/implementation for|opset|not implemented|unsupported|not a registered function|no available backend/i.test(text)) {
    return "This version of ONNX Runtime Web has no code for an operator of the model.";
  }
  return "Something went wrong that this page did not foresee.";
}
