// The prompt box: a text is generated token by token, and each token can be watched being thought.

const PACES = [["0", "at once"], ["150", "fast"], ["500", "slowly"]];

function render({ model, el }) {
  el.classList.add("ebt-view");
  el.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab leaves arrow keys to the tokens
  const frame = model.get("frame");
  const view = createTokenView(frame);
  const parts = [view.controls, view.strips, view.panels];
  if (!model.get("has_kernel")) {
    el.prepend(...parts, element("p", { class: "ebt-note" },
      "Another prompt needs a kernel: call prompt_box() in JupyterLab."));
    return undefined;
  }
  const generation = createGeneration(model, el, view);
  el.prepend(promptControls(frame, generation), ...parts);
  const onFrame = () => { if (!generation.isRunning) view.setFrame(model.get("frame")); };
  model.on("change:frame", onFrame);
  return () => {
    generation.stop();
    model.off("change:frame", onFrame);
  };
}

// Asks for one token after the other: the kernel rests between them, and no stop button has to interrupt it.
function createGeneration(model, el, view) {
  const generation = { isRunning: false, number: null, pace: 150, onChange: () => {} };
  let timer = null;
  const setRunning = (isRunning) => {
    clearTimeout(timer);
    generation.isRunning = isRunning;
    generation.onChange(isRunning);
  };
  const later = (action, delay) => { timer = setTimeout(() => { if (generation.isRunning) action(); }, delay); };
  const next = () => ask({ continue: generation.number });
  const advance = () => {
    if (generation.pace === 0 || view.steps.value >= Number(view.steps.input.max)) return later(next, 0);
    view.steps.set(view.steps.value + 1);
    return later(advance, generation.pace);
  };
  const ask = createAsker(model, el, (response) => {
    if (response.started) {
      generation.number = response.started;
      view.setFrame(model.get("frame"));
      if (generation.isRunning) later(next, 0);
    } else if (response.token && response.number === generation.number) {
      const record = response.record;
      view.setFrame(appendToken(view.frame, response), generation.pace === 0 ? record.landscapes.length : 0);
      view.select(view.frame.tokens.length - 1);
      if (response.finished) setRunning(false);
      else if (generation.isRunning) later(advance, generation.pace);
    }
  });
  model.on("change:response", () => { if (model.get("response").error) setRunning(false); });
  generation.start = (prompt, settings) => {
    setRunning(true);
    ask({ prompt, settings });
  };
  generation.stop = () => {
    if (!generation.isRunning) return;
    setRunning(false);
    if (generation.number !== null) ask({ stop: generation.number });
  };
  return generation;
}

function appendToken(frame, response) {
  const [row] = frame.rows;
  const runs = { own: [...row.runs.own, response.record] };
  return { ...frame, tokens: [...frame.tokens, response.token], rows: [{ ...row, runs }] };
}

function promptControls(frame, generation) {
  const thinking = thinkingControls(frame, () => {});
  const generated = { ...frame.generation };
  const start = () => {
    if (!generation.isRunning) generation.start(prompt.value, { ...thinking.settings, ...generated });
  };
  const prompt = textBox("prompt", frame.prompt, start);
  const startButton = button("generate", start);
  const stopButton = button("stop", () => generation.stop(), { disabled: true });
  generation.onChange = (isRunning) => {
    startButton.disabled = isRunning;
    stopButton.disabled = !isRunning;
  };
  const number = (label, key, options) => slider(label, { ...options, value: generated[key] },
    (value) => { generated[key] = value; }).node;
  const pace = choice("show steps", PACES, String(generation.pace), (value) => { generation.pace = Number(value); });
  return element("div", { class: "ebt-settings" },
    element("div", { class: "ebt-row" }, prompt.node, startButton, stopButton, pace.node),
    element("div", { class: "ebt-row" },
      number("new tokens", "generation.max_new_tokens", { min: 1, max: frame.limits.newTokens }),
      number("temperature", "generation.temperature", { min: 0, max: 2, step: 0.05 }),
      number("seed", "run.seed", { min: 0, max: 99 })),
    thinking.node);
}

export default { render };
