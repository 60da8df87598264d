// --- the mask: cells on a canvas, to be zoomed and moved -------------------------------------------------------------
const runs = (rows) => rows.map((row) => row.split(" ").map((x) => [x[0], Number(x.slice(1))]));
const KIND = { e: "empty", p: "partial", f: "full" };
function drawMask(plot, plan, group) {
  const mask = group.mask, picture = mask.picture;
  if (!picture || !picture.layers.length) {
    nothing(plot, mask.expr ? "There is no picture of this mask: which tiles it keeps is known at run time." : "Every tile is full.");
    return;
  }
  const layers = picture.layers.map((l) => runs(l.rows));
  let rows = layers[0], view = { x: 0, y: 0, zoom: 1 };
  const wide = Math.ceil(picture.keys / picture.cell_m), high = rows.length;
  const tools = node("div", { class: "tools" });
  const spoken = `${mask.text} Plus and minus zoom, arrow keys move.`;
  const canvas = node("canvas", { tabindex: "0", role: "img", "aria-label": spoken });
  const at = node("span", { class: "dim mono" });
  const button = (text, label, act) => {
    const made = node("button", { type: "button", "aria-label": label }, text);
    made.addEventListener("click", act); tools.append(made);
  };
  const size = () => {
    const width = Math.max(220, Math.min(plot.clientWidth || 480, 560));
    const ratio = Math.min(4, Math.max(.02, picture.queries / picture.keys));
    return [width, Math.max(34, Math.min(width * ratio, 420))];
  };
  const paint = () => {
    const [width, height] = size(), scale = devicePixelRatio || 1, style = getComputedStyle(root);
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d"), fills = {};
    for (const [kind, name] of Object.entries(KIND)) fills[kind] = style.getPropertyValue(`--${name}`);
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
          } else {
            const left = Math.round(ox + k * cw), right = Math.round(ox + (k + n) * cw);
            pen.fillRect(left, top, Math.max(1, right - left), Math.max(1, bottom - top));
          }
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
    const at = (offset, f, n) => Math.min(n - 1, Math.floor((offset + f / view.zoom) * n));
    const j = at(view.x, fx, wide), i = at(view.y, fy, high);
    let k = 0, kind = "e";
    for (const [name, n] of rows[i]) { kind = name; k += n; if (j < k) break; }
    const end = (a, step, all) => `${a * step} to ${Math.min((a + 1) * step, all) - 1}`;
    return `${KIND[kind]}\nqueries ${end(i, picture.cell_p, picture.queries)}\nkeys ${end(j, picture.cell_m, picture.keys)}`;
  };
  const whole = () => { view = { x: 0, y: 0, zoom: 1 }; paint(); };
  button("+", "Zoom in", () => zoom(2)); button("−", "Zoom out", () => zoom(.5)); button("Reset", "Show the whole mask", whole);
  if (layers.length > 1) {
    const pick = node("select", { "aria-label": "Which heads or batch entries" });
    picture.layers.forEach((l, i) => pick.append(node("option", { value: i }, l.label)));
    pick.addEventListener("change", () => { rows = layers[Number(pick.value)]; paint(); });
    tools.append(pick);
    if (picture.omitted) tools.append(node("span", { class: "dim" }, `${picture.omitted} more that differ are not drawn`));
  }
  tools.append(at);
  let held = null;
  canvas.addEventListener("wheel", (e) => {
    // Without a key held the wheel scrolls the page past a mask that is shown whole.
    if (!e.ctrlKey && !e.metaKey && view.zoom === 1) return;
    e.preventDefault(); zoom(e.deltaY < 0 ? 1.25 : .8, ...cell(e));
  }, { passive: false });
  canvas.addEventListener("pointerdown", (e) => {
    held = [...cell(e), view.x, view.y];
    canvas.setPointerCapture(e.pointerId); canvas.style.cursor = "grabbing";
  });
  canvas.addEventListener("pointerup", () => { held = null; canvas.style.cursor = ""; });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("pointermove", (e) => {
    const [fx, fy] = cell(e);
    if (held) {
      view.x = held[2] + (held[0] - fx) / view.zoom; view.y = held[3] + (held[1] - fy) / view.zoom;
      paint(); hideTip(); return;
    }
    if (fx >= 0 && fx < 1 && fy >= 0 && fy < 1) showTip(told(fx, fy), e.clientX, e.clientY);
  });
  canvas.addEventListener("keydown", (e) => {
    const step = .25 / view.zoom, steps = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const move = steps[e.key];
    if (e.key === "+" || e.key === "=") zoom(2); else if (e.key === "-") zoom(.5); else if (e.key === "0") whole();
    else if (move && view.zoom > 1) { view.x += move[0]; view.y += move[1]; paint(); } else return;
    e.preventDefault(); say.textContent = `Zoom ${digits(view.zoom)}. In the middle: ${told(.5, .5).replace(/\n/g, ", ")}`;
  });
  const count = (n) => n.toLocaleString("en"), tiles = picture.scale > 1 ? ` (${picture.scale}×${picture.scale} tiles)` : "";
  const named = (n, one, many) => `${count(n)} ${n === 1 ? one : many}`;
  const sides = `↓ ${named(picture.queries, "query", "queries")}   → ${named(picture.keys, "key", "keys")}   cell ${picture.cell_p}×${picture.cell_m}${tiles}`;
  const axes = node("p", { class: "dim mono" }, sides);
  plot.append(tools, canvas, axes);
  legend(plot, [
    ["full", "var(--full)"], ["partial: the mask is evaluated", "var(--partial)"], ["empty: skipped", "var(--empty)", "var(--line)"],
  ]);
  paint();
  plot.repaint = paint;
}

