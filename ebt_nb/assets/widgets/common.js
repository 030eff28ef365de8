// Parts that all views share: elements, controls, charts, colours, and the exchange with the kernel.
// A view is a file of its own that exports `render`; this file is put before it.

// Colours (Okabe and Ito) and dashes of lines, as figures have them (`ebt_nb.runs.figures.line_style`).
const COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"];
const DASHES = ["", "", "6 3", "8 2 2 2", "2 2", "8 2 2 2 2 2", ""];
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838"];
const SVG = "http://www.w3.org/2000/svg";

// ---- elements ----

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  setAttributes(node, attributes);
  node.append(...children);
  return node;
}

function shape(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  setAttributes(node, attributes);
  node.append(...children);
  return node;
}

function setAttributes(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
}

function formatNumber(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size >= 1e5 || (size > 0 && size < 1e-3) ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
}

// ---- controls: native elements, so that keyboard and screen readers work ----

// JupyterLab takes arrow keys and letters for commands of the notebook, unless an element is marked.
const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" };

// A labelled range input. `options`: min, max, step, value, format. Returns { node, value, set(value, silent) }.
function slider(label, options, onInput) {
  const format = options.format || ((value) => formatNumber(value));
  const output = element("output", { class: "ebt-value" });
  const input = element("input", {
    type: "range", min: options.min, max: options.max, step: options.step || 1, "aria-label": label, ...OWN_KEYS,
  });
  input.value = options.value ?? options.min;
  const show = () => {
    output.textContent = format(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => { show(); onInput(Number(input.value)); });
  show();
  return {
    node: element("label", { class: "ebt-control" }, element("span", {}, label), input, output),
    input,
    get value() { return Number(input.value); },
    set(value, silent = false) {
      input.value = value;
      show();
      if (!silent) onInput(Number(input.value));
    },
    setRange(min, max) { input.min = min; input.max = max; show(); },
  };
}

// A labelled list of choices: `options` are [value, text] pairs or plain texts.
function choice(label, options, value, onChange) {
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const select = element("select", { "aria-label": label, onchange: () => onChange(select.value), ...OWN_KEYS });
  for (const [key, text] of pairs) select.append(element("option", { value: key }, String(text)));
  select.value = value;
  return {
    node: element("label", { class: "ebt-control" }, element("span", {}, label), select),
    select,
    get value() { return select.value; },
    set(next) { select.value = next; },
  };
}

function button(label, onClick, attributes = {}) {
  const own = { type: "button", class: "ebt-button", onclick: onClick, ...OWN_KEYS };
  return element("button", { ...own, ...attributes }, label);
}

function textBox(label, value, onEnter) {
  const input = element("input", { type: "text", "aria-label": label, class: "ebt-text", ...OWN_KEYS });
  input.value = value;
  input.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") onEnter(input.value);
  });
  return { node: element("label", { class: "ebt-control" }, element("span", {}, label), input), input,
    get value() { return input.value; } };
}

// A button that moves a slider to its end, one value every `interval` ms, and stops there.
function playButton(control, interval = 600) {
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    node.textContent = "▶ play";
    node.setAttribute("aria-pressed", "false");
  };
  const advance = () => {
    if (!node.isConnected || control.value >= Number(control.input.max)) return stop();
    control.set(control.value + Number(control.input.step || 1));
  };
  const node = button("▶ play", () => {
    if (timer !== null) return stop();
    if (control.value >= Number(control.input.max)) control.set(Number(control.input.min));
    node.textContent = "❚❚ pause";
    node.setAttribute("aria-pressed", "true");
    timer = setInterval(advance, interval);
  }, { "aria-pressed": "false" });
  return { node, stop };
}

// ---- colours ----

function mixColors(palette, share) {
  const place = Math.min(Math.max(share, 0), 1) * (palette.length - 1);
  const index = Math.min(Math.floor(place), palette.length - 2);
  const [low, high] = [palette[index], palette[index + 1]].map(readColor);
  return low.map((value, i) => Math.round(value + (high[i] - value) * (place - index)));
}

function readColor(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function cssColor([red, green, blue]) {
  return `rgb(${red}, ${green}, ${blue})`;
}

// Black or white, whichever is legible on this ground.
function inkOn([red, green, blue]) {
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
}

function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value === null || !Number.isFinite(value)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return low <= high ? [low, high] : [0, 1];
}

// ---- charts ----

// Round numbers between low and high, about `count` of them.
function niceTicks(low, high, count = 4) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k += 1) {
    ticks.push(Number((k * step).toPrecision(12)));
  }
  return ticks;
}

