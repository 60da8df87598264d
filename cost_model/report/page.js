"use strict";
(() => {
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
  for (const [unit, scale] of steps) if (x >= scale) return `${x / scale >= 1000 ? Math.round(x / scale) : digits(x / scale)} ${unit}`;
  const [unit, scale] = steps[steps.length - 1];
  return `${digits(x / scale)} ${unit}`;
};
const seconds = (x) => scaled(x, [["s", 1], ["ms", 1e-3], ["µs", 1e-6], ["ns", 1e-9]]);
const bytes = (x) => scaled(x, [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["B", 1]]);
const rate = (x) => scaled(x, [["PFLOP/s", 1e15], ["TFLOP/s", 1e12], ["GFLOP/s", 1e9], ["MFLOP/s", 1e6]]);
const tokens = (n) => n >= 1048576 && n % 1048576 === 0 ? `${n / 1048576}M` : n >= 1024 && n % 1024 === 0 ? `${n / 1024}k` : `${n}`;

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
  element.addEventListener("focus", () => { const b = element.getBoundingClientRect(); showTip(text, b.left + b.width / 2, b.top); });
  element.addEventListener("blur", hideTip);
};
addEventListener("keydown", (e) => { if (e.key === "Escape") hideTip(); });
addEventListener("scroll", hideTip, { passive: true });

const log = (low, high, a, b) => (x) => a + (Math.log(x) - Math.log(low)) / (Math.log(high) - Math.log(low) || 1) * (b - a);
const linear = (low, high, a, b) => (x) => a + (x - low) / (high - low || 1) * (b - a);
const decades = (low, high) => {
  const out = [];
  for (let e = Math.ceil(Math.log10(low) - 1e-9); e <= Math.floor(Math.log10(high) + 1e-9); e++) out.push(10 ** e);
  const every = Math.ceil(out.length / 7);
  return out.filter((_, i) => i % every === 0);
};
const nice = (high) => { const step = 10 ** Math.floor(Math.log10(high / 4)); return [1, 2, 5, 10].map((k) => k * step).find((s) => high / s <= 5); };

// Marks differ in shape as well as in colour.
const mark = (name, x, y, r = 6) => {
  const fill = colour(name);
  if (name === "sdpa") return svg("rect", { x: x - r + 1, y: y - r + 1, width: 2 * r - 2, height: 2 * r - 2, fill, class: "ring" });
  if (name === "flex") return svg("path", { d: `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z`, fill, class: "ring" });
  if (name === "original") return svg("path", { d: `M${x} ${y - r}L${x + r} ${y + r - 1}L${x - r} ${y + r - 1}Z`, fill, class: "ring" });
  return svg("circle", { cx: x, cy: y, r: r - .5, fill, class: "ring" });
};
const frame = (plot, height, label) => {
  const width = Math.max(260, plot.clientWidth || 520);
  const out = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  plot.append(out);
  return { out, width, height };
};
const legend = (plot, rows) => {
  const list = node("ul", { class: "legend" });
  for (const [text, background, border] of rows) {
    const item = node("li"), key = node("i", { "aria-hidden": "true", style: `background:${background};${border ? `border-color:${border}` : ""}` });
    item.append(key, text); list.append(item);
  }
  plot.append(list);
};

