// The page: a picture, a question, an answer as it comes, and what was found drawn over the picture.
const $ = (id) => document.getElementById(id);
const body = document.body;
const WORDS = {
  query: { name: "Ask", label: "Question", button: "Ask", example: "What is in the picture?" },
  caption: { name: "Caption", label: "Length", button: "Describe" },
  detect: { name: "Detect", label: "What to find", button: "Find", example: "cup" },
  point: { name: "Point", label: "What to point at", button: "Point", example: "cup" },
};
const STAGES = ["image", "preprocess", "vision", "project", "prefill", "prompt", "decode"];
const LINE = "#ffd600", EDGE = "#000";
let about;
let picture = null; // { name, file }: a shipped picture's name, or a file of the user's
let marks = { boxes: [], points: [] };
let asking = null; // the AbortController of the question at work

const element = (tag, text = "", data = {}) => {
  const made = document.createElement(tag);
  made.textContent = text;
  Object.assign(made.dataset, data);
  return made;
};
const state = (word) => { body.dataset.state = word; };
const skill = () => document.querySelector("#skills input:checked").value;
const milliseconds = (ms) => (ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${ms >= 100 ? ms.toFixed(0) : ms.toFixed(1)} ms`);
const tasks = (name) => about.pictures.find((entry) => entry.picture === name)?.tasks ?? [];

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
  if (text) state("error");
}

// ---- the picture ------------------------------------------------------------------------------------------------

function take(file) {
  if (!file) return;
  if (file.size > about.limit) return complain(`the picture's file is too large; ${about.limit >> 20} MiB is the limit`);
  show(URL.createObjectURL(file), { name: "", file }, file.name || "your picture");
}

function show(address, chosen, title) {
  asking?.abort();
  const image = $("picture");
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  picture = null;
  delete body.dataset.picture;
  image.onload = () => {
    picture = chosen;
    body.dataset.picture = chosen.name || "own";
    $("frame").hidden = false;
    const ratio = ratioAsStored(image);
    $("frame").style.aspectRatio = ratio;
    $("frame").style.width = `min(100%, calc(${ratio} * min(58vh, 520px)))`;
    $("hint").hidden = true;
    draw();
    ready();
  };
  image.onerror = () => {
    $("frame").hidden = true;
    $("hint").hidden = false;
    complain("this is no picture that the browser can show");
    ready("error");
  };
  complain("");
  $("result").hidden = true;
  mark([], []);
  image.alt = title;
  image.src = address;
  for (const button of $("shipped").children) button.setAttribute("aria-pressed", button.value === chosen.name);
}

// naturalWidth and naturalHeight are those of the turned photo, whatever image-orientation says; its layout obeys.
function ratioAsStored(image) {
  image.classList.add("measured");
  const { width, height } = image.getBoundingClientRect();
  image.classList.remove("measured");
  return width / height;
}

function mark(boxes, points) {
  marks = { boxes, points };
  $("marks").dataset.boxes = JSON.stringify(boxes);
  $("marks").dataset.points = JSON.stringify(points);
  draw();
}