// --- the roofline ---------------------------------------------------------------------------------------------------
function drawRoofline(plot, plan, group) {
  const found = group.candidates.filter((c) => c.cost && c.cost.flops > 0 && c.cost.bytes > 0 && c.cost.seconds > 0);
  if (!found.length || !group.roof.flops_per_s) { nothing(plot, "No candidate has a predicted time."); return; }
  const peak = group.roof.flops_per_s, band = group.roof.bytes_per_s, dram = group.roof.dram_bytes_per_s, ridge = peak / band;
  const points = found.map((c) => ({ c, x: c.cost.flops / c.cost.bytes, y: c.cost.flops / c.cost.seconds }));
  const x0 = Math.min(ridge, ...points.map((p) => p.x)) / 8, x1 = Math.max(ridge, ...points.map((p) => p.x)) * 4;
  const y0 = Math.min(...points.map((p) => p.y / (1 + p.c.cost.band)), peak) / 6, y1 = Math.max(peak, ...points.map((p) => p.y)) * 2.5;
  const told = points.map((p) => `${p.c.name} ${rate(p.y)} at ${digits(p.x)} FLOP a byte`).join("; ");
  const roof = (x) => Math.min(peak, band * x);
  const title = `Roofline of ${plan.device.name}: ${told}. Peak ${rate(peak)}, ${bytes(band)} a second.`;
  const { out, width, height } = frame(plot, 290, title);
  out.setAttribute("role", "group");
  const l = 78, r = width - 12, t = 12, b = height - 40, X = log(x0, x1, l, r), Y = log(y0, y1, b, t);
  for (const v of decades(x0, x1)) {
    out.append(line(X(v), t, X(v), b), words(X(v), b + 16, v >= 1e6 ? `${v / 1e6}M` : v >= 1e3 ? `${v / 1e3}k` : digits(v)));
  }
  for (const v of decades(y0, y1)) {
    out.append(line(l, Y(v), r, Y(v)), words(l - 8, Y(v) + 4, rate(v).replace("FLOP/s", "F/s"), "end"));
  }
  out.append(words((l + r) / 2, height - 6, "FLOP a byte"));
  const low = Math.max(x0, y0 / band);
  out.append(path(`M${X(low)} ${Y(band * low)}L${X(ridge)} ${Y(peak)}L${r} ${Y(peak)}`, "var(--roof)"));
  const top = `${rate(peak)} ${group.dtype}`, labels = [[r - 7 * top.length, Y(peak) - 19, r, Y(peak) - 3]];
  out.append(words(r, Y(peak) - 7, top, "end"));
  // The bandwidth is written along its line, where there is room left of the ridge.
  const x = Math.sqrt(Math.max(x0, y0 / band) * ridge), cx = X(x), cy = Y(band * x), speed = `${dram < band ? "last cache " : ""}${bytes(band)}/s`;
  if (X(ridge) - l > 90 && width > 420) {
    const tilt = Math.atan((Y(2 * band * x) - cy) / (X(2 * x) - cx)) * 180 / Math.PI;
    labels.push([cx - 4 * speed.length, cy - 34, cx + 4 * speed.length, cy - 2]);
    out.append(words(cx, cy - 7, speed, "middle", { transform: `rotate(${tilt} ${cx} ${cy})` }));
  }
  if (dram < band) {
    const from = Math.max(x0, y0 / dram), to = Math.min(x1, peak / dram);
    out.append(svg("path", { d: `M${X(from)} ${Y(dram * from)}L${X(to)} ${Y(dram * to)}`, stroke: "var(--dim)", "stroke-dasharray": "5 4", fill: "none" }));
  }
  const taken = points.map((p) => {
    const off = 1 + p.c.cost.band;
    return [X(p.x) - 8, Math.min(Y(p.y) - 8, Y(Math.min(p.y * off, roof(p.x)))), X(p.x) + 8, Math.max(Y(p.y) + 8, Y(p.y / off))];
  });
  taken.push(...labels);
  const apart = (a, o) => a[2] < o[0] || a[0] > o[2] || a[3] < o[1] || a[1] > o[3];
  const free = (box) => box[0] >= l && box[2] <= r && taken.every((o) => apart(box, o));
  for (const p of [...points].sort((a, c) => c.y - a.y)) {
    const x = X(p.x), y = Y(p.y), bound = roof(p.x), off = 1 + p.c.cost.band;
    const text = [
      p.c.name, `${seconds(p.c.cost.seconds)}, bound by ${p.c.cost.bound}`, `${p.c.range}, ${p.c.cost.basis}`,
      `${rate(p.y)}: ${Math.round(100 * p.y / bound)}% of the roof`, `${digits(p.x)} FLOP a byte`,
    ].join("\n");
    const g = spot(text);
    g.append(svg("circle", { cx: x, cy: y, r: 13, fill: "transparent" }));
    // No time is shorter than the roof allows.
    if (off > 1) g.append(whisker(Y(p.y / off), Y(Math.max(p.y, Math.min(p.y * off, bound))), x, true));
    g.append(mark(p.c.name, x, y));
    const wide = p.c.name.length * 7;
    // Beside the mark where there is room, else further down or up.
    const places = [0, 16, -16, 32, -32, 48, -48, 64].flatMap((dy) => [[1, dy], [-1, dy]]).map(([side, dy]) => {
      const from = side > 0 ? x + 12 : x - 12 - wide;
      return { side, dy, box: [from, y + dy - 8, from + wide, y + dy + 6] };
    });
    const inside = (s) => s.box[0] >= l && s.box[2] <= r, to = places.find((s) => free(s.box)) || places.find(inside) || places[0];
    taken.push(to.box);
    if (to.dy) g.append(line(x, y, x + to.side * 10, y + to.dy, { class: "axis" }));
    g.append(words(x + to.side * 12, y + to.dy + 4, p.c.name, to.side > 0 ? "start" : "end", { class: "strong" }));
    explain(g, text); out.append(g);
  }
}

