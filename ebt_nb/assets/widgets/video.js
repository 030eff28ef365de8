// A clip, its roll-outs and their differences from the truth, frame by frame; error and energy over time.
// The frame that is shown moves along all of them; other clips and settings are asked of the kernel.

const THUMBNAIL_SIDE = 48; // pixels on the page
const NAME_STYLE = "border: 0; font-weight: normal; font-size: 13px; max-width: 9rem";

function render({ model, el }) {
  el.classList.add("ebt-view");
  const frame = model.get("frame");
  let result = frame.result;
  let measure = "relative energy";
  const stage = element("div", { class: "ebt-columns" });
  const strips = element("div", { style: "overflow-x: auto" });
  const charts = element("div", { class: "ebt-columns" });
  const show = (number) => {
    drawStage(stage, result, number);
    markColumn(strips, number);
    drawCurves(charts, result, number, measure);
  };
  const last = result.rows[0].frames.length - 1;
  const time = slider("frame", { min: 1, max: last + 1, value: result.num_observed + 1 }, (value) => show(value - 1));
  const player = playButton(time, 350);
  const measures = choice("energy", ["relative energy", "final energy"], measure, (value) => {
    measure = value;
    show(time.value - 1);
  });
  const draw = () => {
    drawStrips(strips, result, (number) => time.set(number + 1));
    show(time.value - 1);
  };
  const controls = element("div", { class: "ebt-row" });
  el.append(controls, element("div", { class: "ebt-row" }, time.node, player.node, measures.node));
  el.append(stage, strips, charts);
  if (model.get("has_kernel")) {
    const ask = createAsker(model, el, (response) => { result = response.result; draw(); });
    controls.append(...settingControls(frame, ask));
  } else {
    controls.append(element("span", { class: "ebt-note" }, settingsText(frame)));
  }
  draw();
}

// The frame of each row, large.
function drawStage(stage, result, number) {
  const isGiven = number < result.num_observed;
  const kind = isGiven ? "given" : `generated, ${number + 1 - result.num_observed} after the given ones`;
  const nodes = result.rows.map((row) => picture(row.frames[number], row.name));
  const note = element("p", { class: "ebt-note", style: "width: 100%" }, `frame ${number + 1}: ${kind}`);
  stage.replaceChildren(note, ...nodes);
}

// One row of small frames for the truth, each roll-out and each difference; a click shows a frame large.
function drawStrips(strips, result, onClick) {
  const table = element("table");
  const style = `width: ${THUMBNAIL_SIDE}px; height: ${THUMBNAIL_SIDE}px; image-rendering: pixelated; display: block`;
  for (const row of result.rows) {
    const cells = row.frames.map((source, number) => {
      const name = `${row.name}, frame ${number + 1}`;
      const image = element("img", { src: source, alt: "", style });
      const node = button("", () => onClick(number), { "aria-label": `show ${name}`, style: "padding: 1px" });
      node.append(image);
      return element("td", { style: "padding: 1px; border: 0", "data-column": number }, node);
    });
    table.append(element("tr", {}, element("th", { scope: "row", style: NAME_STYLE }, row.name), ...cells));
  }
  const numbers = result.rows[0].frames.map((_, number) => {
    const text = number < result.num_observed ? "given" : String(number + 1);
    return element("td", { style: "padding: 1px; border: 0; text-align: center; font-size: 11px" }, text);
  });
  table.append(element("tr", {}, element("th", { style: "border: 0" }, ""), ...numbers));
  strips.replaceChildren(table);
}

// Outline the frames of one moment.
function markColumn(strips, number) {
  for (const cell of strips.querySelectorAll("[data-column]")) {
    const isShown = Number(cell.dataset.column) === number;
    cell.style.background = isShown ? COLORS[1] : "";
  }
}

function drawCurves(charts, result, number, measure) {
  const marker = number < result.num_observed ? null : number + 1;
  const toPoints = (values) => values.map((value, k) => [result.num_observed + k + 1, value]);
  const toSeries = (curves) => curves.map((curve) => ({ ...curve, points: toPoints(curve.values), marked: true }));
  const errors = toSeries(result.errors);
  const energies = toSeries(result.energies.filter((curve) => curve.measure === measure));
  const options = { xLabel: "frame", marker, height: 200 };
  const errorChart = lineChart(errors, { title: "Error", yLabel: result.distance, ...options });
  charts.replaceChildren(
    element("div", { style: "max-width: 340px" }, errorChart, legend(errors)),
    lineChart(energies, { title: "Energy of what was generated", yLabel: measure, ...options }),
  );
}

export default { render };
