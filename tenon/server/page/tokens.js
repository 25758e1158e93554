// An answer token by token: each tinted by how unlikely it was, and what else could have come in a box beside it.

import { $, element } from "/dom.js";

const RARE = 0.1; // below it a token is underlined too, for those who do not see the tint

// The tokens of one chunk of either endpoint: { bytes or null, name, logprob, top: [[name, logprob], …] }.
export function entriesOf(choice) {
  const told = choice.logprobs;
  if (!told) return [];
  if (told.content) {
    return told.content.map((it) => ({ bytes: it.bytes, name: it.token, logprob: it.logprob, top: it.top_logprobs.map((other) => [other.token, other.logprob]) }));
  }
  return (told.tokens ?? []).map((name, i) => ({ bytes: null, name, logprob: told.token_logprobs[i], top: Object.entries(told.top_logprobs?.[i] ?? {}) }));
}

export function percent(probability) {
  const share = probability * 100;
  if (share < 0.1) return "<0.1 %";
  return `${share >= 99.95 ? 100 : share.toFixed(1)} %`;
}

// Blanks as signs, so that tokens made of them can be told apart.
export const visible = (name) => name.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\r/g, "␍").replace(/\t/g, "⇥") || "(nothing)";

// `box` is where the tokens go; `add` appends some, and `perplexity` is that of all so far.
export function tokenView() {
  const box = element("div", "tokens");
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-orientation", "horizontal");
  box.setAttribute("aria-label", "The answer by token; arrow keys move");
  const entries = new WeakMap();
  const decoder = new TextDecoder();
  let sum = 0;
  let count = 0;

  function made(entry) {
    // A token may hold a part of a character: the one that completes it shows it.
    const text = entry.bytes ? decoder.decode(Uint8Array.from(entry.bytes), { stream: true }) : entry.name;
    const probability = Math.exp(entry.logprob ?? 0);
    const span = element("span", "token", text || "·");
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.setAttribute("aria-label", `${visible(entry.name)}, ${percent(probability)}`);
    span.tabIndex = count === 0 ? 0 : -1;
    span.style.setProperty("--doubt", (1 - probability).toFixed(3));
    if (probability < RARE) span.classList.add("rare");
    entries.set(span, entry);
    sum += entry.logprob ?? 0;
    count += 1;
    return span;
  }

  const tokenAt = (event) => (event.target instanceof Element ? event.target.closest(".token") : null);
  box.addEventListener("pointerover", (event) => { const token = tokenAt(event); if (token) open(token, entries.get(token)); });
  box.addEventListener("pointerleave", () => {
    const focused = box.querySelector(".token:focus");
    if (focused) open(focused, entries.get(focused)); else close();
  });
  box.addEventListener("focusin", (event) => {
    const token = tokenAt(event);
    if (!token) return;
    for (const other of box.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    token.tabIndex = 0;
    open(token, entries.get(token));
  });
  box.addEventListener("focusout", close);
  box.addEventListener("keydown", (event) => {
    const token = tokenAt(event);
    const to = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const next = to ? token?.[to] : { Home: box.firstElementChild, End: box.lastElementChild }[event.key];
    if (event.key === "Escape") close();
    if (!to && !next) return;
    event.preventDefault();
    next?.focus();
  });

  return {
    box,
    add(more) { box.append(...more.map(made)); },
    get perplexity() { return Math.exp(-sum / Math.max(count, 1)); },
  };
}

// --- The box beside a token -------------------------------------------------------------------------------------

const popover = $("alternatives");
let shown = null;

function row(name, logprob, taken) {
  const item = element("li", taken ? "taken" : "");
  const bar = element("i");
  bar.style.width = `${Math.exp(logprob) * 100}%`;
  const track = element("span", "track");
  track.append(bar);
  item.append(element("code", "", visible(name)), track, element("span", "share", percent(Math.exp(logprob))));
  return item;
}

function open(token, entry) {
  if (shown === token) return;
  close();
  shown = token;
  token.setAttribute("aria-selected", "true");
  token.setAttribute("aria-describedby", "alternatives");
  if (entry.logprob === null) {
    popover.replaceChildren(element("p", "", "The first token of a text has no probability."));
  } else {
    const ranked = entry.top.some(([name]) => name === entry.name) ? [...entry.top] : [...entry.top, [entry.name, entry.logprob]];
    ranked.sort((a, b) => b[1] - a[1]);
    const list = element("ul");
    list.append(...ranked.map(([name, logprob]) => row(name, logprob, name === entry.name)));
    popover.replaceChildren(element("p", "", `log-probability ${entry.logprob.toFixed(3).replace("-", "−")}`), list);
  }
  popover.hidden = false;
  place();
}

export function close() {
  shown?.setAttribute("aria-selected", "false");
  shown?.removeAttribute("aria-describedby");
  shown = null;
  popover.hidden = true;
}

// Under the token, or over it where there is no room; never beyond the window, and gone with its token.
function place() {
  if (!shown) return;
  const at = shown.getClientRects()[0];
  const view = $("scroll").getBoundingClientRect();
  if (!at || at.bottom < view.top || at.top > view.bottom) { close(); return; }
  const { width, height } = popover.getBoundingClientRect();
  const below = at.bottom + 6 + height <= innerHeight;
  popover.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  popover.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - height - 6)}px`;
}

$("scroll").addEventListener("scroll", place, { passive: true });
addEventListener("resize", place);