// --- the mask: cells on a canvas, to be zoomed and moved -------------------------------------------------------------
const runs = (rows) => rows.map((row) => row.split(" ").map((x) => [x[0], Number(x.slice(1))]));
const KIND = { e: "empty", p: "partial", f: "full" };
function drawMask(plot, plan, group) {
  const mask = group.mask, picture = mask.picture;
  if (!picture || !picture.layers.length) { plot.append(node("p", { class: "dim" }, mask.expr ? "There is no picture of this mask: which tiles it keeps is known at run time." : "Every tile is full.")); return; }
  const layers = picture.layers.map((l) => runs(l.rows));
  let rows = layers[0], view = { x: 0, y: 0, zoom: 1 };
  const wide = Math.ceil(picture.keys / picture.cell_m), high = rows.length;
  const tools = node("div", { class: "tools" });
  const canvas = node("canvas", { tabindex: "0", role: "img", "aria-label": `${mask.text} Plus and minus zoom, arrow keys move.` });
  const at = node("span", { class: "dim mono" });
  const button = (text, label, act) => { const b = node("button", { type: "button", "aria-label": label }, text); b.addEventListener("click", act); tools.append(b); };
  const size = () => {
    const width = Math.max(220, Math.min(plot.clientWidth || 480, 560));
    const ratio = Math.min(4, Math.max(.02, picture.queries / picture.keys));
    return [width, Math.max(34, Math.min(width * ratio, 420))];
  };
  const paint = () => {
    const [width, height] = size(), scale = devicePixelRatio || 1, style = getComputedStyle(root);
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d"), fills = { e: style.getPropertyValue("--empty"), p: style.getPropertyValue("--partial"), f: style.getPropertyValue("--full") };
    const cw = canvas.width / wide * view.zoom, ch = canvas.height / high * view.zoom;
    const limit = 1 - 1 / view.zoom;
    view.x = Math.max(0, Math.min(limit, view.x)); view.y = Math.max(0, Math.min(limit, view.y));
    const ox = -view.x * canvas.width * view.zoom, oy = -view.y * canvas.height * view.zoom;
    pen.fillStyle = fills.e; pen.fillRect(0, 0, canvas.width, canvas.height);
    const gap = Math.min(cw, ch) >= 7 ? Math.max(1, Math.round(scale)) : 0;
    rows.forEach((row, i) => {
      const top = Math.round(oy + i * ch), bottom = Math.round(oy + (i + 1) * ch);
      if (bottom < 0 || top > canvas.height) return;
      let k = 0;
      for (const [kind, n] of row) {
        if (kind !== "e" || gap) {
          pen.fillStyle = fills[kind];
          if (gap) for (let j = k; j < k + n; j++) {
            const left = Math.round(ox + j * cw), right = Math.round(ox + (j + 1) * cw);
            if (right > 0 && left < canvas.width) pen.fillRect(left, top, right - left - gap, bottom - top - gap);
          } else { const left = Math.round(ox + k * cw); pen.fillRect(left, top, Math.max(1, Math.round(ox + (k + n) * cw) - left), Math.max(1, bottom - top)); }
        }
        k += n;
      }
    });
    at.textContent = view.zoom > 1 ? `×${digits(view.zoom)}` : "";
  };
  const zoom = (by, fx = .5, fy = .5) => {
    const before = view.zoom, after = Math.max(1, Math.min(before * by, Math.max(wide, high) / 4, 512) || 1);
    view = { x: view.x + fx / before - fx / after, y: view.y + fy / before - fy / after, zoom: after };
    paint();
  };
  const cell = (e) => {
    const box = canvas.getBoundingClientRect();
    return [(e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height];
  };
  const told = (fx, fy) => {
    const j = Math.min(wide - 1, Math.floor((view.x + fx / view.zoom) * wide)), i = Math.min(high - 1, Math.floor((view.y + fy / view.zoom) * high));
    let k = 0, kind = "e";
    for (const [name, n] of rows[i]) { kind = name; k += n; if (j < k) break; }
    const end = (a, step, all) => `${a * step} to ${Math.min((a + 1) * step, all) - 1}`;
    return `${KIND[kind]}\nqueries ${end(i, picture.cell_p, picture.queries)}\nkeys ${end(j, picture.cell_m, picture.keys)}`;
  };
  button("+", "Zoom in", () => zoom(2)); button("−", "Zoom out", () => zoom(.5)); button("Reset", "Show the whole mask", () => { view = { x: 0, y: 0, zoom: 1 }; paint(); });
  if (layers.length > 1) {
    const pick = node("select", { "aria-label": "Which heads or batch entries" });
    picture.layers.forEach((l, i) => pick.append(node("option", { value: i }, l.label)));
    pick.addEventListener("change", () => { rows = layers[Number(pick.value)]; paint(); });
    tools.append(pick);
    if (picture.omitted) tools.append(node("span", { class: "dim" }, `${picture.omitted} more that differ are not drawn`));
  }
  tools.append(at);
  let held = null;
  canvas.addEventListener("wheel", (e) => { if (!e.ctrlKey && !e.metaKey && view.zoom === 1 && e.deltaY > 0) return; e.preventDefault(); zoom(e.deltaY < 0 ? 1.25 : .8, ...cell(e)); }, { passive: false });
  canvas.addEventListener("pointerdown", (e) => { held = [...cell(e), view.x, view.y]; canvas.setPointerCapture(e.pointerId); canvas.style.cursor = "grabbing"; });
  canvas.addEventListener("pointerup", () => { held = null; canvas.style.cursor = ""; });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("pointermove", (e) => {
    const [fx, fy] = cell(e);
    if (held) { view.x = held[2] + (held[0] - fx) / view.zoom; view.y = held[3] + (held[1] - fy) / view.zoom; paint(); hideTip(); return; }
    if (fx >= 0 && fx < 1 && fy >= 0 && fy < 1) showTip(told(fx, fy), e.clientX, e.clientY);
  });
  canvas.addEventListener("keydown", (e) => {
    const step = .25 / view.zoom, move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[e.key];
    if (e.key === "+" || e.key === "=") zoom(2); else if (e.key === "-") zoom(.5); else if (e.key === "0") { view = { x: 0, y: 0, zoom: 1 }; paint(); }
    else if (move && view.zoom > 1) { view.x += move[0]; view.y += move[1]; paint(); } else return;
    e.preventDefault(); say.textContent = `Zoom ${digits(view.zoom)}. In the middle: ${told(.5, .5).replace(/\n/g, ", ")}`;
  });
  const axes = node("p", { class: "dim mono" }, `↓ ${picture.queries.toLocaleString("en")} queries   → ${picture.keys.toLocaleString("en")} keys   cell ${picture.cell_p}×${picture.cell_m}${picture.scale > 1 ? ` (${picture.scale}×${picture.scale} tiles)` : ""}`);
  plot.append(tools, canvas, axes);
  legend(plot, [["full", "var(--full)"], ["partial: the mask is evaluated", "var(--partial)"], ["empty: skipped", "var(--empty)", "var(--line)"]]);
  paint();
  plot.repaint = paint;
}

// --- the roofline ---------------------------------------------------------------------------------------------------
function drawRoofline(plot, plan, group) {
  const found = group.candidates.filter((c) => c.cost && c.cost.flops > 0 && c.cost.bytes > 0 && c.cost.seconds > 0);
  if (!found.length || !group.peak) { plot.append(node("p", { class: "dim" }, "No candidate has a predicted time.")); return; }
  const peak = group.peak, band = plan.device.bandwidth, ridge = peak / band;
  const points = found.map((c) => ({ c, x: c.cost.flops / c.cost.bytes, y: c.cost.flops / c.cost.seconds }));
  const x0 = Math.min(ridge, ...points.map((p) => p.x)) / 4, x1 = Math.max(ridge, ...points.map((p) => p.x)) * 4;
  const y0 = Math.min(...points.map((p) => p.y), peak) / 6, y1 = Math.max(peak, ...points.map((p) => p.y)) * 2.5;
  const told = points.map((p) => `${p.c.name} ${rate(p.y)} at ${digits(p.x)} FLOP a byte`).join("; ");
  const { out, width, height } = frame(plot, 290, `Roofline of ${plan.device.name}: ${told}. Peak ${rate(peak)}, ${bytes(band)} a second.`);
  out.setAttribute("role", "group");
  const l = 78, r = width - 12, t = 12, b = height - 40, X = log(x0, x1, l, r), Y = log(y0, y1, b, t);
  for (const v of decades(x0, x1)) out.append(svg("line", { x1: X(v), x2: X(v), y1: t, y2: b, class: "gridline" }), svg("text", { x: X(v), y: b + 16, "text-anchor": "middle" }, v >= 1e4 ? v.toExponential(0).replace("e+", "e") : digits(v)));
  for (const v of decades(y0, y1)) out.append(svg("line", { x1: l, x2: r, y1: Y(v), y2: Y(v), class: "gridline" }), svg("text", { x: l - 8, y: Y(v) + 4, "text-anchor": "end" }, rate(v).replace("FLOP/s", "F/s")));
  out.append(svg("text", { x: (l + r) / 2, y: height - 6, "text-anchor": "middle" }, "FLOP a byte"));
  const low = Math.max(x0, y0 / band);
  out.append(svg("path", { d: `M${X(low)} ${Y(band * low)}L${X(ridge)} ${Y(peak)}L${r} ${Y(peak)}`, fill: "none", stroke: "var(--roof)", "stroke-width": 2, "stroke-linejoin": "round" }));
  out.append(svg("text", { x: r, y: Y(peak) - 7, "text-anchor": "end" }, `${rate(peak)} ${group.dtype}`));
  const taken = points.map((p) => [X(p.x) - 8, Y(p.y) - 8, X(p.x) + 8, Y(p.y) + 8]);
  const free = (box) => box[0] >= l && box[2] <= r && taken.every((o) => box[2] < o[0] || box[0] > o[2] || box[3] < o[1] || box[1] > o[3]);
  for (const p of [...points].sort((a, c) => c.y - a.y)) {
    const x = X(p.x), y = Y(p.y), bound = Math.min(peak, band * p.x);
    const text = `${p.c.name}\n${seconds(p.c.cost.seconds)}, bound by ${p.c.cost.bound}\n${rate(p.y)}: ${Math.round(100 * p.y / bound)}% of the roof\n${digits(p.x)} FLOP a byte`;
    const g = svg("g", { class: "point", tabindex: "0", role: "img", "aria-label": text.replace(/\n/g, ", ") });
    g.append(svg("circle", { cx: x, cy: y, r: 13, fill: "transparent" }), mark(p.c.name, x, y));
    const wide = p.c.name.length * 7;
    // Beside the mark where there is room, else further down or up.
    const spots = [0, 16, -16, 32, -32, 48, -48, 64].flatMap((dy) => [[1, dy], [-1, dy]]).map(([side, dy]) => {
      const from = side > 0 ? x + 12 : x - 12 - wide;
      return { side, dy, box: [from, y + dy - 8, from + wide, y + dy + 6] };
    });
    const spot = spots.find((s) => free(s.box)) || spots[0];
    taken.push(spot.box);
    if (spot.dy) g.append(svg("line", { x1: x, y1: y, x2: x + spot.side * 10, y2: y + spot.dy, class: "axis" }));
    g.append(svg("text", { x: x + spot.side * 12, y: y + spot.dy + 4, "text-anchor": spot.side > 0 ? "start" : "end", class: "strong" }, p.c.name));
    explain(g, text); out.append(g);
  }
}

// --- time by part ----------------------------------------------------------------------------------------------------
function drawParts(plot, plan, group) {
  const found = group.candidates.filter((c) => c.cost);
  if (!found.length) { plot.append(node("p", { class: "dim" }, "No candidate has a predicted time.")); return; }
  const names = [...new Set([...Object.keys(PARTS).filter((n) => found.some((c) => c.parts[n])), ...found.flatMap((c) => Object.keys(c.parts))])];
  const sum = (c) => Object.values(c.parts).reduce((a, v) => a + v, 0);
  const top = Math.max(...found.map((c) => Math.max(sum(c), c.cost.seconds)));
  const told = found.map((c) => `${c.name} ${seconds(c.cost.seconds)}`).join("; ");
  const { out, width, height } = frame(plot, found.length * 46 + 40, `Time by part: ${told}`);
  out.setAttribute("role", "group");
  const l = 78, r = width - 70, b = height - 26, X = linear(0, top, l, r), step = nice(top);
  for (let v = 0; v <= top * 1.0001; v += step) out.append(svg("line", { x1: X(v), x2: X(v), y1: 4, y2: b, class: "gridline" }), svg("text", { x: X(v), y: b + 16, "text-anchor": "middle" }, v ? seconds(v) : "0"));
  found.forEach((c, i) => {
    const y = 8 + i * 46;
    const told = names.filter((n) => c.parts[n]).map((n) => `${n} ${seconds(c.parts[n])}`).join("\n");
    const g = svg("g", { class: "point", tabindex: "0", role: "img", "aria-label": `${c.name}, ${seconds(c.cost.seconds)} in all: ${told.replace(/\n/g, ", ")}` });
    g.append(svg("rect", { x: l, y: y - 2, width: r - l, height: 34, fill: "transparent", class: "ring" }));
    let from = 0;
    for (const n of names) {
      const v = c.parts[n];
      if (!v) continue;
      const w = X(from + v) - X(from);
      if (w > .4) g.append(svg("rect", { x: X(from), y: y + 4, width: Math.max(.6, w - (w > 4 ? 1.5 : 0)), height: 20, fill: part(n, names), rx: w > 6 ? 2 : 0 }));
      from += v;
    }
    const x = X(c.cost.seconds);
    g.append(svg("line", { x1: x, x2: x, y1: y, y2: y + 28, stroke: "var(--ink)", "stroke-width": 2 }));
    g.append(svg("text", { x: l - 10, y: y + 18, "text-anchor": "end", class: "strong" }, c.name));
    g.append(svg("text", { x: Math.max(x, X(from)) + 8, y: y + 18 }, seconds(c.cost.seconds)));
    explain(g, `${c.name}: ${seconds(c.cost.seconds)}\n${told}`); out.append(g);
  });
  legend(plot, [...names.map((n) => [n, part(n, names)]), ["predicted time", "var(--ink)"]]);
}

// --- lines over a size ------------------------------------------------------------------------------------------------
function drawLines(plot, spec) {
  const { points, lines, marks = [], levels = [], winners = null, text, x: title } = spec;
  const values = points.map((p) => p.value), all = [...lines.flatMap((n) => n.values), ...levels.map((v) => v.value)].filter((v) => v > 0);
  const { out, width, height } = frame(plot, winners ? 310 : 290, spec.label);
  out.setAttribute("role", "group");
  const l = 70, r = width - 14, t = 14, b = height - (winners ? 62 : 42);
  const low = Math.min(...all), high = Math.max(...all), X = log(values[0], values[values.length - 1] * (values.length > 1 ? 1 : 2), l, r), Y = log(low / 1.6, high * 1.6, b, t);
  for (const v of decades(low / 1.6, high * 1.6)) out.append(svg("line", { x1: l, x2: r, y1: Y(v), y2: Y(v), class: "gridline" }), svg("text", { x: l - 8, y: Y(v) + 4, "text-anchor": "end" }, text(v)));
  let last = -99;
  const powers = [];
  for (let v = 2 ** Math.ceil(Math.log2(values[0])); v <= values[values.length - 1]; v *= 2) powers.push(v);
  for (const v of powers.length > 1 ? powers : values) if (X(v) - last > 40) {
    last = X(v);
    out.append(svg("line", { x1: X(v), x2: X(v), y1: b, y2: b + 4, class: "axis" }), svg("text", { x: X(v), y: height - 24, "text-anchor": "middle" }, tokens(v)));
  }
  out.append(svg("line", { x1: l, x2: r, y1: b, y2: b, class: "axis" }), svg("text", { x: (l + r) / 2, y: height - 6, "text-anchor": "middle" }, title));
  levels.forEach((v, i) => out.append(svg("line", { x1: l, x2: r, y1: Y(v.value), y2: Y(v.value), stroke: "var(--dim)", "stroke-dasharray": "5 4" }), svg("text", i ? { x: r - 6, y: Y(v.value) + 14, "text-anchor": "end" } : { x: l + 6, y: Y(v.value) - 5 }, v.name)));
  for (const m of marks) { const x = X(Math.sqrt(m.low * m.high)); out.append(svg("line", { x1: x, x2: x, y1: t, y2: b, stroke: "var(--ink)", "stroke-dasharray": "2 3" })); }
  if (winners) [...marks, null].forEach((m, i) => {
    const turn = (k) => X(Math.sqrt(marks[k].low * marks[k].high)), from = i ? turn(i - 1) : l, to = m ? turn(i) : r;
    out.append(svg("rect", { x: from, y: b + 8, width: Math.max(1, to - from), height: 8, fill: colour(m ? m.before : winners[winners.length - 1]) }));
  });
  const ends = [];
  for (const n of lines) {
    const spots = n.values.map((v, i) => v > 0 ? [X(values[i]), Y(v)] : null).filter(Boolean);
    out.append(svg("path", { d: spots.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join(""), fill: "none", stroke: n.colour, "stroke-width": 2, "stroke-linejoin": "round" }));
    for (const [x, y] of spots) out.append(n.mark ? mark(n.mark, x, y, 4) : svg("circle", { cx: x, cy: y, r: 3, fill: n.colour }));
    ends.push([n.name, n.colour]);
  }
  const cursor = svg("line", { y1: t, y2: b, stroke: "var(--dim)", visibility: "hidden" });
  const cover = svg("rect", { x: l, y: t, width: r - l, height: b - t + 20, fill: "transparent", tabindex: "0", role: "slider", class: "ring", "aria-label": `${title}: arrow keys move`, "aria-valuemin": 0, "aria-valuemax": values.length - 1, "aria-valuenow": 0 });
  let now = 0;
  const told = (i) => `${tokens(values[i])}${winners ? `: ${winners[i]}` : ""}\n` + lines.filter((n) => n.values[i] > 0).map((n) => `${n.name} ${text(n.values[i])}`).join("\n");
  const point = (i, x, y) => {
    now = i; cursor.setAttribute("x1", X(values[i])); cursor.setAttribute("x2", X(values[i])); cursor.setAttribute("visibility", "visible");
    cover.setAttribute("aria-valuenow", i); cover.setAttribute("aria-valuetext", told(i).replace(/\n/g, ", ")); showTip(told(i), x, y);
  };
  const leave = () => { cursor.setAttribute("visibility", "hidden"); hideTip(); };
  const here = () => { const box = out.getBoundingClientRect(); return [box.left + X(values[now]) * box.width / width, box.top + t + 30]; };
  cover.addEventListener("pointermove", (e) => {
    const box = out.getBoundingClientRect(), x = (e.clientX - box.left) * width / box.width;
    const i = values.reduce((best, v, k) => Math.abs(X(v) - x) < Math.abs(X(values[best]) - x) ? k : best, 0);
    point(i, e.clientX, e.clientY);
  });
  cover.addEventListener("pointerleave", leave); cover.addEventListener("blur", leave);
  cover.addEventListener("focus", () => point(now, ...here()));
  cover.addEventListener("keydown", (e) => {
    const to = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: values.length - 1 }[e.key];
    if (to === undefined) return;
    e.preventDefault(); now = Math.max(0, Math.min(values.length - 1, to)); point(now, ...here());
  });
  out.append(cursor, cover);
  legend(plot, ends);
}
function drawSweep(plot, plan, group, index) {
  const s = group.sweeps[index];
  drawLines(plot, {
    points: s.points, x: s.title, text: seconds, winners: s.points.map((p) => p.choice), marks: s.changes,
    lines: s.names.map((n) => ({ name: n, colour: colour(n), mark: n, values: s.points.map((p) => p.times[n] || 0) })),
    label: `Predicted time over ${s.title}. Choice: ${s.text}.`,
  });
}
function drawMemory(plot, plan) {
  const m = plan.memory, levels = [{ name: `${plan.device.name}: ${bytes(plan.device.dram_bytes)}`, value: plan.device.dram_bytes }];
  if (plan.weight_bytes) levels.push({ name: `weights: ${bytes(plan.weight_bytes)}`, value: plan.weight_bytes });
  const line = (name, colour, key) => ({ name, colour, values: m.rows.map((r) => r[key]) });
  drawLines(plot, {
    points: m.rows, x: m.title, text: bytes, levels, label: `Memory over context length. ${m.text}`,
    lines: [line("keys and values, all attentions", "var(--p0)", "cache"), line("alive in one attention, operator by operator", "var(--p1)", "eager"), line("alive in one attention, tiled", "var(--p3)", "tiled")],
  });
}