function draw() {
  const canvas = $("marks"), scale = window.devicePixelRatio || 1;
  const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(wide * scale);
  canvas.height = Math.round(high * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const clamp = (value, most) => Math.min(Math.max(value, 0), 1) * most;
  const several = marks.boxes.length + marks.points.length > 1;
  for (const b of marks.boxes) {
    const [x, y, x2, y2] = [clamp(b.x_min, wide), clamp(b.y_min, high), clamp(b.x_max, wide), clamp(b.y_max, high)];
    for (const [color, width] of [[EDGE, 6], [LINE, 3]]) {
      pen.strokeStyle = color;
      pen.lineWidth = width;
      pen.strokeRect(x, y, x2 - x, y2 - y);
    }
  }
  for (const p of marks.points) {
    for (const [color, radius] of [[EDGE, 9], [LINE, 6.5]]) {
      pen.fillStyle = color;
      pen.beginPath();
      pen.arc(clamp(p.x, wide), clamp(p.y, high), radius, 0, 2 * Math.PI);
      pen.fill();
    }
  }
  if (!several) return;
  pen.font = "600 13px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "center";
  const corners = [...marks.boxes.map((b) => [b.x_min, b.y_min]), ...marks.points.map((p) => [p.x, p.y])];
  corners.forEach(([x, y], index) => {
    const size = 18;
    const [left, top] = [Math.min(clamp(x, wide) + (index < marks.boxes.length ? 0 : 9), wide - size), Math.max(clamp(y, high) - size, 0)];
    pen.fillStyle = EDGE;
    pen.fillRect(left - 1, top - 1, size + 2, size + 2);
    pen.fillStyle = LINE;
    pen.fillRect(left, top, size, size);
    pen.fillStyle = EDGE;
    pen.fillText(index + 1, left + size / 2, top + size / 2 + 1);
  });
}

// ---- the question -----------------------------------------------------------------------------------------------

function ready(word = "ready") {
  const words = WORDS[skill()], caption = skill() === "caption";
  $("label").textContent = words.label;
  $("label").htmlFor = caption ? "length" : "text";
  $("text").hidden = caption;
  $("text").placeholder = words.example ?? "";
  $("length").hidden = !caption;
  $("go").textContent = words.button;
  $("go").disabled = !picture || asking !== null;
  const known = caption ? [] : tasks(picture?.name).filter((task) => task.skill === skill());
  $("suggestions").replaceChildren(...known.map((task) => {
    const button = element("button", task.text);
    button.type = "button";
    button.onclick = () => { $("text").value = task.text; ask(); };
    return button;
  }));
  if (!asking) state(word);
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts.filter(Boolean).map((line) => JSON.parse(line));
  }
  if (rest) yield JSON.parse(rest);
}

async function ask() {
  if (!picture || asking) return;
  const question = { skill: skill(), text: skill() === "caption" ? $("length").value : $("text").value.trim() };
  if (!question.text) return complain(`say ${WORDS[question.skill].label.toLowerCase()} first`);
  const mine = (asking = new AbortController());
  begin(question);
  try {
    const address = `ask?${new URLSearchParams({ ...question, picture: picture.name })}`;
    const reply = await fetch(address, { method: "POST", body: picture.file ?? "", signal: mine.signal });
    let answer = null;
    for await (const line of lines(reply.body)) {
      if (line.error) throw new Error(line.error);
      if (line.text) $("answer").textContent += line.text;
      answer = line.answer ?? answer;
    }
    if (!answer) throw new Error("the answer broke off");
    finish(question, answer);
  } catch (error) {
    fail(error, mine);
  }
}

function begin(question) {
  complain("");
  state("busy");
  mark([], []);
  $("go").disabled = true;
  $("stop").hidden = false;
  $("go").hidden = true;
  $("result").hidden = false;
  $("asked").textContent = question.skill === "query" ? question.text : `${WORDS[question.skill].name}: ${question.text}`;
  $("answer").textContent = "";
  for (const id of ["known", "places", "timings"]) $(id).hidden = true;
}

function end(word) {
  asking = null;
  $("stop").hidden = true;
  $("go").hidden = false;
  ready(word);
}

function fail(error, mine) {
  const stopped = mine.signal.aborted;
  const lost = error instanceof TypeError; // fetch's way to say that nobody answered
  if (!stopped) complain(lost ? "vlmedge does not answer; is it still running?" : error.message);
  if (!$("answer").textContent) $("result").hidden = true;
  end(stopped ? "ready" : "error");
}

