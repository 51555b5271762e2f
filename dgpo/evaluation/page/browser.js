// The episode browser of report.html: one list of questions, filters over it, and the episodes of the chosen question.
//
// Reads the JSON block #episode-data (form: dgpo/evaluation/browser.py). Token ids of the episodes come in chunks, inside
// that block for small runs, else from files beside the page that call `receiveEpisodes`. Whatever a model wrote becomes
// a text node: nothing here parses text as HTML.
"use strict";

const ROW_HEIGHT = 52; // pixels, as .row in style.css
const MARGIN_ROWS = 8; // drawn above and below what is visible
const MAX_HEAT = 2; // nats at which a token's colour is full
const TAGGED = /<(think|search|answer|information)>[\s\S]*?<\/\1>/g;
const VIEWS = { text: "text", mask: "token mask", kl: "reverse KL" };

const data = JSON.parse(document.getElementById("episode-data").textContent);
const chunks = new Map(Object.entries(data.chunks)); // "model-number" -> {row: episode}
const waiting = new Map(); // name of a chunk -> functions to call when it is there
const state = { model: data.focus, shown: new Set(data.shown), view: "text", row: null, rows: [] };
let hashTimer = 0; // of the address's next change
let haystacks = null; // lower-cased text per row of the filtered model

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// Filters ------------------------------------------------------------------------------------------------------------

const FILTERS = ["model", "set", "property", "outcome", "against", "searches", "text"];
const TESTS = {
  correct: (scores, row) => scores.em[row] === 1,
  failed: (scores, row) => scores.em[row] !== 1,
  wrong: (scores, row) => scores.em[row] !== 1 && data.statuses[scores.status[row]] === "answered",
  found: (scores, row) => scores.em[row] !== 1 && scores.hit[row] === 1,
  unfound: (scores, row) => scores.em[row] !== 1 && scores.hit[row] !== 1,
};

function outcomeTest(name) {
  if (name in TESTS) return TESTS[name];
  const status = data.statuses.indexOf(name);
  return (scores, row) => scores.status[row] === status;
}

function haystack(row) {
  const scores = data.scores[state.model];
  const parts = [data.questions[row], ...data.golds[row], scores.answers[row] ?? "", scores.queries[row] ?? ""];
  return [...parts, data.ids[row]].join("\n").toLowerCase();
}

function applyFilters() {
  const chosen = Object.fromEntries(FILTERS.map((name) => [name, byId(`filter-${name}`).value]));
  if (Number(chosen.model) !== state.model || !haystacks) {
    state.model = Number(chosen.model);
    state.shown.add(state.model);
    haystacks = data.questions.map((_, row) => haystack(row));
  }
  const scores = data.scores[state.model];
  const tests = [(row) => scores.status[row] !== null];
  if (chosen.set) tests.push((row) => data.sets[data.set[row]] === chosen.set);
  if (chosen.property) {
    const [name, value] = chosen.property.split("=");
    tests.push((row) => data.properties[name][row] === value);
  }
  if (chosen.outcome) {
    const test = outcomeTest(chosen.outcome);
    tests.push((row) => test(scores, row));
  }
  if (chosen.against) {
    const [name, other] = chosen.against.split("-");
    const others = data.scores[Number(other)];
    tests.push((row) => others.status[row] !== null && TESTS[name](others, row));
  }
  if (chosen.searches) {
    const [wanted, orMore] = [parseInt(chosen.searches, 10), chosen.searches.endsWith("+")];
    tests.push((row) => scores.searches[row] === wanted || (orMore && scores.searches[row] > wanted));
  }
  const needle = chosen.text.trim().toLowerCase();
  if (needle) tests.push((row) => haystacks[row].includes(needle));
  state.rows = data.questions.map((_, row) => row).filter((row) => tests.every((test) => test(row)));
  byId("episode-count").textContent = `${state.rows.length} of ${data.questions.length} questions`;
  if (!state.rows.includes(state.row)) state.row = state.rows[0] ?? null;
  writeHash();
  byId("episode-list").scrollTop = 0;
  drawList();
  scrollToChosen();
  drawEpisode();
}

function resetFilters() {
  for (const name of FILTERS) byId(`filter-${name}`).value = name === "model" ? data.focus : "";
}

// A set is of the models that were tested on it, or of training alone: what was chosen last takes the other filter along.
function keepTogether(changed) {
  const [model, set] = [byId("filter-model"), byId("filter-set")];
  const plays = (number) =>
    data.set.some((index, row) => data.sets[index] === set.value && data.scores[number].status[row] !== null);
  if (!set.value || plays(Number(model.value))) return;
  if (changed === "model") set.value = "";
  else model.value = String(data.models.findIndex((_, number) => plays(number)));
}

