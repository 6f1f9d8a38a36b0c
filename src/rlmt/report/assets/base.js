// Helpers that the other files use: elements, numbers, colours, the theme, and the payload.
// Text reaches the page as text nodes only; nothing here or elsewhere parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Makes an element. `on…` properties are listeners, `style` an object; children are nodes or text. */
function el(name, properties = {}, ...children) {
  const svg = ["svg", "path", "rect", "circle", "line", "text", "g", "title"].includes(name);
  const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A number with three significant digits, and thousands separators where it is long. */
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 10000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(1).replace("e-", "e−").replace(/^-/, "−");
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

/** Seconds as `48 s`, `12 min` or `3.4 h`. */
function duration(seconds) {
  if (seconds < 120) return `${number(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${number(seconds / 3600)} h`;
}

const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (index) => css(`--series-${(index % 6) + 1}`);

/** A colour with transparency; `colour` is #rrggbb. */
const faint = (colour, alpha) => colour + Math.round(alpha * 255).toString(16).padStart(2, "0");

const STATES = {
  ok: { icon: "✓", word: "ok" },
  watch: { icon: "!", word: "watch" },
  problem: { icon: "✕", word: "problem" },
  unknown: { icon: "…", word: "too early" },
};
const ORDER = ["problem", "watch", "unknown", "ok"];

/** Icon and word of a state; the colour is never the only sign. */
const badge = (state) =>
  el("span", { class: `badge ${state}` }, el("span", { class: "icon", "aria-hidden": "true" }, STATES[state].icon), STATES[state].word);

/** Decodes the payload: base64 of gzip of JSON. */
async function readPayload() {
  const bytes = Uint8Array.from(atob(document.getElementById("payload").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const theme = {
  order: ["auto", "light", "dark"],
  listeners: [],
  get chosen() {
    return document.documentElement.dataset.theme;
  },
  set(value) {
    document.documentElement.dataset.theme = value;
    const button = document.getElementById("theme");
    button.textContent = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" }[value];
    button.setAttribute("aria-label", `Colours: ${value}; press to change`);
    for (const listener of this.listeners) listener();
  },
  start() {
    this.set("auto");
    document.getElementById("theme").addEventListener("click", () => {
      this.set(this.order[(this.order.indexOf(this.chosen) + 1) % 3]);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.set(this.chosen));
    let before = "auto";
    addEventListener("beforeprint", () => {
      before = this.chosen;
      drawAll();
      this.set("light");
    });
    addEventListener("afterprint", () => this.set(before));
  },
};

/** A section with an entry in the navigation. */
function section(id, title, lead, ...children) {
  const nav = document.getElementById("nav");
  nav.append(el("a", { href: `#${id}` }, title));
  const node = el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title));
  if (lead) node.append(el("p", { class: "lead" }, lead));
  node.append(...children);
  document.getElementById("main").append(node);
  return node;
}

/** A labelled control. */
const field = (label, control) => el("label", { class: "field" }, el("span", {}, label), control);

/** Text whose options (`--data.top_p 1`) are set as code, which breaks after dots only. */
const prose = (text) => text.split(/(--[a-z][\w.]*\w(?: \d+)?)/).map((part, i) => (i % 2 ? el("code", {}, part.split(/(?<=\.)/).flatMap((word) => [el("wbr"), word]).slice(1)) : part));

/** A select element; `options` are [value, text] pairs. */
function select(options, onchange) {
  const node = el("select", { onchange: () => onchange(node.value) });
  node.append(...options.map(([value, text]) => el("option", { value }, text)));
  return node;
}

/** A table; the cells of a row are texts or nodes. */
function table(columns, rows, caption, className = "") {
  const head = el("tr", {}, ...columns.map((column) => el("th", { scope: "col" }, column)));
  const body = rows.map((row) => el("tr", {}, ...row.map((cell, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, cell))));
  const node = el("table", { class: className }, caption ? el("caption", {}, caption) : null, el("thead", {}, head), el("tbody", {}, ...body));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption || columns.join(", ") }, node);
}
