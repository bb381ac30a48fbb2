// The explorer's page. Data of the graph is inserted as text, never as markup.
"use strict";

const byId = (id) => document.getElementById(id);
const LONGEST = 120; // maximum letters of a name on the page
const DELAY = 150; // milliseconds after the last key before the search for names

let about = null; // the response of /api/run
let asked = 0; // number of the last query; responses to earlier queries are dropped
let current = ""; // name of the entity on the page

// -- parts of the page --------------------------------------------------------------------------

function make(tag, text, attributes = {}, ...children) {
  const node = document.createElement(tag);
  if (text !== null) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// One line of bounded length; control characters become their pictures, format characters "�".
function shown(label, longest = LONGEST) {
  const letters = Array.from(label.slice(0, 2 * longest));
  const cut = letters.length > longest || label.length > 2 * longest;
  const line = (cut ? letters.slice(0, longest - 1).join("") + "…" : label).replace(/\s+/g, " ");
  const clean = line.replace(/\p{Cc}|\p{Cf}|\p{Cs}|\p{Co}/gu, (letter) => {
    const code = letter.codePointAt(0);
    if (letter === "\u200d") return letter;
    return code < 0x20 ? String.fromCodePoint(0x2400 + code) : "\ufffd";
  });
  return clean.trim() || "␠";
}

// The name, followed by the label if they differ: other entities may have the same name.
function named({ label, name }) {
  return name === label ? shown(name) : `${shown(name)} (${shown(label, 40)})`;
}

const number = (value) => value.toFixed(3);
const percent = (value) => `${(100 * value).toFixed(1)} %`;

function moved(by) {
  const size = Math.abs(100 * by).toFixed(1);
  return size === "0.0" ? "±0" : `${by < 0 ? "−" : "+"}${size}`;
}

function bar(share, plain = null) {
  const inner = make("div", null, { class: share < 0 ? "bar minus" : "bar" });
  const track = make("div", null, { class: "track", "aria-hidden": "true" }, inner);
  if (plain !== null) track.append(make("div", null, { class: "mark" }));
  setBar(track, share, plain);
  return track;
}

function setBar(track, share, plain = null) {
  track.firstChild.style.width = `${Math.min(100, 100 * Math.abs(share))}%`;
  if (plain !== null) track.lastChild.style.left = `${Math.min(100, 100 * plain)}%`;
}

// -- the service --------------------------------------------------------------------------------

async function get(path, parameters = {}) {
  return answerOf(await fetch(`${path}?${new URLSearchParams(parameters)}`));
}

async function answerOf(response) {
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

// -- the state, kept in the page's URL ----------------------------------------------------------

function read() {
  const given = new URLSearchParams(location.search);
  return {
    entity: given.get("entity") ?? "",
    relation: given.get("relation") ?? about.relations[0].label,
    ask: given.get("ask") === "head" ? "head" : "tail",
    known: given.get("known") !== "0",
    top: ["10", "20", "50", "100"].includes(given.get("top")) ? given.get("top") : "10",
    answer: given.get("answer") ?? "",
  };
}

function address(state) {
  const parameters = { entity: state.entity, relation: state.relation, ask: state.ask };
  if (!state.known) parameters.known = "0";
  if (state.top !== "10") parameters.top = state.top;
  if (state.answer) parameters.answer = state.answer;
  return `?${new URLSearchParams(parameters)}`;
}

function go(changes) {
  history.pushState(null, "", address({ ...read(), ...changes }));
  show();
}

async function show() {
  const state = read();
  const mine = ++asked;
  fillForm(state);
  current = "";
  if (!state.entity) {
    byId("result").hidden = true;
    byId("status").textContent = "Choose an entity to begin.";
    return;
  }
  try {
    const query = { relation: state.relation, top: state.top, known: state.known };
    query[state.ask === "tail" ? "head" : "tail"] = state.entity;
    const found = await get("api/complete", query);
    if (mine !== asked) return;
    current = shown(found.given.name);
    byId("entity").value = current;
    showAnswers(found, state);
    showViews(byId("given"), found.given);
    byId("given-title").textContent = `Views of ${shown(found.given.name)}`;
    byId("result").hidden = false;
    byId("status").textContent =
      `${found.answers.length} answers to ${question(found.given.name, found.relation.name, state.ask)}.`;
    document.title = `${question(found.given.name, found.relation.name, state.ask)} – imvia-graph explore`;
    await showWhy(state, found, mine);
  } catch (error) {
    if (mine !== asked) return;
    byId("result").hidden = true;
    byId("status").textContent = error.message;
  }
}

function question(entity, relation, ask) {
  const parts = [shown(entity, 40), shown(relation, 40), "?"];
  return `(${(ask === "tail" ? parts : parts.reverse()).join(", ")})`;
}

// -- the form -----------------------------------------------------------------------------------

function fillForm(state) {
  byId("relation").value = state.relation;
  byId("known").checked = state.known;
  byId("top").value = state.top;
  document.querySelector(`input[name="ask"][value="${state.ask}"]`).checked = true;
}

function fillRelations() {
  const relations = [...about.relations].sort((one, other) => one.name.localeCompare(other.name));
  byId("relation").append(
    ...relations.map(({ label, name, train }) =>
      make("option", `${shown(name, 60)} (${train})`, { value: label }),
    ),
  );
}

// -- finding an entity: a combobox with a listbox, as the ARIA practices describe it --------------

// The entities found, the text they were found for, and the selected position.
const finder = { found: [], text: null, place: -1, timer: 0, number: 0 };

function closeList() {
  clearTimeout(finder.timer);
  finder.number += 1; // drops the response of a running search
  byId("found").hidden = true;
  byId("entity").setAttribute("aria-expanded", "false");
  byId("entity").removeAttribute("aria-activedescendant");
  finder.place = -1;
}

// Search for the text in the field; returns whether it is still the text after the response.
async function find() {
  clearTimeout(finder.timer);
  const mine = ++finder.number;
  const text = byId("entity").value;
  const found = await get("api/entities", { q: text.slice(0, 200), limit: 12 });
  if (mine !== finder.number) return false;
  finder.found = found;
  finder.text = text;
  finder.place = -1;
  byId("found").replaceChildren(
    ...found.map((entity, i) =>
      make("li", named(entity), { role: "option", id: `found-${i}`, "aria-selected": "false" }),
    ),
  );
  byId("found").hidden = found.length === 0;
  byId("entity").setAttribute("aria-expanded", String(found.length > 0));
  byId("entity").removeAttribute("aria-activedescendant");
  return text === byId("entity").value;
}

function point(place) {
  const count = finder.found.length;
  if (!count) return;
  finder.place = (place + count) % count;
  byId("found").childNodes.forEach((node, i) => {
    node.setAttribute("aria-selected", String(i === finder.place));
    if (i === finder.place) node.scrollIntoView({ block: "nearest" });
  });
  byId("entity").setAttribute("aria-activedescendant", `found-${finder.place}`);
}

function choose(place) {
  const entity = finder.found[place];
  closeList();
  if (entity) go({ entity: entity.label, answer: "" });
}

async function onKey(event) {
  const text = byId("entity").value;
  // Soon after a key, the list may still be for the previous text.
  const ready = !byId("found").hidden && finder.text === text;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (!ready && !(await find())) return;
    point(finder.place + (event.key === "ArrowDown" ? 1 : finder.place < 0 ? 0 : -1));
  } else if (event.key === "Enter") {
    event.preventDefault();
    if (!text.trim() && !(ready && finder.place >= 0)) return;
    if (!ready && !(await find())) return;
    if (!finder.found.length) byId("status").textContent = `No entity is called ${shown(text)}.`;
    choose(Math.max(0, finder.place));
  } else if (event.key === "Escape") {
    closeList();
  }
}

// -- answers ------------------------------------------------------------------------------------

function showAnswers(found, state) {
  const heads = about.heads;
  byId("weights").replaceChildren(
    make("h3", "Weights of the heads under this relation"),
    make(
      "ul",
      null,
      { class: "weights" },
      ...heads.map((head) =>
        make("li", `${shown(head)} ${percent(found.weights[head])}`, {}, bar(found.weights[head])),
      ),
    ),
  );
  const table = byId("answers");
  table.caption.textContent = question(found.given.name, found.relation.name, state.ask);
  table.tHead.replaceChildren(
    make(
      "tr",
      null,
      {},
      make("th", "rank", { scope: "col", class: "number" }),
      make("th", "answer", { scope: "col" }),
      make("th", "score", { scope: "col", class: "number" }),
      ...heads.map((head) => make("th", shown(head, 20), { scope: "col" })),
      make("th", "query it", { scope: "col" }),
    ),
  );
  const scores = found.answers.flatMap((answer) => Object.values(answer.heads));
  const most = Math.max(...scores.map(Math.abs), 1e-9);
  table.tBodies[0].replaceChildren(
    ...found.answers.map((answer) => answerRow(answer, heads, most, state)),
  );
}

function answerRow(answer, heads, most, state) {
  const why = make("a", named(answer), { href: address({ ...state, answer: answer.label }) });
  follow(why, { answer: answer.label });
  const on = make("a", "its answers", {
    href: address({ ...state, entity: answer.label, answer: "" }),
    "aria-label": `Ask about ${named(answer)}`,
  });
  follow(on, { entity: answer.label, answer: "" });
  const name = make("th", null, { scope: "row" }, why);
  if (answer.known) name.append(" ", make("span", "known fact", { class: "known" }));
  const row = make(
    "tr",
    null,
    {},
    make("td", String(answer.rank), { class: "number" }),
    name,
    make("td", number(answer.score), { class: "number" }),
    ...heads.map((head) =>
      make("td", number(answer.heads[head]), {}, bar(answer.heads[head] / most)),
    ),
    make("td", null, {}, on),
  );
  if (answer.label === state.answer) row.setAttribute("aria-current", "true");
  return row;
}

// Make a click on the link change the state without reloading; in a new tab it is a plain link.
function follow(link, changes) {
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    go(changes);
  });
}

