// The inspector's page. The list is `items`; `current` is the one that is shown; the server keeps everything else.
"use strict";

const $ = (selector) => document.querySelector(selector);
const KINDS = ["photograph", "map", "reconstruction", "nearest"];
const AHEAD = 3, KEPT = 16;
const TITLES = { alarm: "Alarm", review: "Review", pass: "Pass" };

let about = {}, items = [], current = -1, total = 0;
const selected = new Set(), pictures = new Map(), masks = new Map(), mine = [];
const view = { zoom: 1, x: 0, y: 0 };
let tool = null, brush = 0.03, strokes = [];

// What the browser keeps for its user.
const kept = (key, value) => value === undefined ? localStorage.getItem(`vlmdiff.${key}`) || "" : localStorage.setItem(`vlmdiff.${key}`, value);
const source = () => $("#filters").source.value;
const item = () => items[current];

async function ask(path, options) {
  const response = await fetch(path, options);
  const body = await response.json();
  if (!response.ok) throw new Error(body.error);
  return body;
}

// Answers go out one after the other, in their order: a browser has few connections, and pictures need them.
let sent = Promise.resolve();
function send(path, said) {
  const body = JSON.stringify({ source: source(), by: $("#by").value.trim(), ...said });
  const answer = sent.then(() => ask(path, { method: "POST", body }));
  sent = answer.catch(() => {});
  return answer;
}

let fading;
function say(text, isProblem = false) {
  $("#message").textContent = text;
  $("#message").classList.toggle("problem", isProblem);
  clearTimeout(fading);
  fading = setTimeout(() => { $("#message").textContent = ""; }, isProblem ? 12000 : 4000);
}

// The list

async function load(show) {
  const asked = new URLSearchParams(new FormData($("#filters")));
  try {
    const found = await ask(`queue?${asked}`);
    ({ items, total } = found);
    offer("product", found.products);
    offer("date", found.dates);
  } catch (error) {
    items = [], total = 0;
    say(error.message, true);
  }
  selected.clear();
  const training = source() === "suspects";
  $("#classes").hidden = $("#mask").hidden = training;
  $("#what").textContent = training ? "Why" : "Kind of defect";
  $("#defect").placeholder = training ? "the reason" : "anomaly";
  $("[data-do=normal] span").textContent = training ? "Keep" : "Normal";
  $("[data-do=anomalous] span").textContent = training ? "Exclude" : "Anomalous";
  $("#list").replaceChildren(...items.map(entry));
  const place = items.findIndex((each) => each.id === show);
  go(place >= 0 ? place : 0);
}

function offer(name, values) {
  const select = $("#filters")[name], chosen = select.value;
  select.replaceChildren(new Option("all", ""), ...values.map((value) => new Option(value)));
  select.value = values.includes(chosen) ? chosen : "";
}

function entry(each) {
  const row = document.createElement("div"), box = document.createElement("input"), small = document.createElement("small");
  const [title, score] = [document.createElement("span"), document.createElement("span")];
  row.className = "item";
  row.role = "option";
  row.dataset.id = each.id;
  row.title = each.path;
  box.type = "checkbox";
  box.tabIndex = -1;
  box.title = "Select (X)";
  title.className = "title";
  title.textContent = each.name;
  score.className = each.kind;
  score.textContent = each.score.toFixed(3);
  row.append(box, title, score, small);
  row.addEventListener("click", (event) => {
    if (event.target === box) select(each.id, box.checked);
    else if (event.shiftKey) range(items.indexOf(each));
    else go(items.indexOf(each));
  });
  refresh(each, row);
  return row;
}

function when(text) {
  const then = new Date(text), isToday = then.toDateString() === new Date().toDateString();
  return then.toLocaleString([], isToday ? { timeStyle: "short" } : { dateStyle: "short", timeStyle: "short" });
}
const words = (said) => said.truth === "anomalous" ? `anomalous (${said.defect})` : said.truth === "excluded" ? `excluded: ${said.defect}` : said.truth;

