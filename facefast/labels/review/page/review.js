"use strict";
// Every name is put on the page as text, never as HTML. The server is asked for pictures and told of decisions; where
// to go next is decided here, so that no key waits for it.

const HEIGHT = 44; // pixels of a line of the list, as in review.css
const AHEAD = 6; // items whose pictures are fetched before they are looked at
const KINDS = {
  wrong_label: "Wrong labels", duplicate: "Copies", merge: "One person twice", group: "Groups",
};
const DONE = { keep: "Kept", drop: "Dropped", move: "Moved", merge: "Merged" };
const $ = (id) => document.getElementById(id);

let items = [], decisions = new Map(), order = [], task = "audit";
let at = 0; // place in `order`
let whole = false, over = false, waiting = false;
const given = []; // what was decided since the page was opened, to be taken back
let queue = Promise.resolve();
const ahead = new Map(); // address -> Image, so that what was fetched stays

function name(text) {
  const part = document.createElement("bdi"); // the direction of a name is its own
  part.textContent = text || "nobody";
  return part;
}

function write(place, ...parts) {
  place.replaceChildren(...parts);
}

function percent(value) {
  return `${Math.round(100 * value)} %`;
}

function picture(row) {
  return `picture/${row}/${whole ? "whole" : "face"}`;
}

function say(text, fault = false) {
  $("status").textContent = text;
  $("status").classList.toggle("fault", fault);
}

async function ask(address, body) {
  const options = body === undefined ? {} :
    { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new Error("The server does not answer: it was ended, or its machine cannot be reached. Nothing was decided.");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error || `The server says ${response.status}.`);
  return answer;
}

function headline(item) {
  if (item.kind === "group") return [name(item.person), `: ${item.size} picture${item.size === 1 ? "" : "s"}`];
  if (item.kind === "merge") return [name(item.person), " = ", name(item.suggested), "?"];
  return [name(item.person), item.kind === "duplicate" ? ": a copy?" : "?"];
}

function reason(item) {
  const near = item.other_score === null ? "" : ` (cosine ${item.other_score.toFixed(2)})`;
  const own = item.score === null ? "" : ` (cosine ${item.score.toFixed(2)})`;
  if (item.kind === "group") {
    const beside = item.suggested ? ["; nearest to ", name(item.suggested), near] : [];
    return [`Alike${own}, sure ${percent(item.confidence)}`, ...beside];
  }
  const path = item.path ? [name(item.path), ": "] : [];
  if (item.kind === "merge") return [`One person, sure ${percent(item.confidence)}${near}`];
  if (item.kind === "duplicate") {
    return [...path, `copy of a picture of `, name(item.suggested), near, `, sure ${percent(item.confidence)}`];
  }
  const beside = item.suggested ? ["; nearest to ", name(item.suggested), near] : [];
  return [...path, `wrong, sure ${percent(item.confidence)}; like its own person${own}`, ...beside];
}

function decided(decision) {
  if (!decision) return [];
  return decision.to ? [`${DONE[decision.action]}: `, name(decision.to)] : [DONE[decision.action]];
}

// The list: only what can be seen is in the document.

function drawList() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 5);
  const last = Math.min(order.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + 5);
  $("space").style.height = `${order.length * HEIGHT}px`;
  const lines = [];
  for (let place = first; place < last; place++) {
    const number = order[place], item = items[number], decision = decisions.get(number);
    const line = document.createElement("div"), one = document.createElement("div"), two = document.createElement("div");
    line.className = "item";
    line.id = `item-${number}`;
    line.dataset.place = place;
    line.style.top = `${place * HEIGHT}px`;
    line.setAttribute("role", "option");
    line.setAttribute("aria-selected", String(place === at));
    line.setAttribute("aria-posinset", String(place + 1));
    line.setAttribute("aria-setsize", String(order.length));
    write(one, `${number + 1} `, ...headline(item));
    two.className = `second ${decision ? decision.action : ""}`;
    write(two, ...(decision ? decided(decision) : [`${percent(item.confidence)} ${item.advice}`]));
    line.append(one, two);
    lines.push(line);
  }
  write($("space"), ...lines);
  if (order.length) list.setAttribute("aria-activedescendant", `item-${order[at]}`);
  else list.removeAttribute("aria-activedescendant");
}

function scrollTo(place) {
  const list = $("list"), top = place * HEIGHT;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
}

// The item.

function faces(section, heading, rows, alt) {
  const place = $(section);
  place.hidden = rows.length === 0;
  write(place.querySelector("h3"), ...heading);
  write(place.querySelector(".faces"), ...rows.map((row, number) => {
    const image = document.createElement("img");
    image.src = picture(row);
    image.alt = `${alt}, picture ${number + 1}`;
    return image;
  }));
}

function label(act, ...parts) {
  const button = document.querySelector(`[data-act="${act}"]`);
  button.hidden = parts.length === 0;
  write(button.querySelector("span"), ...parts);
}

