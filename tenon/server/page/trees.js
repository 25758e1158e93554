// What was guessed ahead of an answer and what came of it: the newest trees, and how far guesses are right. Draws `trees`
// events, of the request that is looked at, and the totals of `stats`.

import { $, element } from "/dom.js";
import { percent, visible } from "/tokens.js";

const SVG = "http://www.w3.org/2000/svg";
const MOST_SEQUENCES = 64;
const MOST_TREES = 12; // of a sequence
const MOST_CHARS = 12; // of a token's text
const CHAR = 6.4; // width of one at the size that the style sheet gives them
const PAD = 5;
const GAP = 14; // between a node and what follows it
const HEIGHT = 17;
const ROW = 22;

const texts = new Map(); // by token
const sequences = new Map(); // by request and sibling, the one first that was heard of longest ago
let totals = null;
let mine = null; // the page's own newest answer
let frame = 0;

const keyOf = (request, index) => `${request} ${index}`;

// An answer of this page's has begun: by its id the engine calls the request.
export function lookAt(id) {
  mine = keyOf(`${id.slice(id.indexOf("-") + 1)}/0`, 0);
  draw();
}

export function showGuesses(guesses) {
  totals = guesses;
  $("guesses").hidden = $("speculative-box").hidden = guesses === null;
  draw();
}

export function showTrees(event) {
  for (const [token, text] of Object.entries(event.texts)) texts.set(Number(token), text);
  for (const tree of event.trees) take(tree);
  draw();
}

// The server is gone; another one guesses anew.
export function forgetTrees() {
  sequences.clear();
  totals = mine = null;
  draw();
}

function take(tree) {
  const key = keyOf(tree.request_id, tree.index);
  const known = sequences.get(key) ?? { trees: [], n: 0, nodes: 0, accepted: 0, reached: [], accepted_at: [], end: 0 };
  if (tree.n_tokens < known.end) return; // told again, since somebody else has come to read
  sequences.delete(key);
  sequences.set(key, known);
  if (sequences.size > MOST_SEQUENCES) sequences.delete(sequences.keys().next().value);
  known.end = tree.n_tokens + tree.path.length + 1;
  known.trees.unshift(tree);
  known.trees.length = Math.min(known.trees.length, MOST_TREES);
  known.n += 1;
  known.nodes += tree.tokens.length;
  known.accepted += tree.path.length;
  const right = new Set([-1, ...tree.path]);
  const depths = depthsOf(tree);
  const deepest = Math.max(...depths.filter((_, i) => right.has(tree.parents[i])));
  for (let d = 0; d < deepest; d += 1) {
    known.reached[d] = (known.reached[d] ?? 0) + 1;
    known.accepted_at[d] = (known.accepted_at[d] ?? 0) + (d < tree.path.length ? 1 : 0);
  }
}

function depthsOf(tree) {
  const depths = [];
  tree.parents.forEach((parent, i) => { depths[i] = parent < 0 ? 1 : depths[parent] + 1; });
  return depths;
}

// --- Drawing ------------------------------------------------------------------------------------------------------

// Once a frame at most: events may come faster.
function draw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (totals === null) return;
    const chosen = $("guesses-of").value;
    const key = sequences.has(chosen) ? chosen : sequences.has(mine) ? mine : [...sequences.keys()].at(-1);
    const shown = sequences.get(key);
    offer(chosen);
    const asked = totals.nodes ? `${Math.round((totals.accepted / totals.nodes) * 100)} % right of ${totals.nodes.toLocaleString("en")}` : "–";
    $("guesses-text").textContent = asked;
    $("guesses-said").textContent = shown ? `${(shown.accepted / shown.n).toFixed(1)} of ${(shown.nodes / shown.n).toFixed(1)} a step` : "";
    $("guesses-depths").replaceChildren(...bars(shown ?? totals));
    $("guesses-trees").replaceChildren(...(shown?.trees ?? []).map(picture));
  });
}

