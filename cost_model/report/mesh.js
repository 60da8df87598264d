// --- a mesh: the time of a step and the memory of a device under every way ---------------------------------------------
const STEP = { compute: 0, memory: 3, exposed: 6, latency: 5 };
const STEP_NAMES = {
  compute: "computing", memory: "memory traffic", exposed: "messages that nothing hides", latency: "latency of messages",
};
const HOLDS = { weights: 5, cache: 0, activations: 2 };
const HOLDS_NAMES = { weights: "weights", cache: "keys and values", activations: "inputs and output" };
// Messages by kind and axis, each as long as it takes where nothing hides it.
const messages = (way) => {
  const sums = {};
  for (const x of way.exchanges) sums[`${x.kind} over ${x.axis}`] = (sums[`${x.kind} over ${x.axis}`] || 0) + x.seconds * x.layers;
  const parts = Object.entries(sums).map(([name, s]) => `${name} ${seconds(s)}`);
  return parts.length ? `: ${parts.join(", ")}, were nothing to hide them` : "";
};
const wayColour = (i) => `var(--p${[0, 1, 3, 4, 6, 2, 5][i % 7]})`;
const told = (way) => [
  `${way.name}: ${seconds(way.seconds)} a step`, `${way.range}, bound by ${way.bound}`,
  ...Object.keys(STEP).filter((n) => way.parts[n]).map((n) => `${STEP_NAMES[n]} ${seconds(way.parts[n])}`),
  `holds ${bytes(way.held)}: weights ${bytes(way.weights)}, keys and values ${bytes(way.cache)}, inputs and output ${bytes(way.activations)}`,
  `sends ${bytes(way.sent)}${messages(way)}`, way.why,
].filter(Boolean).join("\n");
const clipped = (text, most) => text.length > most ? `${text.slice(0, most - 1)}…` : text;
// Rows of bars with a name to the left: above them on narrow screens. `cells(row)` gives [part, from, to, thin].
function drawRows(plot, spec) {
  const { ways, high, unit, cells, ends, label, band = 0, level = null } = spec;
  const narrow = (plot.clientWidth || 520) < 520, each = narrow ? 58 : 42, longest = Math.max(...ways.map((w) => w.name.length));
  const { out, width, height } = frame(plot, ways.length * each + 52, label);
  out.setAttribute("role", "group");
  const l = narrow ? 4 : Math.min(210, 20 + 7.2 * longest), r = width - 92, t = level ? 20 : 4, b = height - 26;
  const X = linear(0, high, l, r), step = nice(high);
  for (let v = 0; v <= high * 1.0001; v += step) out.append(line(X(v), t, X(v), b), words(X(v), b + 16, v ? unit(v) : "0"));
  ways.forEach((w, i) => {
    const top = t + i * each + (narrow ? 22 : 6);
    const g = spot(told(w));
    g.append(svg("rect", { x: l, y: top - 2, width: r - l, height: 34, fill: "transparent", class: "ring" }));
    for (const [n, from, to, place] of cells(w)) {
      if (!(to > from)) continue;
      const y = top + [2, 19, 25][place], wide = X(to) - X(from);
      g.append(svg("rect", {
        x: X(from), y, width: Math.max(1, wide - (wide > 4 && !place ? 1.5 : 0)), height: place ? 4 : 16,
        rx: wide > 6 && !place ? 2 : 0, fill: n, opacity: w.fits ? 1 : .45,
      }));
    }
    const end = ends(w);
    if (band) g.append(whisker(X(end / (1 + band)), X(end * (1 + band)), top + 10));
    const name = words(narrow ? l : l - 10, narrow ? top - 6 : top + 14, clipped(w.name, 40), narrow ? "start" : "end", { class: "strong" });
    g.append(name, words(X(band ? end * (1 + band) : end) + 8, top + 14, unit(end) + (w.fits ? "" : ", too much"), "start"));
    explain(g, told(w)); out.append(g);
  });
  if (level) {
    out.append(line(X(level.value), t - 4, X(level.value), b, { stroke: "var(--ink)", "stroke-width": 1.5, "stroke-dasharray": "5 4" }));
    out.append(words(X(level.value) - 6, 11, level.name, "end"));
  }
}
function drawMeshTime(plot, plan) {
  const ways = plan.mesh.ways.filter((w) => w.known), band = plan.device.band;
  if (!ways.length) { nothing(plot, "No way can be had on this mesh; the table says why."); return; }
  drawRows(plot, {
    ways, band, unit: seconds, high: Math.max(...ways.map((w) => w.seconds * (1 + band))), ends: (w) => w.seconds,
    label: `Time of a step: ${ways.map((w) => `${w.name} ${seconds(w.seconds)}`).join("; ")}`,
    cells: (w) => {
      // The larger of computing and memory traffic stands for both: they overlap. Both are drawn thin, as if alone.
      const { compute, memory, exposed, latency } = w.parts, busy = w.seconds - exposed - latency;
      const paint = (n) => `var(--p${STEP[n]})`;
      return [
        [paint(compute >= memory ? "compute" : "memory"), 0, busy, 0], [paint("exposed"), busy, busy + exposed, 0],
        [paint("latency"), busy + exposed, w.seconds, 0], [paint("compute"), 0, compute, 1], [paint("memory"), 0, memory, 2],
      ];
    },
  });
  legend(plot, [...Object.keys(STEP).map((n) => [STEP_NAMES[n], `var(--p${STEP[n]})`]), ["range", RANGE]]);
}
function drawMeshMemory(plot, plan) {
  const { ways: all, room } = plan.mesh, ways = all.filter((w) => w.known);
  if (!ways.length) { nothing(plot, "No way can be had on this mesh; the table says why."); return; }
  drawRows(plot, {
    ways, unit: bytes, high: Math.max(room, ...ways.map((w) => w.held)), ends: (w) => w.held,
    level: { name: `${plan.device.name}: ${bytes(room)}`, value: room },
    label: `Memory of a device: ${ways.map((w) => `${w.name} ${bytes(w.held)}`).join("; ")}; it has ${bytes(room)}`,
    cells: (w) => {
      let from = 0;
      return Object.keys(HOLDS).map((n) => { const start = from; from += w[n]; return [`var(--p${HOLDS[n]})`, start, from, 0]; });
    },
  });
  legend(plot, Object.keys(HOLDS).map((n) => [HOLDS_NAMES[n], `var(--p${HOLDS[n]})`]));
}
function drawMeshSweep(plot, plan, group, index) {
  const c = plan.mesh.courses[index], kind = plot.parentElement.dataset.of;
  const points = c.values.map((value) => ({ value })), all = plan.mesh.ways.map((w) => w.name);
  const at = (name) => Math.max(0, all.indexOf(name));
  if (kind === "held") {
    const whole = plan.device.dram_bytes, name = `${plan.device.name}: ${bytes(whole)}, ${bytes(c.room)} of it to be used`;
    const levels = [{ name, value: whole }, { name: "", value: c.room }];
    drawLines(plot, {
      points, x: c.title, text: bytes, levels, label: `Memory of a device over ${c.axis}`,
      lines: c.held.map((h) => ({ name: h.names.join(", "), colour: wayColour(at(h.names[0])), values: h.values })),
    });
    return;
  }
  drawLines(plot, {
    points, x: c.title, text: seconds, band: plan.device.band, winners: c.best, marks: c.changes, label: `Step over ${c.axis}. ${c.text}`,
    paint: (name) => name ? wayColour(at(name)) : "var(--empty)",
    lines: c.names.map((n) => ({ name: n, colour: wayColour(at(n)), values: c.seconds[n].map((v, i) => c.fits[n][i] ? v : 0) })),
  });
}
