/** Which operators of a bundle WebGPU does not have: onnxruntime-web computes them in WebAssembly and says so in its log. */

import { openBundle } from "./driver.mjs";

const PRODUCTS = /^(Mat|Gemm|Conv|QLinear|DynamicQuantize)/; // what holds weights
const HEAVY = /Attention/;

/** Opens the bundle once, with the log on: [products, others that count] by operator, as far as WebAssembly has them. */
export async function placement(ort, folder) {
  const found = {};
  const before = console.error;
  let provider = "";
  console.error = (...words) => {
    const text = words.join(" "); // "... placed on [CPUExecutionProvider]. ...", then a line "... MatMul (name)" for each
    const next = /placed on \[(\w+)\]/.exec(text);
    const node = /VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(/.exec(text);
    if (next) provider = next[1];
    else if (node && provider === "CPUExecutionProvider") found[node[1]] = (found[node[1]] ?? 0) + 1;
    else if (/\[[EF]:onnxruntime/.test(text)) before(...words);
  };
  try {
    const model = await openBundle(ort, folder, { executionProviders: ["webgpu"], logSeverityLevel: 0 });
    await Promise.all(Object.values(model.sessions).map((session) => session.release()));
  } finally {
    console.error = before;
  }
  const some = (wanted) => Object.entries(found).flatMap(([name, count]) => (wanted.test(name) ? `${count} ${name}` : []));
  return { products: some(PRODUCTS), heavy: some(HEAVY) };
}
