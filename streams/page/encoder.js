// The encoder's adapter: which one is in use, which one stands in shadow, and what was decided last.

import { number, time } from "./elements.js";

const BY_HAND = ["switched", "trial", "trial ended"];  // no decision of the gate: what follows one, or was asked for
const DECIDED = {
  promote: "promoted: it was better than what was in use",
  kept: "kept: its predecessor was not better",
  rollback: "taken back: its predecessor was better",
};
const PREDECESSORS = ["kept", "rollback"];  // whose evidence is about the predecessor

function words({ kind, verdict }) {
  if (kind === "drop") return verdict === "worse" ? "dropped: it was worse than what is in use" : "dropped: nothing was shown";
  return DECIDED[kind] ?? kind;
}

function evidence(decision) {
  const { tests, log10_e_better: better, log10_e_worse: worse } = decision;
  if ([tests, better, worse].includes(undefined)) return "";
  const who = PREDECESSORS.includes(decision.kind) ? "the predecessor" : "it";
  return ` (log10 e ${better.toFixed(2)} that ${who} is better, ${worse.toFixed(2)} that ${who} is worse, ${number.format(tests)} tests)`;
}

function inUse({ adapter, checkpoints }) {
  if (adapter === null) return ["none: the encoder as it came"];
  const since = checkpoints.find((one) => one.adapter === adapter)?.current_since;
  return since === undefined ? [adapter] : [adapter, " since ", time(since)];
}

// While a duel goes on nothing is told of it.
function inShadow([newest]) {
  if (newest?.state !== "shadow") return "no candidate";
  const { examples, loss, loss_frozen: before } = newest.training;
  const trained = [examples, loss, before].includes(undefined)
    ? "" : `, trained on ${number.format(examples)} examples (loss ${before.toFixed(3)} → ${loss.toFixed(3)})`;
  const decision = newest.decisions.findLast(({ kind }) => !BY_HAND.includes(kind));
  return `${newest.adapter}${trained}, ${decision ? `${words(decision)}${evidence(decision)}` : "in shadow, not decided yet"}`;
}

function decidedLast(checkpoints) {
  const all = checkpoints.flatMap((one) => one.decisions.map((decision) => ({ one, decision })));
  const last = all.filter(({ decision }) => !BY_HAND.includes(decision.kind)).sort((a, b) => b.decision.position - a.decision.position)[0];
  if (last === undefined) return "none yet";
  const { one, decision } = last;
  const byHand = one.state === "taken back" && decision.kind !== "rollback" ? "; then taken back by hand" : "";
  return `${one.adapter} ${words(decision)}${evidence(decision)}${byHand}`;
}

// [name, ...what is told of it] each.
export const facts = (encoder) => [
  ["Adapter in use", ...inUse(encoder)],
  ["Candidate in shadow", inShadow(encoder.checkpoints)],
  ["Last decision", decidedLast(encoder.checkpoints)],
];