// Filters and question in the page's address: a view can be kept as a bookmark, or opened by a link. Without a question
// the first of the list is the chosen one.
function writeHash() {
  const values = FILTERS.map((name) => [name, byId(`filter-${name}`).value]);
  if (state.view !== "text") values.push(["view", state.view]);
  if (state.row !== (state.rows[0] ?? null)) values.push(["question", data.ids[state.row]]);
  const told = values.filter(([name, value]) => value && !(name === "model" && Number(value) === data.focus));
  if (told.length || location.hash) history.replaceState(null, "", `#${new URLSearchParams(told)}`);
}

function readHash() {
  const values = new URLSearchParams(location.hash.slice(1));
  for (const name of FILTERS) {
    const field = byId(`filter-${name}`);
    if (!values.has(name)) continue;
    const known = field.tagName === "INPUT" || [...field.options].some((option) => option.value === values.get(name));
    if (known) field.value = values.get(name);
  }
  state.view = values.get("view") in VIEWS ? values.get("view") : "text";
  state.row = data.ids.indexOf(values.get("question"));
}

function openHash() {
  resetFilters();
  readHash();
  keepTogether("set");
  applyFilters();
}

function fillFilters() {
  const options = (id, pairs) => byId(id).append(...pairs.map(([value, text]) => element("option", { value }, text)));
  const numbered = data.models.map((name, model) => [model, name]);
  options("filter-set", [["", "all sets"], ...data.sets.map((name) => [name, name])]);
  options("filter-model", numbered);
  byId("filter-model").value = state.model;
  const properties = Object.entries(data.properties).flatMap(([name, values]) =>
    [...new Set(values)].filter((value) => value !== null).map((value) => [`${name}=${value}`, `${name}: ${value}`]),
  );
  options("filter-property", [["", "all questions"], ...properties]);
  byId("filter-property").hidden = !properties.length;
  const statuses = data.statuses.filter((name) => name !== "answered");
  options("filter-outcome", [
    ["", "any outcome"],
    ["correct", "correct"],
    ["failed", "failed: not an exact match"],
    ["wrong", "wrong answer"],
    ["found", "failed though a gold was retrieved"],
    ["unfound", "failed and no gold was retrieved"],
    ...statuses.map((name) => [name, name.replace("_", " ")]),
  ]);
  options("filter-against", [
    ["", "whatever the others did"],
    ...numbered.flatMap(([model, name]) => [
      [`correct-${model}`, `${name} correct`],
      [`failed-${model}`, `${name} failed`],
    ]),
  ]);
  const most = data.scores.reduce((high, scores) => scores.searches.reduce((a, b) => Math.max(a, b ?? 0), high), 0);
  const counts = Array.from({ length: most + 1 }, (_, count) => [String(count), `${count} searches`]);
  if (counts.length > 1) counts[1][1] = "1 search";
  options("filter-searches", [["", "any searches"], ...counts, ...(most > 1 ? [["1+", "1 or more"], ["2+", "2 or more"]] : [])]);
}

// List ---------------------------------------------------------------------------------------------------------------