function drawItem() {
  const empty = order.length === 0;
  $("question").hidden = $("pictures").hidden = $("actions").hidden = empty;
  const total = items.length, count = decisions.size;
  $("bar").max = Math.max(total, 1);
  $("bar").value = count;
  $("count").textContent = `${count} of ${total} decided`;
  if (empty) return;
  const number = order[at], item = items[number], decision = decisions.get(number);
  const group = item.kind === "group", merge = item.kind === "merge";
  write($("what"), `${number + 1}. `, ...headline(item));
  write($("why"), ...reason(item));
  $("answer").className = decision ? decision.action : "";
  write($("answer"), ...decided(decision));
  faces("suspect", group ? ["In this group"] : ["In question: ", name(item.person)], item.rows, "In question");
  faces("mates", ["Others of ", name(item.person)], item.mates, `Of ${item.person}`);
  const copy = item.kind === "duplicate" ? "The picture that stays: " : "Nearest: ";
  faces("others", [merge ? "" : copy, name(item.suggested)], item.others, `Of ${item.suggested}`);
  const other = item.suggested && item.suggested !== item.person;
  label("keep", group ? "Keep this name" : merge ? "Two people" : "Keep as it is");
  label("drop", ...(merge ? [] : [group ? "Drop the name" : "Drop the picture"]));
  label("move", ...(other && !merge && !group ? ["Move to ", name(item.suggested)] : []));
  label("merge", ...(other && item.person ? ["Merge with ", name(item.suggested)] : []));
  label("type", group ? "Name…" : merge ? "Merge with another…" : "Another person…");
  fetchAhead();
}

function fetchAhead() {
  const wanted = [];
  for (let place = at + 1; place <= at + AHEAD && place < order.length; place++) {
    const item = items[order[place]];
    wanted.push(...item.rows, ...item.mates, ...item.others);
  }
  const addresses = new Set(wanted.map(picture));
  for (const address of ahead.keys()) if (!addresses.has(address)) ahead.delete(address);
  for (const address of addresses) {
    if (ahead.has(address)) continue;
    const image = new Image();
    image.src = address;
    ahead.set(address, image);
  }
}

function go(place) {
  at = Math.max(0, Math.min(order.length - 1, place));
  scrollTo(at);
  drawList();
  drawItem();
}

function goTo(number) {
  let place = order.indexOf(number);
  if (place < 0) {
    $("filter").value = "all";
    filter();
    place = number;
  }
  go(place);
}

function nextOpen(from) {
  for (let step = 1; step <= order.length; step++) {
    const place = (from + step) % order.length;
    if (!decisions.has(order[place])) return place;
  }
  return from;
}

function filter() {
  const wanted = $("filter").value, here = order[at];
  order = items.map((_, number) => number).filter((number) =>
    wanted === "all" || (wanted === "open" ? !decisions.has(number) : items[number].kind === wanted));
  go(Math.max(0, order.indexOf(here)));
}

// Deciding: what the server will say is shown at once, and taken back if it says no.

function decide(action, to) {
  if (over || !order.length) return;
  const number = order[at], before = decisions.get(number), item = items[number];
  const target = to || (action === "move" || action === "merge" ? item.suggested : "");
  const entry = { number, before, decision: { action, to: target } };
  decisions.set(number, entry.decision);
  given.push(entry);
  go(nextOpen(at));
  const left = items.length - decisions.size;
  say(`${number + 1}: ${DONE[action].toLowerCase()}${target ? ` (\u2068${target}\u2069)` : ""}. ` +
    (left ? `${left} open.` : "All are decided: Done writes the table."));
  queue = queue.then(() => ask("decide", { item: number, action, to: to || "" })).then((answer) => {
    if (decisions.get(number) !== entry.decision) return; // decided anew, or taken back, since
    entry.decision.to = answer.decision.to; // a typed name as the set has it
    if (answer.decision.to !== target) drawList();
  }).catch((error) => {
    if (given.includes(entry)) given.splice(given.indexOf(entry), 1);
    if (before) decisions.set(number, before); else decisions.delete(number);
    goTo(number);
    say(error.message, true);
  });
}

function undo() {
  const last = given.pop();
  if (last) putBack(last.number, last.before);
  else waiting = true; // an answer of an earlier time: only the server knows which
  queue = queue.then(() => ask("undo", {})).then((answer) => {
    if (!last) putBack(answer.item, answer.decision);
  }).catch((error) => {
    if (last) decisions.set(last.number, last.decision);
    drawList();
    drawItem();
    say(error.message, true);
  }).finally(() => { waiting = false; });
}

function putBack(number, before) {
  if (before) decisions.set(number, before); else decisions.delete(number);
  goTo(number);
  say(`${number + 1}: taken back. ${decisions.size} of ${items.length} decided.`);
}

function finish() {
  queue = queue.then(() => ask("done", {})).then((answer) => {
    over = true;
    for (const button of document.querySelectorAll("button, select")) button.disabled = true;
    say(`${answer.counts.decided} of ${answer.counts.items} decided. Written: ${answer.result}. This page can be closed.`);
  }).catch((error) => say(error.message, true));
}

