// Marks what is right on a page. Every figure gets a button; marks, of files, are kept by `dcp-zoo review` or, on a page
// that was opened as a file, in the browser, until they are saved as a table.
const about = JSON.parse(document.getElementById("about").textContent);
const get = (id) => document.getElementById(id);
const picker = get("picker"), text = get("text"), list = get("list"), status = get("status");
const figures = new Map(); // of buttons: {file, guess, figure, link}
const before = []; // [button, mark] of each change, for undo
const table = {class: "corrections.csv", change: "changes.csv"}[about.column];
let kept = true, picked = null, active = 0, saving = Promise.resolve();

const served = location.protocol === "http:" && await fetch("marks").then((answer) => answer.ok ? answer.json() : null, () => null);

function load() {
  if (served) return new Map(served);
  try {
    return new Map(JSON.parse(localStorage.getItem(about.key) || "[]"));
  } catch {
    kept = false; // the browser keeps nothing, or not for this page
    return new Map();
  }
}

const marks = load(); // file -> class

function keep(file, message) {
  if (served) return saving = saving.then(() => send(file, marks.get(file) ?? null, message));
  try {
    localStorage.setItem(about.key, JSON.stringify([...marks]));
  } catch {
    kept = false;
  }
  say(message);
}

const saved = new Map(marks); // what the server has

async function send(file, name, message) {
  say(`${message} Saving.`);
  const answer = await fetch("say", {method: "POST", body: JSON.stringify([file, name])}).catch(() => null);
  if (answer?.ok) {
    set(saved, file, name);
    return say(`${message} Saved.`);
  }
  set(marks, file, saved.get(file) ?? null);
  showAll(file);
  say(`Not saved: ${answer ? await answer.text() : "dcp-zoo review has ended. Start it again, and open its new address."}`);
}

function set(map, file, name) {
  name === null ? map.delete(file) : map.set(file, name);
}

function show(button) {
  const {file, guess, figure} = figures.get(button), mark = marks.get(file);
  const state = mark === undefined ? "not checked" : mark === guess ? "right" : "corrected";
  figure.dataset.state = state;
  button.textContent = {"not checked": guess, right: `✓ ${guess}`, corrected: `→ ${mark}`}[state];
  button.setAttribute("aria-label", `${button.textContent}, ${state}, ${figure.title}`);
}

function showAll(file) { // it may be on the page twice
  for (const [button, figure] of figures) if (figure.file === file) show(button);
}

function say(message = "") {
  const number = `${marks.size.toLocaleString("en")} checked.`;
  const warning = kept ? "" : " This browser does not keep them: save before you close or reload the page.";
  status.textContent = `${message} ${number}${warning}`.trim();
}

function mark(button, name) {
  const {file, guess} = figures.get(button);
  before.push([button, marks.get(file) ?? null]);
  set(marks, file, name);
  showAll(file);
  keep(file, name === null ? "Not checked." : name === guess ? `${name} is right.` : `${name}, not ${guess}.`);
  if (name !== null) (neighbour(button, 1) || button).focus();
}

function undo() {
  const [button, name] = before.pop() ?? [];
  if (!button) return;
  mark(button, name);
  before.pop();
  button.focus();
}

// ------------------------------------------------------------------------------------------------------- move and press

function neighbour(button, step) {
  const all = [...figures.keys()];
  return all[all.indexOf(button) + step];
}

function inRow(button, step) { // of the row above or below, the nearest
  const all = [...figures.keys()], {top, left} = button.getBoundingClientRect();
  let best = null, row = null, least = Infinity;
  for (let i = all.indexOf(button) + step; all[i]; i += step) {
    const place = all[i].getBoundingClientRect();
    if (Math.abs(place.top - top) < 2) continue;
    row ??= place.top;
    if (Math.abs(place.top - row) > 2) break;
    if (Math.abs(place.left - left) < least) [best, least] = [all[i], Math.abs(place.left - left)];
  }
  return best;
}

function confirm(button) {
  const {guess} = figures.get(button);
  known().has(guess) ? mark(button, guess) : open(button, ""); // a parent of classes is none
}

const keys = {
  ArrowRight: (button) => neighbour(button, 1)?.focus(),
  ArrowLeft: (button) => neighbour(button, -1)?.focus(),
  Home: () => [...figures.keys()][0].focus(),
  End: () => [...figures.keys()].at(-1).focus(),
  ArrowDown: (button) => inRow(button, 1)?.focus(),
  ArrowUp: (button) => inRow(button, -1)?.focus(),
  Enter: confirm,
  Delete: (button) => mark(button, null),
  Backspace: (button) => mark(button, null),
};

