"""Template, style and script of the report page. The facts and numbers in it are `report`'s.

No library and no address: the page opens from a disk without a network, in light and in dark.
"""

# ruff: noqa: E501 - a script and a style sheet, whose lines are not Python's

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<div class="controls">
<label>Horizontal axis <select id="axis"><option value="step">batch</option><option value="tokens">tokens</option>
<option value="time">time</option></select></label>
<label>Smoothing <input id="smooth" type="range" min="0" max="0.98" step="0.02" value="0"></label>
<button id="theme" type="button" title="light or dark">◐</button>
</div>
</header>
<nav id="legend" aria-label="Runs"></nav>
{tiles}
<main id="charts"></main>
<noscript><p>The curves are drawn by a script inside this page; allow it to run to see them.</p></noscript>
<section class="facts"><h2>Facts</h2><div class="scroll">{table}</div>{notes}</section>
<script id="data" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { --page:#f6f6f3; --card:#fff; --ink:#15181c; --soft:#5d646d; --faint:#9aa1a9; --line:#e4e4df; --bad:#d03b3b;
  --c0:#2a78d6; --c1:#d9601f; --c2:#138a62; --c3:#8a4fd0; --c4:#cf4f86; --c5:#8a6d00; --c6:#0e8a9b; --c7:#6b5a4d; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { --page:#101214; --card:#191c1f; --ink:#eef0f2;
  --soft:#a9b0b8; --faint:#727a83; --line:#2b2f34; --bad:#ff7a70; --c0:#5aa2f2; --c1:#f08a4b; --c2:#3fbf8f; --c3:#b58cf0;
  --c4:#ee82ae; --c5:#d6b13a; --c6:#46c0d1; --c7:#b8a596; } }
:root[data-theme=dark] { --page:#101214; --card:#191c1f; --ink:#eef0f2; --soft:#a9b0b8; --faint:#727a83; --line:#2b2f34;
  --bad:#ff7a70; --c0:#5aa2f2; --c1:#f08a4b; --c2:#3fbf8f; --c3:#b58cf0; --c4:#ee82ae; --c5:#d6b13a; --c6:#46c0d1;
  --c7:#b8a596; }
* { box-sizing:border-box; }
body { margin:0 auto; max-width:1480px; padding:20px 24px 48px; background:var(--page); color:var(--ink);
  font:14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { display:flex; flex-wrap:wrap; gap:12px 28px; align-items:center; justify-content:space-between; }
h1 { font-size:21px; margin:0; font-weight:650; letter-spacing:-.01em; }
h2 { font-size:15px; margin:0; font-weight:620; }
.controls { display:flex; flex-wrap:wrap; gap:16px; align-items:center; color:var(--soft); }
.controls label { display:flex; gap:8px; align-items:center; }
select, button { font:inherit; color:var(--ink); background:var(--card); border:1px solid var(--line); border-radius:7px;
  padding:3px 9px; cursor:pointer; }
input[type=range] { width:120px; accent-color:var(--c0); }
#legend { display:flex; flex-wrap:wrap; gap:8px; margin:14px 0 16px; position:sticky; top:0; z-index:3; padding:6px 0;
  background:var(--page); }
#legend button { display:flex; gap:8px; align-items:center; }
#legend button[aria-pressed=false] { opacity:.45; text-decoration:line-through; }
.keys { display:flex; gap:14px; align-items:center; color:var(--soft); margin-left:auto; }
.swatch { display:inline-block; width:12px; height:12px; border-radius:4px; flex:none; }
.c0 { background:var(--c0); } .c1 { background:var(--c1); } .c2 { background:var(--c2); } .c3 { background:var(--c3); }
.c4 { background:var(--c4); } .c5 { background:var(--c5); } .c6 { background:var(--c6); } .c7 { background:var(--c7); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(165px,1fr)); gap:12px; margin-bottom:14px; }
.tile, .card, .facts { background:var(--card); border:1px solid var(--line); border-radius:12px; }
.tile { padding:11px 15px; } .tile span { display:block; color:var(--soft); font-size:12.5px; }
.tile b { font-size:20px; font-weight:620; font-variant-numeric:tabular-nums; }
#charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(520px,100%),1fr)); gap:14px; }
.card { padding:13px 15px 8px; position:relative; min-width:0; }
.card.wide, .card:last-child:nth-child(even) { grid-column:1/-1; }
.card .head { display:flex; gap:10px; align-items:baseline; }
.card .head small { color:var(--soft); font-size:12.5px; flex:1; }
.card .head button { font-size:12px; padding:1px 8px; color:var(--soft); }
svg { display:block; width:100%; touch-action:pan-y; }
svg text { fill:var(--soft); font-size:11.5px; font-variant-numeric:tabular-nums; }
.grid { stroke:var(--line); stroke-width:1; shape-rendering:crispEdges; } .axis { stroke:var(--faint); }
.cross { stroke:var(--faint); stroke-width:1; } .resume { stroke:var(--soft); stroke-width:1; stroke-dasharray:3 3; }
.bad { fill:var(--bad); }
.curve { fill:none; stroke-width:1.8; stroke-linejoin:round; stroke-linecap:round; } .raw { opacity:.28; stroke-width:1.2; }
.tip { position:absolute; pointer-events:none; z-index:2; background:var(--card); border:1px solid var(--line);
  border-radius:9px; padding:7px 11px; box-shadow:0 5px 18px #0003; font-size:12.5px; white-space:nowrap; display:none;
  font-variant-numeric:tabular-nums; }
.tip div { display:flex; gap:8px; align-items:center; } .tip em { color:var(--soft); font-style:normal; }
.tip b { margin-left:auto; padding-left:14px; } .tip .warn { color:var(--bad); }
.facts { margin-top:14px; padding:14px 16px; } .scroll { overflow-x:auto; margin-top:6px; }
table { border-collapse:collapse; min-width:min(560px,100%); font-variant-numeric:tabular-nums; }
th, td { text-align:left; padding:6px 22px 6px 0; vertical-align:top; border-bottom:1px solid var(--line); }
tbody tr:last-child > * { border-bottom:0; }
th[scope=row] { color:var(--soft); font-weight:450; white-space:nowrap; } th[scope=col] { font-weight:620; }
th .swatch { margin-right:8px; }
.notes { color:var(--soft); margin:10px 0 0; padding-left:18px; }
@media print { #legend, .controls { display:none; } body { max-width:none; } }
"""

SCRIPT = r"""
(() => {
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const state = { axis: "step", smooth: 0, hidden: new Set(), log: {}, views: [] };
const color = i => `var(--c${i % 8})`, dash = i => i < 8 ? "" : ` stroke-dasharray="${i < 16 ? "7 3" : "2 3"}"`;
const esc = s => String(s).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const known = v => v !== null && v !== undefined && Number.isFinite(v);
const M = { left: 58, right: 14, top: 10, bottom: 28 };

const trim = s => s.includes("e") ? s.replace(/\.?0+e/, "e").replace("e+", "e") : s.includes(".") ? s.replace(/\.?0+$/, "") : s;
function short(v) {
  const a = Math.abs(v);
  if (a === 0) return "0";
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (a >= size && a >= 1e5) return trim((v / size).toPrecision(4)) + unit;
  return a < 1e-3 ? trim(v.toExponential(3)) : trim(v.toPrecision(5));
}
function exact(v) {
  if (Number.isInteger(v)) return v.toLocaleString("en-US");
  return Math.abs(v) < 1e-3 ? trim(v.toExponential(5)) : trim(v.toPrecision(7));
}
function duration(s) {
  if (s >= 5400) return trim((s / 3600).toFixed(2)) + " h";
  return s >= 90 ? trim((s / 60).toFixed(1)) + " min" : trim(s.toFixed(1)) + " s";
}
const axisText = v => state.axis === "time" ? duration(v) : short(v);

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count), base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 2.5, 5, 10].find(f => base * f >= raw * 0.999), out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) out.push(k * step);
  return out;
}
function timeTicks(low, high, count) {
  const unit = high >= 5400 ? 3600 : high >= 90 ? 60 : 1;
  return ticks(low / unit, high / unit, count).map(t => t * unit);
}
function logTicks(low, high, base, count) {
  const first = Math.floor(Math.log(low) / Math.log(base) + 1e-9), last = Math.ceil(Math.log(high) / Math.log(base) - 1e-9);
  const every = Math.max(1, Math.ceil((last - first) / count)), out = [];
  for (let k = first; k <= last; k += every)
    for (const f of base === 10 && last - first <= 2 ? [1, 2, 5] : [1])
      if (base ** k * f >= low * 0.999 && base ** k * f <= high * 1.001) out.push(base ** k * f);
  return out.length > 1 ? out : ticks(low, high, count);
}

