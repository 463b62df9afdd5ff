// The page: one user's list and its reasons, and the stream as it goes by. It only uses the public API.

const RECENT_MAX = 8;
const TITLE_CHARS_MAX = 80;
const FEED_MAX = 6;
const EVENTS_SHOWN = 12;
const REASONS_SHOWN = 3;
const RACE_POINTS_MAX = 300;
const RETRY_MAX = 3;
const RECONNECT_MS = 2000;
const KEY = "headwater-key";  // in this tab's memory alone: it leaves with the tab

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const when = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });

let user = "";
let shown = [];          // item ids of the list on the page
let generation = 0;      // of the user's reads: an overtaken answer is dropped
const recent = [];
const titles = new Map();
const race = { model: [], popular: [] };

// -- making elements; text only ever goes in as text

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== undefined));
  return element;
}

const title = (id, text) => {
  if (text && id) titles.set(id, text.length > TITLE_CHARS_MAX ? `${text.slice(0, TITLE_CHARS_MAX)}…` : text);
  return titles.get(id) ?? text ?? (id ? `item ${id}` : "an item");
};
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)}\u00a0%`);
const time = (ts) => make("time", { datetime: new Date(ts * 1000).toISOString() }, when.format(new Date(ts * 1000)));

// -- the API

function keyed(options = {}) {
  const key = sessionStorage.getItem(KEY);
  return { ...options, headers: { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) } };
}

async function call(path, options, retries = RETRY_MAX) {
  const response = await fetch(path, keyed(options));
  const body = await response.json();
  if (response.ok) return body;
  if (response.status === 401) askForKey();
  const seconds = Number(response.headers.get("Retry-After"));
  if (response.status === 503 && seconds && retries > 0 && !options?.method) {
    await new Promise((done) => setTimeout(done, 1000 * seconds));
    return call(path, options, retries - 1);
  }
  throw new Error(`${body.title}: ${body.detail}`);
}

async function guarded(work) {
  $("problem").textContent = "";
  try {
    await work();
  } catch (failure) {
    $("problem").textContent = failure.message;
  }
}

const userPath = (what) => `/v1/users/${encodeURIComponent(user)}/${what}`;

async function read(positions = []) {
  const turn = ++generation;
  const wait = positions.map((position) => `at_least=${encodeURIComponent(position)}`);
  const list = await call(userPath("recommendations?") + ["limit=10&explain=true&texts=true", ...wait].join("&"));
  const state = await call(userPath("state?") + wait.join("&"));
  if (turn !== generation) return;
  showState(state);
  showList(list, positions.length > 0);
}

async function send(event) {
  const started = performance.now();
  const answer = await call("/v1/events", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ user_id: user, ...event }),
  });
  const before = shown;
  await read(answer.positions);
  const fresh = shown.filter((id) => !before.includes(id)).length;
  const moved = shown.some((id, place) => before[place] !== id);
  const change = moved ? `${fresh} new in the list` : "The order stays";
  $("news").textContent = `${change}, ${number.format(performance.now() - started)} ms after your ${event.type}.`;
}

// -- one user

async function choose(id) {
  if (!id) throw new Error("Type a user id first.");
  user = id;
  shown = [];
  $("user").value = id;
  for (const part of ["write-panel", "list-panel", "side"]) $(part).hidden = false;
  $("list-heading").textContent = `The list of ${id}`;
  $("news").textContent = "";
  await read();
  $("list-heading").focus({ preventScroll: true });
}

function reason(part) {
  const what = part.item_id === undefined ? undefined : title(part.item_id, part.text);
  if (part.type === "comment" && !part.action) return what ? `because of what you wrote about ${what}` : "because of what you wrote";
  const verbs = { click: "clicked", like: "liked", purchase: "bought", rating: "rated", view: "viewed", comment: "wrote about", skip: "skipped" };
  return `because you ${verbs[part.action] ?? `did “${part.action}” with`} ${what ?? "an item"}`;
}

function reasonLine(value, text) {
  return make("li", {}, make("span", { class: `value ${value < 0 ? "minus" : "plus"}` }, signed(value)), make("span", {}, text));
}

function why(explanation) {
  const parts = [...explanation.contributions].sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const others = parts.slice(REASONS_SHOWN);
  const rest = others.reduce((sum, part) => sum + part.value, explanation.rest);
  const all = [
    ...others.map((part) => reasonLine(part.value, reason(part))),
    reasonLine(explanation.rest, "older history and constants"),
  ];
  return make(
    "div", { class: "why" },
    make(
      "ul", {},
      ...parts.slice(0, REASONS_SHOWN).map((part) => reasonLine(part.value, reason(part))),
      reasonLine(explanation.bias, "where every item starts, and how popular and new this one is"),
    ),
    others.length || Math.abs(explanation.rest) >= 0.005
      ? make("details", {}, make("summary", {}, `${signed(rest)} from ${others.length} more`), make("ul", {}, ...all))
      : undefined,
  );
}

function showList(list, isAnswer) {
  const before = new Map(shown.map((id, place) => [id, place]));
  shown = list.items.map((item) => item.item_id);
  $("list").replaceChildren(...list.items.map((item, place) => {
    const was = before.get(item.item_id);
    const isNew = isAnswer && was === undefined;
    const steps = was === undefined ? 0 : was - place;
    const moved = isNew ? "new" : steps > 0 ? `↑ ${steps}` : steps < 0 ? `↓ ${-steps}` : "";
    const name = title(item.item_id, item.text);
    return make(
      "li", { "data-item": item.item_id, class: isNew ? "new" : false },
      make(
        "button",
        {
          type: "button", class: "pick", "aria-label": `Click ${name}`,
          onclick: () => guarded(() => send({ type: "click", item_id: item.item_id, action: "click" })),
        },
        make("span", { class: "title" }, name), make("span", { class: "moved" }, moved),
      ),
      why(item.explanation),
    );
  }));
  if (!list.items.length) $("news").textContent = "No items yet: the catalogue is empty, or all of it is consumed.";
}

function bar(label, share, value) {
  const fill = make("div", { class: "fill" });
  fill.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  return make(
    "div", { class: "bar" }, make("span", {}, label), make("span", { class: "value" }, value),
    make("div", { class: "track", "aria-hidden": "true" }, fill),
  );
}

const PARTS = { behaviour: "what the user did", item_texts: "what those items say", own_words: "what the user wrote", cooccurrence: "what others did with it" };

function showState(state) {
  const events = new Map(state.last_events.map((event) => [`${event.topic}:${event.offset}`, event]));
  const top = Math.max(...state.parts.map((part) => part.norm), 1e-9);
  $("parts").replaceChildren(...state.parts.map((part) => make(
    "li", { "data-part": part.name },
    bar(PARTS[part.name] ?? part.name, part.norm / top, part.norm.toFixed(2)),
    make("ul", { class: "bars" }, ...part.events.slice(0, REASONS_SHOWN).map((made) => {
      const event = events.get(`${made.topic}:${made.offset}`);
      return make("li", {}, bar(event ? described(event) : "an older event", made.share, percent(made.share)));
    })),
  )));
  $("counts").textContent = state.events
    ? `${number.format(state.events)} events, ${number.format(state.consumed)} items consumed.`
    : "Nothing is known of this user: the list is what everybody gets.";
  $("events").replaceChildren(...state.last_events.slice(0, EVENTS_SHOWN).map((event) => make("li", {}, described(event), " ", time(event.ts))));
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
  const line = make("li", {}, make("span", { class: "user" }, event.user_id), " ", described({ ...event, type: event.action ? "click" : "comment" }));
  $("feed").prepend(line);
  while ($("feed").children.length > FEED_MAX) $("feed").lastChild.remove();
}

function showStatus(status) {
  $("live-rate").textContent = number.format(status.events_per_s);
  $("live-lag").textContent = `${number.format(status.lag_records)} records`;
  $("live-learnt").textContent = number.format(status.positives);
  $("live-items").textContent = number.format(status.items);
  const { model, popularity } = status.hit_ratio ?? {};
  $("race-model").textContent = percent(model);
  $("race-popular").textContent = percent(popularity);
  if (model === null || model === undefined) return;
  for (const [name, value] of [["model", model], ["popular", popularity ?? 0]]) {
    race[name].push(value);
    if (race[name].length > RACE_POINTS_MAX) race[name].shift();
  }
  const top = Math.max(...race.model, ...race.popular, 0.01) * 1.1;
  for (const name of ["model", "popular"]) {
    const step = 600 / Math.max(1, race[name].length - 1);
    const points = race[name].map((value, i) => `${(i * step).toFixed(1)},${(100 - (100 * value) / top).toFixed(1)}`);
    $(`race-${name}-line`).setAttribute("points", points.join(" "));
  }
  $("race").setAttribute("aria-label", `Hit ratio now: model ${percent(model)}, popularity ${percent(popularity)}`);
}

function say(state, words) {
  $("connection").dataset.state = state;
  $("connection").textContent = words;
}

// EventSource sends no key, so the stream is read by fetch: blocks of "name: value" lines, an empty line between.
async function connect() {
  try {
    const response = await fetch("/v1/stream", keyed());
    if (response.status === 401) return askForKey();
    if (!response.ok) throw new Error(response.statusText);
    say("open", "live");
    let rest = "";
    for await (const chunk of chunks(response.body.pipeThrough(new TextDecoderStream()).getReader())) {
      const blocks = (rest + chunk).split("\n\n");
      rest = blocks.pop();
      blocks.forEach(showBlock);
    }
  } catch (failure) {
    console.debug("the stream ended", failure);
  }
  say("lost", "connection lost, trying again");
  setTimeout(connect, RECONNECT_MS);
}

async function* chunks(reader) {
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

function showBlock(block) {
  const fields = Object.fromEntries(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]));
  if (fields.event === "event") showEvent(JSON.parse(fields.data));
  if (fields.event === "status") showStatus(JSON.parse(fields.data));
}

// -- the key, where the worker asks for one

function askForKey() {
  const isWrong = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  say("lost", isWrong ? "the key is not valid here" : "a key is needed");
  $("key-panel").hidden = false;
  $("key").focus();
}

function busy(form, work) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const button = form.querySelector("[type=submit]");
    button.disabled = true;
    guarded(work).finally(() => { button.disabled = false; });
  });
}

busy($("key-form"), () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  $("key-panel").hidden = true;
  connect();
});
busy($("who"), () => choose($("user").value.trim()));
busy($("write"), async () => {
  if (!$("comment").value.trim()) throw new Error("Write something first.");
  await send({ type: "comment", text: $("comment").value });
  $("comment").value = "";
});
$("new-user").addEventListener("click", () => guarded(() => choose(`visitor-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`)));
connect();