function drawList() {
  const list = byId("episode-list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - MARGIN_ROWS);
  const last = Math.ceil((list.scrollTop + (list.clientHeight || 600)) / ROW_HEIGHT) + MARGIN_ROWS;
  const rows = state.rows.slice(first, last).map((row, offset) => drawRow(row, first + offset));
  const sheet = element("div", { class: "sheet" }, ...rows);
  sheet.style.height = `${state.rows.length * ROW_HEIGHT}px`;
  list.replaceChildren(sheet);
  list.setAttribute("aria-activedescendant", state.row === null ? "" : `row-${state.row}`);
}

function drawRow(row, position) {
  const chosen = row === state.row;
  const marks = data.models.map((name, model) => {
    const scores = data.scores[model];
    if (scores.status[row] === null) return null;
    const right = scores.em[row] === 1;
    return element("i", { class: right ? "mark good" : "mark bad", title: `${name}: ${right ? "correct" : "failed"}` }, right ? "✓" : "✗");
  });
  const searches = data.scores[state.model].searches[row];
  const small = element("small", {}, ...marks, ` ${data.sets[data.set[row]]} · ${searches} search${searches === 1 ? "" : "es"}`);
  const node = element(
    "div",
    { class: "row", id: `row-${row}`, role: "option", "aria-selected": String(chosen), onclick: () => choose(row) },
    element("span", {}, data.questions[row]),
    small,
  );
  node.style.top = `${position * ROW_HEIGHT}px`;
  return node;
}

function choose(row) {
  state.row = row;
  scrollToChosen();
  drawList();
  drawEpisode();
  clearTimeout(hashTimer); // browsers refuse an address that changes with every repeat of a key
  hashTimer = setTimeout(writeHash, 200);
}

function scrollToChosen() {
  const list = byId("episode-list");
  const top = state.rows.indexOf(state.row) * ROW_HEIGHT;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
}

function move(by) {
  if (!state.rows.length) return;
  const position = state.rows.indexOf(state.row) + by;
  choose(state.rows[Math.min(Math.max(position, 0), state.rows.length - 1)]);
}

// Episodes of one question -------------------------------------------------------------------------------------------

function drawEpisode() {
  const place = byId("episode-detail");
  const row = state.row;
  if (row === null) {
    place.replaceChildren(element("p", {}, "No question matches these filters."));
    return;
  }
  const present = data.models.map((_, model) => model).filter((model) => data.scores[model].status[row] !== null);
  const chips = present.map((model) => chip(data.models[model], state.shown.has(model), () => toggleModel(model)));
  const views = Object.entries(VIEWS).map(([view, label]) => chip(label, state.view === view, () => setView(view)));
  place.replaceChildren(
    element("h3", {}, data.questions[row]),
    element("p", { class: "golds" }, `gold: ${data.golds[row].join(" | ")} · ${data.sets[data.set[row]]} · ${data.ids[row]}`),
    element("div", { class: "chips" }, ...chips, element("span", { class: "gap" }), ...views),
    element("div", { class: "pair" }, ...present.filter((model) => state.shown.has(model)).map((model) => drawSide(row, model))),
  );
}

function chip(label, on, onclick) {
  return element("button", { type: "button", class: "chip", "aria-pressed": String(on), onclick }, label);
}

function toggleModel(model) {
  if (!state.shown.delete(model)) state.shown.add(model);
  drawEpisode();
}

function setView(view) {
  state.view = view;
  writeHash();
  drawEpisode();
}

function drawSide(row, model) {
  const scores = data.scores[model];
  const right = scores.em[row] === 1;
  const status = data.statuses[scores.status[row]];
  const verdict = right ? "correct" : status === "answered" ? "wrong" : status.replace("_", " ");
  const body = element("div", { class: "text" }, "loading");
  const side = element(
    "article",
    { "data-model": data.models[model] },
    element("h4", {}, element("span", {}, data.models[model]), element("span", { class: right ? "good" : "bad" }, verdict)),
    body,
  );
  const name = `${model}-${Math.floor(row / data.chunk_size)}`;
  withChunk(name, (chunk) => body.replaceChildren(...drawText(chunk?.[row], model, row)));
  return side;
}

function withChunk(name, use) {
  if (chunks.has(name) || !data.folder) return use(chunks.get(name));
  const uses = waiting.get(name) ?? [];
  waiting.set(name, [...uses, use]);
  if (!uses.length) {
    const missing = () => window.receiveEpisodes(name, {});
    document.head.append(element("script", { src: `${data.folder}/${name}.js`, onerror: missing }));
  }
  return undefined;
}

// Called by the chunk files.
window.receiveEpisodes = (name, episodes) => {
  chunks.set(name, episodes);
  (waiting.get(name) ?? []).forEach((use) => use(episodes));
  waiting.delete(name);
};

function drawText(episode, model, row) {
  if (!episode) return [element("em", {}, data.folder ? `No text: is the folder ${data.folder} beside this page?` : "No text was kept of this episode.")];
  if (episode.segments) {
    const notice = state.view === "text" ? [] : [note("Kept as text only: its tokenizer was not found, so that tokens cannot be shown.")];
    return [...notice, ...episode.segments.flatMap(([generated, text]) => drawSegment(generated, text))];
  }
  if (state.view === "text") return runs(episode, model).flatMap(({ generated, pieces }) => drawSegment(generated, decode(pieces)));
  if (state.view === "kl" && !episode.teacher) return [note(data.kl_notes[data.set[row]]), ...drawTokens(episode, model, null)];
  return [...legend(episode), ...drawTokens(episode, model, state.view === "kl" ? klPerToken(episode) : null)];
}

const note = (text) => element("p", { class: "note" }, text);

function legend(episode) {
  const trained = episode.runs.reduce((sum, length, index) => sum + (index % 2 ? 0 : length), 0);
  if (state.view === "mask") return [note(`${trained} of ${episode.ids.length} tokens by the policy (boxed); the others take no part in any loss.`)];
  const values = klPerToken(episode).filter((value) => value !== null);
  const mean = values.reduce((sum, value) => sum + value, 0) / (values.length || 1);
  return [note(`Reverse KL to the teacher: log p(student) - log p(teacher) of each sampled token, in nats; mean ${mean.toFixed(3)} over ${values.length}. Orange: likelier to the student; blue: to the teacher.`)];
}

// Null on environment tokens.
function klPerToken(episode) {
  const difference = (index) => episode.student[index] - episode.teacher[index];
  let index = 0;
  return episode.runs.flatMap((length, run) => Array.from({ length }, () => (run % 2 ? (index++, null) : difference(index++))));
}

// Runs of tokens by one writer: the policy first, then in turns.
function runs(episode, model) {
  const pieces = data.pieces[data.vocabulary[model]];
  let start = 0;
  return episode.runs.map((length, run) => {
    const ids = episode.ids.slice(start, start + length);
    const found = { generated: run % 2 === 0, start, pieces: ids.map((id) => pieces[id] ?? `[${id}]`) };
    start += length;
    return found;
  });
}

// A piece is text, or bytes where a token holds part of a character.
function decode(pieces) {
  const parts = [];
  let bytes = [];
  const flush = () => {
    if (bytes.length) parts.push(new TextDecoder().decode(new Uint8Array(bytes)));
    bytes = [];
  };
  for (const piece of pieces) {
    if (typeof piece !== "string") bytes.push(...piece);
    else {
      flush();
      parts.push(piece);
    }
  }
  flush();
  return parts.join("");
}

// [class, start, end] of the text's parts: tagged ones by their tag, the rest plain or, of the environment, a notice.
function partsOf(generated, text) {
  const parts = [];
  const rest = generated ? "" : "notice";
  let end = 0;
  for (const match of text.matchAll(TAGGED)) {
    if ((match[1] === "information") === generated) continue; // a tag that this writer has no right to is plain text
    if (match.index > end) parts.push([rest, end, match.index]);
    end = match.index + match[0].length;
    parts.push([match[1], match.index, end]);
  }
  if (end < text.length) parts.push([rest, end, text.length]);
  return parts;
}

function drawSegment(generated, text) {
  const shown = generated ? text : text.replace(/^\n+|\n+$/g, "");
  return partsOf(generated, shown)
    .filter(([, start, end]) => shown.slice(start, end).trim())
    .map(([kind, start, end]) => element("span", { class: kind || "plain" }, shown.slice(start, end)));
}

function drawTokens(episode, model, kl) {
  return runs(episode, model).flatMap(({ generated, start, pieces }) => {
    const parts = partsOf(generated, decode(pieces));
    let at = 0;
    return pieces.map((piece, offset) => {
      const text = decode([piece]);
      const kind = parts.find(([, , end]) => at < end)?.[0] ?? "";
      at += text.length;
      const index = start + offset;
      const value = kl?.[index] ?? null;
      const title = `token ${index}, id ${episode.ids[index]}${value === null ? "" : `, ${value.toFixed(3)} nats`}`;
      const node = element("span", { class: `token ${generated ? "trained" : "masked"} ${kind}`, title }, text);
      if (kl) heat(node, value);
      return node;
    });
  });
}

function heat(node, value) {
  node.classList.add("heat");
  if (value === null) return;
  node.style.setProperty("--heat", `${Math.round((100 * Math.min(Math.abs(value), MAX_HEAT)) / MAX_HEAT)}%`);
  node.style.setProperty("--tone", value > 0 ? "var(--line-2)" : "var(--line-1)");
}

// Keyboard and start -------------------------------------------------------------------------------------------------

function onKey(event) {
  const typing = event.target.closest?.("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && typing) {
    if (typing.id === "filter-text" && typing.value) {
      typing.value = "";
      applyFilters();
    }
    typing.blur();
  }
  if (typing) return;
  const inList = event.target === byId("episode-list");
  const actions = {
    j: () => move(1),
    k: () => move(-1),
    t: () => setView(state.view === "mask" ? "text" : "mask"),
    d: () => setView(state.view === "kl" ? "text" : "kl"),
    "/": () => byId("filter-text").focus(),
    ...(inList && { ArrowDown: () => move(1), ArrowUp: () => move(-1), PageDown: () => move(8), PageUp: () => move(-8) }),
    ...(inList && { Home: () => move(-state.rows.length), End: () => move(state.rows.length) }),
  };
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
}

fillFilters();
for (const name of FILTERS) {
  byId(`filter-${name}`).addEventListener("input", () => {
    keepTogether(name);
    applyFilters();
  });
}
byId("filter-clear").addEventListener("click", () => {
  resetFilters();
  applyFilters();
});
byId("episode-list").addEventListener("scroll", drawList);
document.addEventListener("keydown", onKey);
window.addEventListener("hashchange", openHash);
openHash();
