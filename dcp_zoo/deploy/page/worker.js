// Runs the exported file: pixels of any size go in, the resize is inside the file.

import * as ort from "./ort.wasm.bundle.min.mjs";

const STRIP = 1024; // rows that are read at a time, for browsers with a limit on canvas sizes

ort.env.wasm.wasmPaths = { wasm: "./ort-wasm-simd-threaded.wasm" };
ort.env.logLevel = "error";
const session = ort.InferenceSession.create("./model.onnx", { executionProviders: ["wasm"] });
session.then(
  () => postMessage({ kind: "ready" }),
  (error) => postMessage({ kind: "failed", message: error.message }),
);

function pixels(bitmap) {
  const { width, height } = bitmap;
  const rgb = new Uint8Array(3 * width * height);
  const canvas = new OffscreenCanvas(width, Math.min(STRIP, height));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let to = 0;
  for (let top = 0; top < height; top += STRIP) {
    const rows = Math.min(STRIP, height - top);
    context.clearRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, -top);
    const { data } = context.getImageData(0, 0, width, rows);
    for (let from = 0; from < data.length; from += 4) {
      rgb[to++] = data[from];
      rgb[to++] = data[from + 1];
      rgb[to++] = data[from + 2];
    }
  }
  bitmap.close();
  return new ort.Tensor("uint8", rgb, [1, height, width, 3]);
}

let last = Promise.resolve(); // one image at a time
self.onmessage = ({ data: { number, bitmap } }) => {
  last = last.then(async () => {
    try {
      const { probabilities, distance } = await (await session).run({ pixels: pixels(bitmap) });
      const [distances] = distance ? await distance.getData() : [];
      postMessage({ kind: "answer", number, probabilities: await probabilities.getData(), distance: distances });
    } catch (error) {
      postMessage({ kind: "error", number, message: `This image cannot be classified: ${error.message}` });
    }
  });
};