// Colour and dash of the line with this number: lines of similar lightness differ in dash. From the eighth on the
// colours return; what was solid is then dashed, and the other way round.
function lineStyle(number) {
  const [color, dash] = [COLORS[number % COLORS.length], DASHES[number % COLORS.length]];
  const isFirstRound = number % (2 * COLORS.length) < COLORS.length;
  return { color, dash: isFirstRound ? dash : (dash ? "" : DASHES[2]) };
}

// The style of a line of a chart: its own colour and dash, or those of its number.
function styleOf(one, number) {
  const own = lineStyle(number);
  return { color: one.color || own.color, dash: one.dashed ? "5 3" : one.dash ?? (one.color ? "" : own.dash) };
}

// A line chart as SVG. `series`: [{ name, points: [[x, y], ...], color, dash, dashed, marked }], where `dashed` is a
// line to compare with; `options`: title, xLabel, yLabel, width, height, marker (an x at which a vertical line stands).
// Points with y === null are left out.
function lineChart(series, options = {}) {
  const { width = 340, height = 190, title = "", xLabel = "", yLabel = "", marker = null } = options;
  const margin = { left: 62, right: 18, top: title ? 24 : 10, bottom: 36 };
  const points = series.flatMap((one) => one.points.filter((point) => point[1] !== null));
  const [xLow, xHigh] = extent(points.map((point) => point[0]));
  let [yLow, yHigh] = extent(points.map((point) => point[1]));
  if (yLow === yHigh) [yLow, yHigh] = [yLow - 0.5, yHigh + 0.5];
  const pad = 0.06 * (yHigh - yLow);
  [yLow, yHigh] = [yLow - pad, yHigh + pad];
  const xAt = (x) => margin.left + ((x - xLow) / (xHigh - xLow || 1)) * (width - margin.left - margin.right);
  const yAt = (y) => height - margin.bottom - ((y - yLow) / (yHigh - yLow)) * (height - margin.top - margin.bottom);
  const svg = shape("svg", {
    viewBox: `0 0 ${width} ${height}`, width, height, role: "img", class: "ebt-chart",
    "aria-label": chartText(series, title),
  });
  if (title) svg.append(shape("text", { x: margin.left, y: 15, class: "ebt-title" }, title));
  for (const tick of niceTicks(yLow, yHigh, 5)) {
    svg.append(
      shape("line", { x1: margin.left, x2: width - margin.right, y1: yAt(tick), y2: yAt(tick), class: "ebt-grid" }),
      shape("text", { x: margin.left - 5, y: yAt(tick) + 4, "text-anchor": "end" }, formatNumber(tick, 4)),
    );
  }
  const isWhole = points.every((point) => Number.isInteger(point[0])); // steps and samples have no halves
  for (const tick of niceTicks(xLow, xHigh, 5).filter((value) => !isWhole || Number.isInteger(value))) {
    svg.append(shape("text", { x: xAt(tick), y: height - margin.bottom + 15, "text-anchor": "middle" },
      formatNumber(tick, 4)));
  }
  svg.append(
    shape("text", { x: (margin.left + width - margin.right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel),
    shape("text", { x: 11, y: (margin.top + height - margin.bottom) / 2, "text-anchor": "middle",
      transform: `rotate(-90 11 ${(margin.top + height - margin.bottom) / 2})` }, yLabel),
  );
  if (marker !== null) {
    svg.append(shape("line", { x1: xAt(marker), x2: xAt(marker), y1: margin.top, y2: height - margin.bottom,
      class: "ebt-marker" }));
  }
  series.forEach((one, number) => drawSeries(svg, one, styleOf(one, number), xAt, yAt));
  return svg;
}

function drawSeries(svg, one, { color, dash }, xAt, yAt) {
  const drawn = one.points.filter((point) => point[1] !== null);
  const path = drawn.map(([x, y], i) => `${i ? "L" : "M"}${xAt(x).toFixed(1)} ${yAt(y).toFixed(1)}`).join("");
  const line = shape("path", { d: path, fill: "none", stroke: color, "stroke-width": 1.8,
    "stroke-dasharray": dash || null });
  line.append(shape("title", {}, one.name || ""));
  svg.append(line);
  if (one.marked || drawn.length === 1) {
    for (const [x, y] of drawn) svg.append(shape("circle", { cx: xAt(x), cy: yAt(y), r: 2.8, fill: color }));
  }
}

function chartText(series, title) {
  const parts = series.filter((one) => one.points.length).map((one) => {
    const last = one.points[one.points.length - 1];
    return `${one.name || "values"}: ${formatNumber(one.points[0][1])} to ${formatNumber(last[1])}`;
  });
  return `${title ? title + ". " : ""}${parts.join("; ")}`;
}

// The names of lines, each beside a piece of its line, to stand beside a chart.
function legend(series) {
  return element("div", { class: "ebt-legend" }, ...series.map((one, number) =>
    element("span", {}, lineSample(styleOf(one, number), one.marked), one.name)));
}

// A short piece of a line, with a mark where its points have one.
function lineSample({ color, dash }, marked = false) {
  const sample = shape("svg", { class: "ebt-sample", width: 28, height: 10, "aria-hidden": "true" },
    shape("line", { x1: 0, x2: 28, y1: 5, y2: 5, stroke: color, "stroke-width": 2.4,
      "stroke-dasharray": dash || null }));
  if (marked) sample.append(shape("circle", { cx: 14, cy: 5, r: 3.2, fill: color }));
  return sample;
}

// Horizontal bars: `rows`: [{ label, value, text, marked }], drawn on a scale from 0 to `most`.
function barChart(rows, most = 1, title = "") {
  const list = element("div", { class: "ebt-bars", role: "img",
    "aria-label": `${title ? title + ": " : ""}${rows.map((row) => `${row.label} ${row.text}`).join(", ")}` });
  for (const row of rows) {
    const share = Math.max(0, Math.min(1, row.value / most));
    list.append(element("div", { class: row.marked ? "ebt-bar ebt-marked" : "ebt-bar" },
      element("span", { class: "ebt-label" }, row.label),
      element("span", { class: "ebt-track" }, element("i", { style: `width: ${(100 * share).toFixed(1)}%` })),
      element("span", { class: "ebt-number" }, row.text)));
  }
  return list;
}

// ---- the exchange with the kernel ----

// Returns ask(request): sends it when the last one has been answered; of those that come meanwhile the newest is sent.
// `onAnswer(response)` gets the answer. While one is awaited, `el` carries data-busy="true".
function createAsker(model, el, onAnswer) {
  const sender = Math.random().toString(36).slice(2);
  const message = element("p", { class: "ebt-message", role: "status" });
  el.append(message);
  let number = 0;
  let waiting = false;
  let next = null;
  let timer = null;
  const send = (request) => {
    waiting = true;
    number += 1;
    el.dataset.busy = "true";
    timer = setTimeout(() => { message.textContent = "The kernel has not answered for 15 s."; }, 15000);
    model.set("request", { ...request, id: `${sender}:${number}` });
    model.save_changes();
  };
  model.on("change:response", () => {
    const response = model.get("response");
    if (response.id !== `${sender}:${number}` || !waiting) return;
    clearTimeout(timer);
    waiting = false;
    message.textContent = response.error || "";
    if (!response.error) onAnswer(response);
    const request = next;
    next = null;
    if (request) send(request);
    else el.dataset.busy = "false";
  });
  el.dataset.busy = "false";
  return (request) => {
    if (waiting) next = request;
    else send(request);
  };
}

// Stands in for a kernel's model in a page without one: the same values, and no answers.
function staticModel(values) {
  return {
    get: (name) => values[name],
    set: (name, value) => { values[name] = value; },
    on: () => {},
    off: () => {},
    save_changes: () => {},
  };
}

// ---- settings of a request, and pictures ----

const IMAGE_SIDE = 168; // pixels of a large picture on the page

// One control for each setting; every change asks the kernel for all of them.
function settingControls(frame, ask) {
  const settings = { ...frame.settings };
  const change = (name, value) => {
    settings[name] = value;
    ask({ ...settings });
  };
  return frame.controls.map(({ name, label, ...options }) => {
    if (options.text) {
      const box = textBox(label, settings[name], (value) => change(name, value));
      box.input.addEventListener("input", () => { settings[name] = box.value; }); // asked with the next change
      return box.node;
    }
    return slider(label, { ...options, value: settings[name] }, (value) => change(name, value)).node;
  });
}

function settingsText(frame) {
  return frame.controls.map(({ name, label }) => `${label}: ${frame.settings[name]}`).join(", ");
}

function picture(source, caption, side = IMAGE_SIDE) {
  const style = `width: ${side}px; height: ${side}px; image-rendering: pixelated; display: block`;
  return element("figure", { style: "margin: 0" }, element("img", { src: source, alt: caption, style }),
    element("figcaption", { style: `max-width: ${side}px` }, caption));
}