function refresh(each, row = document.querySelector(`[data-id="${each.id}"]`)) {
  if (!row) return;
  const said = each.said && `${words(each.said)} · ${each.said.by}, ${when(each.said.when)}`;
  row.classList.toggle("done", Boolean(each.said || each.known));
  row.classList.toggle("failed", Boolean(each.problem));
  row.querySelector("small").textContent = each.problem || (each.sending && "saving …") || said || (each.known && `in the dataset: ${each.known}`) || [each.product, each.date].filter(Boolean).join(" · ");
  row.querySelector("input").checked = selected.has(each.id);
  row.ariaSelected = selected.has(each.id);
  if (each === item()) tell(each);
}

function select(id, on) {
  if (on) selected.add(id); else selected.delete(id);
  refresh(items.find((each) => each.id === id));
  count();
}

function range(to) {
  for (let i = Math.min(current, to); i <= Math.max(current, to); i++) select(items[i].id, true);
}

function count() {
  const left = items.filter((each) => !each.said && !each.known).length;
  const shown = total > items.length ? `${items.length} of ${total} shown, ` : "";
  $("#count").textContent = selected.size ? `${selected.size} selected` : `${shown}${left} to do`;
}

// One photograph

function fetched(each) {
  if (!pictures.has(each.id)) {
    pictures.set(each.id, Object.fromEntries(KINDS.map((kind) => {
      const image = new Image();
      image.alt = "";
      image.src = `picture/${source()}/${each.id}/${kind}`;
      return [kind, image.decode().then(() => image, () => null)];
    })));
    for (const old of pictures.keys()) if (pictures.size > KEPT) pictures.delete(old);
  }
  return pictures.get(each.id);
}

function tell(each) {
  $("#kind").textContent = source() === "suspects" && each.kind === "alarm" ? "Suspect" : TITLES[each.kind];
  $("#kind").className = each.kind;
  $("#name").textContent = each.name;
  $("#text").textContent = each.text;
  $("#nearest").textContent = each.nearest;
  $("#said").textContent = each.problem || (each.said ? `${each.said.by} said, ${when(each.said.when)}: ${words(each.said)}` : each.known ? `in the dataset: ${each.known}` : "");
}

async function go(to) {
  const none = !items.length;
  $("#stage").hidden = none;
  $("#empty").hidden = !none;
  count();
  if (none) {
    current = -1;
    const nothing = source() === "suspects" ? "No suspects: run vlmdiff suspects." : `Nothing to do in ${about.scores}. Run vlmdiff score PHOTOS --out ${about.scores}, choose another filter, or open a photograph.`;
    $("#empty p").textContent = nothing;
    document.body.dataset.shown = "";
    return;
  }
  current = Math.max(0, Math.min(to, items.length - 1));
  const each = item(), row = document.querySelector(`[data-id="${each.id}"]`);
  document.querySelectorAll(".item[aria-current]").forEach((other) => other.removeAttribute("aria-current"));
  row.setAttribute("aria-current", "true");
  row.scrollIntoView({ block: "nearest" });
  tell(each);
  use(null);
  zoom(1, 0, 0);
  $("#class").value = about.classes.includes(each.product) ? each.product : kept("class") || about.classes[0] || "";
  const found = fetched(each);
  const [photograph, map] = await Promise.all([found.photograph, found.map]);
  if (each !== item()) return;
  if (photograph) $("#panes").style.setProperty("--ratio", photograph.naturalWidth / photograph.naturalHeight);
  const over = map && map.cloneNode();
  if (over) over.className = "over";
  put("photograph", photograph, over, photograph && maskOf(each, photograph));
  put("map", map);
  document.body.dataset.shown = each.id;
  for (const kind of ["reconstruction", "nearest"]) {
    found[kind].then((image) => { if (each === item()) put(kind, image); });
  }
  for (let i = 1; i <= AHEAD; i++) if (items[current + i]) fetched(items[current + i]);
  if (!photograph) say(`${each.name} cannot be shown: it is gone, or has changed.`, true);
}

