// The worker's public API, with the key where one is asked for. A key is in this tab's memory alone: it leaves with it.

const KEY = "headwater-key";
const RETRY_MAX = 3;
const RECONNECT_MS = 2000;

let refused = () => {};

// Told when the worker wants a key: whether one had been given.
export function onRefused(listener) {
  refused = listener;
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

function keyed(options = {}) {
  const key = sessionStorage.getItem(KEY);
  return { ...options, headers: { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) } };
}

function refuse() {
  const hadKey = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  refused(hadKey);
}

export async function call(path, options, retries = RETRY_MAX) {
  const [response, body] = await answer(path, keyed(options));
  if (response.ok) return body;
  if (response.status === 401) refuse();
  const seconds = Number(response.headers.get("Retry-After"));
  if (response.status === 503 && seconds && retries > 0 && !options?.method) {
    await new Promise((done) => setTimeout(done, 1000 * seconds));
    return call(path, options, retries - 1);
  }
  throw new Error(`${body.title}: ${body.detail}`);
}

async function answer(path, options) {
  try {
    const response = await fetch(path, options);
    return [response, await response.json()];
  } catch (failure) {
    console.debug("no answer", failure);
    throw new Error("The worker does not answer. It may be starting again: try once more in a moment.");
  }
}

export const post = (path, body) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

// EventSource sends no key, so the stream is read by fetch: blocks of "name: value" lines, an empty line between.
// listeners: of each message by its name; say: told "open" and "lost".
export async function listen(listeners, say) {
  try {
    const response = await fetch("/v1/stream", keyed());
    if (response.status === 401) return refuse();
    if (!response.ok) throw new Error(response.statusText);
    say("open", "live");
    let rest = "";
    for await (const chunk of chunks(response.body.pipeThrough(new TextDecoderStream()).getReader())) {
      const blocks = (rest + chunk).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const { event, data } = fieldsOf(block);
        if (Object.hasOwn(listeners, event)) listeners[event](JSON.parse(data));
      }
    }
  } catch (failure) {
    console.debug("the stream ended", failure);
  }
  say("lost", "connection lost, trying again");
  setTimeout(() => listen(listeners, say), RECONNECT_MS);
}

async function* chunks(reader) {
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

function fieldsOf(block) {
  return Object.fromEntries(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]));
}
