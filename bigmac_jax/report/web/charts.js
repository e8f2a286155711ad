"use strict";
// Curves of all runs over steps, tokens or hours. A chart is a <figure class="chart">; its data attributes say what it draws.

const RUNS = JSON.parse(document.getElementById("data").textContent).runs;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 3", "6 2 1 2"];
const HEIGHT = 220, MARGIN = { left: 56, right: 24, top: 10, bottom: 24 };
const controls = document.getElementById("controls");
const view = { axis: "step", smoothing: 0, log: false, hidden: new Set(), zoom: null };

// ---- numbers

const escaped = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const digits = (x, n) => (x === 0 ? "0" : Math.abs(x) < 1e-4 ? Number(x.toPrecision(n)).toExponential() : x.toLocaleString("en", { maximumSignificantDigits: n }));

function scaled(x, base, units, n) {
  let i = 0;
  while (Math.abs(x) >= base && i < units.length - 1) { x /= base; i++; }
  return digits(x, Math.max(n, Math.ceil(Math.log10(Math.abs(x) + 1)))) + units[i];
}

function shown(x, format, n = 4) {
  if (format === "percent") return digits(100 * x, n) + " %";
  if (format === "bytes") return scaled(x, 1024, [" B", " KiB", " MiB", " GiB", " TiB"], n);
  return Math.abs(x) >= 1e5 ? scaled(x, 1000, ["", "k", "M", "G", "T"], n) : digits(x, n);
}

// Round values from low to high, about `count` of them.
function ticks(low, high, count, format, log) {
  if (log) {
    const found = [];
    for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10)
      for (const m of [1, 2, 5]) if (m * power >= low && m * power <= high) found.push(m * power);
    if (found.length >= 3) return found.length > 2 * count ? found.filter((x) => Math.log10(x) % 1 === 0) : found;
  }
  const unit = format === "bytes" ? 1024 ** Math.max(0, Math.floor(Math.log(high || 1) / Math.log(1024))) : 1;
  const rough = (high - low) / unit / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = unit * power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// ---- data

// Where a step of a run stands on the x axis, between the clock's points.
function position(run, step) {
  if (view.axis === "step") return step;
  const at = run.clock.step, values = run.clock[view.axis];
  let low = 0, high = at.length - 1;
  if (step >= at[high]) return values[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (at[middle] <= step) low = middle; else high = middle;
  }
  return values[low] + (values[high] - values[low]) * (step - at[low]) / (at[high] - at[low]);
}

function points(run, key) {
  const series = run.series[key];
  return series ? series.step.map((step, i) => ({ step, x: position(run, step), y: series.value[i] })) : [];
}

// An exponential moving average whose start is not drawn to zero.
function smooth(curve, weight) {
  let sum = 0, total = 0;
  return curve.map((point) => {
    if (point.y === null) return point;
    sum = weight * sum + (1 - weight) * point.y;
    total = weight * total + (1 - weight);
    return { ...point, y: sum / total };
  });
}

// ---- drawing

