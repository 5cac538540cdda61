// page.js: the script of a screening's page (page.py). Unpacks the rows, draws charts, table and patterns on demand.
// Only as many table rows exist as can be seen. Texts from files are put in as text nodes alone.
"use strict";

const BINS = 200, ROW = 40, SHARE = 1000;
const COLORS = ["#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#8a6fd1"]; // Okabe & Ito, and one
const $ = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let data, rows, thumbs, order = [], sortBy = "at0", falling = false, axis = "2θ", scale = "sqrt", open = -1;

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

async function unpacked(id) {
  const text = $(id).textContent.trim();
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// A Hermann-Mauguin symbol: -3 with a bar, 2_1 with an index.
function symbol(number) {
  const node = element("span");
  const text = data.symbols[number - 1];
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "-") node.append(element("span", text[++i], "over"));
    else if (text[i] === "_") node.append(element("sub", text[++i]));
    else node.append(text[i]);
  }
  node.append(` (${number})`);
  return node;
}

const percent = (share) => (share < 0 ? "–" : `${(100 * share / SHARE).toFixed(1)} %`);
const hundredths = (share) => (share < 0 ? "–" : (100 * share / SHARE).toFixed(0));
const texts = (column, i) => column.texts[column.at[i]];
const systemOf = (i) => data.systems.indexOf(texts(rows.crystal_system, i));
const notesOf = (i) => rows.notes.at[i].map((n) => rows.notes.texts[n]);

// Columns: heading, what to sort by, what to show, class.
const COLUMNS = [
  ["no.", (i) => rows.at[i], (i) => rows.at[i] + 1, "number"],
  ["pattern", null, (i) => thumbnailOf(i), ""],
  ["scan", (i) => rows.scan_id[i], (i) => { const b = element("bdi", rows.scan_id[i]); b.title = rows.scan_id[i]; return b; }, "scan"],
  ["space group", (i) => rows.space_group[i][0], (i) => symbol(rows.space_group[i][0]), ""],
  ["probability", (i) => rows.probability[i][0], (i) => shareOf(rows.probability[i][0]), ""],
  ["system", (i) => systemOf(i), (i) => dotted(systemOf(i)), ""],
  ["95 % set", (i) => rows.set_size[i], (i) => (rows.set_size[i] < 0 ? "–" : rows.set_size[i]), "number"],
  ["unusual", (i) => rows.out_of_distribution[i], (i) => hundredths(rows.out_of_distribution[i]), "number"],
  ["phases", (i) => rows.several_phases[i], (i) => hundredths(rows.several_phases[i]), "number"],
  ["notes", (i) => rows.notes.at[i].length, (i) => rows.notes.at[i].length || "", "number"],
];

function shareOf(share) {
  const node = element("span"), bar = element("span", undefined, "share"), full = element("i");
  full.style.width = `${100 * share / SHARE}%`;
  bar.append(full);
  node.append(bar, percent(share));
  return node;
}

function dotted(system) {
  const node = element("span"), dot = element("span", undefined, "dot");
  dot.style.background = COLORS[system];
  node.append(dot, data.systems[system]);
  return node;
}

function canvasOf(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  return pen;
}

function thumbnailOf(i) {
  const canvas = element("canvas"), pen = canvasOf(canvas, 150, 32);
  pen.strokeStyle = color("--mark");
  pen.lineWidth = 1;
  pen.beginPath();
  for (let b = 0; b < BINS; b++) pen.lineTo(0.5 + 149 * b / (BINS - 1), 31 - 30 * thumbs[BINS * i + b] / 255);
  pen.stroke();
  return canvas;
}

function showHead() {
  $("head").replaceChildren(...COLUMNS.map(([name, key, , kind], c) => {
    const cell = element("div", undefined, kind === "number" ? kind : "");
    cell.setAttribute("role", "columnheader");
    if (!key) { cell.textContent = name; return cell; }
    const mine = sortBy === c, button = element("button", name + (mine ? (falling ? " ↓" : " ↑") : ""));
    button.type = "button";
    button.addEventListener("click", () => {
      falling = mine ? !falling : kind === "number" && c > 5 || c === 4;
      sortBy = c;
      show();
    });
    cell.setAttribute("aria-sort", mine ? (falling ? "descending" : "ascending") : "none");
    cell.append(button);
    return cell;
  }));
}