// place on the horizontal axis of a batch: that of the point itself, else between its neighbours
function place(run, step) {
  if (state.axis === "step") return step;
  const xs = run[state.axis], steps = run.step;
  let i = steps.findIndex(s => s >= step);
  if (i < 0) i = steps.length - 1;
  if (steps[i] === step || i === 0 || !known(xs[i - 1])) return xs[i];
  return xs[i - 1] + (xs[i] - xs[i - 1]) * (step - steps[i - 1]) / (steps[i] - steps[i - 1]);
}
// exponential mean by batch distance, free of the start's bias
function smoothed(steps, ys, weight) {
  if (!weight) return ys;
  let mean = 0, mass = 0, before = null;
  return ys.map((y, i) => {
    if (!known(y)) return null;
    const keep = before === null ? 0 : weight ** Math.min(1e3, steps[i] - before);
    mean = keep * mean + (1 - weight) * y; mass = keep * mass + (1 - weight); before = steps[i];
    return mean / mass;
  });
}
const visible = () => data.runs.map((run, index) => ({ run, index })).filter(r => !state.hidden.has(r.index));

function spread(chart) {
  const values = [];
  for (const { run } of visible()) {
    values.push(...run.series[chart.key].filter(known));
    if (chart.validation) for (const set of Object.values(run.validation)) values.push(...set[chart.validation].filter(known));
  }
  return values;
}
function isLog(chart, values) {
  if (!values.some(v => v > 0)) return false;
  if (chart.key in state.log) return state.log[chart.key];
  const positive = values.filter(v => v > 0), r = positive.reduce((m, v) => [Math.min(m[0], v), Math.max(m[1], v)], [1e300, 0]);
  return chart.scale.startsWith("log") || (chart.scale === "auto" && positive.length === values.length && r[1] / r[0] > 30);
}
function verticalRange(chart, values, log) {
  const used = log ? values.filter(v => v > 0) : values;
  let low = Infinity, high = -Infinity;
  for (const v of used) { if (v < low) low = v; if (v > high) high = v; }
  if (!used.length) return [0, 1];
  if (log) { const f = low === high ? 2 : (high / low) ** 0.05; return [low / f, high * f]; }
  if (chart.from_zero) return [0, high > 0 ? high * 1.06 : 1];
  const pad = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.06;
  return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
}
function horizontalRange() {
  let low = Infinity, high = -Infinity;
  for (const { run } of visible()) for (const x of run[state.axis]) if (known(x)) { if (x < low) low = x; if (x > high) high = x; }
  if (low > high) return [0, 1];
  return low === high ? [low - 1, high + 1] : [low, high];
}

