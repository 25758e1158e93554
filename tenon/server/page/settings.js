// The form of settings: what it asks of a request, what is wrong with it, and keeping it.

import { $ } from "/dom.js";

const KEPT = "tenon.settings";
const TOP_LOGPROBS = 5;
const form = $("settings");
const named = () => [...form.elements].filter((it) => it.name && it.type !== "radio");

export const settings = {
  get mode() { return form.elements.mode.value; },
  get completing() { return this.mode === "completion"; },
  // The fields of a request; what is empty is left to the model's own defaults.
  get body() {
    const body = {};
    for (const input of form.querySelectorAll("input[type=number], input[type=range]")) {
      if (input.value !== "") body[input.name] = Number(input.value);
    }
    const stops = $("stop").value.split("\n").filter((line) => line !== "").map(unescaped);
    if (stops.length) body.stop = stops;
    if ($("logprobs").checked) Object.assign(body, this.completing ? { logprobs: TOP_LOGPROBS } : { logprobs: true, top_logprobs: TOP_LOGPROBS });
    if (!$("speculative-box").hidden && !$("speculative").checked) body.speculative = false;
    return this.completing ? body : { ...body, ...this.format };
  },
  get format() {
    const type = $("format").value;
    if (type === "json_object") return { response_format: { type } };
    if (type === "json_schema") return { response_format: { type, json_schema: { name: "answer", schema: parsed($("schema").value).schema, strict: true } } };
    return {};
  },
};

// A stop string is a line of its own, so that line ends in it are written \n.
const unescaped = (line) => line.replace(/\\([nt\\])/g, (_, it) => ({ n: "\n", t: "\t", "\\": "\\" })[it]);

export function parsed(text) {
  if (text.trim() === "") return { wrong: "The schema is empty; write one, or choose another kind of answer." };
  let schema;
  try { schema = JSON.parse(text); } catch (error) { return { wrong: `The schema is not valid JSON: ${error.message}` }; }
  if (schema === null || typeof schema !== "object" || Array.isArray(schema)) return { wrong: 'The schema must be a JSON object, such as {"type": "object"}.' };
  return { schema };
}

const label = (input) => form.querySelector(`label[for="${input.id}"] > span`).textContent;

function wrongNumber(input) {
  if (input.validity.valid) return "";
  const kind = input.step === "1" ? "a whole number" : "a number";
  return `${label(input)} must be ${kind} ${input.max ? `from ${input.min} to ${input.max}` : `of at least ${input.min}`}.`;
}

const usesSchema = () => !settings.completing && $("format").value === "json_schema";

// The first thing that cannot be sent, or null: { input, said }.
export function firstWrong() {
  for (const input of form.querySelectorAll("input[type=number]")) {
    const said = wrongNumber(input);
    if (said) return { input, said };
  }
  const said = usesSchema() ? parsed($("schema").value).wrong : undefined;
  return said ? { input: $("schema"), said } : null;
}

// Brings an input into sight, wherever it is folded away, and into focus.
export function reveal(input) {
  for (let fold = input.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  openPanel(true);
  input.focus();
}

export function openPanel(open) {
  $("side").classList.toggle("open", open);
  $("toggle").setAttribute("aria-expanded", String(open));
}

function show() {
  $("temperature-out").textContent = Number($("temperature").value).toFixed(2);
  for (const input of form.querySelectorAll("input[type=number]")) input.setAttribute("aria-invalid", String(!input.validity.valid));
  $("format-box").hidden = settings.completing;
  $("schema-box").hidden = !usesSchema();
  const wrong = usesSchema() ? parsed($("schema").value).wrong : undefined;
  $("schema").setAttribute("aria-invalid", String(wrong !== undefined));
  $("schema-said").textContent = wrong ?? "";
}

function remember() {
  const kept = { mode: settings.mode };
  for (const it of named()) kept[it.name] = it.type === "checkbox" ? it.checked : it.value;
  try { localStorage.setItem(KEPT, JSON.stringify(kept)); } catch { /* private windows keep nothing */ }
}

function restore() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}") ?? {}; } catch { /* unreadable: the defaults hold */ }
  if (["chat", "completion"].includes(kept.mode)) form.elements.mode.value = kept.mode;
  for (const it of named()) {
    if (!(it.name in kept)) continue;
    if (it.type === "checkbox") it.checked = kept[it.name] === true;
    else it.value = kept[it.name];
  }
  if ($("format").value === "") $("format").value = "text";
  $("more").open = [...$("more").querySelectorAll("input, textarea")].some((it) => it.value !== "");
}

// `changed` is called now, and whenever something has been set.
export function startSettings(changed) {
  const told = () => { show(); changed(); };
  form.addEventListener("input", () => { remember(); told(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => queueMicrotask(() => { remember(); told(); }));
  $("toggle").addEventListener("click", () => openPanel(!$("side").classList.contains("open")));
  restore();
  told();
}
