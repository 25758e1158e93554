// What every part of the page uses: elements by id, new elements, text as nodes, times as people read them.

export const $ = (id) => document.getElementById(id);

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export function button(text, onClick) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

// Text with ``` fences and `code`: built from nodes, never parsed as HTML.
export function fillText(target, text) {
  const nodes = [];
  text.split("```").forEach((part, i) => {
    if (i % 2) {
      const pre = element("pre");
      pre.tabIndex = 0; // it may scroll sideways, by keys too
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

export const milliseconds = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(1)} s`);
