// Where the time of the newest requests went: a bar of parts for each. Draws the ledgers of `finished` events, and of
// `ledger` ones, which come after the former where a request ended before the engine heard of it.

import { $, element, milliseconds } from "/dom.js";

const MOST = 6;
const PARTS = {
  waiting: ["queue_s", "again_s", "grammar_s"],
  prompt: ["prefill_s", "recompute_s", "missed_s"],
  others: ["behind_s", "prompts_s"],
  decoding: ["decode_s", "guesses_s"],
  between: ["to_engine_s", "from_engine_s", "residual_s"],
};
const WORDS = { waiting: "waiting", prompt: "its prompt", others: "others' prompts", decoding: "decoding", between: "HTTP" };
const newest = new Map(); // by request, the newest last

// Of a ledger, each kind's seconds that are more than nothing.
export function kinds(ledger) {
  return Object.entries(PARTS)
    .map(([kind, names]) => [kind, names.reduce((sum, name) => sum + ledger[name], 0)])
    .filter(([, seconds]) => seconds > 0);
}

function row([request, ledger]) {
  const parts = kinds(ledger);
  const total = parts.reduce((sum, [, seconds]) => sum + seconds, 0);
  const box = element("div", "ledger-row");
  const bar = element("div", "fill");
  const said = `${request}: ${parts.map(([kind, seconds]) => `${WORDS[kind]} ${milliseconds(seconds)}`).join(", ")}`;
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", said);
  box.title = said;
  bar.append(...parts.map(([kind, seconds]) => {
    const made = element("i", kind);
    made.style.flexGrow = seconds / total;
    return made;
  }));
  box.append(bar, element("span", "", milliseconds(total)));
  return box;
}

function draw() {
  $("ledger").hidden = newest.size === 0;
  $("ledger-rows").replaceChildren(...[...newest].reverse().map(row));
}

export function showLedger(event) {
  if (!event.ledger) return;
  newest.delete(event.request_id);
  newest.set(event.request_id, event.ledger);
  if (newest.size > MOST) newest.delete(newest.keys().next().value);
  draw();
}

// The server is gone.
export function forgetLedgers() {
  newest.clear();
  draw();
}
