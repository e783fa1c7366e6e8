/** What the tests call in the page: `driverRun(job)` and `transformersRun(job)`; a job is JSON, its pixels an address. */

import { concat, openBundle } from "./driver.mjs";
import { openModel, originalBans, pictureCache, promptInputs } from "./transformers_driver.mjs";

const MODULES = `${location.origin}/node_modules`;

/** {bundle, pixels, crops, tiling, bos, prompts, text, maxTokens, threads} -> tokens. */
window.driverRun = async (job) => {
  const ort = await import(`${MODULES}/onnxruntime-web/dist/ort.wasm.min.mjs`);
  ort.env.wasm.wasmPaths = `${MODULES}/onnxruntime-web/dist/`;
  ort.env.wasm.numThreads = job.threads;
  const model = await openBundle(ort, job.bundle);
  const ask = async (prompt) => model.generate(await model.append(prompt), { maxTokens: job.maxTokens });
  const empty = model.state;
  const rows = await model.project(await model.vision(await fetchPixels(job.pixels), job.crops), job.tiling);
  await model.forward(concat(await model.embed([job.bos]), rows));
  const kept = model.state;
  const picture = [];
  for (const prompt of job.prompts) {
    model.state = kept;
    picture.push(await ask(prompt));
  }
  model.state = empty;
  return { picture, text: await ask(job.text), isolated: crossOriginIsolated, version: ort.env.versions.web };
};

/** The same through transformers.js; `build`: which WASM file, ".asyncify" is its default. */
window.transformersRun = async (job) => {
  const transformers = await import(`${MODULES}/@huggingface/transformers/dist/transformers.min.js`);
  const { env, AutoTokenizer, AutoImageProcessor, RawImage } = transformers;
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/" }); // a path: an address is not looked up locally
  const dist = `${MODULES}/@huggingface/transformers/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded${job.build}`;
  Object.assign(env.backends.onnx.wasm, { wasmPaths: { mjs: `${dist}.mjs`, wasm: `${dist}.wasm` }, numThreads: job.threads });
  const model = await openModel(transformers, job.bundle.slice(1));
  const generate = async (ids, picture, options = {}) => {
    const inputs = promptInputs(transformers, ids, picture);
    const out = await model.llava.generate({ ...inputs, max_new_tokens: job.maxTokens, ...options });
    return out.tolist()[0].slice(ids.length).map(Number);
  };
  const pixels = await fetchPixels(job.pixels);
  const picture = await pictureCache(transformers, model, { ...job, pixels });
  const bans = (ids) => originalBans(transformers, model.open().spec.prompt.banned, ids.length);
  const answers = [];
  for (const prompt of job.prompts) answers.push(await generate(prompt, picture, bans(prompt)));
  const tokenizer = await AutoTokenizer.from_pretrained(job.bundle.slice(1));
  const processor = await AutoImageProcessor.from_pretrained(job.bundle.slice(1));
  const size = model.open().spec.image.size;
  const { pixel_values } = await processor(new RawImage(pixels.slice(0, 3 * size * size), size, size, 3));
  return {
    picture: answers,
    text: await generate(job.text, null, bans(job.text)),
    plain: await generate(job.text, null),
    words: tokenizer.decode(answers[0], { skip_special_tokens: true }),
    ids: tokenizer.encode(job.question),
    pixels: { dims: pixel_values.dims, data: Array.from(pixel_values.data.slice(0, 64)) },
    refused: await model.llava.generate({ ...promptInputs(transformers, job.text), pixel_values }).catch(String),
    version: env.backends.onnx.versions.web,
  };
};

const fetchPixels = async (address) => new Uint8Array(await (await fetch(address)).arrayBuffer());
