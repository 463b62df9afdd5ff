// What is supposed of a user: events that had not been, events that come next. The worker stores none of it.

import { post } from "./api.js";
import { title } from "./elements.js";

const without = new Set();  // positions
let supposed = [];          // events

export const position = (event) => `${event.topic}:${event.partition}:${event.offset}`;
export const isWithout = (event) => without.has(position(event));
export const isSupposing = () => without.size + supposed.length > 0;

export function clear() {
  without.clear();
  supposed = [];
}

export function toggle(event) {
  if (!without.delete(position(event))) without.add(position(event));
}

export function suppose(event) {
  supposed.push(event);
}

export function words() {
  const parts = without.size ? [`without ${without.size} ${without.size === 1 ? "event" : "events"}`] : [];
  for (const event of supposed) parts.push(event.type === "click" ? `with a click on ${title(event.item_id)}` : `with the words “${event.text}”`);
  return parts.join(", ");
}

export function ask(user, query) {
  const events = supposed.map((event) => ({ user_id: user, ...event }));
  return post(`/v1/users/${encodeURIComponent(user)}/what-if?${query}`, { without: [...without], with: events });
}