// A name that is typed.

function openDialog() {
  const item = items[order[at]];
  if (!item) return;
  const group = item.kind === "group", merge = item.kind === "merge";
  $("who-title").textContent = group ? "Who is this?" : "Another person";
  $("who-move").textContent = group ? "Name" : "Move the picture there";
  $("who-move").hidden = merge;
  $("who-merge").hidden = group || !item.person;
  write($("who-merge"), "Merge ", name(item.person), " with them");
  $("name").value = "";
  $("who-fault").textContent = "";
  $("names").replaceChildren();
  $("who").showModal();
  $("name").focus();
}

let asked = 0;
async function suggest() {
  const mine = ++asked, text = $("name").value;
  try {
    const answer = await ask(`people?q=${encodeURIComponent(text)}`);
    if (mine !== asked) return; // a later letter was answered before
    write($("names"), ...answer.people.map((person) => {
      const option = document.createElement("option");
      option.value = person;
      return option;
    }));
  } catch (error) {
    $("who-fault").textContent = error.message;
  }
}

function typed(action) {
  const text = $("name").value.trim();
  if (!text) {
    $("who-fault").textContent = "Type a name.";
    $("name").focus();
    return;
  }
  $("who").close();
  decide(action, text);
}

// What can be pressed.

const ACTS = {
  keep: () => decide("keep"), drop: () => decide("drop"), move: () => decide("move"), merge: () => decide("merge"),
  type: openDialog, undo, previous: () => go(at - 1), next: () => go(at + 1), open: () => go(nextOpen(at)),
  whole: () => {
    whole = !whole;
    document.querySelector('[data-act="whole"]').setAttribute("aria-pressed", String(whole));
    drawItem();
  },
};
const LETTERS = { k: "keep", d: "drop", m: "move", g: "merge", t: "type", u: "undo", n: "open", w: "whole" };
const ARROWS = { ArrowLeft: "previous", ArrowUp: "previous", ArrowRight: "next", ArrowDown: "next" };

function act(what) {
  const button = document.querySelector(`[data-act="${what}"]`);
  if (over || waiting || button.hidden || button.closest("[hidden]")) return;
  ACTS[what]();
}

document.addEventListener("keydown", (event) => {
  if ($("who").open || event.altKey || event.metaKey || /^(SELECT|INPUT)$/.test(event.target.tagName)) return;
  let what = ARROWS[event.key];
  if (event.ctrlKey) what = event.key === "z" ? "undo" : undefined;
  else if (!what && $("keys").checked && !event.repeat) what = LETTERS[event.key.toLowerCase()];
  if (what) {
    event.preventDefault();
    act(what);
  } else if (event.target === $("list") && ["Home", "End", "PageUp", "PageDown"].includes(event.key)) {
    event.preventDefault();
    const page = Math.max(1, Math.floor($("list").clientHeight / HEIGHT));
    go({ Home: 0, End: order.length, PageUp: at - page, PageDown: at + page }[event.key]);
  }
});
$("keys").addEventListener("keydown", (event) => event.stopPropagation());
for (const button of document.querySelectorAll("[data-act]")) {
  button.addEventListener("click", () => act(button.dataset.act));
}
$("list").addEventListener("scroll", drawList);
$("list").addEventListener("click", (event) => {
  const line = event.target.closest(".item");
  if (line) go(Number(line.dataset.place));
});
$("filter").addEventListener("change", filter);
$("done").addEventListener("click", finish);
$("name").addEventListener("input", suggest);
$("who-form").addEventListener("submit", (event) => {
  event.preventDefault();
  typed($("who-move").hidden ? "merge" : "move");
});
$("who-merge").addEventListener("click", () => typed("merge"));
$("who-cancel").addEventListener("click", () => $("who").close());
window.addEventListener("resize", drawList);

async function begin() {
  const answer = await ask("items");
  items = answer.items;
  task = answer.task;
  decisions = new Map(Object.entries(answer.decisions).map(([number, decision]) => [Number(number), decision]));
  write($("title"), task === "audit" ? "Suspects among " : "Groups among ", name(answer.root));
  document.title = `${task === "audit" ? "Suspects" : "Groups"}: facefast review`;
  const kinds = [...new Set(items.map((item) => item.kind))];
  const choices = [["all", "all"], ["open", "open"], ...(kinds.length > 1 ? kinds.map((kind) => [kind, KINDS[kind]]) : [])];
  write($("filter"), ...choices.map(([value, text]) => new Option(text, value)));
  order = items.map((_, number) => number);
  const first = order.find((number) => !decisions.has(number));
  go(first === undefined ? 0 : first);
  say(items.length ? `${decisions.size} of ${items.length} decided.` : "Nothing was found: there is nothing to decide.");
  $("list").focus();
}

begin().catch((error) => say(error.message, true));
