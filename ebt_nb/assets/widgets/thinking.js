// The thinking player: a text predicted token by token, by one model or by two.

function render({ model, el }) {
  el.classList.add("ebt-view");
  el.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab leaves arrow keys to the tokens
  const frame = model.get("frame");
  const view = createTokenView(frame);
  const notes = element("div", { role: "status" });
  const drawNotes = () => notes.replaceChildren(...view.frame.rows.flatMap((row) => row.notes)
    .map((note) => element("p", { class: "ebt-note" }, note)));
  const onFrame = () => {
    view.setFrame(model.get("frame"));
    drawNotes();
  };
  const controls = model.get("has_kernel") ? liveControls(model, el, frame) : stepCounts(view, frame);
  el.prepend(controls, view.controls, view.strips, notes, view.panels);
  drawNotes();
  model.on("change:frame", onFrame);
  return () => {
    view.play.stop();
    model.off("change:frame", onFrame);
  };
}

// Text, second model and settings of thinking: each change is a request.
function liveControls(model, el, frame) {
  const ask = createAsker(model, el, () => {});
  const send = () => ask({ text: text.value, other: other.value.trim(), settings: { ...thinking.settings } });
  const text = textBox("text", frame.text, send);
  const list = element("datalist", { id: `models-${Math.random().toString(36).slice(2)}` },
    ...frame.addresses.map((address) => element("option", { value: address })));
  const other = textBox("compare with", frame.other, send);
  other.input.setAttribute("list", list.id);
  other.input.setAttribute("placeholder", "address of a second model");
  const thinking = thinkingControls(frame, send);
  return element("div", { class: "ebt-settings" },
    element("div", { class: "ebt-row" }, text.node, other.node, list, button("think", send)), thinking.node);
}

// Without a kernel: the numbers of steps that were computed beforehand.
function stepCounts(view, frame) {
  const runs = Object.keys(frame.rows[0].runs);
  const names = runs.map((run) => [run, run === "own" ? `${numSteps(frame.rows, run)} (as trained)` : run]);
  const node = element("div", { class: "ebt-row" });
  if (runs.length > 1) node.append(choice("number of steps", names, "own", view.setRun).node);
  node.append(element("span", { class: "ebt-note" },
    "Another text, step size, noise or more samples need a kernel: call watch_thinking() in JupyterLab."));
  return node;
}

export default { render };
