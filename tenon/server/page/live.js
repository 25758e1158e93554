// The live figures: rate, cache, queue and first tokens, from `stats` and `first` events.

import { $, milliseconds } from "/dom.js";

const HISTORY = 240; // points of the sparkline, four a second
const rates = new Array(HISTORY).fill(0);
const samples = [];
const firsts = [];
let stats = null;

export function showStats(event) {
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
}

export function showFirst(event) {
  firsts.push(event.ttft_s);
  if (firsts.length > 15) firsts.shift();
  const sorted = [...firsts].sort((a, b) => a - b);
  $("ttft").textContent = milliseconds(sorted[sorted.length >> 1]);
}

// The server is gone; another one counts from nothing.
export function forget() {
  stats = null;
  samples.length = 0;
}

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

export function startLive() {
  sampleRate();
  setInterval(sampleRate, 250);
}
