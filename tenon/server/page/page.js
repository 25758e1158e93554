// The page: a playground over the public API, and a live strip fed by /events. Nothing internal is read.
//
// dom: elements; settings: the form; answer, tokens: one message; live, ledger, map, trees: what the server says of itself.
// This file routes between them: asking, the server's state, keys.

import { Answer, Told, addUser } from "/answer.js";
import { $, element } from "/dom.js";
import { forgetLedgers, showLedger } from "/ledger.js";
import { forget, showFirst, showStats, startLive } from "/live.js";
import { showMap } from "/map.js";
import { firstWrong, reveal, settings, startSettings } from "/settings.js";
import { close as closeAlternatives, entriesOf } from "/tokens.js";
import { forgetTrees, lookAt, showGuesses, showTrees } from "/trees.js";

const SAMPLES = {
  chat: ["Write a function that counts words in a file", "Return the largest of a list of numbers", "Parse a date like 2026-01-31"],
  completion: ["def fibonacci(n):\n    ", "import os\n\ndef list_files(path):\n    ", "class Stack:\n    "],
};

const view = { state: "connecting", reason: "", model: "", phases: new Map(), messages: [], turn: null };

// --- Asking -----------------------------------------------------------------------------------------------------

const nearEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;
const toEnd = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };

async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      const data = block.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Told(event.error.message);
      yield event;
    }
  }
}

async function failure(response) {
  try { return new Told((await response.json()).error.message); } catch { return new Told(`HTTP ${response.status}`); }
}

// False where something is wrong that the server need not be asked about; it is said above the message.
function sound() {
  const wrong = firstWrong();
  $("refusal").hidden = wrong === null;
  $("refusal").textContent = wrong?.said ?? "";
  if (wrong) reveal(wrong.input);
  return wrong === null;
}