function finish(question, answer) {
  const found = [...answer.boxes, ...answer.points];
  const looked = question.skill === "detect" || question.skill === "point";
  $("answer").textContent = looked ? `${found.length || "none"} found` : answer.text.trim();
  mark(answer.boxes, answer.points);
  $("places").replaceChildren(...found.map((at, index) => {
    const numbers = "x" in at ? [at.x, at.y] : [at.x_min, at.y_min, at.x_max, at.y_max];
    return element("li", `${index + 1}  ${numbers.map((n) => n.toFixed(3)).join("  ")}`);
  }));
  $("places").hidden = !found.length;
  judge(question, answer);
  time(answer);
  end("done");
}

// What is known about a shipped picture, beside what the model said.
function judge(question, answer) {
  const task = tasks(picture.name).find((known) => known.skill === question.skill && known.text === question.text);
  const wanted = task?.boxes ?? task?.points;
  $("known").hidden = !task;
  if (!task) return;
  const right = wanted ? wanted.length === answer.boxes.length + answer.points.length : task.answers.includes(answer.text.trim());
  $("known").dataset.right = right;
  $("known").textContent = right ? "✓ as it is in the picture" : `in the picture: ${wanted ? wanted.length : task.answers[0]}`;
}

function time(answer) {
  const ms = answer.timings_ms, stages = STAGES.filter((name) => name in ms);
  $("bar").replaceChildren(...stages.map((name) => {
    const part = element("i", "", { stage: name });
    part.style.flexGrow = ms[name];
    return part;
  }));
  $("stages").replaceChildren(...[...stages, "total"].map((name) => {
    const item = element("li", `${name} `, { stage: name, ms: ms[name] });
    item.append(element("b", milliseconds(ms[name])));
    return item;
  }));
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const counts = [plural(answer.crops, "crop"), plural(answer.image_tokens, "picture token"), plural(answer.tokens.length, "token") + " out"];
  if (!("vision" in ms)) counts.push("picture kept from the question before");
  if (answer.finish === "length") counts.push("cut at the longest length");
  $("counts").textContent = counts.join(" · ");
  $("timings").hidden = false;
}

// ---- the beginning ----------------------------------------------------------------------------------------------

function shipped(entry) {
  const button = element("button");
  button.type = "button";
  button.value = entry.picture;
  button.setAttribute("aria-pressed", "false");
  const image = element("img");
  image.src = `picture/${entry.picture}`;
  image.alt = entry.picture.replace(".png", "");
  button.append(image);
  button.onclick = () => show(image.src, { name: entry.picture, file: null }, `shipped picture ${image.alt}`);
  return button;
}

function skillChoice(name, index) {
  const label = element("label"), input = element("input");
  Object.assign(input, { type: "radio", name: "skill", value: name, checked: index === 0 });
  input.onchange = () => { $("text").value = ""; complain(""); ready(); };
  label.append(input, element("span", WORDS[name].name));
  return label;
}

function listen() {
  $("form").onsubmit = (event) => { event.preventDefault(); ask(); };
  $("stop").onclick = () => asking?.abort();
  $("file").onchange = () => { take($("file").files[0]); $("file").value = ""; };
  document.onpaste = (event) => take(event.clipboardData.files[0]);
  document.ondragover = (event) => { event.preventDefault(); body.dataset.over = ""; };
  document.ondragleave = (event) => { if (!event.relatedTarget) delete body.dataset.over; };
  document.ondrop = (event) => { event.preventDefault(); delete body.dataset.over; take(event.dataTransfer.files[0]); };
  new ResizeObserver(draw).observe($("frame"));
}

try {
  about = await (await fetch("about")).json();
  const threads = about.threads ? [`${about.threads} thread${about.threads === 1 ? "" : "s"}`] : [];
  $("facts").replaceChildren(...[about.source, about.what, about.runtime, ...threads].map((text) => element("li", text)));
  $("skills").append(...about.skills.map(skillChoice));
  $("length").replaceChildren(...about.lengths.map((name) => new Option(name, name, name === "normal", name === "normal")));
  $("shipped").replaceChildren(...about.pictures.map(shipped));
  listen();
  ready();
} catch (error) {
  complain(`the page could not start: ${error.message}`);
}
