// Runs each model of this folder on the sample beside it and compares what comes out with what is expected.
//
//   npm install --ignore-scripts && node smoke.mjs
//
// In a page see index.html. Needs the runtime for JavaScript alone: onnxruntime-node, or onnxruntime-web.

const views = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, bool: Uint8Array, int8: Int8Array,
  uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array,
  int64: BigInt64Array, uint64: BigUint64Array,
};

/**
 * What each output of each model is like: [{model, output, error, tolerance, ok}].
 *
 * `runtime` is the module onnxruntime-node or onnxruntime-web; `place(name)` gives where the runtime finds a file,
 * `read(name)` its bytes as a promise of an ArrayBuffer.
 */
export async function smoke(runtime, place, read) {
  const manifest = JSON.parse(new TextDecoder().decode(await read('manifest.json')));
  const load = async (tensor) => new views[tensor.dtype](await read(tensor.file));
  const feeds = {};
  for (const tensor of manifest.sample.inputs) {
    feeds[tensor.name] = new runtime.Tensor(tensor.dtype, typed(tensor.dtype, await load(tensor)), tensor.shape);
  }
  const rows = [];
  for (const model of manifest.models) {
    const session = await runtime.InferenceSession.create(place(model.file), options(model, manifest.threads, place));
    const found = await session.run(feeds);
    for (const wanted of manifest.sample.outputs) {
      const error = difference(found[wanted.name], wanted, await load(wanted));
      rows.push({model: model.file, output: wanted.name, error, tolerance: wanted.tolerance,
        ok: error <= wanted.tolerance});
    }
    await session.release();
  }
  return rows;
}

/** A row of what smoke() gives as text. */
export function line(row) {
  const judged = row.ok ? 'ok' : 'WRONG';
  return `${row.model} ${row.output}: error ${row.error.toPrecision(3)}, allowed ${row.tolerance}: ${judged}`;
}

function options(model, threads, place) {
  const inPage = typeof window !== 'undefined';
  const provider = model.provider.replace('ExecutionProvider', '').toLowerCase();
  const extra = {};
  for (const [key, value] of Object.entries(model.config)) { // session.x = 1 is {session: {x: 1}}
    const parts = key.split('.');
    const last = parts.pop();
    parts.reduce((inner, part) => inner[part] ??= {}, extra)[last] = value;
  }
  return {
    executionProviders: [inPage ? 'wasm' : provider], logSeverityLevel: 3, extra,
    ...threads > 0 && !inPage ? {intraOpNumThreads: threads} : {},
    ...inPage && model.data.length ? {externalData: model.data.map((path) => ({path, data: place(path)}))} : {},
  };
}

/** The array that the runtime wants: half floats have one of their own where the language has it. */
function typed(dtype, values) {
  return dtype === 'float16' && globalThis.Float16Array ? new Float16Array(values.buffer) : values;
}

/** The largest difference between two tensors: infinite where types or shapes differ, or one is not a number. */
function difference(found, wanted, expected) {
  if (found === undefined || found.type !== wanted.dtype || String(found.dims) !== String(wanted.shape)) {
    return Infinity;
  }
  const real = wanted.dtype === 'float16' ? halfAt : (values, k) => values[k];
  const data = ArrayBuffer.isView(found.data) && !(found.data instanceof views[wanted.dtype])
    ? new views[wanted.dtype](found.data.buffer, found.data.byteOffset, found.data.length) : found.data;
  let largest = 0;
  for (let k = 0; k < expected.length; k++) {
    const a = real(data, k), b = real(expected, k);
    if (a === b || Number.isNaN(a) && Number.isNaN(b)) continue;
    const error = Math.abs(Number(a - b));
    largest = Number.isNaN(error) ? Infinity : Math.max(largest, error);
  }
  return largest;
}

/** The number that 16 bits stand for as a half float: a sign, 5 bits of exponent, 10 of the fraction. */
function halfAt(values, k) {
  const bits = values[k], exponent = bits >> 10 & 31, fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction / 1024 * 2 ** -14);
}

/** The same in Node.js, on files in the folder of this program; true where all is well. */
async function main(name) {
  const {readFile} = await import('node:fs/promises');
  const {dirname, join} = await import('node:path');
  const {fileURLToPath} = await import('node:url');
  const module = await import(name);
  const place = (file) => join(dirname(fileURLToPath(import.meta.url)), file);
  const rows = await smoke(module.default ?? module, place, async (file) => {
    const bytes = await readFile(place(file));
    return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  });
  rows.forEach((row) => console.log(line(row)));
  return rows.length > 0 && rows.every((row) => row.ok);
}

if (typeof process !== 'undefined' && process.argv[1] && import.meta.url.endsWith('/smoke.mjs')) {
  process.exitCode = await main(process.argv[2] ?? 'onnxruntime-node') ? 0 : 1;
}