function draw(figure) {
  const { key, marks, format } = figure.dataset;
  const log = view.log && "log" in figure.dataset, isPoints = "points" in figure.dataset;
  const lines = RUNS.map((run, i) => {
    const raw = points(run, key);
    const curve = view.smoothing && !isPoints ? smooth(raw, view.smoothing) : raw;
    return { run, i, raw, curve, marks: isPoints ? raw : marks ? points(run, marks) : [] };
  }).filter((line) => line.raw.length && !view.hidden.has(line.i));
  const plot = figure.querySelector(".plot");
  if (!lines.length) { plot.innerHTML = ""; figure.querySelector(".readout").textContent = "no run to show"; return; }

  const all = lines.flatMap((line) => [...line.raw, ...line.marks]);
  const [x0, x1] = view.zoom ?? [0, Math.max(...lines.map((line) => line.raw.at(-1).x)) || 1];
  const ys = all.filter((p) => p.y !== null && p.x >= x0 && p.x <= x1 && (!log || p.y > 0)).map((p) => p.y);
  let low = ys.length ? Math.min(...ys) : log ? 0.1 : 0, high = ys.length ? Math.max(...ys) : 1;
  if ("zero" in figure.dataset) { low = Math.min(0, low); high += 0.06 * (high - low); }
  else if (!log) { const room = 0.05 * (high - low); low -= room; high += room; }
  if (high === low) { high += Math.abs(high) * 0.1 || 1; if (!("zero" in figure.dataset)) low -= Math.abs(low) * 0.1; }
  if (log) { low *= 0.97; high *= 1.03; }

  const width = Math.max(200, plot.clientWidth), right = width - MARGIN.right, bottom = HEIGHT - MARGIN.bottom;
  const scale = log ? Math.log : (y) => y;
  const px = (x) => MARGIN.left + (x - x0) / (x1 - x0) * (right - MARGIN.left);
  const py = (y) => bottom - (scale(y) - scale(low)) / (scale(high) - scale(low)) * (bottom - MARGIN.top);

  const id = `clip-${key.replace(/\W/g, "-")}`;
  const last = lines.map((line) => `${line.run.letter} ${line.run.name} ${value(lastOf(line.curve), format)}`).join(", ");
  const title = figure.querySelector("figcaption").firstChild.textContent.trim();
  plot.innerHTML = `<svg viewBox="0 0 ${width} ${HEIGHT}" height="${HEIGHT}" tabindex="0" role="img" aria-label="${escaped(`${title}, last: ${last}`)}">
    <clipPath id="${id}"><rect x="${MARGIN.left - 5}" y="0" width="${right - MARGIN.left + 10}" height="${bottom + 5}"/></clipPath>
    ${ticks(low, high, 4, format, log).map((y) => `<line class="grid" x1="${MARGIN.left}" x2="${right}" y1="${py(y)}" y2="${py(y)}"/><text x="${MARGIN.left - 6}" y="${py(y) + 4}" text-anchor="end">${shown(y, format, 3)}</text>`).join("")}
    <line class="axis" x1="${MARGIN.left}" x2="${right}" y1="${bottom}" y2="${bottom}"/>
    ${ticks(x0, x1, width < 420 ? 3 : 5, "", false).map((x) => `<text x="${px(x)}" y="${bottom + 16}" text-anchor="middle">${shown(x, "", 3)}</text>`).join("")}
    <g clip-path="url(#${id})">${lines.map((line) => drawn(line, px, py, log)).join("")}</g>
    ${ys.length && ys.every((y) => y === 0) ? `<text x="${(MARGIN.left + right) / 2}" y="${HEIGHT / 2}" text-anchor="middle">0 throughout</text>` : ""}
    ${ends(lines, px, py, log, right, bottom)}
    <rect class="band" y="${MARGIN.top}" height="${bottom - MARGIN.top}" visibility="hidden"/>
    <line class="cursor" y1="${MARGIN.top}" y2="${bottom}" visibility="hidden"/>
  </svg>`;
  listen(figure, plot.firstChild, { lines, x0, x1, px, right, format });
}

function drawn(line, px, py, log) {
  const path = (curve) => {
    let d = "", pen = "M";
    for (const p of curve) {
      if (p.y === null || (log && p.y <= 0)) { pen = "M"; continue; }
      d += `${pen}${px(p.x).toFixed(1)} ${py(p.y).toFixed(1)}`;
      pen = "L";
    }
    return d;
  };
  const raw = line.curve === line.raw ? "" : `<path class="curve raw" d="${path(line.raw)}"/>`;
  const single = line.curve.length === 1 ? line.curve : [];
  const events = line.run.events.map((event) => px(position(line.run, event.step)));
  return `<g class="run${line.i % 8}">${raw}<path class="curve" stroke-dasharray="${DASHES[line.i % 8]}" d="${path(line.curve)}"/>
    ${[...line.marks, ...single].filter((p) => p.y !== null && (!log || p.y > 0)).map((p) => mark(line.i, px(p.x), py(p.y))).join("")}
    ${events.map((x) => `<line class="event" x1="${x}" x2="${x}" y1="${MARGIN.top}" y2="${HEIGHT - MARGIN.bottom}"/>`).join("")}</g>`;
}

// Circle, square, triangle, diamond: runs differ without colour.
function mark(i, x, y) {
  const shapes = [
    () => `<circle class="mark" cx="${x}" cy="${y}" r="3.5"/>`,
    () => `<rect class="mark" x="${x - 3.2}" y="${y - 3.2}" width="6.4" height="6.4"/>`,
    () => `<path class="mark" d="M${x} ${y - 4}l4 7h-8z"/>`,
    () => `<path class="mark" d="M${x} ${y - 4.5}l4.5 4.5l-4.5 4.5l-4.5 -4.5z"/>`,
  ];
  return shapes[i % 4]();
}

// Each curve's letter at its last visible point, moved apart where they would overlap.
function ends(lines, px, py, log, right, bottom) {
  const labels = lines.map((line) => {
    const p = line.curve.filter((p) => p.y !== null && (!log || p.y > 0) && px(p.x) <= right + 1).at(-1);
    return p && { line, x: px(p.x) + 6, y: py(p.y) + 4 };
  }).filter((label) => label && label.x > MARGIN.left && label.y > 0 && label.y < bottom + 8).sort((a, b) => a.y - b.y);
  const near = (a, b) => Math.abs(a.x - b.x) < 14;
  labels.forEach((label, j) => {
    for (const above of labels.slice(0, j)) if (near(above, label)) label.y = Math.max(label.y, above.y + 11);
  });
  labels.toReversed().forEach((label, j, upwards) => { // and back up from the bottom
    label.y = Math.min(label.y, bottom + 8);
    for (const below of upwards.slice(0, j)) if (near(below, label)) label.y = Math.min(label.y, below.y - 11);
  });
  return labels.map(({ line, x, y }) => `<g class="run${line.i % 8}"><text class="end" x="${x}" y="${y}">${line.run.letter}</text></g>`).join("");
}