// --- time by part ----------------------------------------------------------------------------------------------------
function drawParts(plot, plan, group) {
  const found = group.candidates.filter((c) => c.cost);
  if (!found.length) { nothing(plot, "No candidate has a predicted time."); return; }
  const there = new Set(found.flatMap((c) => Object.keys(c.parts)));
  const names = [...new Set([...Object.keys(PARTS).filter((n) => there.has(n)), ...there])];
  const sum = (c) => Object.values(c.parts).reduce((a, v) => a + v, 0);
  const top = Math.max(...found.map((c) => Math.max(sum(c), c.cost.seconds * (1 + c.cost.band))));
  const told = found.map((c) => `${c.name} ${seconds(c.cost.seconds)}`).join("; ");
  const { out, width, height } = frame(plot, found.length * 46 + 40, `Time by part: ${told}`);
  out.setAttribute("role", "group");
  const l = 78, r = width - 70, b = height - 26, X = linear(0, top, l, r), step = nice(top);
  for (let v = 0; v <= top * 1.0001; v += step) out.append(line(X(v), 4, X(v), b), words(X(v), b + 16, v ? seconds(v) : "0"));
  found.forEach((c, i) => {
    const y = 8 + i * 46;
    const told = names.filter((n) => c.parts[n]).map((n) => `${n} ${seconds(c.parts[n])}`).join("\n");
    const g = spot(`${c.name}, ${seconds(c.cost.seconds)} in all, ${c.range}, ${c.cost.basis}: ${told}`);
    g.append(svg("rect", { x: l, y: y - 2, width: r - l, height: 34, fill: "transparent", class: "ring" }));
    let from = 0;
    for (const n of names) {
      const v = c.parts[n];
      if (!v) continue;
      const w = X(from + v) - X(from);
      const shape = { x: X(from), y: y + 4, width: Math.max(.6, w - (w > 4 ? 1.5 : 0)), height: 20, rx: w > 6 ? 2 : 0 };
      if (w > .4) g.append(svg("rect", { ...shape, fill: part(n, names) }));
      from += v;
    }
    const x = X(c.cost.seconds);
    g.append(line(x, y, x, y + 28, { stroke: "var(--ink)", "stroke-width": 2 }));
    const off = 1 + c.cost.band, ends = Math.max(X(from), X(c.cost.seconds * off));
    if (off > 1) g.append(whisker(X(c.cost.seconds / off), X(c.cost.seconds * off), y + 14));
    g.append(words(l - 10, y + 18, c.name, "end", { class: "strong" }));
    g.append(words(ends + 8, y + 18, seconds(c.cost.seconds), "start"));
    explain(g, `${c.name}: ${seconds(c.cost.seconds)}\n${c.range}, ${c.cost.basis}\n${told}`); out.append(g);
  });
  legend(plot, [...names.map((n) => [n, part(n, names)]), ["predicted time and its range", RANGE]]);
}