// Filters and sorts; the order of the page itself, most unusual first, is the order of the rows.
function show() {
  const find = $("find").value.trim().toLowerCase(), system = $("system").value;
  const least = SHARE * $("least").value / 100, most = SHARE * ($("most").value === "" ? 100 : $("most").value) / 100;
  order = [];
  for (let i = 0; i < rows.n; i++) {
    const share = rows.probability[i][0], number = rows.space_group[i][0];
    if (share < least || share > most || (system !== "" && systemOf(i) !== Number(system))) continue;
    if ($("noted").checked && !rows.notes.at[i].length) continue;
    if ($("assumed").checked && texts(rows.wavelength_source, i) !== "assumed") continue;
    if (find && !rows.scan_id[i].toLowerCase().includes(find) && find !== String(number) &&
      data.symbols[number - 1].replaceAll("_", "").toLowerCase() !== find.replaceAll("_", "") &&
      !notesOf(i).some((note) => note.toLowerCase().includes(find))) continue;
    order.push(i);
  }
  if (typeof sortBy === "number") {
    const keys = Array.from({ length: rows.n }, (_, i) => COLUMNS[sortBy][1](i)), sign = falling ? -1 : 1;
    order.sort((a, b) => (keys[a] < keys[b] ? -sign : keys[a] > keys[b] ? sign : a - b));
  }
  $("count").textContent = `${order.length.toLocaleString("en")} of ${rows.n.toLocaleString("en")}`;
  $("space").style.height = `${ROW * order.length}px`;
  $("body").scrollTop = 0;
  showHead();
  showRows();
}

function showRows() {
  const first = Math.max(0, Math.floor($("body").scrollTop / ROW) - 4);
  const seen = order.slice(first, first + Math.ceil($("body").clientHeight / ROW) + 8);
  $("window").style.top = `${ROW * first}px`;
  $("window").replaceChildren(...seen.map((i) => {
    const row = element("div", undefined, "row");
    row.setAttribute("role", "row");
    row.tabIndex = 0;
    row.dataset.row = i;
    for (const [, , content, kind] of COLUMNS) {
      const cell = element("div", undefined, kind), shown = content(i);
      cell.setAttribute("role", "cell");
      cell.append(shown);
      row.append(cell);
    }
    return row;
  }));
}

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function showHistogram() {
  const counts = data.summary.histogram, top = Math.max(1, ...counts), wide = 560 / counts.length;
  const chart = svg("svg", { viewBox: "0 0 580 170", role: "img", "aria-label": "histogram of probabilities" });
  counts.forEach((count, b) => {
    const high = 125 * count / top, low = Math.round(100 * b / counts.length), next = Math.round(100 * (b + 1) / counts.length);
    const bar = svg("rect", { x: 10 + b * wide + 1, y: 145 - high, width: wide - 2, height: Math.max(high, count ? 1 : 0), fill: color("--mark"), class: "bar" });
    bar.append(svg("title", {}, `${low} to ${next} %: ${count.toLocaleString("en")} scans`));
    bar.addEventListener("click", () => { $("least").value = low; $("most").value = next; show(); });
    chart.append(bar);
    if (count === top) chart.append(svg("text", { x: 10 + (b + 0.5) * wide, y: 140 - high, "text-anchor": "middle" }, count.toLocaleString("en")));
  });
  for (let t = 0; t <= 100; t += 20) chart.append(svg("text", { x: 10 + 5.6 * t, y: 162, "text-anchor": t ? t === 100 ? "end" : "middle" : "start" }, `${t} %`));
  $("histogram").replaceChildren(chart);
  if (data.summary.median !== null) $("median").textContent = `(median ${(100 * data.summary.median).toFixed(1)} %)`;
}