// --- drawing what is seen ----------------------------------------------------------------------------------------------
const DRAW = { mask: drawMask, roofline: drawRoofline, parts: drawParts, sweep: drawSweep, memory: drawMemory };
const draw = (figure) => {
  const plot = figure.querySelector(".plot"), d = figure.dataset, plan = PLANS[Number(d.plan)];
  plot.replaceChildren();
  DRAW[d.chart](plot, plan, plan.groups[Number(d.group)], Number(d.sweep));
  figure.drawn = plot.clientWidth;
};
const figures = [...document.querySelectorAll("figure[data-chart]")];
const watch = new IntersectionObserver((seen) => { for (const s of seen) if (s.isIntersecting && !s.target.drawn) draw(s.target); }, { rootMargin: "600px" });
figures.forEach((f) => watch.observe(f));
let wait = 0;
addEventListener("resize", () => { clearTimeout(wait); wait = setTimeout(() => figures.forEach((f) => { if (f.drawn && f.drawn !== f.querySelector(".plot").clientWidth) draw(f); }), 120); });
const repaint = () => figures.forEach((f) => f.drawn && f.querySelector(".plot").repaint && f.querySelector(".plot").repaint());
addEventListener("beforeprint", () => {
  figures.forEach((f) => { if (!f.drawn && f.offsetParent) draw(f); });
  document.querySelectorAll("details").forEach((d) => { d.wasOpen = d.open; d.open = true; });
});
addEventListener("afterprint", () => document.querySelectorAll("details").forEach((d) => { d.open = d.wasOpen; }));

