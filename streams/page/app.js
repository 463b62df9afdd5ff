// The page: one user's list and its reasons, what it would be otherwise, and the stream as it goes by.

import { call, listen, onRefused, post, setKey } from "./api.js";
import { showRace } from "./chart.js";
import { $, bar, duration, make, number, percent, signed, time, title } from "./elements.js";
import { facts as encoderFacts } from "./encoder.js";
import * as whatIf from "./whatif.js";

const RECENT_MAX = 8;
const FEED_MAX = 4;
const EVENTS_SHOWN = 12;
const REASONS_SHOWN = 3;
const MODEL_EVERY_MS = 10000;
const LIST_QUERY = "limit=10&explain=true&texts=true";

let user = "";
let real = [];           // item ids of the user's own list
let state;               // of the user, as last read
let eventsShown = "";    // the user's events on the page, by position
let generation = 0;      // of the user's reads: an overtaken answer is dropped
let modelReadAt = -Infinity;
const recent = [];

async function guarded(work) {
  $("problem").textContent = "";
  try {
    await work();
  } catch (failure) {
    $("problem").textContent = failure.message;
  }
}

// -- one user

const userPath = (what) => `/v1/users/${encodeURIComponent(user)}/${what}`;

async function read(positions = []) {
  const turn = ++generation;
  const wait = positions.map((position) => `at_least=${encodeURIComponent(position)}`);
  const list = await call(userPath("recommendations?") + [LIST_QUERY, ...wait].join("&"));
  const told = await call(userPath("state?") + wait.join("&"));
  if (turn !== generation) return false;
  const before = positions.length ? real : [];
  whatIf.clear();
  state = told;
  real = list.items.map((item) => item.item_id);
  showState();
  showList(list, before);
  markSupposed();
  return true;
}

async function send(event) {
  const started = performance.now();
  const answer = await post("/v1/events", { user_id: user, ...event });
  const before = real;
  if (!await read(answer.positions)) return;
  const fresh = real.filter((id) => !before.includes(id)).length;
  const moved = real.some((id, place) => before[place] !== id);
  const change = moved ? `${fresh} new in the list` : "The order stays";
  $("news").textContent = `${change}, ${number.format(performance.now() - started)} ms after your ${event.type}.`;
}

async function choose(id) {
  if (!id) throw new Error("Type a user id first.");
  user = id;
  real = [];
  $("user").value = id;
  for (const part of ["write-panel", "list-panel", "side"]) $(part).hidden = false;
  $("news").textContent = "";
  await read();
  $("list-heading").focus({ preventScroll: true });
}

// -- what if

// The list as supposed; change: made to what is supposed, and forgotten where the worker refuses it.
async function suppose(change) {
  change();
  if (!whatIf.isSupposing()) return void await read();
  const turn = ++generation;
  let list;
  try {
    list = await whatIf.ask(user, LIST_QUERY);
  } catch (failure) {
    await read();
    throw failure;
  }
  if (turn !== generation) return;
  showList(list, real);
  showEvents();
  markSupposed(list);
}

function markSupposed(list) {
  const isSupposed = list !== undefined;
  $("list-panel").classList.toggle("supposed", isSupposed);
  $("supposed").hidden = !isSupposed;
  $("list-heading").textContent = isSupposed ? `What if: the list of ${user}` : `The list of ${user}`;
  $("gone").textContent = "";
  if (!isSupposed) return;
  const ids = list.items.map((item) => item.item_id);
  const gone = real.filter((id) => !ids.includes(id));
  const changed = ids.filter((id, place) => real[place] !== id).length;
  const about = list.exact ? "" : " Older events have left the user's row, so that a real stream might differ a little.";
  $("supposed-words").textContent = `Hypothetical: ${whatIf.words()}. Nothing of it is stored.${about}`;
  $("news").textContent = changed ? `${changed} of ${ids.length} places differ from the real list.` : "The same as the real list.";
  $("gone").textContent = gone.length ? `Not in it any more: ${gone.map((id) => title(id)).join("; ")}` : "";
}

// -- the list

const VERBS = {
  click: "clicked", like: "liked", purchase: "bought", rating: "rated", view: "viewed", comment: "wrote about", skip: "skipped",
};

