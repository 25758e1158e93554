// One message of the log: its text, or its tokens, what the model thought before, its figures, and what went wrong.

import { $, button, element, fillText, milliseconds } from "/dom.js";
import { tokenView } from "/tokens.js";

// What a browser hands over within such a time of the first token came with it, and tells nothing of the rate.
const TOGETHER_MS = 15;

// A failure that the server told, in its own words.
export class Told extends Error {}

export function addUser(text) {
  const box = element("article", "message user");
  const body = element("div", "text");
  fillText(body, text);
  box.append(body);
  $("log").append(box);
  return box;
}

export class Answer {
  // `given` is the text that a completion goes on from; null in a chat.
  constructor(given) {
    this.text = "";
    this.thought = "";
    this.tokens = 0;
    this.started = performance.now();
    this.first = null;
    this.given = given;
    this.box = element("article", `message ${given === null ? "assistant" : "completion"} busy`);
    this.box.setAttribute("aria-busy", "true");
    this.body = element("div", "text");
    this.target = this.body;
    if (given !== null) {
      this.target = element("span", "made");
      this.body.append(element("span", "given", given), this.target);
    }
    this.meta = element("div", "meta");
    this.box.append(this.body, this.meta);
    this.view = null; // of tokens, once there are any with log-probabilities
    this.waiting = [];
    this.plain = false;
    $("log").append(this.box);
  }

  take(text, thought, entries, tokens) {
    this.text += text;
    this.thought += thought;
    this.waiting.push(...entries);
    if (tokens !== undefined) this.tokens = tokens;
    if (!this.tokens && !text && !thought) return;
    this.last = performance.now();
    this.first ??= this.last;
    if (this.last - this.first < TOGETHER_MS) this.base = { at: this.last, tokens: this.tokens };
  }

  draw() {
    if (this.thought) this.showThought();
    if (this.waiting.length) {
      this.view ??= this.makeView();
      this.view.add(this.waiting.splice(0));
    }
    if (!this.view || this.plain) {
      if (this.given === null) fillText(this.target, this.text);
      else this.target.textContent = this.text;
    }
    this.showMeta(null);
  }

  makeView() {
    const view = tokenView();
    this.target.hidden = true;
    this.target.after(view.box);
    return view;
  }

  // Open while there is nothing else to read, unless the reader has decided.
  showThought() {
    if (!this.thinking) {
      this.thinking = element("details", "thinking");
      this.thinking.open = true;
      const summary = element("summary", "", "Thinking");
      summary.addEventListener("click", () => { this.decided = true; });
      this.thinking.append(summary, element("div", "thought"));
      this.box.prepend(this.thinking);
    }
    this.thinking.lastChild.textContent = this.thought;
    if (this.text && !this.decided) { this.thinking.open = false; this.decided = true; }
  }

  // `ended`: a remark, an error, or nothing to say.
  end(ended) {
    this.draw();
    this.box.classList.remove("busy");
    this.box.removeAttribute("aria-busy");
    if (ended instanceof Error) this.showTrouble(ended);
    this.showMeta(ended);
  }

  showTrouble(error) {
    const trouble = element("div", "trouble");
    trouble.setAttribute("role", "alert");
    const partial = this.text || this.thought;
    trouble.append(element("b", "", partial ? "The answer ended early" : "No answer to this one"), element("p", "", said(error)));
    this.meta.before(trouble);
    if (!partial && this.given === null) this.body.hidden = true;
  }

  showMeta(ended) {
    const parts = [];
    if (this.first !== null && this.tokens > 0) {
      const rate = ((this.tokens - this.base.tokens) / (this.last - this.base.at)) * 1000;
      parts.push(element("span", "", `${this.tokens} tokens`));
      if (rate > 0) parts.push(element("span", "", `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`));
      parts.push(element("span", "", `first token ${milliseconds((this.first - this.started) / 1000)}`));
    }
    if (typeof ended === "string" && ended) parts.push(element("span", "", ended));
    if (ended !== null && this.view) parts.push(...this.aboutTokens());
    if (ended !== null && this.text) parts.push(this.copyButton());
    this.meta.replaceChildren(...parts);
  }

  aboutTokens() {
    const scale = element("span", "scale");
    scale.append(element("span", "", "likely"), element("i"), element("span", "", "unlikely"));
    const toggle = button("Text", () => {
      this.plain = !this.plain;
      this.view.box.hidden = this.plain;
      this.target.hidden = !this.plain;
      toggle.textContent = this.plain ? "Tokens" : "Text";
      this.draw();
      this.showMeta("");
      this.meta.querySelector("button").focus();
    });
    toggle.textContent = this.plain ? "Tokens" : "Text";
    toggle.title = this.plain ? "Show each token by its probability" : "Show the answer as text";
    return [element("span", "", `perplexity ${this.view.perplexity.toFixed(2)}`), ...(this.plain ? [] : [scale]), toggle];
  }

  copyButton() {
    const copy = button("Copy", async () => {
      try { await navigator.clipboard.writeText(this.text); copy.textContent = "Copied"; } catch { copy.textContent = "Copying is not allowed here"; }
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
    return copy;
  }
}

// Whatever is no word of the server's is the connection's end, which each browser says in its own way. A sentence gets
// its capital and its stop, but a field keeps its name.
function said(error) {
  const text = error instanceof Told ? error.message : "The connection to the server was lost.";
  const begin = /^[a-z]+ /.test(text) ? text.charAt(0).toUpperCase() : text.charAt(0);
  return begin + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