function showSystems() {
  const counts = data.summary.by_system, top = Math.max(1, ...counts);
  const chart = svg("svg", { viewBox: "0 0 580 170", role: "img", "aria-label": "counts of crystal systems" });
  counts.forEach((count, s) => {
    const y = 4 + 23.5 * s, long = 350 * count / top, share = data.summary.n ? (100 * count / data.summary.n).toFixed(1) : "0.0";
    chart.append(svg("text", { x: 88, y: y + 13, "text-anchor": "end" }, data.systems[s]));
    const bar = svg("rect", { x: 96, y: y + 2, width: long, height: 15, fill: COLORS[s], class: "bar" });
    bar.addEventListener("click", () => { $("system").value = s; show(); });
    chart.append(bar, svg("text", { x: 102 + long, y: y + 13 }, `${count.toLocaleString("en")} (${share} %)`));
  });
  $("systems").replaceChildren(chart);
}

// One cell a scan, in the order of the run.
function showMap() {
  const canvas = $("map"), width = canvas.clientWidth || 1000;
  const cell = Math.max(3, Math.min(16, Math.floor(Math.sqrt(width * 150 / Math.max(rows.n, 1)))));
  const across = Math.max(1, Math.floor(width / cell)), down = Math.max(1, Math.ceil(rows.n / across));
  canvas.style.height = `${down * cell}px`;
  const pen = canvasOf(canvas, width, down * cell);
  const run = Array.from(rows.at.keys()).sort((a, b) => rows.at[a] - rows.at[b]), gap = cell > 5 ? 1 : 0;
  run.forEach((i, place) => {
    pen.globalAlpha = 0.25 + 0.75 * rows.probability[i][0] / SHARE;
    pen.fillStyle = COLORS[systemOf(i)];
    pen.fillRect(cell * (place % across), cell * Math.floor(place / across), cell - gap, cell - gap);
  });
  const at = (event) => run[Math.floor(event.offsetY / cell) * across + Math.floor(event.offsetX / cell)];
  canvas.onmousemove = (event) => {
    const i = at(event);
    $("maptext").textContent = i === undefined ? "\u00a0" : `${rows.at[i] + 1}: ${rows.scan_id[i]}, ${data.symbols[rows.space_group[i][0] - 1]}, ${percent(rows.probability[i][0])}`;
  };
  canvas.onclick = (event) => { const i = at(event); if (i !== undefined) showDetail(i); };
}

function tableOf(title, lines, className) {
  const table = element("table", undefined, className);
  const caption = table.createTHead().insertRow();
  const heading = element("th", title);
  heading.colSpan = 2;
  caption.append(heading);
  const body = table.createTBody();
  for (const [name, value] of lines) {
    const row = body.insertRow();
    row.insertCell().append(name);
    row.insertCell().append(value);
  }
  return table;
}

function choices(id, names, chosen, choose) {
  $(id).replaceChildren(...names.map((name) => {
    const button = element("button", name);
    button.type = "button";
    button.setAttribute("aria-pressed", name === chosen());
    button.addEventListener("click", () => { choose(name); showDetail(open); });
    return button;
  }));
}

// An extinction group is named by its space groups, up to some twenty.
function shortened(name) {
  const parts = name.split(", ");
  return parts.length > 6 ? `${parts.slice(0, 5).join(", ")} and ${parts.length - 5} more` : name;
}

const LEVELS = ["crystal_system", "bravais_lattice", "lattice_centering", "laue_class", "point_group", "extinction_group"];

