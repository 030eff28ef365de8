// The landscape explorer: contour panels with paths, a surface, what is known of a point, and the controls.

const PANEL = { size: 236, left: 46, top: 22, bottom: 40, right: 8 };
const PATH_COLOR = "#ffffff";
const SAMPLE_COLOR = "#56B4E9";
const WALK_COLOR = "#E69F00";
const PLANES = [
  ["path", "principal axes of the path"], ["tokens", "towards two tokens"],
  ["gradient", "downhill, largest curvature"], ["random", "two random directions"],
];

// ---- a contour panel ----

// Functions from coordinates in the plane to places on the panel.
function panelScale(plane) {
  const { size, left, top } = PANEL;
  return {
    x: (x) => left + ((x - plane.x[0]) / (plane.x[1] - plane.x[0])) * size,
    y: (y) => top + (1 - (y - plane.y[0]) / (plane.y[1] - plane.y[0])) * size,
  };
}

function drawPanel(view, number) {
  const { plane } = view;
  const { size, left, top, bottom, right } = PANEL;
  const field = plane.fields[number];
  const levels = quantiles(field, NUM_CONTOURS);
  const [width, height] = [left + size + right, top + size + bottom];
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "ebt-chart ebt-contours",
    tabindex: 0, role: "group", "aria-label": panelText(view, number), ...OWN_KEYS });
  const cell = size / (field.rows.length - 1);
  const clip = `clip-${Math.random().toString(36).slice(2)}`;
  const inside = shape("g", { "clip-path": `url(#${clip})` },
    shape("image", { x: left - cell / 2, y: top - cell / 2, width: size + cell, height: size + cell,
      preserveAspectRatio: "none", href: heatImage(field, levels) }),
    shape("path", { d: contourPath(field, levels), fill: "none", stroke: "#000", "stroke-opacity": 0.35,
      "stroke-width": 0.7, transform: `translate(${left} ${top + size}) scale(${cell} ${-cell})`,
      "vector-effect": "non-scaling-stroke" }));
  svg.append(shape("clipPath", { id: clip }, shape("rect", { x: left, y: top, width: size, height: size })), inside);
  drawAxes(svg, plane, panelTitle(view, number));
  drawPaths(inside, view, number);
  svg.addEventListener("keydown", (event) => view.moveCross(event));
  svg.addEventListener("pointerdown", (event) => view.dragCross(event, svg));
  return svg;
}

function drawAxes(svg, plane, title) {
  const { size, left, top } = PANEL;
  const at = panelScale(plane);
  svg.append(shape("rect", { x: left, y: top, width: size, height: size, fill: "none", stroke: "currentColor" }),
    shape("text", { x: left, y: 15, class: "ebt-title" }, title));
  for (const tick of niceTicks(...plane.x)) {
    svg.append(shape("text", { x: at.x(tick), y: top + size + 15, "text-anchor": "middle" }, formatNumber(tick)));
  }
  for (const tick of niceTicks(...plane.y)) {
    svg.append(shape("text", { x: left - 4, y: at.y(tick) + 4, "text-anchor": "end" }, formatNumber(tick)));
  }
  const middle = top + size / 2;
  svg.append(shape("text", { x: left + size / 2, y: top + size + 32, "text-anchor": "middle" }, plane.labels[0]),
    shape("text", { x: 11, y: middle, "text-anchor": "middle", transform: `rotate(-90 11 ${middle})` },
      plane.labels[1]));
}