async function showWhy(state, found, mine) {
  byId("why").hidden = !state.answer;
  if (!state.answer) return;
  const [head, tail] =
    state.ask === "tail" ? [state.entity, state.answer] : [state.answer, state.entity];
  const why = await get("api/explain", { head, relation: state.relation, tail });
  if (mine !== asked) return;
  const answer = state.ask === "tail" ? why.tail : why.head;
  const triple = [why.head.name, why.relation.name, why.tail.name].map((part) => shown(part, 40));
  byId("why-title").textContent = `Why ${shown(answer.name, 60)}`;
  const table = byId("judgements");
  table.caption.textContent =
    `(${triple.join(", ")}): ` + (why.known ? `in ${why.known}` : "not in the graph");
  table.tBodies[0].replaceChildren(
    ...Object.entries(why.judgements[state.ask]).map(([name, { rank, score, weight }]) =>
      make(
        "tr",
        null,
        {},
        make("th", shown(name), { scope: "row" }),
        make("td", String(rank), { class: "number" }),
        make("td", number(score), { class: "number" }),
        make("td", percent(weight), { class: "number" }),
      ),
    ),
  );
  byId("answer-title").textContent = `Views of ${shown(answer.name, 60)}`;
  showViews(byId("answer"), answer);
  byId("status").textContent += ` ${shown(answer.name, 60)} is explained below the views.`;
}