function showDetail(i) {
  open = i;
  $("name").textContent = rows.scan_id[i];
  choices("axes", ["2θ", "d", "Q"], () => axis, (name) => { axis = name; });
  choices("scales", ["linear", "sqrt", "log"], () => scale, (name) => { scale = name; });
  $("candidates").replaceChildren(tableOf("Space groups", rows.space_group[i].map((n, k) => [symbol(n), percent(rows.probability[i][k])])));
  $("levels").replaceChildren(tableOf("Levels, most probable", LEVELS.map((level) => [`${level.replaceAll("_", " ")}: ${shortened(texts(rows[level], i))}`, percent(rows[`${level}_probability`][i])])));
  const source = texts(rows.wavelength_source, i);
  const said = element(source === "assumed" ? "strong" : "span", `${rows.wavelength[i]} Å (${source})`);
  $("facts").replaceChildren(tableOf("Scan", [
    ["wavelength", said], ["read as", texts(rows.kind, i)], ["points", rows.n_points[i].toLocaleString("en")],
    ["range", `${rows.two_theta_first[i]} to ${rows.two_theta_last[i]}°`], ["95 % set", rows.set_size[i] < 0 ? "not calibrated" : `${rows.set_size[i]} groups`],
    ["unusual", hundredths(rows.out_of_distribution[i])], ["several phases", hundredths(rows.several_phases[i])],
    ["SHA-256", rows.sha256[i] ? `${rows.sha256[i]}…` : "–"], ["time", `${rows.ms[i]} ms`],
  ], "facts"));
  $("notes").replaceChildren(...notesOf(i).map((note) => element("li", note)));
  if (!$("detail").open) $("detail").showModal();
  drawPattern(i);
}

const AXES = {
  "2θ": { label: "2θ (degrees)", of: (t) => t, log: false },
  d: { label: "d (Å), logarithmic", of: (t, w) => w / (2 * Math.sin(t * Math.PI / 360)), log: true },
  Q: { label: "Q (1/Å)", of: (t, w) => 4 * Math.PI * Math.sin(t * Math.PI / 360) / w, log: false },
};

function drawPattern(i) {
  const canvas = $("plot"), width = canvas.clientWidth, height = 340, pen = canvasOf(canvas, width, height);
  const pattern = data.patterns[i], wavelength = rows.wavelength[i], shown = AXES[axis];
  const first = rows.two_theta_first[i], last = rows.two_theta_last[i];
  let high, low = null, background = null;
  if (pattern) ({ high, low, background } = pattern);
  else high = Array.from(thumbs.subarray(BINS * i, BINS * (i + 1)), (v) => (v / 255) ** 2 * 100);
  const angle = (k, n) => first + (last - first) * (k + 0.5) / n;
  const along = (t) => { const x = shown.of(t, wavelength); return shown.log ? Math.log(x) : x; };
  const ends = [along(first), along(last)].sort((a, b) => a - b), left = 62, right = width - 12, bottom = height - (pattern ? 58 : 42);
  const px = (t) => left + (right - left) * (along(t) - ends[0]) / (ends[1] - ends[0] || 1);
  const top = Math.max(...high), floor = Math.max(top * 1e-4, scale === "log" ? Math.min(...high.filter((v) => v > 0)) * 0.8 : 0);
  const level = { linear: (y) => y, sqrt: (y) => Math.sqrt(Math.max(y, 0)), log: (y) => Math.log10(Math.max(y, floor)) }[scale];
  const base = scale === "log" ? level(floor) : 0;
  const py = (y) => bottom - (bottom - 14) * (level(y) - base) / (level(top) - base || 1);
  const line = (values, stroke, wide) => {
    pen.strokeStyle = stroke;
    pen.lineWidth = wide;
    pen.beginPath();
    values.forEach((y, k) => pen.lineTo(px(angle(k, values.length)), py(y)));
    pen.stroke();
  };
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = color("--quiet");
  pen.textAlign = "center";
  for (const value of ticks(shown.log ? Math.exp(ends[0]) : ends[0], shown.log ? Math.exp(ends[1]) : ends[1], shown.log)) {
    const x = left + (right - left) * ((shown.log ? Math.log(value) : value) - ends[0]) / (ends[1] - ends[0] || 1);
    pen.fillRect(x, height - 38, 1, 4);
    pen.fillText(String(value), x, height - 22);
  }
  pen.fillText(shown.label, (left + right) / 2, height - 6);
  pen.textAlign = "right";
  for (const value of scale === "log" ? [top, top / 10, top / 100, top / 1000].filter((v) => v >= floor) : [0, top / 4, top / 2, top]) {
    pen.fillText(Number(value.toPrecision(2)).toLocaleString("en"), left - 8, py(value) + 4);
    pen.fillRect(left - 5, py(value), 4, 1);
  }
  pen.save();
  pen.translate(11, (14 + bottom) / 2);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = "center";
  pen.fillText(`${pattern ? "counts" : "highest = 100"}, ${scale}`, 0, 0);
  pen.restore();
  if (low) {
    pen.strokeStyle = color("--mark");
    pen.lineWidth = 1;
    pen.beginPath();
    high.forEach((y, k) => { const x = px(angle(k, high.length)); pen.moveTo(x, py(low[k])); pen.lineTo(x, py(y) - 0.5); });
    pen.stroke();
  }
  line(high, color("--mark"), low ? 0.7 : 1.2);
  if (background) line(background, COLORS[5], 1.6);
  if (pattern) {
    pen.fillStyle = color("--ink");
    for (const place of pattern.peaks) pen.fillRect(px(place) - 0.5, bottom + 4, 1, 9);
  }
  $("caption").textContent = pattern
    ? `Counts of the file (highest and lowest of ${high.length} bins), background (orange), ${pattern.peaks.length} peaks found (ticks). No hkl: the answer names a symmetry, not a cell.`
    : `From the stored thumbnail: the highest intensity of each of ${BINS} bins, in 256 steps. Background and peaks are drawn for scans whose files were at hand.`;
}

