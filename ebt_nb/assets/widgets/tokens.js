// A text token by token, coloured by a measure, and how the selected token was predicted step by step.
// Put between common.js and the views that show tokens (thinking.js, prompt.js).
//
// A frame holds `tokens` (texts) and `rows`, one for each model. `row.runs[name]` has a record for each token, or null
// where nothing was predicted. Values of a record are lists over samples, then over points: the start and each step.

const DIVERGING = ["#0072B2", "#f4f4f4", "#D55E00"];
const MEASURES = {
  surprise: { label: "surprise", unit: "nats", palette: CIVIDIS },
  energy: { label: "energy", unit: "", palette: CIVIDIS },
  relative: { label: "energy relative to the start", unit: "", palette: CIVIDIS },
  difference: { label: "surprise minus that of the other model", unit: "nats", palette: DIVERGING },
};

const RULES = { lowest: "lowest energy", largest_fall: "largest fall of energy", highest: "highest energy" };

// ---- what a record says ----

// The values of one measure at the start and after each step, of the chosen sample.
function pointsOf(record, measure) {
  const sample = record.chosen;
  if (measure === "relative") return record.relative[sample];
  if (measure !== "energy") return record.nll[sample];
  const after = record.after[sample];
  return after.length ? [record.before[sample][0], ...after] : [];
}

// The value at a step, or at the last one where a candidate took fewer; null where there is none.
function valueAt(record, measure, step) {
  const points = record ? pointsOf(record, measure) : [];
  return points.length ? points[Math.min(step, points.length - 1)] : null;
}

function recordsOf(row, run) {
  return row.runs[run] || Object.values(row.runs)[0];
}

function numSteps(rows, run) {
  const records = rows.flatMap((row) => recordsOf(row, run).filter((record) => record));
  return Math.max(0, ...records.map((record) => record.landscapes.length));
}

function describeValue(measure, value) {
  if (value === null) return `no ${MEASURES[measure].label}`;
  return `${MEASURES[measure].label} ${formatNumber(value)} ${MEASURES[measure].unit}`.trim();
}