function reason(part, applied) {
  const isSupposed = part.offset > (applied[part.topic]?.[1] ?? Infinity);
  const what = part.item_id === undefined ? undefined : title(part.item_id, part.text);
  if (part.type === "comment" && !part.action) {
    return (isSupposed ? "if you wrote that" : "because of what you wrote") + (what ? ` about ${what}` : "");
  }
  return `${isSupposed ? "if" : "because"} you ${VERBS[part.action] ?? `did “${part.action}” with`} ${what ?? "an item"}`;
}

function reasonLine(value, text) {
  return make("li", {}, make("span", { class: `value ${value < 0 ? "minus" : "plus"}` }, signed(value)), make("span", {}, text));
}

function why(explanation, applied) {
  const parts = [...explanation.contributions].sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const line = (part) => reasonLine(part.value, reason(part, applied));
  const others = parts.slice(REASONS_SHOWN);
  const all = [
    ...others.map(line),
    reasonLine(explanation.bias, "where every item starts, and how popular and new this one is"),
    reasonLine(explanation.rest, "older history and constants"),
  ];
  const rest = others.reduce((sum, part) => sum + part.value, explanation.bias + explanation.rest);
  return make(
    "div", { class: "why" },
    parts.length ? make("ul", {}, ...parts.slice(0, REASONS_SHOWN).map(line)) : undefined,
    make(
      "details", {},
      make("summary", {}, `${signed(rest)} from where it starts${others.length ? ` and ${others.length} more` : ""}`),
      make("ul", {}, ...all),
    ),
  );
}

function movement(was, place) {
  if (was < 0) return "new";
  return was > place ? `↑ ${was - place}` : was < place ? `↓ ${place - was}` : "";
}

// before: item ids of the list that this one is compared with; empty: with none.
function showList(list, before) {
  $("list").replaceChildren(...list.items.map((item, place) => {
    const moved = before.length ? movement(before.indexOf(item.item_id), place) : "";
    const name = title(item.item_id, item.text);
    return make(
      "li", { "data-item": item.item_id, class: moved === "new" ? "new" : false },
      make(
        "button",
        { type: "button", class: "pick", onclick: () => guarded(() => pick(item.item_id)) },
        make("span", { class: "title" }, make("span", { class: "unseen" }, "Click "), name),
        make("span", { class: "moved" }, moved),
      ),
      why(item.explanation, list.applied),
    );
  }));
  if (!list.items.length) $("news").textContent = "No items yet: the catalogue is empty, or all of it is consumed.";
}

// In a what-if a click is supposed too, and otherwise sent.
function pick(id) {
  const event = { type: "click", item_id: id, action: "click" };
  return whatIf.isSupposing() ? suppose(() => whatIf.suppose(event)) : send(event);
}

// -- the user's state

const PARTS = {
  behaviour: "what the user did", item_texts: "what those items say", own_words: "what the user wrote",
  cooccurrence: "what others did with it", context: "how much, and how long ago",
};

function showState() {
  const events = new Map(state.last_events.map((event) => [whatIf.position(event), event]));
  const top = Math.max(...state.parts.map((part) => part.norm), 1e-9);
  $("parts").replaceChildren(...state.parts.map((part) => make(
    "li", { "data-part": part.name },
    bar(PARTS[part.name] ?? part.name, part.norm / top, part.norm.toFixed(2)),
    make("ul", { class: "bars" }, ...part.events.slice(0, REASONS_SHOWN).map((made) => {
      const event = events.get(whatIf.position(made));
      return make("li", {}, bar(event ? described(event) : "an older event", made.share, percent(made.share)));
    })),
  )));
  $("counts").textContent = state.events
    ? `${number.format(state.events)} events, ${number.format(state.consumed)} items consumed.`
    : "Nothing is known of this user: the list is what everybody gets.";
  showEvents();
}

function showEvents() {
  const shown = state.last_events.slice(0, EVENTS_SHOWN);
  const key = JSON.stringify([user, shown.map((event) => [whatIf.position(event), event.action])]);
  if (key !== eventsShown) {  // else the focus stays where it is
    eventsShown = key;
    $("events").replaceChildren(...shown.map((event) => make(
      "li", {},
      make("span", { class: "what" }, described(event), " ", time(event.ts)),
      make("label", { class: "switch" }, make("input", {
        type: "checkbox", role: "switch", "aria-label": `without this: ${described(event)}`,
        onchange: () => guarded(() => suppose(() => whatIf.toggle(event))),
      }), "without this"),
    )));
  }
  // One comment about an item is two lines and one event: both switches follow what is supposed.
  [...$("events").children].forEach((line, place) => {
    const isWithout = whatIf.isWithout(shown[place]);
    line.querySelector("input").checked = isWithout;
    line.classList.toggle("without", isWithout);
  });
}