// -- views --------------------------------------------------------------------------------------

// For the same entity, only the weights are updated, so that their change is animated.
function showViews(place, entity) {
  if (place.dataset.label !== entity.label) {
    place.dataset.label = entity.label;
    place.replaceChildren(...Object.entries(entity.views).flatMap(modality));
  }
  for (const [name, views] of Object.entries(entity.views)) {
    for (const view of views) {
      const item = place.querySelector(`[data-view="${CSS.escape(name)} ${view.view}"]`);
      item.querySelector(".weight").textContent =
        `${percent(view.weight)} (${moved(view.weight - view.plain_weight)})`;
      setBar(item.querySelector(".track"), view.weight, view.plain_weight);
    }
  }
}

function modality([name, views]) {
  const items = views.map((view, i) => {
    const source = view.source ? shown(view.source) : `number ${i + 1}`;
    const what = make("div", null, { class: "what" });
    const item = make("li", null, { "data-view": `${name} ${view.view}` });
    if (view.picture) {
      const src = `views/${encodeURIComponent(name)}/${view.view}`;
      item.append(make("img", null, { src, alt: source, loading: "lazy" }));
    } else {
      what.append(make("div", source));
    }
    what.append(make("div", "", { class: "weight" }), bar(0, 0));
    item.append(what);
    return item;
  });
  if (!items.length) return [make("h3", shown(name)), make("p", "No views.", { class: "faint" })];
  return [make("h3", shown(name)), make("ul", null, { class: "views" }, ...items)];
}

