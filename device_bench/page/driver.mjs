/**
 * Runs an ONNX bundle of vlmedge with onnxruntime-web: crops of a picture and token ids in, token ids out.
 *
 *     import * as ort from "onnxruntime-web/wasm";
 *     const model = await openBundle(ort, "/moondream2.onnx");
 *     const rows = await model.project(await model.vision(pixels, crops), [rows, columns]);
 *     await model.forward(concat(await model.embed([bos]), rows));   // the picture: once
 *     const kept = model.state;                                      // and kept for the next question
 *     const ids = await model.generate(await model.append(promptIds));
 *     model.state = kept;
 *
 * The KV cache grows: each call gives the whole cache back as new tensors, so an older state stays valid. With WebGPU it
 * may stay on the device (`preferredOutputLocation: "gpu-buffer"`); its tensors there are freed by `drop`, not by themselves.
 * All other outputs are fetched, and freed there (`getData(true)`).
 */

const SESSIONS = ["vision_encoder", "vision_projection", "embed_tokens", "decoder_model_merged"];

/** Fetch a bundle and open its sessions. `options`: InferenceSession.SessionOptions. Throws where a file is missing. */
export async function openBundle(ort, folder, options = {}) {
  const [manifest, config] = await Promise.all(
    ["vlmedge.json", "config.json"].map(async (name) => (await get(`${folder}/${name}`)).json()),
  );
  const parts = config["transformers.js_config"].use_external_data_format;
  const sessions = {};
  for (const name of SESSIONS) {
    sessions[name] = await openSession(ort, `${folder}/onnx`, `${name}.onnx`, parts[name] ?? 0, options);
  }
  return new Model(sessions, manifest.model, (type, data, dims) => new ort.Tensor(type, data, dims));
}

async function openSession(ort, folder, file, parts, options) {
  const names = Array.from({ length: parts }, (_, i) => `${file}_data${i ? `_${i}` : ""}`);
  const [graph, ...data] = await Promise.all([file, ...names].map((name) => bytes(`${folder}/${name}`)));
  return ort.InferenceSession.create(graph, {
    executionProviders: ["wasm"],
    logSeverityLevel: 3, // else a warning for each input with a default
    externalData: names.map((path, i) => ({ path, data: data[i] })),
    ...options,
  });
}

