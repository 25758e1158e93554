// The page: a playground over the public API, and a live strip fed by /events. Nothing internal is read.

import { showMap } from "/map.js";

const $ = (id) => document.getElementById(id);
const HISTORY = 240; // points of the sparkline, four a second
const SAMPLES = {
  chat: ["Write a function that counts words in a file", "Return the largest of a list of numbers", "Parse a date like 2026-01-31"],
  completion: ["def fibonacci(n):\n    ", "import os\n\ndef list_files(path):\n    ", "class Stack:\n    "],
};

const view = { state: "connecting", model: "", phases: new Map(), messages: [], turn: null };

// --- Settings -------------------------------------------------------------------------------------------------

const settings = {
  get mode() { return $("settings").elements.mode.value; },
  get body() {
    const seed = $("seed").value;
    return {
      temperature: Number($("temperature").value),
      max_tokens: Math.max(1, Math.floor(Number($("max-tokens").value)) || 256),
      ...(seed === "" ? {} : { seed: Math.floor(Number(seed)) }),
    };
  },
};

function rememberSettings() {
  const kept = Object.fromEntries(new FormData($("settings")));
  try { localStorage.setItem("tenon.settings", JSON.stringify(kept)); } catch { /* private windows keep nothing */ }
}

function restoreSettings() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem("tenon.settings") ?? "{}"); } catch { /* unreadable: the defaults hold */ }
  for (const [name, value] of Object.entries(kept)) {
    const element = $("settings").elements[name];
    if (element) element.value = value;
  }
  showSettings();
}

function showSettings() {
  $("temperature-out").textContent = Number($("temperature").value).toFixed(2);
  const completing = settings.mode === "completion";
  $("composer").classList.toggle("mono", completing);
  $("input").placeholder = completing ? "Text to continue" : "Message";
  $("new").textContent = completing ? "Clear" : "New chat";
  showEmpty();
}

// --- The conversation -------------------------------------------------------------------------------------------

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Text with ``` fences and `code`: built from nodes, never parsed as HTML.
function fill(target, text) {
  const nodes = [];
  text.split("```").forEach((part, i) => {
    if (i % 2) {
      const pre = element("pre");
      pre.append(element("code", "", part.replace(/^[\w+-]*\n/, "").replace(/\n$/, "")));
      nodes.push(pre);
      return;
    }
    const prose = i ? part.replace(/^\n/, "") : part;
    prose.split(/`([^`\n]+)`/).forEach((piece, j) => {
      if (piece) nodes.push(j % 2 ? element("code", "", piece) : document.createTextNode(piece));
    });
  });
  target.replaceChildren(...nodes);
}

function addMessage(kind, text) {
  const box = element("article", `message ${kind}`);
  const body = element("div", "text");
  if (kind === "completion") body.append(element("span", "given", text), element("span", "made"));
  else fill(body, text);
  box.append(body);
  const meta = element("div", "meta");
  if (kind !== "user") box.append(meta);
  $("log").append(box);
  return { box, body, meta };
}

const nearEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;
const toEnd = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };

// --- Asking -----------------------------------------------------------------------------------------------------

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
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function failure(response) {
  try { return (await response.json()).error.message; } catch { return `HTTP ${response.status}`; }
}

async function ask(prompt) {
  const completing = settings.mode === "completion";
  const started = performance.now();
  const turn = { abort: new AbortController(), text: "", first: null, tokens: 0 };
  const conversation = view.messages; // another one once "New chat" is pressed
  view.turn = turn;
  if (!completing) {
    conversation.push({ role: "user", content: prompt });
    addMessage("user", prompt);
  }
  const shown = addMessage(completing ? "completion" : "assistant", completing ? prompt : "");
  const target = completing ? shown.body.lastChild : shown.body;
  shown.box.classList.add("busy");
  showComposer();
  toEnd();

  let frame = 0;
  const draw = () => {
    frame = 0;
    const follow = nearEnd();
    if (completing) target.textContent = turn.text;
    else fill(target, turn.text);
    showMeta(shown.meta, turn, started, null);
    if (follow) toEnd();
  };
  let ended = "";
  try {
    const response = await fetch(completing ? "/v1/completions" : "/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...authorization() },
      signal: turn.abort.signal,
      body: JSON.stringify({
        model: view.model,
        ...(completing ? { prompt } : { messages: conversation }),
        ...settings.body,
        stream: true,
        stream_options: { include_usage: true, continuous_usage_stats: true },
      }),
    });
    if (response.status === 401) lock();
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of serverEvents(response)) {
      const choice = event.choices[0];
      if (event.usage) turn.tokens = event.usage.completion_tokens;
      if (!choice) continue;
      turn.text += (completing ? choice.text : choice.delta.content) ?? "";
      if (turn.first === null && turn.tokens > 0) turn.first = performance.now();
      if (choice.finish_reason === "length") ended = "cut at max tokens";
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    ended = error.name === "AbortError" ? "stopped" : error;
  }
  cancelAnimationFrame(frame);
  draw();
  shown.box.classList.remove("busy");
  if (!completing && ended instanceof Error && !turn.text) conversation.pop();
  else if (!completing) conversation.push({ role: "assistant", content: turn.text });
  showMeta(shown.meta, turn, started, ended);
  view.turn = null;
  showComposer();
  if (nearEnd()) toEnd();
}

function showMeta(meta, turn, started, ended) {
  const parts = [];
  if (turn.first !== null) {
    const seconds = (performance.now() - turn.first) / 1000;
    turn.rate = ended === null || turn.rate === undefined ? (turn.tokens - 1) / Math.max(seconds, 1e-3) : turn.rate;
    parts.push(element("span", "", `${turn.tokens} tokens`));
    if (turn.tokens > 1) parts.push(element("span", "", `${turn.rate.toFixed(turn.rate < 10 ? 1 : 0)} tokens/s`));
    parts.push(element("span", "", `first token ${milliseconds((turn.first - started) / 1000)}`));
  }
  if (ended instanceof Error) parts.push(element("span", "error", ended.message));
  else if (ended) parts.push(element("span", "", ended));
  if (ended !== null && turn.text) {
    const copy = element("button", "", "Copy");
    copy.type = "button";
    copy.onclick = async () => {
      try { await navigator.clipboard.writeText(turn.text); copy.textContent = "Copied"; } catch { copy.textContent = "Copying is not allowed here"; }
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    };
    parts.push(copy);
  }
  meta.replaceChildren(...parts);
}

// --- What the server says of itself -------------------------------------------------------------------------------

const rates = new Array(HISTORY).fill(0);
const samples = [];
const firsts = [];
let stats = null;

const on = {
  state(event) {
    view.state = event.state;
    view.reason = event.reason;
    view.model = event.model;
    $("model").textContent = event.model;
    document.title = `${event.model} · Tenon`;
    showState();
  },
  phase(event) {
    for (const phase of view.phases.values()) if (phase.name !== event.name) phase.fraction = 1;
    view.phases.set(event.name, event);
    showPhases();
  },
  stats(event) {
    stats = event;
    samples.push([performance.now(), event.output_tokens]);
    const held = event.blocks_held / event.blocks_total;
    $("kv-held").style.width = `${held * 100}%`;
    $("kv-cached").style.width = `${(event.blocks_cached / event.blocks_total) * 100}%`;
    $("kv-text").textContent = `${(held * 100).toFixed(held < 0.1 && held > 0 ? 1 : 0)} %`;
    $("running").textContent = event.running;
    $("waiting").textContent = event.waiting;
    const asked = event.prompt_tokens;
    $("hits").textContent = asked ? `${((event.cached_tokens / asked) * 100).toFixed(0)} %` : "–";
    $("saved").textContent = event.prompt_flops ? `${((event.saved_flops / event.prompt_flops) * 100).toFixed(0)} %` : "–";
    $("holes").textContent = event.holes.toLocaleString("en");
  },
  residency: showMap,
  first(event) {
    firsts.push(event.ttft_s);
    if (firsts.length > 15) firsts.shift();
    const sorted = [...firsts].sort((a, b) => a - b);
    $("ttft").textContent = milliseconds(sorted[sorted.length >> 1]);
  },
};

const milliseconds = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(1)} s`);

