// Making elements, and figures as a reader wants them. Text only ever goes in as text.

const TITLE_CHARS_MAX = 80;

export const $ = (id) => document.getElementById(id);
export const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const when = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });
const titles = new Map();

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== undefined));
  return element;
}

// An item's name; what was once told of it is remembered.
export function title(id, text) {
  if (text && id) titles.set(id, text.length > TITLE_CHARS_MAX ? `${text.slice(0, TITLE_CHARS_MAX)}…` : text);
  return titles.get(id) ?? text ?? (id ? `item ${id}` : "an item");
}

export const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
export const percent = (share) => (share === null || share === undefined ? "–" : `${share < 0 ? "−" : ""}${Math.abs(100 * share).toFixed(1)}\u00a0%`);
export const time = (ts) => make("time", { datetime: new Date(ts * 1000).toISOString() }, when.format(new Date(ts * 1000)));

const UNITS = [["days", 86400], ["h", 3600], ["min", 60]];

// Seconds, in the unit that suits: a recorded stream is behind by the age of its record.
export function duration(seconds) {
  const [unit, size] = UNITS.find(([, size]) => seconds >= 2 * size) ?? ["s", 1];
  return `${size === 1 ? seconds.toFixed(1) : number.format(seconds / size)} ${unit}`;
}

export function bar(label, share, value) {
  const fill = make("div", { class: share < 0 ? "fill against" : "fill" });
  fill.style.width = `${Math.min(100, 100 * Math.abs(share))}%`;
  return make(
    "div", { class: "bar" }, make("span", {}, label), make("span", { class: "value" }, value),
    make("div", { class: "track", "aria-hidden": "true" }, fill),
  );
}
