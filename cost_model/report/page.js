// --- drawing what is seen ----------------------------------------------------------------------------------------------
const DRAW = { mask: drawMask, roofline: drawRoofline, parts: drawParts, sweep: drawSweep, memory: drawMemory,
  meshtime: drawMeshTime, meshmemory: drawMeshMemory, meshsweep: drawMeshSweep,
};
const draw = (figure) => {
  const plot = figure.querySelector(".plot"), d = figure.dataset, plan = PLANS[Number(d.plan)];
  plot.replaceChildren();
  DRAW[d.chart](plot, plan, plan.groups[Number(d.group)], Number(d.sweep));
  figure.drawn = plot.clientWidth;
};
const figures = [...document.querySelectorAll("figure[data-chart]")];
const watch = new IntersectionObserver((seen) => {
  for (const s of seen) if (s.isIntersecting && !s.target.drawn) draw(s.target);
}, { rootMargin: "600px" });
figures.forEach((f) => watch.observe(f));
let wait = 0;
const plotOf = (figure) => figure.querySelector(".plot");
addEventListener("resize", () => {
  clearTimeout(wait);
  wait = setTimeout(() => figures.forEach((f) => { if (f.drawn && f.drawn !== plotOf(f).clientWidth) draw(f); }), 120);
});
const repaint = () => figures.forEach((f) => { if (f.drawn && plotOf(f).repaint) plotOf(f).repaint(); });
addEventListener("beforeprint", () => {
  figures.forEach((f) => { if (!f.drawn && f.offsetParent) draw(f); });
  document.querySelectorAll("details").forEach((d) => { d.wasOpen = d.open; d.open = true; });
});
addEventListener("afterprint", () => document.querySelectorAll("details").forEach((d) => { d.open = d.wasOpen; }));

// --- theme -------------------------------------------------------------------------------------------------------------
const dark = matchMedia("(prefers-color-scheme: dark)"), toggle = document.getElementById("theme");
const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
const shown = () => {
  toggle.setAttribute("aria-pressed", String(isDark())); toggle.textContent = isDark() ? "Light" : "Dark";
  repaint();
};
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

// --- the plan as JSON ----------------------------------------------------------------------------------------------------
document.querySelectorAll("[data-document]").forEach((b) => b.addEventListener("click", async () => {
  const text = document.getElementById(`document${b.dataset.document}`).textContent;
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await new Response(plain).blob());
  link.download = b.dataset.name;
  link.click();
  URL.revokeObjectURL(link.href);
}));

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
      const x = value(a, i, kind), y = value(b, i, kind);
      const order = kind === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
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