function formatShare(share) {
  return share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

// Whether a token was drawn by the model, after the `numGiven` tokens of a prompt.
function isDrawn(frame, index) {
  return frame.numGiven !== undefined && index >= frame.numGiven;
}

// The token whose surprise thinking changes most, to begin with.
function mostChanged(row) {
  const changes = recordsOf(row, "own").map((record) => {
    const points = record ? pointsOf(record, "surprise") : [0];
    return Math.abs(points[0] - points[points.length - 1]);
  });
  return Math.max(1, changes.indexOf(Math.max(...changes)));
}

// ---- the text ----

// Shows `frame`, and which step of which token. Returns { strips, panels, controls, setFrame(frame), show(...) }.
function createTokenView(frame) {
  const state = { frame, run: "own", selected: mostChanged(frame.rows[0]), measure: "surprise", nodes: [] };
  const strips = element("div");
  const panels = element("div");
  const key = element("span", { class: "ebt-key" });
  const steps = slider("step", { min: 0, max: 1, value: 1, format: (step) => (step ? String(step) : "start") },
    () => drawStep());
  const play = playButton(steps, 700);
  const measures = choice("coloured by", Object.keys(MEASURES), "surprise", (measure) => {
    state.measure = measure;
    drawStep();
  });
  const controls = element("div", { class: "ebt-row" }, steps.node, play.node, measures.node, key);

  const value = (rowIndex, tokenIndex, step) => {
    const { rows } = state.frame;
    const record = recordsOf(rows[rowIndex], state.run)[tokenIndex];
    if (state.measure !== "difference") return valueAt(record, state.measure, step);
    const other = rows[1 - rowIndex] && recordsOf(rows[1 - rowIndex], state.run)[tokenIndex];
    return record && other ? valueAt(record, "surprise", step) - valueAt(other, "surprise", step) : null;
  };

  // The lowest and highest value at any step, so that colours of different steps compare.
  const range = () => {
    const values = [];
    state.frame.rows.forEach((row, r) => recordsOf(row, state.run).forEach((record, t) => {
      for (let step = 0; record && step <= Number(steps.input.max); step += 1) values.push(value(r, t, step));
    }));
    const [low, high] = extent(values);
    if (state.measure === "surprise") return [0, high];
    if (state.measure !== "difference") return [low, high];
    const size = Math.max(-low, high);
    return [-size, size];
  };

  const select = (index, rowIndex = null) => {
    const last = state.frame.tokens.length - 1;
    state.selected = Math.min(Math.max(index, 0), last);
    for (const nodes of state.nodes) {
      nodes.forEach((node, i) => {
        node.setAttribute("aria-selected", String(i === state.selected));
        node.tabIndex = i === state.selected ? 0 : -1;
      });
    }
    if (rowIndex !== null) state.nodes[rowIndex][state.selected].focus();
    drawPanels();
  };

  const move = (event, rowIndex) => {
    const last = state.frame.tokens.length - 1;
    const targets = { ArrowLeft: state.selected - 1, ArrowRight: state.selected + 1, Home: 0, End: last };
    if (event.key in targets) {
      event.preventDefault();
      select(targets[event.key], rowIndex);
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      event.preventDefault();
      steps.set(steps.value + (event.key === "ArrowUp" ? 1 : -1));
    }
  };

  const drawTokens = () => {
    state.nodes = state.frame.rows.map((row, r) => state.frame.tokens.map((token, i) => element("span", {
      role: "option", class: isDrawn(state.frame, i) ? "ebt-piece ebt-drawn" : "ebt-piece", onclick: () => select(i, r),
    }, token.replaceAll("\n", "⏎\n"))));
    strips.replaceChildren(...state.frame.rows.flatMap((row, r) => [
      element("h4", {}, row.title),
      element("div", {
        class: "ebt-passage", role: "listbox", "aria-label": `tokens of the text, ${row.title}`,
        onkeydown: (event) => move(event, r),
      }, ...state.nodes[r]),
    ]));
  };

  const drawKey = (low, high) => {
    const { label, unit, palette } = MEASURES[state.measure];
    const ground = `background: linear-gradient(to right, ${palette.join(", ")})`;
    key.replaceChildren(formatNumber(low), element("i", { style: ground }), `${formatNumber(high)} ${unit}`);
    key.setAttribute("role", "img");
    key.setAttribute("aria-label", `colours: ${label} from ${formatNumber(low)} to ${formatNumber(high)} ${unit}`);
  };

  const drawStep = () => {
    const [low, high] = range();
    state.frame.rows.forEach((row, r) => state.nodes[r].forEach((node, i) => {
      const shown = value(r, i, steps.value);
      const share = (shown - low) / (high - low || 1);
      const color = shown === null ? null : mixColors(MEASURES[state.measure].palette, share);
      node.style.background = color ? cssColor(color) : "none";
      node.style.color = color ? inkOn(color) : "inherit";
      node.classList.toggle("ebt-unscored", !color);
      const record = recordsOf(row, state.run)[i];
      const parts = ["energy", "surprise"].map((name) => describeValue(name, valueAt(record, name, steps.value)));
      node.setAttribute("aria-label", [state.frame.tokens[i].trim() || "blank", ...parts].join(", "));
      node.title = [...parts, state.measure in { energy: 0, surprise: 0 } ? [] : describeValue(state.measure, shown)]
        .flat().join(", ");
    }));
    drawKey(low, high);
    drawPanels();
  };

  const drawPanels = () => {
    const { rows, tokens } = state.frame;
    const shown = rows.filter((row) => recordsOf(row, state.run)[state.selected]);
    const kind = isDrawn(state.frame, state.selected) ? "drawn token" : "true token";
    panels.replaceChildren(...shown.map((row) => predictionPanel(row, tokens, state.selected,
      recordsOf(row, state.run)[state.selected], steps.value, kind)));
    if (!shown.length) {
      panels.append(element("p", { class: "ebt-note" }, tokens.length
        ? "Nothing was predicted here: the first token has none before it." : ""));
    }
  };

  // The step that is looked at stays, unless `step` is given; who looks at the last one goes on doing so.
  const setFrame = (next, step = null) => {
    play.stop();
    const wasAtEnd = steps.value >= Number(steps.input.max);
    state.frame = next;
    if (!next.rows.some((row) => row.runs[state.run])) state.run = "own";
    const hasEnergies = numSteps(next.rows, state.run) > 0;
    const names = Object.keys(MEASURES).filter((name) => name === "surprise"
      || (name === "difference" ? next.rows.length > 1 : hasEnergies));
    measures.select.replaceChildren(...names.map((name) => element("option", { value: name }, MEASURES[name].label)));
    if (!names.includes(state.measure)) state.measure = "surprise";
    measures.set(state.measure);
    const last = numSteps(next.rows, state.run);
    const kept = wasAtEnd ? last : Math.min(steps.value, last);
    steps.setRange(0, last);
    steps.set(step ?? kept, true);
    for (const node of [steps.node, play.node]) node.style.display = last ? "" : "none";
    drawTokens();
    select(state.selected);
    drawStep();
  };

  const setRun = (run) => {
    state.run = run;
    setFrame(state.frame);
  };
  setFrame(frame);
  return { strips, panels, controls, steps, play, setFrame, setRun, select, get frame() { return state.frame; } };
}

// ---- one prediction ----

function predictionPanel(row, tokens, index, record, step, kind) {
  const last = record.tokens.length - 1;
  const shown = Math.min(step, last);
  const before = tokens.slice(0, index).join("").slice(-32);
  const where = last ? (shown ? `after step ${shown} of ${last}` : "at the start") : "in one pass";
  const heading = `${row.name}: what follows “…${before.replaceAll("\n", "⏎")}”, ${where}`;
  const bars = barChart(barRows(record, shown), 1, heading);
  const node = element("div", { class: "ebt-prediction" }, element("h4", {}, heading));
  const values = ["nll", "entropy", "largest"].map((name) => formatNumber(record[name][record.chosen][shown]));
  const facts = element("p", { class: "ebt-note" },
    `${kind[0].toUpperCase()}${kind.slice(1)} ${record.target} (orange): surprise ${values[0]} nats. ` +
    `Entropy ${values[1]} nats.`);
  const likeliest = element("div", { class: "ebt-likeliest" }, bars, facts);
  node.append(element("div", { class: "ebt-columns" }, likeliest, stepCharts(row, record, shown, kind)));
  return node;
}

// The likeliest tokens, and the true one (marked) below them if it is not among them.
function barRows(record, step) {
  const rows = record.tokens[step].map((token, i) => ({ label: token, value: record.probabilities[step][i] }));
  const found = rows.find((row) => row.label === record.target);
  const truth = { label: record.target, value: record.targetProbabilities[step] };
  for (const row of found ? rows : [...rows, truth]) row.text = formatShare(row.value);
  (found || truth).marked = true;
  return found ? rows : [...rows, truth];
}

// The energy before and after each step, a line for each landscape: energies of different landscapes do not compare.
function energySeries(record, sample) {
  const series = [];
  record.landscapes.forEach((landscape, k) => {
    if (k === 0 || landscape !== record.landscapes[k - 1]) {
      series.push({ name: `landscape ${landscape + 1}`, landscape, points: [], marked: true });
    }
    series[series.length - 1].points.push([k, record.before[sample][k]], [k + 1, record.after[sample][k]]);
  });
  return series;
}

// Lines of all samples: the others thin and grey, the chosen one on top.
function sampleSeries(record, ofSample) {
  const others = record.nll.map((_, sample) => sample).filter((sample) => sample !== record.chosen);
  return [
    ...others.flatMap((sample) => ofSample(sample).map((one) => ({
      ...one, name: `sample ${sample + 1}`, color: "#767676", dashed: true, marked: false }))),
    ...ofSample(record.chosen),
  ];
}

function stepCharts(row, record, step, kind) {
  const charts = element("div", { class: "ebt-charts" });
  if (!record.landscapes.length) return charts;
  const curve = (name) => (sample) => [{ name: "chosen", marked: true, color: COLORS[0],
    points: record[name][sample].map((value, k) => [k, value]) }];
  const energies = sampleSeries(record, (sample) => energySeries(record, sample).map((one) => ({
    ...one, ...lineStyle(one.landscape) })));
  const truth = { name: kind, color: COLORS[1], dashed: true,
    points: record.targetProbabilities.map((value, k) => [k, value]) };
  const size = { width: 240, height: 150, xLabel: "step", marker: step };
  charts.append(
    lineChart(energies, { ...size, title: "energy" }),
    lineChart(sampleSeries(record, curve("norm")), { ...size, title: "gradient norm",
      marker: Math.min(step, record.landscapes.length - 1) }),
    lineChart(sampleSeries(record, curve("entropy")), { ...size, title: "entropy (nats)" }),
    lineChart([...sampleSeries(record, curve("largest")), truth], { ...size, title: "largest probability" }),
  );
  const keys = energies.filter((one) => !one.dashed).map((one) => ({ ...one, name: `energy in ${one.name}` }));
  keys.push(truth);
  if (record.nll.length > 1) {
    keys.push({ name: `${record.nll.length - 1} other samples`, color: "#767676", dashed: true });
    keys.push({ name: `sample ${record.chosen + 1}, chosen by ${RULES[row.select]}`, color: COLORS[0] });
  }
  return element("div", { class: "ebt-curves" }, charts, legend(keys));
}

// ---- settings of thinking, which a kernel answers ----

// Sliders for `inference.*`; `onChange(settings)` gets the keys that were changed, and only those.
function thinkingControls(frame, onChange) {
  const row = frame.rows.find((one) => one.own);
  const node = element("div", { class: "ebt-row" });
  const settings = { ...frame.settings };
  if (!row) return { node, settings };
  const { own, limits } = { own: row.own, limits: frame.limits };
  const change = (key, value) => {
    settings[key] = value;
    onChange(settings);
  };
  const setting = (key, fallback) => settings[key] ?? fallback;
  const parts = {
    "inference.steps": slider("steps", { min: 1, max: Math.max(limits.steps, own.steps),
      value: setting("inference.steps", own.steps) }, (value) => change("inference.steps", value)),
    "inference.step_size_factor": slider("step size", { min: -4, max: 4, step: 0.25,
      value: Math.log2(setting("inference.step_size_factor", own.factor)),
      format: (power) => `× ${formatNumber(2 ** power)} = ${formatNumber(own.stepSize * 2 ** power)}` },
    (power) => change("inference.step_size_factor", 2 ** power)),
    "inference.noise": slider("noise", { min: 0, max: Math.max(1, 2 * own.noise), step: 0.05,
      value: setting("inference.noise", own.noise) }, (value) => change("inference.noise", value)),
    "inference.samples": slider("samples", { min: 1, max: Math.max(limits.samples, own.samples),
      value: setting("inference.samples", own.samples) }, (value) => change("inference.samples", value)),
  };
  const reset = button("as trained", () => {
    for (const key of Object.keys(settings)) if (key in parts) delete settings[key];
    parts["inference.steps"].set(own.steps, true);
    parts["inference.step_size_factor"].set(Math.log2(own.factor), true);
    parts["inference.noise"].set(own.noise, true);
    parts["inference.samples"].set(own.samples, true);
    onChange(settings);
  });
  node.append(...Object.values(parts).map((part) => part.node), reset);
  return { node, settings };
}
