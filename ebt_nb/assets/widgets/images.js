// An image after each step of a descent, the energy of its patches, and curves over the steps.
// `frame.controls` says what the kernel can be asked for: sliders, and a caption for models that draw.

function render({ model, el }) {
  el.classList.add("ebt-view");
  const frame = model.get("frame");
  let result = frame.result;
  let scale = "of all steps";
  const stage = element("div", { class: "ebt-columns" });
  const strip = element("div", { class: "ebt-row" });
  const charts = element("div", { class: "ebt-columns" });
  const show = (number) => drawState(stage, charts, result, number, scale);
  const step = slider("step shown", { min: 0, max: result.images.length - 1, value: result.images.length - 1 }, show);
  const player = playButton(step);
  const scales = choice("energy colours", ["of all steps", "of this step"], scale, (value) => {
    scale = value;
    show(step.value);
  });
  const draw = () => {
    drawStrip(strip, result, (number) => step.set(number));
    step.setRange(0, result.images.length - 1);
    step.set(Math.min(step.value, result.images.length - 1));
  };
  const controls = element("div", { class: "ebt-row" });
  el.append(controls, element("div", { class: "ebt-row" }, step.node, player.node, scales.node), stage, strip, charts);
  if (model.get("has_kernel")) {
    const ask = createAsker(model, el, (response) => {
      const wasLast = step.value === Number(step.input.max);
      result = response.result;
      draw();
      if (wasLast) step.set(result.images.length - 1);
    });
    controls.append(...settingControls(frame, ask));
  } else {
    controls.append(element("span", { class: "ebt-note" }, settingsText(frame)));
  }
  draw();
}

function stateName(number) {
  return number === 0 ? "start" : `step ${number}`;
}

function decibels(value) {
  return value === null || value === undefined ? "" : `, ${value.toFixed(1)} dB`;
}

// The state that is shown, large, with its patch energies and what it is compared with.
function drawState(stage, charts, result, number, scale) {
  const quality = result.psnr ? decibels(result.psnr[number]) : "";
  const nodes = [picture(result.images[number], `${stateName(number)}${quality}`)];
  nodes.push(energyMap(result, number, scale));
  if (result.clean) nodes.push(picture(result.clean, "clean"));
  if (result.baseline) {
    const { image, name, passes, psnr } = result.baseline;
    nodes.push(picture(image, `${name}, ${passes} passes${decibels(psnr)}`));
  }
  stage.replaceChildren(...nodes);
  const toPoints = (values) => values.map((value, step) => [step, value]);
  const energy = [{ name: "energy", points: toPoints(result.energies), marked: true }];
  const drawn = [lineChart(energy, { title: "Energy", xLabel: "step", yLabel: "energy", marker: number })];
  if (result.psnr) drawn.push(qualityChart(result, number));
  charts.replaceChildren(...drawn);
}

function qualityChart(result, number) {
  const last = result.psnr.length - 1;
  const series = [{ name: "energy model", points: result.psnr.map((value, step) => [step, value]), marked: true }];
  if (result.baseline) {
    const { name, psnr, passes } = result.baseline;
    series.push({ name: `${name} after ${passes} passes`, points: [[0, psnr], [last, psnr]], dashed: true });
  }
  const chart = lineChart(series, { title: "Quality", xLabel: "step", yLabel: "PSNR (dB)", marker: number });
  return element("div", {}, chart, ...(result.baseline ? [legend(series)] : []));
}

// The energy of each patch: on one scale for all steps, which compares steps, or on that of this step.
function energyMap(result, number, scale) {
  const rows = result.patch_energies[number];
  const [low, high] = extent(scale === "of all steps" ? result.patch_energies.flat(2) : rows.flat());
  const size = IMAGE_SIDE / rows.length;
  const name = `energy of each patch, ${formatNumber(low)} (dark) to ${formatNumber(high)}`;
  const svg = shape("svg", { width: IMAGE_SIDE, height: IMAGE_SIDE, viewBox: `0 0 ${IMAGE_SIDE} ${IMAGE_SIDE}`,
    role: "img", "aria-label": name, style: "display: block" });
  rows.forEach((row, y) => row.forEach((value, x) => {
    const fill = cssColor(mixColors(VIRIDIS, (value - low) / (high - low || 1)));
    const square = shape("rect", { x: x * size, y: y * size, width: size + 0.3, height: size + 0.3, fill });
    square.append(shape("title", {}, formatNumber(value)));
    svg.append(square);
  }));
  return element("figure", { style: "margin: 0" }, svg,
    element("figcaption", { style: `max-width: ${IMAGE_SIDE}px` }, name));
}

// All states, small; a click shows one large.
function drawStrip(strip, result, onClick) {
  strip.replaceChildren(...result.images.map((source, number) => {
    const attributes = { "aria-label": `show ${stateName(number)}`, style: "padding: 2px" };
    const node = button("", () => onClick(number), attributes);
    node.append(picture(source, stateName(number), 56));
    return node;
  }));
}

export default { render };