function curve(xs, ys, X, Y, shown, attributes) {
  let path = "", dots = "", open = false;
  for (let i = 0; i < ys.length; i++) {
    if (!shown(ys[i]) || !known(xs[i])) { open = false; continue; }
    const next = i + 1 < ys.length && shown(ys[i + 1]) && known(xs[i + 1]), p = `${X(xs[i]).toFixed(1)} ${Y(ys[i]).toFixed(1)}`;
    if (!open && !next) dots += `<circle cx="${p.split(" ")[0]}" cy="${p.split(" ")[1]}" r="3"/>`;
    else path += (open ? "L" : "M") + p;
    open = true;
  }
  return `<path class="curve ${attributes.extra || ""}" stroke="${attributes.color}"${attributes.dash} d="${path}"/>` +
    `<g fill="${attributes.color}">${dots}</g>`;
}

function draw(view) {
  const { chart, holder } = view, width = Math.max(260, holder.clientWidth), height = view.wide ? 320 : 230;
  const values = spread(chart), log = isLog(chart, values), [y0, y1] = verticalRange(chart, values, log), [x0, x1] = horizontalRange();
  const bottom = height - M.bottom, right = width - M.right, f = log ? Math.log : v => v;
  const X = x => M.left + (x - x0) / (x1 - x0) * (right - M.left), Y = y => bottom - (f(y) - f(y0)) / (f(y1) - f(y0)) * (bottom - M.top);
  const shown = v => known(v) && (!log || v > 0);
  view.toggle.textContent = log ? "log" : "linear";
  view.toggle.hidden = !values.some(v => v > 0);
  let out = "";
  for (const t of log ? logTicks(y0, y1, chart.scale === "log2" ? 2 : 10, 6) : ticks(y0, y1, view.wide ? 6 : 4))
    out += `<line class="grid" x1="${M.left}" x2="${right}" y1="${Y(t)}" y2="${Y(t)}"/><text x="${M.left - 8}" y="${Y(t) + 4}" text-anchor="end">${short(t)}</text>`;
  for (const t of (state.axis === "time" ? timeTicks : ticks)(x0, x1, Math.floor(width / 110)))
    if (t >= 0 && (state.axis !== "step" || Number.isInteger(t))) out += `<text x="${X(t)}" y="${bottom + 18}" text-anchor="middle">${axisText(t)}</text>`;
  out += `<line class="axis" x1="${M.left}" x2="${right}" y1="${bottom}" y2="${bottom}"/>`;
  view.points = [];
  view.weight = chart.noisy ? state.smooth : 0;
  for (const { run, index } of visible()) {
    const xs = run[state.axis], raw = run.series[chart.key], ys = smoothed(run.step, raw, view.weight), paint = { color: color(index), dash: dash(index) };
    for (const s of run.resumes) { const x = place(run, s); if (known(x)) out += `<line class="resume" x1="${X(x)}" x2="${X(x)}" y1="${M.top}" y2="${bottom}" style="stroke:${paint.color}"><title>${esc(run.name)} resumed at batch ${s}</title></line>`; }
    if (view.weight) out += curve(xs, raw, X, Y, shown, { ...paint, extra: "raw" });
    out += curve(xs, ys, X, Y, shown, paint);
    const sets = chart.validation ? Object.entries(run.validation) : [];
    sets.forEach(([name, set], k) => {
      const vx = set.step.map(s => place(run, s)), vy = set[chart.validation];
      out += curve(vx, vy, X, Y, shown, { color: paint.color, dash: ` stroke-dasharray="1 4"` });
      vy.forEach((y, i) => { if (shown(y) && known(vx[i])) out += mark(k, X(vx[i]), Y(y), paint.color); });
    });
    for (const s of run.failed) { const x = place(run, s); if (known(x)) out += `<path class="bad" d="M${X(x) - 4.5} ${bottom}h9l-4.5 -8z"><title>${esc(run.name)}: update of batch ${s} skipped</title></path>`; }
    view.points.push({ run, index, xs, raw, ys, sets });
  }
  holder.innerHTML = `<svg viewBox="0 0 ${width} ${height}" height="${height}" role="img" aria-label="${esc(chart.title)}">${out}<g class="over"></g></svg>`;
  Object.assign(view, { X, Y, shown, width, bottom, x0, x1, over: holder.querySelector(".over") });
}
function mark(k, x, y, paint) {
  const shapes = [`M${x} ${y - 5}l5 5l-5 5l-5 -5z`, `M${x - 4} ${y - 4}h8v8h-8z`, `M${x - 5} ${y + 4}h10l-5 -9z`];
  return `<path d="${shapes[k % 3]}" fill="${paint}" stroke="var(--card)" stroke-width="1.2"/>`;
}