// Tokens a second over the last second, so that an engine that has fallen silent is seen to be silent.
function sampleRate() {
  const now = performance.now();
  while (samples.length > 1 && samples[1][0] < now - 1000) samples.shift();
  const [at, count] = samples[0] ?? [now, 0];
  const latest = samples.at(-1) ?? [now, 0];
  const seconds = Math.max(now - Math.max(at, now - 1000), 250) / 1000;
  const idle = !stats || (stats.running === 0 && latest[0] < now - 1000);
  rates.push(idle ? 0 : Math.max(0, latest[1] - count) / seconds);
  rates.shift();
  const rate = rates.at(-1);
  $("rate").textContent = rate >= 100 || rate === 0 ? Math.round(rate).toLocaleString("en") : rate.toFixed(1);
  const top = Math.max(10, ...rates) * 1.15;
  const points = rates.map((r, i) => `${((i / (HISTORY - 1)) * 240).toFixed(1)},${(47 - (r / top) * 46).toFixed(1)}`);
  $("spark-line").setAttribute("d", `M${points.join("L")}`);
  $("spark-area").setAttribute("d", `M0,48L${points.join("L")}L240,48Z`);
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
    ready: settings.mode === "completion" ? ["Start a text", "The model continues it."] : ["Say something", `${view.model} runs on this machine.`],
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
    const response = await fetch("/events?residency=1", { headers: authorization(), cache: "no-store" });
    if (response.status === 401) { lock(); return; }
    if (response.status === 403) { await unwatched(); return; }
    if (response.ok) for await (const event of serverEvents(response)) if (event.v === 1) on[event.kind]?.(event);
  } catch { /* the server is gone, which is told here */ }
  if (view.state !== "dead") view.state = "offline";
  stats = null;
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

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 200)}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (view.turn) { view.turn.abort.abort(); return; }
  const completing = settings.mode === "completion";
  const text = completing ? $("input").value : $("input").value.trim();
  if (text.trim() === "" || view.state !== "ready") return;
  $("input").value = "";
  grow();
  ask(text);
});
$("input").addEventListener("input", () => { grow(); showComposer(); });
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !view.turn) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("new").addEventListener("click", () => {
  view.turn?.abort.abort();
  view.messages = [];
  $("log").replaceChildren();
  $("input").focus();
});
$("toggle").addEventListener("click", () => {
  $("toggle").setAttribute("aria-expanded", String($("side").classList.toggle("open")));
});
$("settings").addEventListener("input", () => { rememberSettings(); showSettings(); });
$("settings").addEventListener("submit", (event) => event.preventDefault());

$("endpoint").textContent = `${location.origin}/v1`;
restoreSettings();
showState();
sampleRate();
setInterval(sampleRate, 250);
watch();