// The sequences there are to look at. While the list is open it stays as it is.
function offer(chosen) {
  const select = $("guesses-of");
  const keys = [...sequences.keys()].reverse();
  if (document.activeElement === select || keys.join() === select.dataset.keys) return;
  select.dataset.keys = keys.join();
  const options = keys.map((key) => {
    const [request, index] = key.split(" ");
    return [key, `${request.slice(0, 14)}${index === "0" ? "" : ` #${index}`}`];
  });
  select.replaceChildren(...[["", "the newest"], ...options].map(([value, text]) => {
    const option = element("option", "", text);
    option.value = value;
    return option;
  }));
  select.value = sequences.has(chosen) ? chosen : "";
}

// By tokens ahead, how many of the trees that had a guess there were right.
function bars(counts) {
  return counts.reached.filter((n) => n > 0).map((n, d) => {
    const share = counts.accepted_at[d] / n;
    const said = `${d + 1} ${d ? "tokens" : "token"} ahead: ${percent(share)} of ${n.toLocaleString("en")} right`;
    const bar = element("i");
    bar.style.height = `${Math.max(share * 100, 2)}%`;
    const column = element("span");
    column.title = said;
    column.setAttribute("role", "img");
    column.setAttribute("aria-label", said);
    column.append(bar);
    return column;
  });
}

const wide = (text) => [...text].reduce((n, c) => n + (c > "\u2e7f" ? 2 : 1), 0) * CHAR + 2 * PAD;

function label(token) {
  const chars = [...visible(texts.get(token) ?? String(token))];
  return chars.length > MOST_CHARS ? `${chars.slice(0, MOST_CHARS - 1).join("")}…` : chars.join("");
}

// Where each node goes: { depth, row, text, kind, p, up }. What came true stands in one row, with what came after it.
export function layout(tree) {
  const children = new Map();
  const add = (parent, child) => children.set(parent, [...(children.get(parent) ?? []), child]);
  const right = new Set(tree.path);
  tree.tokens.forEach((token, i) => add(tree.parents[i], { token, i, p: tree.probabilities[i], kind: right.has(i) ? "right" : "wrong" }));
  add(tree.path.at(-1) ?? -1, { token: tree.next, i: null, kind: "next" });
  const placed = [];
  let rows = 0;
  const place = (it, depth, row, up) => {
    const node = { depth, row, up, kind: it.kind, p: it.p, text: label(it.token) };
    placed.push(node);
    const rank = { right: 2, next: 2, wrong: 0 };
    const below = it.i === null ? [] : [...(children.get(it.i) ?? [])];
    below.sort((a, b) => rank[b.kind] - rank[a.kind] || b.p - a.p);
    below.forEach((child, k) => place(child, depth + 1, k ? (rows += 1) : row, node));
  };
  place({ token: tree.root, i: -1, kind: "root" }, 0, 0, null);
  return placed;
}

function part(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function picture(tree) {
  const nodes = layout(tree);
  const widths = [];
  for (const node of nodes) widths[node.depth] = Math.max(widths[node.depth] ?? 0, wide(node.text));
  const lefts = [1];
  widths.forEach((width, depth) => { lefts[depth + 1] = lefts[depth] + width + GAP; });
  const middle = (node) => node.row * ROW + HEIGHT / 2 + 1;
  const width = lefts.at(-1) - GAP + 1;
  const height = (Math.max(...nodes.map((node) => node.row)) + 1) * ROW - (ROW - HEIGHT) + 2;
  const svg = part("svg", { class: "tree", width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  const line = nodes.filter((node) => node.kind === "right").map((node) => node.text).join("");
  svg.setAttribute("aria-label", `After ${tree.n_tokens} tokens ${tree.path.length} of ${tree.tokens.length} guesses were right${line ? `: ${line}` : ""}`);
  const links = nodes.filter((node) => node.up); // those of what did not come first, so that the others lie over them
  for (const node of [...links].sort((a, b) => (a.kind !== "wrong") - (b.kind !== "wrong"))) {
    const from = lefts[node.up.depth] + wide(node.up.text);
    const to = lefts[node.depth];
    const bend = to - GAP / 2;
    svg.append(part("path", { class: `link ${node.kind}`, d: `M${from},${middle(node.up)}H${bend - GAP / 2}C${bend},${middle(node.up)} ${bend},${middle(node)} ${to},${middle(node)}` }));
  }
  for (const node of nodes) {
    const box = part("g", { class: `node ${node.kind}`, transform: `translate(${lefts[node.depth]},${node.row * ROW + 1})` });
    const size = wide(node.text);
    if (node.kind !== "root") box.append(part("rect", { class: "box", width: size, height: HEIGHT, rx: 3 }));
    if (node.p !== undefined) box.append(part("rect", { class: "likely", y: HEIGHT - 2, width: size * node.p, height: 2 }));
    const text = part("text", { x: PAD, y: 12 });
    text.textContent = node.text;
    const title = part("title", {});
    title.textContent = { right: `right, thought ${percent(node.p ?? 0)} likely`, wrong: `not so, thought ${percent(node.p ?? 0)} likely`, next: "what came then", root: "the newest token before" }[node.kind];
    box.append(title, text);
    svg.append(box);
  }
  return svg;
}

$("guesses-of").addEventListener("change", (event) => { event.target.blur(); draw(); });
