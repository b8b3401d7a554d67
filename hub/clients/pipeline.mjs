// Print the probabilities of images by transformers.js: `node pipeline.mjs REPO IMAGE ...`.
import { env, pipeline } from "@huggingface/transformers";

const [repo, ...images] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = "/"; // before the path of a folder
const classify = await pipeline("image-classification", repo, { dtype: "fp32" });
const rows = [];
for (const image of images) {
  const answers = await classify(image, { top_k: null });
  rows.push(Object.fromEntries(answers.map(({ label, score }) => [label, score])));
}
console.log(`transformers.js ${env.version}, Node ${process.version}`);
console.log(JSON.stringify(rows));