function drawPaths(group, view, number) {
  const { plane } = view;
  const at = panelScale(plane);
  const landscape = view.frame.visited[number];
  plane.paths.forEach((points, index) => {
    if (index !== view.pathIndex) drawPath(group, points, at, view.colorOf(index), 1.4);
  });
  const chosen = plane.paths[view.pathIndex] || plane.paths[0];
  chosen.slice(1).forEach((point, k) => {
    const own = view.frame.schedule[k] === landscape;
    drawPath(group, [chosen[k], point], at, view.colorOf(view.pathIndex), own ? 2.4 : 1.2, own ? null : "3 3");
  });
  for (const [text, x, y] of plane.marks) drawSign(group, "◆", text, [at.x(x), at.y(y)], "#000");
  const [x, y] = lowestPoint(plane.fields[number], plane);
  drawSign(group, "✕", "lowest", [at.x(x), at.y(y)], "#000");
  drawPoints(group, chosen, at, view);
  if (view.cross) {
    const [cx, cy] = [at.x(view.cross[0]), at.y(view.cross[1])];
    group.append(shape("path", { d: `M${cx - 9} ${cy}H${cx + 9}M${cx} ${cy - 9}V${cy + 9}`, stroke: WALK_COLOR,
      "stroke-width": 2.5 }));
  }
}

function drawPath(group, points, at, color, width, dash = null) {
  const d = points.map(([x, y], i) => `${i ? "L" : "M"}${at.x(x).toFixed(1)} ${at.y(y).toFixed(1)}`).join("");
  for (const [stroke, extra] of [["#000", 1.4], [color, 0]]) {
    group.append(shape("path", { d, fill: "none", stroke, "stroke-width": width + extra, "stroke-dasharray": dash }));
  }
}

function drawPoints(group, points, at, view) {
  const last = points.length - 1;
  const every = Math.max(1, Math.ceil(last / 8));
  points.forEach(([x, y], k) => {
    const chosen = k === view.step;
    group.append(shape("circle", { cx: at.x(x), cy: at.y(y), r: chosen ? 7 : 4, stroke: "#000",
      fill: chosen ? "#D55E00" : view.colorOf(view.pathIndex) }));
    if (k % every === 0 || k === last || chosen) drawLabel(group, String(k), at.x(x), at.y(y) - 10, "middle");
  });
}

function drawSign(group, sign, text, [x, y], color) {
  group.append(shape("text", { x, y: y + 5, "text-anchor": "middle", fill: color, stroke: "#fff", "stroke-width": 3,
    "paint-order": "stroke", class: "ebt-sign" }, sign));
  drawLabel(group, text, x + 9, y + 4, "start");
}

function drawLabel(group, text, x, y, anchor) {
  group.append(shape("text", { x, y, "text-anchor": anchor, class: "ebt-sign", fill: "#000", stroke: "#fff",
    "stroke-width": 3, "paint-order": "stroke" }, text));
}

function panelTitle(view, number) {
  const { visited, schedule } = view.frame;
  const energies = view.path.energies[number];
  const moves = schedule.flatMap((index, k) => (index === visited[number] && k + 1 < energies.length ? [k] : []));
  if (!moves.length) return `landscape ${visited[number]}`;
  const [before, after] = [energies[moves[0]], energies[moves[moves.length - 1] + 1]];
  return `landscape ${visited[number]}: energy ${formatNumber(before, 4)} → ${formatNumber(after, 4)}`;
}

function panelText(view, number) {
  return `Contours of the energy, ${panelTitle(view, number)}. Arrow keys move a cross, Enter lets it descend.`;
}

// ---- what is known of a point ----

