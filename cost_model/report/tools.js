// What all drawings share: texts, elements, tooltips, scales, marks. The files of this page make one script, in this order.
const PLANS = JSON.parse(document.getElementById("data").textContent).plans;
const root = document.documentElement;
const tip = document.getElementById("tip");
const say = document.getElementById("say");
const CANDIDATES = ["reattend", "sdpa", "flex", "original"];
// Parts of a GPU's time and of a CPU's, by what they stand for: the same colour for the same kind of work.
const PARTS = { matrix: 0, exp: 1, vector: 2, element: 2, memory: 3, fault: 6, l2: 4, call: 6, launch: 5, link: 6 };

// --- texts ---------------------------------------------------------------------------------------------------------
const digits = (x) => Number(x.toPrecision(3)).toString();
const scaled = (x, steps) => {
  for (const [unit, scale] of steps) {
    if (x >= scale) return `${x / scale >= 1000 ? Math.round(x / scale) : digits(x / scale)} ${unit}`;
  }
  const [unit, scale] = steps[steps.length - 1];
  return `${digits(x / scale)} ${unit}`;
};
const seconds = (x) => scaled(x, [["s", 1], ["ms", 1e-3], ["µs", 1e-6], ["ns", 1e-9]]);
const bytes = (x) => scaled(x, [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["B", 1]]);
const rate = (x) => scaled(x, [["PFLOP/s", 1e15], ["TFLOP/s", 1e12], ["GFLOP/s", 1e9], ["MFLOP/s", 1e6]]);
const tokens = (n) => {
  if (n >= 1048576 && n % 1048576 === 0) return `${n / 1048576}M`;
  return n >= 1024 && n % 1024 === 0 ? `${n / 1024}k` : `${n}`;
};

// --- small tools ----------------------------------------------------------------------------------------------------
const node = (name, attributes = {}, text = null) => {
  const out = document.createElement(name);
  for (const [k, v] of Object.entries(attributes)) out.setAttribute(k, v);
  if (text !== null) out.textContent = text;
  return out;
};
const svg = (name, attributes = {}, text = null) => {
  const out = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [k, v] of Object.entries(attributes)) out.setAttribute(k, v);
  if (text !== null) out.textContent = text;
  return out;
};
// The parts that drawings are made of.
const line = (x1, y1, x2, y2, attributes = { class: "gridline" }) => svg("line", { x1, y1, x2, y2, ...attributes });
const words = (x, y, text, anchor = "middle", attributes = {}) => svg("text", { x, y, "text-anchor": anchor, ...attributes }, text);
const path = (d, stroke) => svg("path", { d, fill: "none", stroke, "stroke-width": 2, "stroke-linejoin": "round" });
const spot = (text) => svg("g", { class: "point", tabindex: "0", role: "img", "aria-label": text.replace(/\n/g, ", ") });
const colour = (name) => `var(--c-${CANDIDATES.includes(name) ? name : "original"})`;
const part = (name, names) => `var(--p${name in PARTS ? PARTS[name] : names.indexOf(name) % 7})`;
const showTip = (text, x, y) => {
  tip.textContent = text; tip.hidden = false;
  const box = tip.getBoundingClientRect(), width = root.clientWidth;
  const left = Math.max(6, Math.min(x + 14, width - box.width - 6));
  const above = y - box.height - 12;
  tip.style.left = `${left + scrollX}px`; tip.style.top = `${(above < 4 ? y + 16 : above) + scrollY}px`;
};
const hideTip = () => { tip.hidden = true; };
const explain = (element, text) => {
  element.addEventListener("pointermove", (e) => showTip(text, e.clientX, e.clientY));
  element.addEventListener("pointerleave", hideTip);
  element.told = () => {
    const box = element.getBoundingClientRect();
    showTip(text, box.left + box.width / 2, box.top);
  };
  element.addEventListener("focus", element.told);
  element.addEventListener("blur", hideTip);
};
addEventListener("keydown", (e) => { if (e.key === "Escape") hideTip(); });
// What the keyboard stands on keeps its tip when focus scrolls the page there.
addEventListener("scroll", () => {
  const at = document.activeElement, shown = !tip.hidden;
  hideTip();
  if (shown && at && at.told && at.matches(":focus-visible")) at.told();
}, { passive: true });

const log = (low, high, a, b) => (x) => a + (Math.log(x) - Math.log(low)) / (Math.log(high) - Math.log(low) || 1) * (b - a);
const linear = (low, high, a, b) => (x) => a + (x - low) / (high - low || 1) * (b - a);
const decades = (low, high) => {
  const out = [];
  for (let e = Math.ceil(Math.log10(low) - 1e-9); e <= Math.floor(Math.log10(high) + 1e-9); e++) out.push(10 ** e);
  const every = Math.ceil(out.length / 7);
  return out.filter((_, i) => i % every === 0);
};
const nice = (high) => {
  const step = 10 ** Math.floor(Math.log10(high / 4));
  return [1, 2, 5, 10].map((k) => k * step).find((s) => high / s <= 5);
};

// Marks differ in shape as well as in colour.
const mark = (name, x, y, r = 6) => {
  const look = { fill: colour(name), class: "ring" }, n = r - 1;
  if (name === "sdpa") return svg("rect", { x: x - n, y: y - n, width: 2 * n, height: 2 * n, ...look });
  if (name === "flex") return svg("path", { d: `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z`, ...look });
  if (name === "original") return svg("path", { d: `M${x} ${y - r}L${x + r} ${y + n}L${x - r} ${y + n}Z`, ...look });
  return svg("circle", { cx: x, cy: y, r: r - .5, ...look });
};
const frame = (plot, height, label) => {
  const width = Math.max(260, plot.clientWidth || 520);
  const out = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  plot.append(out);
  return { out, width, height };
};
// A range as the key of a legend: a line in the middle.
const RANGE = "linear-gradient(var(--ink), var(--ink)) center / 100% 2px no-repeat";
// The ends of a range, across (x from … to) or up (y from … to).
const whisker = (from, to, at, up = false) => {
  const d = up
    ? `M${at} ${from}V${to}M${at - 4} ${from}h8M${at - 4} ${to}h8`
    : `M${from} ${at}H${to}M${from} ${at - 4}v8M${to} ${at - 4}v8`;
  return svg("path", { d, fill: "none", stroke: "var(--ink)", "stroke-width": 1.25, class: "whisker" });
};
const nothing = (plot, why) => plot.append(node("p", { class: "dim" }, why));
const legend = (plot, rows) => {
  const list = node("ul", { class: "legend" });
  for (const [text, background, border] of rows) {
    const style = `background:${background};${border ? `border-color:${border}` : ""}`;
    const item = node("li"), key = node("i", { "aria-hidden": "true", style });
    item.append(key, text); list.append(item);
  }
  plot.append(list);
};