// --- theme -------------------------------------------------------------------------------------------------------------
const dark = matchMedia("(prefers-color-scheme: dark)"), toggle = document.getElementById("theme");
const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
const shown = () => { toggle.setAttribute("aria-pressed", String(isDark())); toggle.textContent = isDark() ? "Light" : "Dark"; repaint(); };
const asked = new URLSearchParams(location.search).get("theme");
if (asked === "dark" || asked === "light") root.dataset.theme = asked;
toggle.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; shown(); });
toggle.setAttribute("aria-label", "Change between light and dark");
dark.addEventListener("change", shown);
shown();

// --- devices -------------------------------------------------------------------------------------------------------------
const devices = [...document.querySelectorAll("[data-device]")];
const choose = (i, focus) => {
  devices.forEach((b, k) => { b.setAttribute("aria-checked", String(k === i)); b.tabIndex = k === i ? 0 : -1; });
  document.querySelectorAll(".plan").forEach((p) => { p.hidden = Number(p.dataset.plan) !== i; });
  if (focus) devices[i].focus();
};
devices.forEach((b, i) => {
  b.tabIndex = i ? -1 : 0;
  b.addEventListener("click", () => choose(i, false));
  b.addEventListener("keydown", (e) => {
    const to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1 }[e.key];
    if (to === undefined) return;
    e.preventDefault(); choose((to + devices.length) % devices.length, true);
  });
});