function nearest(xs, x) {
  let best = -1, gap = Infinity;
  for (let i = 0; i < xs.length; i++) if (known(xs[i]) && Math.abs(xs[i] - x) < gap) { gap = Math.abs(xs[i] - x); best = i; }
  return best;
}
function hover(x, source) {
  for (const view of state.views) {
    if (x === null) { view.over.innerHTML = ""; view.tip.style.display = "none"; continue; }
    let over = `<line class="cross" x1="${view.X(x)}" x2="${view.X(x)}" y1="${M.top}" y2="${view.bottom}"/>`, rows = "", batch = null, at = null;
    for (const p of view.points) {
      const i = nearest(p.xs, x);
      if (i < 0 || Math.abs(p.xs[i] - x) > (view.x1 - view.x0) * 0.02) continue;
      const step = p.run.step[i], y = p.raw[i], drawn = p.ys[i];
      if (at === null) { batch = step; at = p.xs[i]; }
      if (view.shown(drawn)) over += `<circle cx="${view.X(p.xs[i])}" cy="${view.Y(drawn)}" r="4" fill="${color(p.index)}" stroke="var(--card)" stroke-width="1.5"/>`;
      const name = data.runs.length > 1 ? esc(p.run.name) : esc(view.chart.title);
      rows += `<div><i class="swatch c${p.index % 8}"></i>${name}<b>${known(y) ? exact(y) : "–"}</b></div>`;
      if (view.weight && known(drawn)) rows += `<div><em>smoothed</em><b>${exact(drawn)}</b></div>`;
      if (p.run.failed.includes(step)) rows += `<div class="warn">update of batch ${step} skipped</div>`;
      if (p.run.resumes.includes(step)) rows += `<div><em>resumed here</em></div>`;
      for (const [name, set] of p.sets) {
        const k = nearest(set.step.map(s => place(p.run, s)), x), value = k < 0 ? null : set[view.chart.validation][k];
        if (known(value)) rows += `<div><em>validation ${esc(name)}, batch ${set.step[k]}</em><b>${exact(value)}</b></div>`;
      }
    }
    view.over.innerHTML = over;
    if (view !== source || at === null) { view.tip.style.display = "none"; continue; }
    const where = state.axis === "step" ? "" : ` · ${axisText(at)}${state.axis === "tokens" ? " tokens" : ""}`;
    view.tip.innerHTML = `<div><em>batch ${batch}${where}</em></div>${rows}`;
    view.tip.style.display = "block";
    const left = view.holder.offsetLeft + view.X(x), room = view.holder.offsetLeft + view.width;
    view.tip.style.left = `${left + 14 + view.tip.offsetWidth > room ? left - 14 - view.tip.offsetWidth : left + 14}px`;
    view.tip.style.top = `${view.holder.offsetTop + 14}px`;
  }
}

