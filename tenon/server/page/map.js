// What is where in the cache: the pool's fill, and a strip per running sequence. Draws `residency` events.

const SVG = "http://www.w3.org/2000/svg";
const KINDS = { r: "reused", c: "computed", h: "hole", t: "tail" };
const $ = (id) => document.getElementById(id);

// Of a string of cells, each kind's cells as one path of boxes one high: "rrcr" -> { r: "M0,0h2v1h-2z M3,0h1…", c: … }.
export function paths(cells) {
  const made = {};
  for (const run of cells.matchAll(/(.)\1*/g)) {
    made[run[1]] = `${made[run[1]] ?? ""}M${run.index},0h${run[0].length}v1h-${run[0].length}z`;
  }
  return made;
}

function strip(cells) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "strip");
  svg.setAttribute("viewBox", `0 0 ${Math.max(cells.length, 1)} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  for (const [kind, d] of Object.entries(paths(cells))) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", KINDS[kind]);
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

function share(cells, kind) {
  return Math.round((cells.split(kind).length - 1) / Math.max(cells.length, 1) * 100);
}

function row(it) {
  const box = document.createElement("div");
  box.className = "strip-row";
  const said = `${it.request_id}${it.index ? ` #${it.index}` : ""}: ${it.n_tokens} tokens, ${share(it.cells, "r")} % reused`;
  box.title = said;
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", said);
  const count = document.createElement("span");
  count.textContent = it.n_tokens.toLocaleString("en");
  box.append(strip(it.cells), count);
  return box;
}

const AGES = (s) => (s < 60 ? `${s} s` : s < 3600 ? `${s / 60} min` : `${s / 3600} h`);

// Held, then idle from the most to the least recently used, then free.
export function fill(event) {
  const idle = event.idle_by_age.map((n, i) => ({
    kind: `idle age-${i}`, n,
    said: i < event.ages_s.length ? `idle for less than ${AGES(event.ages_s[i])}` : `idle for ${AGES(event.ages_s.at(-1))} or more`,
  }));
  return [{ kind: "held", n: event.held, said: "held by requests" }, ...idle, { kind: "free", n: event.free, said: "free" }];
}

export function showMap(event) {
  const parts = fill(event);
  const total = parts.reduce((sum, part) => sum + part.n, 0);
  const idle = total - event.held - event.free;
  $("map-text").textContent = `${event.held.toLocaleString("en")} held · ${idle.toLocaleString("en")} idle · ${event.free.toLocaleString("en")} free`;
  $("map-fill").setAttribute("aria-label", `Of ${total} blocks ${parts.filter((part) => part.n).map((part) => `${part.n} ${part.said}`).join(", ")}`);
  $("map-fill").replaceChildren(...parts.filter((part) => part.n).map((part) => {
    const made = document.createElement("i");
    made.className = part.kind;
    made.style.flexGrow = part.n;
    made.title = `${part.n.toLocaleString("en")} blocks ${part.said}`;
    return made;
  }));
  const turns = event.idle_by_turn.map((n, i) => [i < event.turns.length ? `${event.turns[i]}` : `${event.turns.at(-1) + 1}+`, n]);
  $("map-turns").textContent = idle ? `idle by turn ${turns.filter(([, n]) => n).map(([turn, n]) => `${turn}: ${n.toLocaleString("en")}`).join(" · ")}` : "";
  $("map-rows").replaceChildren(...event.rows.map(row));
  $("map-more").textContent = event.running > event.rows.length ? `and ${event.running - event.rows.length} more` : "";
  $("map").hidden = false;
}