function pointFacts(view) {
  const { path, step, frame } = view;
  const rows = path.top[step].map(([token, share]) => ({ label: token, value: share, text: percent(share),
    marked: token === frame.target }));
  const series = frame.visited.map((index, number) => ({ name: `landscape ${index}`, marked: true,
    points: path.energies[number].map((energy, k) => [k, energy]) }));
  const facts = frame.visited.map((index, number) => element("tr", {}, element("td", {}, `landscape ${index}`),
    element("td", {}, formatNumber(path.energies[number][step], 5)),
    element("td", {}, formatNumber(path.norms[number][step]))));
  const head = element("tr", {}, ...["", "energy", "gradient norm"].map((text) => element("th", {}, text)));
  const target = frame.target === null ? "" : `; the text goes on with ${frame.target}`;
  return element("div", { class: "ebt-facts" },
    element("h4", {}, `${path.name}, ${step ? `after move ${step}` : "the start"}`),
    barChart(rows, 1, "likeliest tokens"),
    element("p", { class: "ebt-note" }, `entropy ${formatNumber(path.entropies[step])} nats${target}`),
    element("table", {}, head, ...facts),
    lineChart(series, { title: "Energy along the path", xLabel: "moves made", marker: step, height: 160 }),
    legend(series));
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

// ---- the state of the page ----

// What is shown now: the frame and what the reader chose among what it holds.
class LandscapePage {
  constructor(model, redraw) {
    Object.assign(this, { model, redraw, step: 0, pathIndex: 0, shown: "all", angle: 0.6, cross: null, ask: null });
    this.readFrame();
  }

  readFrame() {
    this.frame = this.model.get("frame");
    this.showPlane(this.frame.planes[this.kind] && !this.ask ? this.kind : this.frame.settings.plane);
    this.pathIndex = Math.min(this.pathIndex, this.plane.paths.length - 1);
    this.step = Math.min(this.step, this.lastStep);
  }

  showPlane(kind) {
    if (kind !== this.kind) this.cross = null; // its coordinates were those of the other plane
    this.kind = kind;
  }

  get plane() { return this.frame.planes[this.kind]; }
  get path() { return this.frame.paths[this.pathIndex]; }
  get lastStep() { return this.path.top.length - 1; }

  // The landscape of the chosen step's move, as its place among those visited.
  get number() {
    if (this.shown !== "all") return Math.min(Number(this.shown), this.frame.visited.length - 1);
    const { schedule, visited } = this.frame;
    return visited.indexOf(schedule[Math.min(this.step, schedule.length - 1)]);
  }

  // The paths of this plane, the chosen one last.
  get lines() {
    const lines = this.plane.paths.map((points, index) => ({ points, color: this.colorOf(index) }));
    const [own] = lines.splice(Math.min(this.pathIndex, lines.length - 1), 1);
    return [...lines, { ...own, chosen: this.step }];
  }

  colorOf(index) {
    if (index >= this.frame.settings.samples) return WALK_COLOR;
    return index ? SAMPLE_COLOR : PATH_COLOR;
  }

  moveCross(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const [dx, dy] = moves[event.key] || [0, 0];
    if (event.key === "Enter" && this.cross) this.descend(false);
    else if (!dx && !dy) return;
    else {
      const { x, y } = this.plane;
      const [cx, cy] = this.cross || this.plane.paths[this.pathIndex][this.step];
      const share = event.shiftKey ? 0.1 : 0.02;
      this.cross = [clamp(cx + dx * share * (x[1] - x[0]), x), clamp(cy + dy * share * (y[1] - y[0]), y)];
      this.redraw({ keepFocus: true });
    }
    event.preventDefault();
    event.stopPropagation();
  }

  dragCross(event, svg) {
    const box = svg.getBoundingClientRect(); // of the time when it was drawn
    const follow = (move, replace) => {
      const unit = svg.viewBox.baseVal.width / box.width;
      const [px, py] = [(move.clientX - box.left) * unit, (move.clientY - box.top) * unit];
      const { x, y } = this.plane;
      this.cross = [clamp(mix(x, (px - PANEL.left) / PANEL.size), x),
        clamp(mix(y, 1 - (py - PANEL.top) / PANEL.size), y)];
      this.descend(replace);
    };
    const drag = (move) => follow(move, true);
    document.addEventListener("pointermove", drag);
    document.addEventListener("pointerup", () => document.removeEventListener("pointermove", drag), { once: true });
    follow(event, false);
    event.preventDefault();
  }

  descend(replace) {
    this.redraw({ keepFocus: true });
    if (this.ask) this.ask({ walk: this.cross, replace });
  }
}

function clamp(value, [low, high]) {
  return Math.min(Math.max(value, low), high);
}

// ---- controls ----

function frameControls(page) {
  const { frame } = page;
  const update = (change) => (value) => { Object.assign(page, change(value)); page.redraw({}); };
  const controls = {};
  controls.step = slider("step", { min: 0, max: page.lastStep, value: page.step }, update((step) => ({ step })));
  controls.play = playButton(controls.step, 900);
  controls.path = choice("candidate", [["0", "…"]], "0", update((index) => ({ pathIndex: Number(index) })));
  controls.shown = choice("landscapes", [["all", "side by side"],
    ...frame.visited.map((index, number) => [String(number), `landscape ${index}`])], page.shown,
  update((shown) => ({ shown })));
  controls.angle = slider("turn", { min: 0, max: 360, step: 5, value: 35, format: (value) => `${value}°` },
    update((degrees) => ({ angle: (degrees * Math.PI) / 180 })));
  return controls;
}

function kernelControls(page) {
  const { settings } = page.frame;
  const change = (key, convert = (value) => value) => (value) => page.ask({ settings: { [key]: convert(value) } });
  const controls = {};
  controls.text = textBox("text", settings.text, (text) => page.ask({ settings: { text, position: -1 } }));
  controls.address = textBox("model", settings.address, change("address"));
  controls.range = slider("range", { min: -3, max: 4, step: 0.25, value: Math.log2(settings.range),
    format: (value) => `× ${formatNumber(2 ** value)}` }, change("range", (value) => 2 ** value));
  controls.resolution = slider("resolution", { min: 11, max: 81, step: 10, value: settings.resolution },
    change("resolution"));
  controls.steps = slider("number of steps", { min: 1, max: 16, value: page.frame.schedule.length }, change("steps"));
  controls.samples = slider("samples", { min: 1, max: 8, value: settings.samples }, change("samples"));
  controls.noise = slider("noise", { min: 0, max: 1, step: 0.02, value: settings.noise || 0 }, change("noise"));
  controls.point = slider("through point", { min: 0, max: page.frame.schedule.length, value: settings.point },
    change("point"));
  controls.tokenA = textBox("token A", settings.token_a, change("token_a"));
  controls.tokenB = textBox("token B", settings.token_b, change("token_b"));
  [controls.tokenA, controls.tokenB].forEach((box) => box.input.classList.add("ebt-short"));
  controls.another = button("other directions", () => page.ask({ settings: { seed: page.frame.settings.seed + 1 } }));
  controls.clear = button("clear walks", () => page.ask({ clear: true }));
  return controls;
}

function tokenButtons(page) {
  const { tokens, settings } = page.frame;
  return tokens.map((token, position) => {
    const style = `ebt-word${position > settings.position ? " ebt-unread" : ""}`;
    const chosen = position === settings.position;
    if (!page.ask) return element("span", { class: style, "aria-current": chosen && "true" }, token);
    return button(token, () => page.ask({ settings: { position } }),
      { class: style, "aria-pressed": String(chosen), title: `what follows token ${position}` });
  });
}

// Bring the controls into step with the frame, without asking anything.
function syncControls(page, controls) {
  const { frame } = page;
  controls.step.setRange(0, page.lastStep);
  controls.step.set(page.step, true);
  const names = page.plane.paths.map((_, index) => [String(index), frame.paths[index].name]);
  controls.path.select.replaceChildren(...names.map(([value, text]) => element("option", { value }, text)));
  controls.path.set(String(page.pathIndex));
  const shown = [["all", "side by side"], ...frame.visited.map((index, k) => [String(k), `landscape ${index}`])];
  controls.shown.select.replaceChildren(...shown.map(([value, text]) => element("option", { value }, text)));
  controls.shown.set(page.shown);
  if (!page.ask) return;
  controls.point.setRange(0, frame.schedule.length);
  controls.point.node.hidden = page.kind === "path";
  controls.tokenA.node.hidden = controls.tokenB.node.hidden = page.kind !== "tokens";
  controls.another.hidden = page.kind !== "random";
  controls.clear.disabled = frame.paths.length <= frame.settings.samples;
  [controls.tokenA, controls.tokenB].forEach((box, k) => {
    box.input.placeholder = page.plane.marks[k] ? page.plane.marks[k][0] : "";
  });
}

// ---- the view ----

function render({ model, el }) {
  el.classList.add("ebt-view");
  const page = new LandscapePage(model, (options) => draw(page, parts, options));
  if (model.get("has_kernel")) page.ask = createAsker(model, el, () => {});
  page.message = el.querySelector(".ebt-message");
  const controls = frameControls(page);
  if (page.ask) Object.assign(controls, kernelControls(page));
  const planes = PLANES.filter(([kind]) => page.ask || page.frame.planes[kind]);
  controls.plane = choice("plane", planes, page.kind, (plane) => {
    if (page.frame.planes[plane]) page.showPlane(plane);
    if (page.ask) page.ask({ settings: { plane } });
    page.redraw({});
  });
  const parts = { controls, tokens: element("div", { class: "ebt-row ebt-words" }), panels: element("div", {
    class: "ebt-columns" }), surface: element("canvas", { class: "ebt-surface", role: "img" }),
  facts: element("div", {}), title: element("p", { class: "ebt-note" }), read: element("output", {}) };
  el.prepend(...layout(page, parts));
  model.on("change:frame", () => { page.readFrame(); controls.plane.set(page.kind); draw(page, parts, {}); });
  draw(page, parts, {});
}

function layout(page, parts) {
  const { controls, tokens, panels, surface, facts, title, read } = parts;
  const row = (...nodes) => element("div", { class: "ebt-row" }, ...nodes);
  const node = (...names) => names.map((name) => controls[name].node || controls[name]);
  const rows = [title, tokens];
  if (page.ask) {
    rows.unshift(row(...node("text", "address")), page.message);
    rows.push(row(...node("plane", "point", "tokenA", "tokenB", "another")),
      row(...node("range", "resolution", "steps", "samples", "noise")));
  } else {
    rows.push(row(...node("plane")));
  }
  rows.push(row(...node("step", "play", "path", "shown", "angle"), ...(page.ask ? node("clear") : [])));
  const note = page.ask ? "Click or drag in a panel, or use arrow keys and Enter there: the candidate descends from it."
    : "This page has no kernel. In JupyterLab the same view takes another text, model, plane or range, and lets a "
      + "candidate descend from any point: ebt_nb.widgets.landscape.explore_landscape().";
  const pictures = element("div", { class: "ebt-columns" }, panels, surface);
  const explained = element("div", {}, pictures, element("p", { class: "ebt-note" }, note, " ", read));
  return [...rows, element("div", { class: "ebt-explorer" }, explained, facts)];
}

function draw(page, parts, { keepFocus = false }) {
  const { frame, plane } = page;
  const focused = keepFocus ? [...parts.panels.querySelectorAll("svg")].indexOf(document.activeElement) : -1;
  const shown = page.shown === "all" ? frame.visited.map((_, number) => number) : [page.number];
  parts.panels.replaceChildren(...shown.map((number) => element("div", {}, drawPanel(page, number),
    colorBar(plane.fields[number], quantiles(plane.fields[number], NUM_CONTOURS)))));
  if (focused >= 0) parts.panels.querySelectorAll("svg")[focused].focus();
  drawSurface(parts.surface, plane.fields[page.number], plane, page.lines, page.angle);
  parts.surface.setAttribute("aria-label", `Surface of the energy, ${panelTitle(page, page.number)}`);
  parts.facts.replaceChildren(pointFacts(page));
  parts.title.textContent = `${frame.title}. Candidates for the token that follows the marked one:`;
  parts.tokens.replaceChildren(...tokenButtons(page));
  const value = page.cross && valueAt(plane.fields[page.number], plane, page.cross);
  parts.read.textContent = page.cross
    ? `Energy at the cross: ${formatNumber(energyOf(plane.fields[page.number], value), 5)}` : "";
  syncControls(page, parts.controls);
}

export default { render };