async function get(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} was not found: ${answer.status}`);
  return answer;
}

const bytes = async (address) => new Uint8Array(await (await get(address)).arrayBuffer());

/**
 * One opened model. `sessions`: by file name; `spec`: the `model` of vlmedge.json; `tensor(type, data, dims)` makes
 * what the sessions take. `state`: the KV cache and its length; set it to one read earlier to go back there.
 */
export class Model {
  constructor(sessions, spec, tensor) {
    Object.assign(this, { sessions, spec, tensor });
    this.state = { position: 0, cache: this.#empty() };
  }

  /** Crops, RGB uint8 [count, size, size, 3], to features float32 [count * tokens * width]. */
  async vision(pixels, count) {
    const { size } = this.spec.image;
    const feed = { pixel_values: this.tensor("float32", normalise(pixels, this.spec.image), [count, 3, size, size]) };
    return (await this.sessions.vision_encoder.run(feed)).image_features.getData(true);
  }

  /** Features of one picture's crops (the global one first) to embeddings float32 [image tokens * width]. */
  async project(features, [rows, columns]) {
    const { image, vision } = this.spec;
    const side = image.size / image.patch_size;
    const feed = { image_features: this.tensor("float32", features, [rows * columns + 1, side * side, vision.width]) };
    if (this.spec.projector.joins_global) {
      const { index, height, width } = stitchIndex(image, rows, columns);
      feed.stitch_index = this.tensor("int64", index, [height, width]);
      feed.pool_rows = this.tensor("float32", poolMatrix(height, side), [side, height]);
      feed.pool_columns = this.tensor("float32", poolMatrix(width, side), [side, width]);
    }
    return (await this.sessions.vision_projection.run(feed)).image_embeds.getData(true);
  }

  /** Token ids to embeddings float32 [n * width]. */
  async embed(ids) {
    const feed = { input_ids: this.tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]) };
    return (await this.sessions.embed_tokens.run(feed)).inputs_embeds.getData(true);
  }

  /** Append embeddings float32 [n * width] to the cache; the logits of the last position, float32 [vocab]. */
  async forward(embeds) {
    const width = this.spec.decoder.width;
    const count = embeds.length / width;
    const position = this.state.position + count;
    const out = await this.sessions.decoder_model_merged.run({
      inputs_embeds: this.tensor("float32", embeds, [1, count, width]),
      attention_mask: this.tensor("int64", new BigInt64Array(position).fill(1n), [1, position]),
      ...this.state.cache,
    });
    const names = Object.keys(this.state.cache);
    const cache = Object.fromEntries(names.map((name) => [name, out[name.replace("past_key_values", "present")]]));
    this.state = { position, cache };
    return out.logits.getData(true);
  }

  /** Append token ids; the logits of the last one. */
  async append(ids) {
    return this.forward(await this.embed(ids));
  }

  /** Greedy answer from the prompt's logits; the end token is part of it. */
  async generate(logits, { maxTokens = this.spec.prompt.max_tokens, onToken = () => {} } = {}) {
    const { stop, banned } = this.spec.prompt;
    const given = this.state;
    const ids = [];
    for (;;) {
      if (ids.length) for (const id of banned) logits[id] = -Infinity; // never the first token: the original's rule
      ids.push(argmax(logits));
      onToken(ids.at(-1));
      const full = this.state.position >= this.spec.decoder.context;
      if (stop.includes(ids.at(-1)) || ids.length >= maxTokens || full) return ids;
      const before = this.state;
      logits = await this.append(ids.slice(-1));
      if (before !== given) this.drop(before);
    }
  }

  /** Free the tensors of a state that is not needed again. */
  drop(state) {
    for (const tensor of Object.values(state.cache)) tensor.dispose();
  }

  #empty() {
    const inputs = this.sessions.decoder_model_merged.inputMetadata.filter((i) => i.name.startsWith("past_key_values"));
    const none = { float32: Float32Array, int8: Int8Array };
    return Object.fromEntries(
      inputs.map(({ name, type, shape }) => {
        const dims = shape.map((d) => (typeof d === "number" ? d : 0));
        return [name, this.tensor(type, new none[type](0), dims)];
      }),
    );
  }
}

/** Rows of embeddings behind each other. */
export function concat(...parts) {
  const out = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => (out.set(part, at), at + part.length), 0);
  return out;
}

/** uint8 [n, h, w, 3] to float32 [n, 3, h, w]: (pixel / 255 - mean) / std, each step rounded to float32. */
export function normalise(pixels, { size, mean, std }) {
  const f = Math.fround;
  const tables = mean.map((m, c) => Float32Array.from({ length: 256 }, (_, v) => f(f(v / 255) - f(m)) / f(std[c])));
  const area = size * size;
  const out = new Float32Array(pixels.length);
  for (let n = 0; n < pixels.length; n += 3 * area) {
    for (let i = 0; i < area; i++) {
      for (let c = 0; c < 3; c++) out[n + c * area + i] = tables[c][pixels[n + 3 * i + c]];
    }
  }
  return out;
}

/** Which feature row of the local crops lands where in the stitched grid (vlmedge.imaging.stitch_index). */
export function stitchIndex({ size, patch_size, tiling: { margin } }, rows, columns) {
  const side = size / patch_size;
  const window = side - 2 * margin;
  const [height, width] = [rows * window + 2 * margin, columns * window + 2 * margin];
  const tile = (at, count) => Math.min(Math.max(Math.floor((at - margin) / window), 0), count - 1);
  const index = new BigInt64Array(height * width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [row, column] = [tile(y, rows), tile(x, columns)];
      const inner = (y - row * window) * side + (x - column * window);
      index[y * width + x] = BigInt((row * columns + column) * side * side + inner);
    }
  }
  return { index, height, width };
}

/** Adaptive average pooling of one axis as a matrix [target, source] (vlmedge.imaging.pool_matrix). */
export function poolMatrix(source, target) {
  const matrix = new Float32Array(target * source);
  for (let i = 0; i < target; i++) {
    const [start, stop] = [Math.floor((i * source) / target), Math.ceil(((i + 1) * source) / target)];
    matrix.fill(1 / (stop - start), i * source + start, i * source + stop);
  }
  return matrix;
}

/** The index of the largest value, the first of equal ones. */
export function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}