function ticks(low, high, log) {
  const found = [];
  if (log) {
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of [1, 1.5, 2, 3, 5, 7]) { const v = Number((digit * 10 ** power).toPrecision(3)); if (v >= low && v <= high) found.push(v); }
    return found;
  }
  const rough = (high - low) / 8, power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].find((s) => s * power >= rough) * power;
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) found.push(Number(v.toPrecision(6)));
  return found;
}

function showFailures() {
  const all = data.failures, page = 200;
  $("nofailures").hidden = all.length > 0;
  $("failed").hidden = !all.length;
  let shown = 0;
  const more = () => {
    for (const { id, reason } of all.slice(shown, shown + page)) {
      const row = $("failed").tBodies[0].insertRow();
      row.insertCell().textContent = id;
      row.insertCell().textContent = reason;
    }
    shown = Math.min(shown + page, all.length);
    $("more").hidden = shown === all.length;
    $("cut").hidden = shown < all.length || all.length === data.summary.n_failures;
  };
  $("cut").textContent = `The first ${all.length.toLocaleString("en")} of ${data.summary.n_failures.toLocaleString("en")}; all are in the .errors.jsonl file beside the table.`;
  $("more").addEventListener("click", more);
  more();
}

async function begin() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old to unpack the page's rows (it needs DecompressionStream, of 2023)");
  data = JSON.parse(new TextDecoder().decode(await unpacked("content")));
  thumbs = await unpacked("thumbnails");
  rows = data.rows;
  data.systems.forEach((name, s) => { const one = element("option", name); one.value = s; $("system").append(one); });
  $("all").hidden = false;
  showHistogram();
  showSystems();
  showMap();
  showFailures();
  show();
  $("filters").addEventListener("input", show);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(() => { sortBy = "at0"; show(); }));
  $("body").addEventListener("scroll", showRows);
  const openRow = (event) => { const row = event.target.closest(".row"); if (row) showDetail(Number(row.dataset.row)); };
  $("body").addEventListener("click", openRow);
  $("body").addEventListener("keydown", (event) => { if (event.key === "Enter") openRow(event); });
  addEventListener("resize", () => { showMap(); showRows(); if ($("detail").open) drawPattern(open); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { showHistogram(); show(); });
  document.documentElement.dataset.ready = "yes";
}

begin().catch((error) => {
  $("wrong").textContent = `The page cannot be shown: ${error.message}.`;
  $("wrong").hidden = false;
});
