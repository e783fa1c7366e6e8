/** What can compute in this browser. */

/** {wasm: "", webgpu: why not}. */
export async function units(task) {
  return { status: "ok", units: { wasm: wasm(), webgpu: await webgpu(task.software) } };
}

/** "" or why this page cannot have so many threads. */
export function threads(wanted) {
  if (wanted <= 1 || crossOriginIsolated) return "";
  const why = isSecureContext ? "is not cross-origin isolated" : "comes over plain http from another machine";
  return `${wanted} threads need shared memory, which a page that ${why} has not; ask for 1 thread`;
}

/** "" or why WebGPU cannot be used. `software`: take an adapter that computes on the processor too. */
export async function webgpu(software) {
  if (!isSecureContext) return "the page comes over plain http from another machine; browsers give WebGPU to https and localhost";
  if (!navigator.gpu) return "this browser has no WebGPU; use one that has, or allow it in its settings";
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) return "this browser finds no GPU for WebGPU; see chrome://gpu for the reason";
  if (!software && adapter.info?.isFallbackAdapter) {
    return `this browser's only adapter is ${adapter.info.architecture || "a software one"}, which computes on the processor`;
  }
  return "";
}

function wasm() {
  return typeof WebAssembly === "object" ? "" : "this browser has no WebAssembly";
}

/** What the browser tells of itself and of the machine. */
export function browser() {
  return {
    user_agent: navigator.userAgent,
    processors: navigator.hardwareConcurrency,
    memory_gb_at_least: navigator.deviceMemory ?? null,
    cross_origin_isolated: crossOriginIsolated,
    timer_us: resolution(),
  };
}

/** The smallest step of performance.now() in microseconds: 5 where isolated, else 100 or more. */
function resolution() {
  let least = Infinity;
  for (let i = 0, last = performance.now(); i < 20; ) {
    const now = performance.now();
    if (now === last) continue;
    least = Math.min(least, now - last);
    [last, i] = [now, i + 1];
  }
  return Math.round(least * 1e4) / 10;
}
