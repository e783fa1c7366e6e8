/** One model measured as vlmedge.device_bench.measuring does it, from crops and token ids that the server made. */

import { argmax, concat, openBundle } from "./driver.mjs";
import { placement } from "./placement.mjs";
import { browser, threads, webgpu } from "./units.mjs";

const LIBRARY = { wasm: "ort.wasm.min.mjs", webgpu: "ort.webgpu.min.mjs" };
const WARM = 8; // tokens of a warm-up answer

/**
 * {unit, threads, asks, bundle, tokens, warmup, repeat, seconds, sustained, software, weigh} -> the reply's parts.
 * An ask: {name, pixels, crops, tiling, before, prompt, truth}, `truth` null or {tokens, ids}.
 */
export async function measure(task, home) {
  task.threads ??= crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  refuse(threads(task.threads) || (task.unit === "webgpu" ? await webgpu(task.software) : ""));
  const mark = (name) => fetch(`${home}/mark/${name}`); // the server looks at this browser's memory and clock
  const library = await timed(() => openLibrary(task));
  const ort = library.result;
  const reason = task.unit === "webgpu" ? await mixture(ort, home) : "";
  await mark("baseline");
  const empty = await weigh(task);
  const opened = await timed(() => openBundle(ort, `${home}/bundle`, sessionOptions(task.unit)));
  if (task.unit === "wasm" && ort.env.wasm.numThreads !== task.threads) {
    throw new Error(`onnxruntime-web took ${ort.env.wasm.numThreads} threads instead of ${task.threads}`);
  }
  await mark("loaded");
  const loaded = await weigh(task);
  const asker = new Asker(opened.result, task.tokens);
  for (const ask of task.asks) ask.pixels = new Uint8Array(await (await fetch(`${home}/${ask.pixels}`)).arrayBuffer());
  for (let i = 0; i < task.warmup; i++) await asker.answer(task.asks[0], Math.min(task.tokens, WARM));
  await mark("began");
  const found = await samples(asker, task);
  await mark("ended");
  const along = {};
  for (const ask of task.asks) if (ask.truth) along[ask.name] = await asker.follow(ask);
  return {
    status: "ok",
    reason,
    load: { ms: opened.ms, import_ms: library.ms },
    ...found,
    along,
    threads: ort.env.wasm.numThreads,
    weighed: { empty, loaded },
    environment: { ...browser(), onnxruntime_web: ort.env.versions.web, gpu: await gpu(task) },
  };
}

function refuse(why) {
  if (why) throw Object.assign(new Error(why), { status: "unavailable" });
}

/** Refuses where WebAssembly would multiply with weights; else what of the rest it would do, "" where nothing heavy. */
async function mixture(ort, home) {
  const { products, heavy } = await placement(ort, `${home}/bundle`).catch(({ message }) => {
    const missing = /: ([^:]*\(WebGPU\): .* is not implemented)/.exec(message); // of an operator that it has otherwise
    refuse(missing && `onnxruntime-web ${ort.env.versions.web}: ${missing[1]}; export the bundle with --flavour portable`);
    throw new Error(message);
  });
  const all = [...products, ...heavy].join(", ");
  const text = `WebGPU in onnxruntime-web ${ort.env.versions.web} does not have all operators: ${all} compute in WebAssembly`;
  refuse(products.length ? text : "");
  return heavy.length ? text : "";
}

async function openLibrary({ unit, threads }) {
  const ort = await import(new URL(`ort/${LIBRARY[unit]}`, document.baseURI).href);
  ort.env.wasm.wasmPaths = new URL("ort/", document.baseURI).href;
  ort.env.wasm.numThreads = threads;
  return ort;
}

/** With WebGPU outputs stay on the device, the KV cache among them; what is read is fetched. */
function sessionOptions(unit) {
  return unit === "webgpu" ? { executionProviders: ["webgpu"], preferredOutputLocation: "gpu-buffer" } : {};
}