// ---- reading out, zooming

const lastOf = (curve) => curve.filter((p) => p.y !== null).at(-1);
const value = (point, format) => (point ? shown(point.y, format) : "–");

// The values of each run nearest to x; without x its last ones.
function readOut(figure, { lines, format, px }, x) {
  const parts = lines.map((line) => {
    const near = (curve) => curve.filter((p) => p.y !== null).reduce((best, p) => (!best || Math.abs(p.x - x) < Math.abs(best.x - x) ? p : best), null);
    const point = x === null ? lastOf(line.curve) : near(line.curve);
    if (x !== null && (!point || Math.abs(px(point.x) - px(x)) > 40)) return `<b>${line.run.letter}</b> –`;
    const checked = x === null || line.marks === line.raw ? null : near(line.marks);
    const also = checked && Math.abs(px(checked.x) - px(x)) < 6 ? ` (validation ${value(checked, format)})` : "";
    return `<b>${line.run.letter} ${value(point, format)}</b>${also}`;
  });
  const where = x === null ? "last" : `${view.axis === "step" ? "step" : view.axis} ${view.axis === "step" ? Math.round(x).toLocaleString("en") : shown(x, "")}`;
  figure.querySelector(".readout").innerHTML = `${where}: ${parts.join(" · ")}`;
}

function listen(figure, svg, chart) {
  const { x0, x1, px, right } = chart;
  const cursor = svg.querySelector(".cursor"), band = svg.querySelector(".band");
  let at = null, from = null;
  const show = (x) => {
    at = x;
    cursor.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x !== null) { cursor.setAttribute("x1", px(x)); cursor.setAttribute("x2", px(x)); }
    readOut(figure, chart, x);
  };
  const under = (event) => {
    const box = svg.getBoundingClientRect();
    const share = (event.clientX - box.left - MARGIN.left) / (right - MARGIN.left);
    return x0 + Math.min(1, Math.max(0, share)) * (x1 - x0);
  };
  svg.onpointermove = (event) => {
    show(under(event));
    if (from === null) return;
    const [a, b] = [px(from), px(at)].sort((a, b) => a - b);
    band.setAttribute("x", a); band.setAttribute("width", b - a); band.setAttribute("visibility", "visible");
  };
  svg.onpointerdown = (event) => { if (event.pointerType === "mouse") { from = under(event); svg.setPointerCapture(event.pointerId); } };
  svg.onpointerup = (event) => {
    if (from === null) return;
    const range = [from, under(event)].sort((a, b) => a - b);
    from = null;
    if (px(range[1]) - px(range[0]) > 8) zoom(range);
  };
  svg.onpointercancel = () => { from = null; band.setAttribute("visibility", "hidden"); };
  svg.onpointerleave = () => { if (from === null) show(null); };
  svg.ondblclick = () => zoom(null);
  svg.onblur = () => show(null);
  svg.onkeydown = (event) => {
    const step = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(Math.min(x1, Math.max(x0, (at ?? x1) + step * (x1 - x0))));
  };
  show(null);
}

function zoom(range) {
  view.zoom = range;
  controls.elements.whole.hidden = range === null;
  drawAll();
}

// ---- the page

const figures = [...document.querySelectorAll("figure.chart")].filter((figure) => {
  figure.hidden = !RUNS.some((run) => run.series[figure.dataset.key]?.value.some((y) => y !== null));
  figure.insertAdjacentHTML("beforeend", '<div class="plot"></div><p class="readout" aria-live="polite"></p>');
  return !figure.hidden;
});
for (const section of document.querySelectorAll("section:has(figure.chart)"))
  section.hidden = [...section.querySelectorAll("figure.chart")].every((figure) => figure.hidden);

const drawAll = () => figures.forEach(draw);

document.getElementById("visible").insertAdjacentHTML("beforeend", RUNS.map((run, i) =>
  `<label><input type="checkbox" name="visible" value="${i}" checked> <span class="key run${i % 8}">${run.letter}</span> ${escaped(run.name)}</label>`).join(""));
document.getElementById("visible").hidden = RUNS.length < 2;

controls.oninput = () => {
  const axis = controls.elements.axis.value;
  if (axis !== view.axis) { view.zoom = null; controls.elements.whole.hidden = true; }
  view.axis = axis;
  view.smoothing = Number(controls.elements.smoothing.value);
  view.log = controls.elements.log.checked;
  view.hidden = new Set([...controls.querySelectorAll("[name=visible]")].filter((box) => !box.checked).map((box) => Number(box.value)));
  drawAll();
  drawLoads();
};
controls.elements.whole.onclick = () => zoom(null);
controls.onsubmit = (event) => event.preventDefault();
