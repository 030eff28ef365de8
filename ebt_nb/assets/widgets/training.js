// Curves of runs that are being trained: losses, energies by step, step size, learning rate, speed.
// The page redraws whenever the frame changes; a slider leaves out the first updates, whose losses dwarf the rest.

const PANELS = {
  loss: { title: "Loss" },
  alpha: { title: "Step size alpha", yLabel: "alpha" },
  lr: { title: "Learning rate" },
  speed: { title: "Speed" },
};

function render({ model, el }) {
  el.classList.add("ebt-view");
  const state = element("div");
  const charts = element("div", { class: "ebt-columns" });
  let first = 0;
  const control = slider("from update", { min: 0, max: 1, value: 0 }, (update) => {
    first = update;
    drawCharts(charts, model.get("frame"), first);
  });
  const draw = () => {
    const frame = model.get("frame");
    const last = Math.max(1, ...frame.runs.map((run) => run.step));
    control.setRange(0, last - 1);
    state.replaceChildren(runTable(frame.runs));
    drawCharts(charts, frame, first);
  };
  model.on("change:frame", draw);
  el.append(state, element("div", { class: "ebt-row" }, control.node), charts);
  draw();
}

// How far each run is, beside a piece of its line.
function runTable(runs) {
  const table = element("table");
  const hasTime = runs.some((run) => run.seconds !== null);
  const heads = ["model", "state", "update", "training loss", "validation loss", ...(hasTime ? ["time"] : [])];
  table.append(element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head))));
  runs.forEach((run, number) => {
    const name = element("td", {}, lineSample(lineStyle(number)), run.name);
    const cells = [run.state, `${run.step} of ${run.max_steps}`, formatNumber(lastValue(run, "training"), 4),
      formatNumber(lastValue(run, "validation"), 4), ...(hasTime ? [`${run.seconds} s`] : [])];
    table.append(element("tr", {}, name, ...cells.map((cell) => element("td", {}, cell))));
  });
  return table;
}

function lastValue(run, name) {
  const curve = run.curves.find((one) => one.panel === "loss" && one.name === name);
  return curve ? curve.points[curve.points.length - 1][1] : null;
}

function drawCharts(charts, frame, first) {
  const nodes = [];
  for (const [panel, options] of Object.entries(PANELS)) {
    const series = frame.runs.flatMap((run, number) => runSeries(run, number, panel, first));
    if (series.length) nodes.push(drawChart(series, { yLabel: frame.labels[panel], ...options }, panel === "loss"));
  }
  for (const run of frame.runs) {
    const series = energySeries(run, first);
    const options = { title: `Energy before each step: ${run.name}`, yLabel: "energy" };
    if (series.length) nodes.push(drawChart(series, options, true));
  }
  charts.replaceChildren(...nodes);
}

function drawChart(series, options, hasLegend) {
  const chart = lineChart(series, { xLabel: "update", height: 200, ...options });
  return element("div", { style: "max-width: 340px" }, chart, ...(hasLegend ? [legend(series)] : []));
}

// The curves of a run in one chart, in the style of the run: validation has a mark at each point.
function runSeries(run, number, panel, first) {
  return run.curves.filter((curve) => curve.panel === panel).map((curve) => ({
    name: curve.name ? `${run.name}, ${curve.name}` : run.name,
    points: curve.points.filter((point) => point[0] >= first),
    ...lineStyle(number),
    marked: curve.name === "validation",
  }));
}

// The energies of a run: from dark (first step) to light (last step).
function energySeries(run, first) {
  const curves = run.curves.filter((curve) => curve.panel === "energy");
  return curves.map((curve, number) => ({
    name: curve.name,
    points: curve.points.filter((point) => point[0] >= first),
    color: cssColor(mixColors(VIRIDIS, (0.85 * number) / Math.max(1, curves.length - 1))),
    dash: number % 2 ? DASHES[2] : "",
  }));
}

export default { render };