function put(kind, ...layers) {
  const figure = $(`[data-kind=${kind}]`);
  figure.hidden = !layers[0] && kind !== "photograph";
  figure.querySelector(".inner").replaceChildren(...layers.filter(Boolean));
}

// What a person says

async function answer(truth) {
  const ids = selected.size ? [...selected] : [item()?.id];
  if (!ids[0]) return;
  if (!$("#by").value.trim()) { $("#by").focus(); return say("Say who you are first.", true); }
  const defect = $("#defect").value.trim(), training = source() === "suspects";
  if (training && truth === "anomalous" && !defect) { $("#defect").focus(); return say("Say why it is excluded.", true); }
  const canvas = masks.get(ids[0]);
  const mask = truth === "anomalous" && ids.length === 1 && canvas && isMarked(canvas) ? canvas.toDataURL("image/png") : null;
  if (truth === "anomalous" && about.masks && !mask && !training) {
    if (ids.length > 1) return say("This dataset needs a mask of each defect: answer one at a time.", true);
    use("draw");
    return say("This dataset needs a mask: draw it, or take the marked regions with R. Then press A again.", true);
  }
  kept("class", $("#class").value);
  const body = { ids, truth: training ? (truth === "normal" ? "kept" : "excluded") : truth, defect: truth === "anomalous" || training ? defect : "", class_name: $("#class").value, mask };
  const answered = items.filter((each) => ids.includes(each.id));
  answered.forEach((each) => { each.sending = true; each.problem = ""; refresh(each); });
  selected.clear();
  const next = items.findIndex((each, i) => i > current && !each.said && !each.sending && !each.known);
  go(next >= 0 ? next : current);
  await settle("answer", body, answered, (each) => {
    if (!each.said || each.said.by === $("#by").value.trim()) mine.push(each.id);
    else say(`${each.name}: ${each.said.by} said so first, ${when(each.said.when)}.`);
  });
}

async function undo() {
  const id = item()?.said ? item().id : mine.at(-1), each = items.find((one) => one.id === id);
  if (!each) return say("There is nothing to take back.");
  await settle("undo", { ids: [id] }, [each], () => {
    mine.splice(mine.lastIndexOf(id), 1);
    say(`${each.name}: taken back.`);
    go(items.indexOf(each));
  });
}

async function settle(path, body, asked, then) {
  let found;
  try {
    found = await send(path, body);
  } catch (error) {
    found = { said: {}, problems: Object.fromEntries(asked.map((each) => [each.id, error.message])) };
  }
  for (const each of asked) {
    each.sending = false;
    if (each.id in found.said) each.said = found.said[each.id];
    each.problem = found.problems[each.id] || "";
    if (each.problem) say(each.problem, true); else then(each);
    refresh(each);
  }
  count();
}

// Others answer too.
async function look() {
  if (document.hidden || !items.length) return;
  try {
    const { said } = await ask(`answers?source=${source()}`);
    for (const each of items) {
      if (!each.sending && JSON.stringify(said[each.id]) !== JSON.stringify(each.said ?? undefined)) {
        each.said = said[each.id] || null;
        refresh(each);
      }
    }
    count();
  } catch { /* The next one may succeed; an answer that is not taken says so. */ }
}

async function bring(file) {
  say(`Looking at ${file.name} …`);
  const caption = about.captions === "class" ? $("#class").value : $("#caption").value;
  try {
    const { id } = await ask(`judge?${new URLSearchParams({ name: file.name, caption })}`, { method: "POST", body: file });
    Object.assign($("#filters").source, { value: "scores" });
    Object.assign($("#filters").show, { value: "open" });
    $("#filters").product.value = $("#filters").date.value = "";
    say("");
    await load(id);
  } catch (error) {
    say(error.message, true);
  }
}

// The mask

function maskOf(each, photograph) {
  let canvas = masks.get(each.id);
  if (!canvas) {
    canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [photograph.naturalWidth, photograph.naturalHeight];
    canvas.getContext("2d", { willReadFrequently: true });
    masks.set(each.id, canvas);
  }
  return canvas;
}