// --- the table: sorting and searching ---------------------------------------------------------------------------------
document.querySelectorAll(".plan").forEach((plan) => {
  const table = plan.querySelector("table.sites");
  if (!table) return;
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, i, kind) => kind === "number" ? Number(row.cells[i].dataset.value) : row.cells[i].textContent.trim();
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", (e) => {
    const kind = e.currentTarget.dataset.sort, up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((h) => h.setAttribute("aria-sort", h === head ? (up ? "ascending" : "descending") : "none"));
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a, i, kind), y = value(b, i, kind), order = kind === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
      return up ? order : -order;
    });
    body.append(...rows);
    say.textContent = `Sorted by ${head.textContent.trim()}, ${up ? "ascending" : "descending"}`;
  }));
  const input = plan.querySelector("[data-search]"), count = plan.querySelector("[data-count]");
  const search = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let kept = 0;
    for (const row of body.rows) {
      const fits = words.every((w) => row.textContent.toLowerCase().includes(w));
      row.hidden = !fits; kept += fits;
      const section = plan.querySelector(`section[data-group="${row.dataset.group}"]`);
      if (section) section.hidden = !fits;
    }
    count.textContent = words.length ? `${kept} of ${body.rows.length}` : "";
  };
  input.addEventListener("input", search);
});
document.querySelectorAll(".site").forEach((s) => s.addEventListener("focus", () => s.scrollIntoView({ block: "start" })));
})();