// False where it was not sent.
function ask(prompt) {
  if (!sound()) return false;
  const completing = settings.completing;
  const conversation = view.messages; // another one once "New chat" is pressed
  if (!completing) conversation.push({ role: "user", content: prompt });
  const question = completing ? null : addUser(prompt);
  const answer = new Answer(completing ? prompt : null);
  const abort = new AbortController();
  const body = {
    model: view.model,
    ...(completing ? { prompt } : { messages: conversation }),
    ...settings.body,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  view.turn = abort;
  showComposer();
  toEnd();
  stream(completing ? "/v1/completions" : "/v1/chat/completions", body, abort.signal, answer).then((ended) => {
    const follow = nearEnd();
    answer.end(ended);
    view.turn = null;
    if (!completing) settle(conversation, prompt, answer, ended, question);
    showComposer();
    if (follow) toEnd();
  });
  return true;
}

// Reads an answer to its end; returns the remark or the error that it ended with.
async function stream(path, body, signal, answer) {
  let frame = 0;
  let ended = "";
  let id = null;
  const draw = () => {
    frame = 0;
    const follow = nearEnd();
    answer.draw();
    if (follow) toEnd();
  };
  try {
    const headers = { "content-type": "application/json", ...authorization() };
    const response = await fetch(path, { method: "POST", headers, signal, body: JSON.stringify(body) });
    if (response.status === 401) lock();
    if (!response.ok) throw await failure(response);
    for await (const event of serverEvents(response)) {
      if (event.id && id === null) lookAt(id = event.id);
      const choice = event.choices[0];
      const delta = choice?.delta ?? {};
      answer.take(choice?.text ?? delta.content ?? "", delta.reasoning_content ?? "", choice ? entriesOf(choice) : [], event.usage?.completion_tokens);
      if (choice?.finish_reason === "length") ended = "cut at max tokens";
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    ended = error.name === "AbortError" ? "stopped" : error;
  }
  cancelAnimationFrame(frame);
  return ended;
}

// A message that got no answer is no part of the conversation: it goes back to where it can be sent again.
function settle(conversation, prompt, answer, ended, question) {
  if (!(ended instanceof Error) || answer.text) {
    conversation.push({ role: "assistant", content: answer.text });
    return;
  }
  conversation.pop();
  question.classList.add("unsent");
  if (conversation === view.messages && $("input").value === "") {
    $("input").value = prompt;
    grow();
  }
}

// --- What the server says of itself -------------------------------------------------------------------------------

const on = {
  state(event) {
    const awoke = event.state === "ready" && view.state !== "ready";
    view.state = event.state;
    view.reason = event.reason;
    view.model = event.model;
    $("model").textContent = event.model;
    $("model-name").textContent = event.model;
    document.title = `${event.model} · Tenon`;
    showState();
    if (awoke) showContext().catch(() => { /* said again at the next state */ });
  },
  phase(event) {
    for (const phase of view.phases.values()) if (phase.name !== event.name) phase.fraction = 1;
    view.phases.set(event.name, event);
    showPhases();
  },
  stats(event) {
    showStats(event);
    showGuesses(event.guesses ?? null);
  },
  trees: showTrees,
  residency: showMap,
  first: showFirst,
  finished: showLedger,
  ledger: showLedger,
};

async function showContext() {
  const models = await (await fetch("/v1/models", { headers: authorization() })).json();
  const length = models.data?.[0]?.max_model_len;
  $("context").textContent = length ? `${length.toLocaleString("en")} tokens` : "–";
}

function showState() {
  $("state").dataset.state = view.state;
  $("state").lastElementChild.textContent = view.state;
  $("state").title = view.reason ?? "";
  showPhases();
  showEmpty();
  showComposer();
}

function showPhases() {
  const list = $("phases");
  list.hidden = view.state !== "loading" || view.phases.size === 0;
  list.replaceChildren(...[...view.phases.values()].map((phase) => {
    const item = element("li", phase.fraction >= 1 ? "done" : "");
    const track = element("span", "track");
    const fillBar = element("i");
    fillBar.style.width = `${Math.max(phase.fraction, 0.03) * 100}%`;
    track.append(fillBar);
    item.append(element("span", "", phase.name), track);
    if (phase.detail) item.append(element("span", "detail", phase.detail));
    return item;
  }));
}

function showEmpty() {
  const words = {
    connecting: ["Connecting", ""],
    loading: ["Loading the model", "The API answers as soon as it is ready."],
    ready: settings.completing ? ["Start a text", "The model continues it."] : ["Say something", `${view.model} runs on this machine.`],
    restarting: ["Starting the engine again", "What was in flight will go on."],
    draining: ["Shutting down", "Requests in flight are being finished."],
    dead: ["The engine has stopped", view.reason ?? ""],
    locked: ["This server wants a key", view.reason ?? ""],
    offline: ["No connection", "The server does not answer; trying again."],
  }[view.state];
  $("greeting").textContent = words[0];
  $("hint").textContent = words[1];
  $("chips").hidden = view.state !== "ready";
  $("lock").hidden = view.state !== "locked";
  $("empty").classList.toggle("asks", view.state === "locked");
  $("chips").replaceChildren(...SAMPLES[settings.mode].map((text) => {
    const chip = element("button", "", text.trim().split("\n").at(-1));
    chip.type = "button";
    chip.onclick = () => ask(text);
    return chip;
  }));
}

function showComposer() {
  const ready = view.state === "ready";
  const send = $("send");
  $("input").disabled = !ready;
  send.classList.toggle("stop", view.turn !== null);
  send.textContent = view.turn ? "Stop" : "Send";
  send.disabled = !view.turn && (!ready || $("input").value.trim() === "");
}

async function watch() {
  try {
    const response = await fetch("/events?residency=1&trees=1", { headers: authorization(), cache: "no-store" });
    if (response.status === 401) { lock(); return; }
    if (response.status === 403) { await unwatched(); return; }
    if (response.ok) for await (const event of serverEvents(response)) if (event.v === 1) on[event.kind]?.(event);
  } catch { /* the server is gone, which is told here */ }
  if (view.state !== "dead") view.state = "offline";
  forget();
  forgetTrees();
  forgetLedgers();
  showState();
  setTimeout(watch, 2000);
}

// --- Keys ---------------------------------------------------------------------------------------------------------

function authorization() {
  const key = sessionStorage.getItem("tenon.key");
  return key ? { authorization: `Bearer ${key}` } : {};
}

function lock() {
  view.reason = sessionStorage.getItem("tenon.key") ? "The key that was given is not known here." : "";
  sessionStorage.removeItem("tenon.key");
  view.state = "locked";
  showState();
  $("key").focus();
}

// A key that may not watch: the page talks, and looks whether the server is ready.
async function unwatched() {
  const models = await (await fetch("/v1/models", { headers: authorization() })).json();
  const ready = await fetch("/readyz");
  on.state({ state: ready.ok ? "ready" : "loading", reason: "", model: models.data[0].id });
  setTimeout(() => unwatched().catch(watch), 5000);
}

$("lock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("tenon.key", $("key").value.trim());
  $("key").value = "";
  view.state = "connecting";
  showState();
  watch();
});

// --- Wiring -------------------------------------------------------------------------------------------------------

function showMode() {
  $("composer").classList.toggle("mono", settings.completing);
  $("input").placeholder = settings.completing ? "Text to continue" : "Message";
  $("new").textContent = settings.completing ? "Clear" : "New chat";
  if (!$("refusal").hidden && firstWrong() === null) $("refusal").hidden = true;
  showEmpty();
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 200)}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (view.turn) { view.turn.abort(); return; }
  const text = settings.completing ? $("input").value : $("input").value.trim();
  if (text.trim() === "" || view.state !== "ready") return;
  if (!ask(text)) return;
  $("input").value = "";
  grow();
  showComposer();
});
$("input").addEventListener("input", () => { grow(); showComposer(); });
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !view.turn) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("new").addEventListener("click", () => {
  view.turn?.abort();
  view.messages = [];
  $("log").replaceChildren();
  closeAlternatives();
  $("input").focus();
});
$("endpoint").textContent = `${location.origin}/v1`;
showState();
startSettings(showMode);
startLive();
watch();