async function samples(asker, { asks, tokens, repeat, seconds, sustained }) {
  const out = { samples: [], tokens: {} };
  const began = performance.now();
  for (let turn = 0; turn < repeat || performance.now() - began < seconds * 1e3; turn++) {
    for (const ask of asks) {
      const at = (performance.now() - began) / 1e3;
      const { ids, ms, token_ms } = await asker.answer(ask, tokens);
      out.samples.push({ ask: ask.name, at, ms, token_ms: sustained ? [] : token_ms });
      out.tokens[ask.name] ??= ids;
    }
  }
  return out;
}

/** Asks an opened model; nothing of the last question is remembered, and no stop token ends an answer. */
class Asker {
  constructor(model) {
    Object.assign(this, { model, empty: model.state, banned: model.spec.prompt.banned });
  }

  /** Exactly `count` tokens, greedily, and the milliseconds of every stage; then the first token of the same again. */
  async answer(ask, count) {
    const { model } = this;
    const ms = {};
    const start = performance.now();
    await this.picture(ask, ms);
    const kept = model.state;
    const ids = [];
    const ends = [];
    let logits = await stage(ms, "prompt", () => model.append(ask.prompt));
    for (;;) {
      ids.push(this.choose(logits, ids.length));
      ends.push(performance.now());
      if (ids.length === count) break;
      const before = model.state;
      logits = await model.append(ids.slice(-1));
      model.drop(before);
    }
    model.drop(model.state);
    const token_ms = ends.slice(1).map((end, i) => end - ends[i]);
    if (token_ms.length) ms.decode = token_ms.reduce((a, b) => a + b) / token_ms.length;
    Object.assign(ms, { first_token: ends[0] - start, end_to_end: ends.at(-1) - start });
    await stage(ms, "next_first_token", async () => {
      model.state = kept;
      this.choose(await model.append(ask.prompt), 0);
    });
    model.drop(model.state);
    model.drop(kept);
    return { ids, ms, token_ms };
  }

  /** The model along the truth's tokens: its best token at each, and its log-probabilities of the truth's ids. */
  async follow(ask) {
    const { model } = this;
    await this.picture(ask, {});
    const out = { best: [], logprobs: [] };
    for (const [i, ids] of ask.truth.ids.entries()) {
      const before = model.state;
      const logits = await model.append(i ? [ask.truth.tokens[i - 1]] : ask.prompt);
      model.drop(before);
      out.best.push(this.choose(logits, i));
      out.logprobs.push(logProbabilities(logits, ids));
    }
    model.drop(model.state);
    return out;
  }

  /** The KV cache holds what stands before the question, and nothing else. */
  async picture({ pixels, crops, tiling, before }, ms) {
    const { model } = this;
    model.state = this.empty;
    const one = tiling[0] * tiling[1] === 1; // its local crop equals the global one: encoded once
    const seen = one ? pixels.subarray(0, pixels.length / crops) : pixels;
    let features = await stage(ms, "vision", () => model.vision(seen, one ? 1 : crops));
    if (one) features = concat(features, features);
    const rows = await stage(ms, "project", () => model.project(features, tiling));
    await stage(ms, "prefill", async () => model.forward(concat(await model.embed(before), rows)));
  }

  /** The best token; some are banned from the second on. */
  choose(logits, index) {
    if (index) for (const id of this.banned) logits[id] = -Infinity;
    return argmax(logits);
  }
}

/** Natural logarithms of the softmax at `ids`, in float64. */
function logProbabilities(logits, ids) {
  const most = logits[argmax(logits)];
  let sum = 0;
  for (const value of logits) sum += Math.exp(value - most);
  return ids.map((id) => logits[id] - most - Math.log(sum));
}

async function timed(work) {
  const start = performance.now();
  const result = await work();
  return { result, ms: performance.now() - start };
}

async function stage(ms, name, work) {
  const { result, ms: taken } = await timed(work);
  ms[name] = taken;
  return result;
}

/** Bytes of this page, workers included, where the server cannot look; null where the browser does not tell. */
async function weigh({ weigh: asked }) {
  if (!asked || !crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return null;
  return (await performance.measureUserAgentSpecificMemory()).bytes;
}

async function gpu({ unit }) {
  const info = unit === "webgpu" ? (await navigator.gpu.requestAdapter())?.info : null;
  return info ? { vendor: info.vendor, architecture: info.architecture, description: info.description } : null;
}