const paint = () => getComputedStyle(document.documentElement).getPropertyValue("--mask");
const shownMask = () => $("[data-kind=photograph] canvas");

function isMarked(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 3; i < data.length; i += 4) if (data[i] > 127) return true;
  return false;
}

function use(name) {
  tool = name;
  document.body.classList.toggle("drawing", Boolean(name));
  for (const each of ["draw", "erase"]) $(`[data-do=${each}]`).ariaPressed = String(name === each);
  strokes = name ? strokes : [];
}

function remember(canvas) {
  strokes.push(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height));
  if (strokes.length > 20) strokes.shift();
}

function stroke(event, start) {
  const canvas = shownMask(), box = canvas.getBoundingClientRect(), pen = canvas.getContext("2d");
  const at = [(event.clientX - box.left) / box.width * canvas.width, (event.clientY - box.top) / box.height * canvas.height];
  pen.globalCompositeOperation = tool === "erase" ? "destination-out" : "source-over";
  pen.strokeStyle = paint();
  pen.lineWidth = Math.max(1, 2 * brush * Math.min(canvas.width, canvas.height) / view.zoom);
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(...(start || at));
  pen.lineTo(...at);
  pen.stroke();
  return at;
}

async function takeRegions() {
  const canvas = shownMask(), map = await fetched(item()).map;
  if (!canvas || !map) return say("There is no map of this photograph.", true);
  remember(canvas);
  const pen = canvas.getContext("2d");
  pen.globalCompositeOperation = "source-over";
  pen.drawImage(map, 0, 0, canvas.width, canvas.height);
  const level = pen.getImageData(0, 0, canvas.width, canvas.height), [red, green, blue] = paint().trim().match(/\w\w/g).map((hex) => parseInt(hex, 16));
  for (let i = 0; i < level.data.length; i += 4) level.data.set([red, green, blue, level.data[i + 3] > 127 ? 255 : 0], i);
  pen.putImageData(level, 0, 0);
}

function clear() {
  const canvas = shownMask();
  if (!canvas) return;
  remember(canvas);
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

// Zoom, the same in every picture

function zoom(by, x, y) {
  view.zoom = Math.max(1, Math.min(by, 20));
  const most = (view.zoom - 1) / 2;
  view.x = Math.max(-most, Math.min(x, most));
  view.y = Math.max(-most, Math.min(y, most));
  for (const [key, value] of Object.entries(view)) $("#panes").style.setProperty(`--${key}`, value);
}

function zoomAt(factor, u = 0, v = 0) {
  const to = Math.max(1, Math.min(view.zoom * factor, 20)), share = to / view.zoom;
  zoom(to, u - share * (u - view.x), v - share * (v - view.y));
}

// Where a pointer is, from the middle of a view, in widths and heights of the unzoomed picture.
function place(event, target) {
  const box = target.getBoundingClientRect(), inner = target.querySelector(".inner");
  return [(event.clientX - box.left - box.width / 2) / inner.offsetWidth, (event.clientY - box.top - box.height / 2) / inner.offsetHeight];
}

for (const target of document.querySelectorAll(".view")) {
  let from = null;
  target.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomAt(Math.exp(-event.deltaY / 400), ...place(event, target));
  }, { passive: false });
  target.addEventListener("pointerdown", (event) => {
    const draws = tool && shownMask() && target.parentElement.dataset.kind === "photograph";
    if (draws) remember(shownMask());
    from = draws ? { draws, last: stroke(event) } : { x: view.x, y: view.y, start: place(event, target) };
    target.setPointerCapture(event.pointerId);
  });
  target.addEventListener("pointermove", (event) => {
    if (from?.draws) from.last = stroke(event, from.last);
    else if (from) {
      const [u, v] = place(event, target);
      zoom(view.zoom, from.x + u - from.start[0], from.y + v - from.start[1]);
    }
  });
  for (const end of ["pointerup", "pointercancel"]) target.addEventListener(end, () => { from = null; });
}