// -- new entities -------------------------------------------------------------------------------

async function askNew(event) {
  event.preventDefault();
  const state = read();
  const texts = byId("texts").value.split("\n").map((text) => text.trim()).filter(Boolean);
  try {
    const response = await fetch("api/complete-new", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ relation: state.relation, ask: state.ask, texts, top: Number(state.top) }),
    });
    const found = await answerOf(response);
    byId("new-note").textContent = `${question("new entity", found.relation.name, found.asked)}. ${found.note}`;
    byId("new-answers").replaceChildren(
      ...found.answers.map((answer) => make("li", `${named(answer)} ${number(answer.score)}`)),
    );
  } catch (error) {
    byId("new-note").textContent = error.message;
    byId("new-answers").replaceChildren();
  }
}

// -- the beginning ------------------------------------------------------------------------------

async function start() {
  about = await get("api/run");
  byId("about").textContent =
    `${shown(about.run)}: ${shown(about.graph)}, ${about.entities.toLocaleString("en")} entities, ` +
    `${about.triples.toLocaleString("en")} triples, ${about.epochs} epochs`;
  byId("new").hidden = !about.encodes_texts;
  fillRelations();
  const entity = byId("entity");
  entity.addEventListener("input", () => {
    clearTimeout(finder.timer);
    finder.timer = setTimeout(find, DELAY);
  });
  entity.addEventListener("focus", () => entity.select());
  entity.addEventListener("keydown", onKey);
  entity.addEventListener("blur", () => {
    closeList();
    // If the whole window loses the focus, the field stays active and keeps its text.
    if (document.activeElement !== entity) entity.value = current;
  });
  // mousedown comes before the field's blur, which would close the list.
  byId("found").addEventListener("mousedown", (event) => {
    event.preventDefault();
    const option = event.target.closest("li");
    if (option) choose([...byId("found").childNodes].indexOf(option));
  });
  byId("relation").addEventListener("change", (event) => go({ relation: event.target.value }));
  byId("known").addEventListener("change", (event) => go({ known: event.target.checked }));
  byId("top").addEventListener("change", (event) => go({ top: event.target.value }));
  for (const option of document.querySelectorAll('input[name="ask"]')) {
    option.addEventListener("change", () => go({ ask: option.value, answer: "" }));
  }
  byId("ask").addEventListener("submit", (event) => event.preventDefault());
  byId("new-form").addEventListener("submit", askNew);
  addEventListener("popstate", show);
  await show();
}

start().catch((error) => {
  byId("status").textContent = `The service does not respond: ${error.message}`;
});