// --- lines over a size ------------------------------------------------------------------------------------------------
function drawLines(plot, spec) {
  const { points, lines, marks = [], winners = null, text, x: title, band = 0, paint = colour } = spec;
  // A device whose memory is not bounded has no level.
  const levels = (spec.levels || []).filter((v) => v.value > 0);
  const values = points.map((p) => p.value), first = values[0], last = values[values.length - 1];
  const all = [...lines.flatMap((n) => n.values), ...levels.map((v) => v.value)].filter((v) => v > 0);
  const { out, width, height } = frame(plot, winners ? 310 : 290, spec.label);
  out.setAttribute("role", "group");
  const l = 70, r = width - 14, t = 14, b = height - (winners ? 62 : 42);
  const low = Math.min(...all) / 1.6, high = Math.max(...all) * 1.6;
  const X = log(first, values.length > 1 ? last : 2 * last, l, r), Y = log(low, high, b, t);
  for (const v of decades(low, high)) out.append(line(l, Y(v), r, Y(v)), words(l - 8, Y(v) + 4, text(v), "end"));
  const powers = [];
  for (let v = 2 ** Math.ceil(Math.log2(first)); v <= last; v *= 2) powers.push(v);
  let edge = -99;
  for (const v of powers.length > 1 ? powers : values) {
    if (X(v) - edge <= 40) continue;
    edge = X(v);
    out.append(line(X(v), b, X(v), b + 4, { class: "axis" }), words(X(v), height - 24, tokens(v)));
  }
  out.append(line(l, b, r, b, { class: "axis" }), words((l + r) / 2, height - 6, title));
  levels.forEach((v, i) => {
    out.append(line(l, Y(v.value), r, Y(v.value), { stroke: "var(--dim)", "stroke-dasharray": "5 4" }));
    const close = i && Math.abs(Y(v.value) - Y(levels[0].value)) < 22;
    out.append(close ? words(r - 6, Y(v.value) + 14, v.name, "end") : words(l + 6, Y(v.value) - 5, v.name, "start"));
  });
  const turns = marks.map((m) => X(Math.sqrt(m.low * m.high)));
  for (const x of turns) out.append(line(x, t, x, b, { stroke: "var(--ink)", "stroke-dasharray": "2 3" }));
  if (winners) [...marks.map((m) => m.before), winners[winners.length - 1]].forEach((name, i) => {
    const from = i ? turns[i - 1] : l, to = i < turns.length ? turns[i] : r;
    out.append(svg("rect", { x: from, y: b + 8, width: Math.max(1, to - from), height: 8, fill: paint(name) }));
  });
  for (const n of band ? lines : []) {
    const at = n.values.map((v, i) => v > 0 ? [X(values[i]), Y(v * (1 + band)), Y(v / (1 + band))] : null).filter(Boolean);
    if (!at.length) continue;
    const up = at.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`), down = at.map(([x, , y]) => `${x.toFixed(1)} ${y.toFixed(1)}`);
    out.append(svg("path", { d: `M${[...up, ...down.reverse()].join("L")}Z`, fill: n.colour, class: "band" }));
  }
  for (const n of lines) {
    const spots = n.values.map((v, i) => v > 0 ? [X(values[i]), Y(v)] : null).filter(Boolean);
    out.append(path(spots.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join(""), n.colour));
    for (const [x, y] of spots) out.append(n.mark ? mark(n.mark, x, y, 4) : svg("circle", { cx: x, cy: y, r: 3, fill: n.colour }));
  }
  const cursor = svg("line", { y1: t, y2: b, stroke: "var(--dim)", visibility: "hidden" });
  const cover = svg("rect", {
    x: l, y: t, width: r - l, height: b - t + 20, fill: "transparent", class: "ring", tabindex: "0", role: "slider",
    "aria-label": `${title}: arrow keys move`, "aria-valuemin": 0, "aria-valuemax": values.length - 1, "aria-valuenow": 0,
  });
  let now = 0;
  const told = (i) => {
    const ranged = (v) => band ? `${text(v)} (${text(v / (1 + band))} to ${text(v * (1 + band))})` : text(v);
    const rows = lines.filter((n) => n.values[i] > 0).map((n) => `${n.name} ${ranged(n.values[i])}`);
    return [`${tokens(values[i])}${winners ? `: ${winners[i]}` : ""}`, ...rows].join("\n");
  };
  const point = (i, x, y) => {
    now = i;
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, X(values[i]));
    cursor.setAttribute("visibility", "visible");
    cover.setAttribute("aria-valuenow", i); cover.setAttribute("aria-valuetext", told(i).replace(/\n/g, ", "));
    showTip(told(i), x, y);
  };
  const leave = () => { cursor.setAttribute("visibility", "hidden"); hideTip(); };
  const here = () => {
    const box = out.getBoundingClientRect();
    return [box.left + X(values[now]) * box.width / width, box.top + t + 30];
  };
  cover.addEventListener("pointermove", (e) => {
    const box = out.getBoundingClientRect(), x = (e.clientX - box.left) * width / box.width;
    const i = values.reduce((best, v, k) => Math.abs(X(v) - x) < Math.abs(X(values[best]) - x) ? k : best, 0);
    point(i, e.clientX, e.clientY);
  });
  cover.addEventListener("pointerleave", leave); cover.addEventListener("blur", leave);
  cover.told = () => point(now, ...here());
  cover.addEventListener("focus", cover.told);
  cover.addEventListener("keydown", (e) => {
    const steps = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: values.length - 1 };
    const to = steps[e.key];
    if (to === undefined) return;
    e.preventDefault(); now = Math.max(0, Math.min(values.length - 1, to)); point(now, ...here());
  });
  out.append(cursor, cover);
  legend(plot, lines.map((n) => [n.name, n.colour]));
}
function drawSweep(plot, plan, group, index) {
  const s = group.sweeps[index];
  drawLines(plot, {
    points: s.points, x: s.title, text: seconds, band: plan.device.band, winners: s.points.map((p) => p.choice), marks: s.changes,
    lines: s.names.map((n) => ({ name: n, colour: colour(n), mark: n, values: s.points.map((p) => p.times[n] || 0) })),
    label: `Predicted time over ${s.title}. Choice: ${s.text}.`,
  });
}
function drawMemory(plot, plan) {
  const m = plan.memory, room = plan.device.dram_bytes;
  const levels = [{ name: `${plan.device.name}: ${bytes(room)}`, value: room }];
  if (plan.weight_bytes) levels.push({ name: `weights: ${bytes(plan.weight_bytes)}`, value: plan.weight_bytes });
  const course = (name, colour, key) => ({ name, colour, values: m.rows.map((r) => r[key]) });
  drawLines(plot, {
    points: m.rows, x: m.title, text: bytes, levels, label: `Memory over context length. ${m.text}`,
    lines: [
      course("keys and values, all attentions", "var(--p0)", "cache"),
      course("alive in one attention, operator by operator", "var(--p1)", "eager"),
      course("alive in one attention, tiled", "var(--p3)", "tiled"),
    ],
  });
}