// Keys and buttons

function opacity(value) {
  $("#opacity").value = value;
  $("#panes").style.setProperty("--opacity", $("#opacity").value / 100);
  kept("opacity", $("#opacity").value);
}

const actions = {
  normal: () => answer("normal"),
  anomalous: () => answer("anomalous"),
  undo,
  draw: () => use(tool === "draw" ? null : "draw"),
  erase: () => use(tool === "erase" ? null : "erase"),
  regions: takeRegions,
  clear,
  next: () => go(current + 1),
  previous: () => go(current - 1),
  select: () => item() && select(item().id, !selected.has(item().id)),
  none: () => { if (tool) return use(null); [...selected].forEach((id) => select(id, false)); },
  fainter: () => opacity(+$("#opacity").value - 10),
  stronger: () => opacity(+$("#opacity").value + 10),
  smaller: () => { brush = Math.max(0.004, brush / 1.4); },
  larger: () => { brush = Math.min(0.2, brush * 1.4); },
  nearer: () => zoomAt(1.5),
  farther: () => zoomAt(1 / 1.5),
  whole: () => zoom(1, 0, 0),
  name: () => $("#defect").focus(),
  keys: () => $("#keys").showModal(),
};
const KEYS = {
  j: "next", arrowright: "next", arrowdown: "next", k: "previous", arrowleft: "previous", arrowup: "previous",
  n: "normal", a: "anomalous", u: "undo", x: "select", escape: "none", m: "draw", e: "erase", r: "regions", c: "clear",
  ",": "fainter", ".": "stronger", "[": "smaller", "]": "larger", "+": "nearer", "=": "nearer", "-": "farther", 0: "whole", d: "name", "?": "keys",
};

document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase(), inField = event.target.matches("input:not([type=range], [type=checkbox]), select, textarea");
  if (inField) {
    if (key === "enter" || key === "escape") { event.preventDefault(); event.target.blur(); }
    return;
  }
  if ($("#keys").open) return;
  if ((event.ctrlKey || event.metaKey) && key === "z" && shownMask() && strokes.length) {
    event.preventDefault();
    return shownMask().getContext("2d").putImageData(strokes.pop(), 0, 0);
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === " ") {
    event.preventDefault();
    return $("#panes").style.setProperty("--opacity", 0);
  }
  if (KEYS[key]) {
    event.preventDefault();
    actions[KEYS[key]]();
  }
});
document.addEventListener("keyup", (event) => { if (event.key === " ") opacity($("#opacity").value); });
document.querySelectorAll("[data-do]").forEach((button) => button.addEventListener("click", () => { button.blur(); actions[button.dataset.do](); }));
$("#opacity").addEventListener("input", () => opacity($("#opacity").value));
$("#by").addEventListener("change", () => kept("by", $("#by").value.trim()));
$("#defect").addEventListener("change", () => kept("defect", $("#defect").value.trim()));
$("#filters").addEventListener("change", () => { document.activeElement.blur(); pictures.clear(); load(); });
$("#help").addEventListener("click", actions.keys);
$("#keys").addEventListener("click", (event) => { if (event.target === $("#keys")) $("#keys").close(); });
$("#bring").addEventListener("change", () => { if ($("#bring").files[0]) bring($("#bring").files[0]); $("#bring").value = ""; });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files[0]) bring(event.dataTransfer.files[0]);
});

async function begin() {
  $("#by").value = kept("by");
  $("#defect").value = kept("defect");
  opacity(kept("opacity") || 60);
  about = await ask("about");
  $("#sources").hidden = !about.suspects;
  $("#captions").hidden = about.captions !== "image";
  $("#bring").parentElement.hidden = !about.model;
  $("#bring").parentElement.title = `It is judged by ${about.model}.`;
  $("#class").replaceChildren(...about.classes.map((name) => new Option(name)));
  document.title = `${about.scores} – vlmdiff inspector`;
  await load();
  setInterval(look, 5000);
}
begin().catch((error) => say(error.message, true));
