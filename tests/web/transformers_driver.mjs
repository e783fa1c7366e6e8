/**
 * The same bundle through transformers.js: it loads and caches the files, tokenizes and generates; the picture goes
 * into its KV cache here, because its Llava class knows neither several crops nor our projection.
 *
 *     const model = await openModel(transformers, "moondream2.onnx");
 *     const picture = await pictureCache(transformers, model, { bos, pixels, crops, tiling });
 *     const out = await model.llava.generate(promptInputs(transformers, promptIds, picture));
 */

import { Model, concat } from "./driver.mjs";

/** Load the bundle that lies under `env.localModelPath` as `name`. */
export async function openModel({ AutoModelForImageTextToText, PreTrainedModel, env, Tensor }, name) {
  const llava = await AutoModelForImageTextToText.from_pretrained(name);
  // No class of transformers.js has a session of this name, so it is loaded as a model of its own.
  const config = { ...llava.config, model_type: "custom", architectures: [] };
  const projection = await PreTrainedModel.from_pretrained(name, { config, model_file_name: "vision_projection" });
  const manifest = await (await fetch(`${env.localModelPath}${name}/vlmedge.json`)).json();
  const sessions = { ...llava.sessions, vision_projection: projection.sessions.model };
  const tensor = (type, data, dims) => new Tensor(type, data, dims).ort_tensor;
  return { llava, open: () => new Model(sessions, manifest.model, tensor) };
}

/** BOS and one picture as a KV cache. generate() adds to the one it gets, so each reading of `cache` makes a new one. */
export async function pictureCache({ DynamicCache, Tensor }, model, { bos, pixels, crops, tiling }) {
  const driver = model.open();
  const rows = await driver.project(await driver.vision(pixels, crops), tiling);
  await driver.forward(concat(await driver.embed([bos]), rows));
  const { cache, position } = driver.state;
  const entries = Object.entries(cache).map(([name, value]) => [name, new Tensor(value)]);
  return { length: position, get cache() { return new DynamicCache(Object.fromEntries(entries)) } };
}

/** What generate() takes for prompt ids, behind a picture where one is given. */
export function promptInputs({ Tensor, ones }, ids, picture = null) {
  const input_ids = new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
  const attention_mask = ones([1, ids.length + (picture?.length ?? 0)]);
  return { input_ids, attention_mask, ...(picture && { past_key_values: picture.cache }) };
}

/** Bans tokens from the second one on, as the original does; the files' `suppress_tokens` bans the first too. */
export function originalBans({ LogitsProcessor, LogitsProcessorList }, banned, promptLength) {
  class Bans extends LogitsProcessor {
    _call(ids, logits) {
      if (ids[0].length > promptLength) for (const id of banned) logits[0].data[id] = -Infinity;
      return logits;
    }
  }
  const list = new LogitsProcessorList();
  list.push(new Bans());
  return { suppress_tokens: null, logits_processor: list };
}