function build(chart, position) {
  const card = document.createElement("section"), wide = position === 0;
  card.className = wide ? "card wide" : "card";
  card.innerHTML = `<div class="head"><h2>${esc(chart.title)}</h2><small>${esc(chart.unit)}</small><button type="button" title="linear or logarithmic axis"></button></div><div class="holder"></div><div class="tip"></div>`;
  document.getElementById("charts").append(card);
  const view = { chart, wide, holder: card.querySelector(".holder"), tip: card.querySelector(".tip"), toggle: card.querySelector("button") };
  view.toggle.onclick = () => { state.log[chart.key] = view.toggle.textContent !== "log"; draw(view); };
  const move = event => {
    const box = view.holder.getBoundingClientRect(), px = (event.clientX - box.left) * view.width / box.width;
    const x = view.x0 + (px - M.left) / (view.width - M.left - M.right) * (view.x1 - view.x0);
    let best = null;
    for (const p of view.points) { const i = nearest(p.xs, x); if (i >= 0 && (best === null || Math.abs(p.xs[i] - x) < Math.abs(best - x))) best = p.xs[i]; }
    hover(best, view);
  };
  view.holder.addEventListener("pointermove", move);
  view.holder.addEventListener("pointerdown", move);
  view.holder.addEventListener("pointerleave", () => hover(null));
  state.views.push(view);
}
function legend() {
  const nav = document.getElementById("legend");
  data.runs.forEach((run, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.innerHTML = `<i class="swatch c${index % 8}"></i>${esc(run.name)}`;
    button.setAttribute("aria-pressed", "true");
    button.onclick = () => {
      if (state.hidden.has(index)) state.hidden.delete(index); else state.hidden.add(index);
      button.setAttribute("aria-pressed", String(!state.hidden.has(index)));
      redraw();
    };
    nav.append(button);
  });
  const keys = [], svg = inner => `<svg viewBox="0 0 14 14" width="14" height="14" style="width:14px;display:inline-block;vertical-align:-2px">${inner}</svg>`;
  if (data.runs.some(r => r.failed.length)) keys.push(svg(`<path class="bad" d="M2 12h10l-5 -9z"/>`) + " update skipped");
  if (data.runs.some(r => r.resumes.length)) keys.push(svg(`<line class="resume" x1="7" x2="7" y1="0" y2="14"/>`) + " resumed");
  const sets = [...new Set(data.runs.flatMap(r => Object.keys(r.validation)))];
  sets.forEach((name, k) => keys.push(svg(mark(k, 7, 7, "var(--soft)")) + ` validation ${esc(name)}`));
  nav.insertAdjacentHTML("beforeend", `<span class="keys">${keys.map(k => `<span>${k}</span>`).join("")}</span>`);
}
const redraw = () => state.views.forEach(draw);

for (const axis of ["tokens", "time"])
  if (!data.runs.every(r => r[axis].some(known))) document.querySelector(`#axis option[value=${axis}]`).disabled = true;
data.charts.forEach(build);
legend();
redraw();
document.getElementById("axis").onchange = event => { state.axis = event.target.value; redraw(); };
document.getElementById("smooth").oninput = event => { state.smooth = Number(event.target.value); redraw(); };
document.getElementById("theme").onclick = () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};
new ResizeObserver(() => { hover(null); redraw(); }).observe(document.getElementById("charts"));
})();
"""
