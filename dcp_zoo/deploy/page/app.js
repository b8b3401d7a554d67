// The page: takes images from files, drops and the camera, hands them to the worker, and shows its answers.

const TOP = 5;
const element = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat(undefined, { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const waiting = new Map(); // article by number of the image
let head, worker, count = 0;

async function start() {
  head = await (await fetch("head.json")).json();
  document.title = element("title").textContent = head.name;
  element("about").textContent = `${head.classnames.length} classes. Images are classified in this browser and do not leave this device.`;
  // A worker made from a blob obeys the page's content security policy; one loaded from an address would not.
  const base = new URL("./", location.href).href;
  const code = (await (await fetch("worker.js")).text()).replaceAll('"./', `"${base}`);
  worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });
  worker.onmessage = ({ data }) => receive(data);
  worker.onerror = (event) => say(`The model cannot be run in this browser: ${event.message}`);
}

function receive({ kind, number, probabilities, distance, message }) {
  if (kind === "ready") say("");
  else if (kind === "failed") say(`The model cannot be loaded: ${message}`);
  else {
    const article = waiting.get(number);
    waiting.delete(number);
    article.removeAttribute("aria-busy");
    if (kind === "answer") {
      if (isUnknown(probabilities, distance)) article.lastChild.append(Object.assign(document.createElement("p"), { className: "unknown", textContent: "None of these" }));
      article.lastChild.append(bars(probabilities));
    }
    else refuse(article, message);
  }
}

function say(text) {
  element("status").textContent = text;
}

// as in_distribution_score in dcp_zoo/answers.py
function isUnknown(probabilities, distance) {
  if (head.threshold === undefined) return false;
  const score = probabilities.reduce((sum, p) => sum + (p > 0 ? p * Math.log(p) : 0), 0) - head.distance_weight * distance;
  return score < head.threshold;
}

function bars(probabilities) {
  const best = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, TOP);
  const table = document.createElement("table");
  for (const i of best) {
    const row = table.insertRow();
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = head.classnames[i];
    const meter = document.createElement("meter");
    meter.value = probabilities[i];
    meter.setAttribute("aria-label", head.classnames[i]);
    row.append(name);
    row.insertCell().append(meter);
    row.insertCell().textContent = percent.format(probabilities[i]);
    row.dataset.probability = probabilities[i];
  }
  return table;
}

async function classify(source, name) {
  const number = count++;
  const article = document.createElement("article");
  const text = document.createElement("div");
  text.append(Object.assign(document.createElement("h2"), { textContent: name }));
  article.append(text);
  article.setAttribute("aria-busy", "true");
  element("results").prepend(article);
  waiting.set(number, article);
  try {
    // the pixels as they are in the file, upright
    const bitmap = await createImageBitmap(source, { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" });
    article.prepend(thumbnail(bitmap));
    worker.postMessage({ number, bitmap }, [bitmap]);
  } catch {
    waiting.delete(number);
    refuse(article, "This is not an image that the browser can read.");
  }
}

function refuse(article, message) {
  article.removeAttribute("aria-busy");
  article.className = "error";
  article.lastChild.append(Object.assign(document.createElement("p"), { textContent: message }));
}

function thumbnail(bitmap) {
  const canvas = document.createElement("canvas");
  const scale = Math.min(1, 400 / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, bitmap.width * scale);
  canvas.height = Math.max(1, bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const image = document.createElement("img");
  image.alt = "";
  image.src = canvas.toDataURL("image/jpeg", 0.8);
  return image;
}

async function openCamera() {
  try {
    element("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    element("viewfinder").hidden = false;
    say("");
  } catch {
    say("There is no camera that this page may use.");
  }
}

function closeCamera() {
  element("video").srcObject?.getTracks().forEach((track) => track.stop());
  element("viewfinder").hidden = true;
}

function all(files) {
  for (const file of files) classify(file, file.name);
}

element("files").addEventListener("change", (event) => {
  all(event.target.files);
  event.target.value = "";
});
element("camera").addEventListener("click", openCamera);
element("close").addEventListener("click", closeCamera);
element("capture").addEventListener("click", () => classify(element("video"), "Camera"));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  element("drop").classList.add("over");
});
document.addEventListener("dragleave", () => element("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  element("drop").classList.remove("over");
  all(event.dataTransfer.files);
});

start().catch((error) => say(`The page cannot be loaded: ${error.message}. Open it from a web server, not as a file.`));