document.addEventListener("keydown", (event) => {
  const command = {s: save, z: undo}[event.key];
  if (command && (event.ctrlKey || event.metaKey) && !picker.open) {
    event.preventDefault();
    command();
  }
  if (event.ctrlKey || event.metaKey || event.altKey || !figures.has(event.target)) return;
  const letter = event.key.length === 1 && event.key !== " " ? event.key : null;
  if (!(event.key in keys) && letter === null) return;
  event.preventDefault();
  letter === null ? keys[event.key](event.target) : open(event.target, letter);
});

// --------------------------------------------------------------------------------------------------------- choose a class

const known = () => new Set([...about.classes, ...marks.values(), about.none]);

function choices() { // [class, what is shown of it]: the guess first, or those that begin with what was typed
  const {guess} = figures.get(picked), typed = text.value.trim(), lower = typed.toLowerCase();
  const place = (name) => typed ? name.toLowerCase().indexOf(lower) : name === guess ? 0 : 1;
  const found = [...known()].filter((name) => place(name) >= 0);
  found.sort((a, b) => Math.min(place(a), 1) - Math.min(place(b), 1));
  const isNew = about.column === "class" && typed && !found.some((name) => name.toLowerCase() === lower);
  return [...found.map((name) => [name, name]), ...(isNew ? [[typed, `new class: ${typed}`]] : [])];
}

function refresh() {
  list.replaceChildren(...choices().map(([name, shown], i) => {
    const option = document.createElement("li");
    option.role = "option";
    option.id = `option-${i}`;
    option.textContent = shown;
    option.dataset.name = name;
    return option;
  }));
  choose(0);
}

function choose(i) {
  active = Math.max(0, Math.min(i, list.children.length - 1));
  for (const [j, option] of [...list.children].entries()) option.setAttribute("aria-selected", String(j === active));
  text.setAttribute("aria-activedescendant", list.children[active]?.id ?? "");
  list.children[active]?.scrollIntoView({block: "nearest"});
}

function open(button, letter) {
  const {figure, link} = figures.get(button);
  picked = button;
  get("file").textContent = figure.title;
  const picture = get("picture"), small = figure.querySelector("img").src;
  picture.onerror = () => { picture.onerror = null; picture.src = small; }; // a kind that browsers do not show
  picture.src = served ? `picture?${encodeURIComponent(JSON.stringify(figures.get(button).file))}` : link || small;
  text.value = letter;
  picker.showModal();
  text.focus();
  refresh();
}

function take() {
  const option = list.children[active];
  if (!option) return;
  picker.close();
  mark(picked, option.dataset.name);
}

text.addEventListener("input", refresh);
text.addEventListener("keydown", (event) => {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (step === undefined && event.key !== "Enter") return;
  event.preventDefault();
  step === undefined ? take() : choose(active + step);
});
list.addEventListener("click", (event) => {
  active = [...list.children].indexOf(event.target.closest("li"));
  take();
});
get("close").addEventListener("click", () => picker.close());

// -------------------------------------------------------------------------------------------------------------------- save

// a cell as dcp_zoo.texts writes it: no formula to a spreadsheet, and quoted where needed
const cell = (value) => {
  const inert = /^'*[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(inert) ? `"${inert.replaceAll('"', '""')}"` : inert;
};

function save() {
  if (served) return;
  const rows = [["file", about.column], ...marks].map((row) => row.map(cell).join(",") + "\r\n");
  const parts = `\ufeff${rows.join("")}`.split(/([\udc80-\udcff])/u); // such a lone surrogate is a byte of a file name
  const bytes = parts.map((part, i) => i % 2 ? new Uint8Array([part.charCodeAt(0) - 0xdc00]) : part);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(bytes, {type: "text/csv"}));
  link.download = table;
  link.click();
  say(`Saved ${table}.`);
}

for (const figure of document.querySelectorAll("figure[data-file]")) {
  const button = document.createElement("button"), link = figure.querySelector("a"), image = figure.querySelector("img");
  button.type = "button";
  (link ?? image).after(button);
  if (link) link.tabIndex = -1; // the picture is also in the dialogue
  if (link && served) link.removeAttribute("href");
  const file = JSON.parse(figure.dataset.file), guess = JSON.parse(figure.closest("[data-class]").dataset.class);
  figures.set(button, {file, guess, figure, link: link?.href});
  button.addEventListener("click", () => open(button, ""));
  show(button);
}
get("save").textContent = `Save ${table} (Ctrl+S)`;
get("save").addEventListener("click", save);
for (const part of document.querySelectorAll("[hidden]")) part.hidden = false;
get("save").hidden = Boolean(served);
say();