function described(event) {
  const what = event.item_id === undefined ? "" : title(event.item_id, event.text);
  if (event.type === "comment" && !event.action) return what ? `wrote about ${what}` : "wrote a comment";
  return `${event.action} ${what || "an item"}`;
}

// -- the stream

function showEvent(event) {
  if (!recent.includes(event.user_id)) {
    recent.unshift(event.user_id);
    recent.length = Math.min(recent.length, RECENT_MAX);
    if (!$("recent").contains(document.activeElement)) {
      $("recent").replaceChildren(...recent.map((id) => make("button", { type: "button", onclick: () => guarded(() => choose(id)) }, id)));
    }
    $("recent-users").replaceChildren(...recent.map((id) => make("option", { value: id })));
  }
  const what = described({ ...event, type: event.action ? "click" : "comment" });
  $("feed").prepend(make("li", {}, make("span", { class: "user" }, event.user_id), " ", what));
  while ($("feed").children.length > FEED_MAX) $("feed").lastChild.remove();
}

function showStatus(status) {
  $("live-rate").textContent = number.format(status.events_per_s);
  $("live-lag").textContent = `${number.format(status.lag_records)} records, ${duration(status.lag_s)}`;
  $("live-learnt").textContent = number.format(status.positives);
  $("live-items").textContent = number.format(status.items);
  showRace(status.hit_ratio ?? {});
  if (performance.now() - modelReadAt < MODEL_EVERY_MS || document.hidden) return;
  modelReadAt = performance.now();
  readModel();
}

// A worker that just restores its partitions says so elsewhere: the figures of before stay.
async function readModel() {
  try {
    showModel(await call("/v1/model"));
  } catch (failure) {
    console.debug("no model figures", failure);
  }
}

function showModel(model) {
  const { encoder, replica, learner } = model;
  const rows = [
    ["Encoder", encoder.name], ["Dimensions of a text", number.format(encoder.dim)], ["Version", model.model_version],
    ["Items, listed", `${number.format(replica.items)}, ${number.format(replica.active)}`],
    ["Learner", learner ? `examples up to ${number.format(learner.applied.examples)}` : "does not answer"],
    ...encoderFacts(encoder),
  ];
  const line = ([name, ...value]) => make("div", {}, make("dt", {}, name), make("dd", {}, ...value));
  $("model").replaceChildren(...rows.map(line));
}

function say(told, words) {
  $("connection").dataset.state = told;
  $("connection").textContent = words;
}

const connect = () => listen({ event: showEvent, status: showStatus }, say);

// -- what a visitor does

function busy(form, work) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const button = form.querySelector("[type=submit]");
    button.disabled = true;
    guarded(work).finally(() => { button.disabled = false; });
  });
}

function written(id) {
  const text = $(id).value;
  if (!text.trim()) throw new Error("Write something first.");
  return { type: "comment", text };
}

onRefused((hadKey) => {
  say("lost", hadKey ? "the key is not valid here" : "a key is needed");
  $("key-panel").hidden = false;
  $("key").focus();
});
busy($("key-form"), () => {
  setKey($("key").value.trim());
  $("key").value = "";
  $("key-panel").hidden = true;
  modelReadAt = -Infinity;
  connect();
});
busy($("who"), () => choose($("user").value.trim()));
busy($("write"), async () => {
  await send(written("comment"));
  $("comment").value = "";
});
busy($("what-if"), async () => {
  const event = written("what-if-text");
  await suppose(() => whatIf.suppose(event));
  $("what-if-text").value = "";
});
$("new-user").addEventListener("click", () => guarded(() => {
  const [draw] = crypto.getRandomValues(new Uint32Array(1));
  return choose(`visitor-${draw.toString(36)}`);
}));
$("back").addEventListener("click", () => guarded(async () => {
  await read();
  $("news").textContent = "The real list again.";
  $("list-heading").focus({ preventScroll: true });
}));
connect();
