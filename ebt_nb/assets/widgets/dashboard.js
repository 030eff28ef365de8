// All runs below a folder: a table, the curves of chosen runs, sweeps, and buttons that stop and resume.
// The page asks every two seconds while it is seen, and never while it is hidden.
// Every part of the page has a function that makes it once (newRuns, ...) and one that fills it (drawRuns, ...); they
// share `board`: the model's frame, what is shown, what is chosen, the parts, and the functions that ask.

const POLL_MS = 2000;
const STATE_MARKS = { running: "▶", done: "✓", failed: "✗", killed: "✗", interrupted: "❚❚", queued: "…" };
const TITLES = ["draw", "run", "status", "actions", "step", "train loss", "val loss", "lowest", "speed", "last change",
  "started", "model"];

function formatAge(seconds) {
  if (!(seconds >= 0)) return "–";
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

function formatLoss(value) {
  return value === null || value === undefined ? "–" : value.toFixed(4);
}

function shorten(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Replaces the options of a list if they are others; returns whether they are.
function setOptions(select, names, textOfNone = "none") {
  if (names.join("\n") === [...select.options].map((option) => option.value).join("\n")) return;
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name || textOfNone)));
}

// A table with a caption, in a region that scrolls and can be reached by keyboard.
function dataTable(caption, titles, body) {
  const head = element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title)));
  const table = element("table", {}, element("caption", {}, caption), element("thead", {}, head), body);
  return element("div", { class: "ebt-scroll", tabindex: 0, role: "region", "aria-label": caption }, table);
}

// ---- the table of runs ----

function newRuns(board) {
  const filter = element("input", { type: "search", class: "ebt-text", "aria-label": "Show runs whose row holds" });
  filter.addEventListener("input", () => { board.filter = filter.value; drawRuns(board); });
  filter.addEventListener("keydown", (event) => event.stopPropagation()); // JupyterLab would take letters as commands
  const none = button("choose none", () => { board.chosen.clear(); board.request(); }, { disabled: !board.hasKernel });
  const count = element("span", { class: "ebt-note" });
  const label = element("label", { class: "ebt-control" }, element("span", {}, "filter"), filter);
  const body = element("tbody");
  const node = element("div", {}, element("div", { class: "ebt-row" }, label, none, count),
    dataTable("Runs, the newest first", TITLES, body));
  return { node, body, count, rows: new Map() };
}

// Rows are kept from one drawing to the next, so that focus stays where it was.
function drawRuns(board) {
  const { body, count, rows } = board.parts.runs;
  const words = board.filter.toLowerCase().split(/\s+/);
  const isWanted = (row) => {
    const text = `${row.run} ${row.name} ${row.model} ${row.status}`.toLowerCase();
    return words.every((word) => text.includes(word));
  };
  const visible = board.table.runs.filter(isWanted);
  visible.forEach((row, place) => {
    if (!rows.has(row.run)) rows.set(row.run, newRow(board, row.run));
    const entry = rows.get(row.run);
    fillRow(board, entry, row);
    if (body.children[place] !== entry.node) body.insertBefore(entry.node, body.children[place] || null);
  });
  const kept = new Set(visible.map((row) => row.run));
  for (const [run, entry] of rows) {
    if (kept.has(run)) continue;
    entry.node.remove();
    rows.delete(run);
  }
  const unread = board.table.unread ? `, ${board.table.unread} still to be read` : "";
  setText(count, `${visible.length} of ${board.table.runs.length} runs${unread}`);
}

function newRow(board, run) {
  const box = element("input", { type: "checkbox", "aria-label": `draw ${run}`, disabled: !board.hasKernel });
  box.addEventListener("change", () => {
    if (box.checked) board.chosen.add(run);
    else board.chosen.delete(run);
    board.request();
  });
  const line = element("span");
  const cells = Array.from({ length: 9 }, () => element("td"));
  const actions = element("div", { class: "ebt-actions" });
  const draw = element("td", {}, element("span", { class: "ebt-draw" }, box, line));
  const [status, ...others] = cells;
  const name = element("th", { scope: "row" }, run);
  const node = element("tr", {}, draw, name, status, element("td", {}, actions), ...others);
  return { node, box, line, cells, actions, shown: "" };
}

function fillRow(board, entry, row) {
  const isResuming = (board.shown.resuming || []).includes(row.run);
  const state = isResuming ? "… resuming" : `${STATE_MARKS[row.status] || ""} ${row.status}`;
  const reason = row.error && !isResuming ? `: ${shorten(row.error, 48)}` : "";
  const speed = row.speed === null ? "–" : `${Math.round(row.speed).toLocaleString("en")} ${row.unit}/s`;
  const texts = [
    `${state}${row.job ? ` (job ${row.job})` : ""}${reason}`,
    `${row.step ?? 0} of ${row.max_steps}`,
    formatLoss(row.train_loss),
    formatLoss(row.val_loss),
    formatLoss(row.lowest_val_loss),
    speed,
    formatAge(board.now - row.changed),
    formatAge(board.now - Date.parse(row.started) / 1000),
    row.model,
  ];
  texts.forEach((text, i) => setText(entry.cells[i], text));
  entry.cells[0].title = row.error || "";
  entry.cells[0].className = `ebt-state-${row.status}`;
  entry.box.checked = board.chosen.has(row.run);
  const number = (board.shown.chosen || []).indexOf(row.run);
  entry.line.replaceChildren(...(number < 0 ? [] : [lineSample(lineStyle(number))]));
  const action = isResuming ? null : row.action;
  const shown = `${action} ${row.report}`;
  if (entry.shown === shown) return;
  entry.shown = shown;
  entry.actions.replaceChildren(...actionButtons(board, { ...row, action }));
}

function actionButtons(board, row) {
  const found = [];
  if (row.report && board.frame.report_url) {
    const href = board.frame.report_url + encodeURIComponent(row.report);
    const label = `open the report of ${row.run}`;
    found.push(element("a", { href, target: "_blank", rel: "noopener", "aria-label": label }, "report"));
  } else if (row.report && board.hasKernel) {
    const show = () => board.act({ kind: "report", report: row.report });
    found.push(button("report", show, { "aria-label": `show the report of ${row.run}` }));
  }
  if (row.action && board.frame.allow_actions && board.hasKernel) {
    const confirm = (event) => confirmAction(board, row, event.target);
    found.push(button(row.action, confirm, { "aria-label": `${row.action} ${row.run}` }));
  }
  return found;
}

// ---- stop and resume: asked a second time ----

const QUESTIONS = {
  stop: ["It saves a checkpoint after the current update, and can be resumed.", "yes, stop it", "keep it running"],
  resume: ["`ebt resume` is started on this machine, and goes on without this page.", "yes, resume it", "leave it"],
};

function confirmAction(board, row, origin) {
  const { dialog, done } = board.parts;
  const [note, yes, no] = QUESTIONS[row.action];
  const close = () => {
    dialog.hidden = true;
    if (origin.isConnected) origin.focus();
  };
  const confirmed = () => {
    close();
    done.textContent = "";
    board.act({ action: row.action, run: row.run });
  };
  const refuse = button(no, close);
  const question = element("p", {}, element("strong", {}, `Really ${row.action} ${row.run}? `), note);
  dialog.replaceChildren(question, element("div", { class: "ebt-row" }, button(yes, confirmed), refuse));
  dialog.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Escape") close();
  };
  dialog.hidden = false;
  refuse.focus();
}

// ---- curves and differences of the chosen runs ----

function newChart(board) {
  const { node: metric, select } = choice("metric", [], "", (name) => { board.metric = name; board.request(); });
  const log = element("input", { type: "checkbox", onchange: () => drawChart(board) });
  const label = element("label", { class: "ebt-control" }, log, element("span", {}, "logarithmic"));
  const place = element("div");
  const row = element("div", { class: "ebt-row" }, metric, label);
  const node = element("section", { "aria-label": "Curves" }, row, place);
  return { node, select, place, log };
}

function drawChart(board) {
  const { select, place, log } = board.parts.chart;
  const { chosen = [], metrics = [], curves = [] } = board.shown;
  setOptions(select, metrics);
  select.value = board.metric;
  select.disabled = !board.hasKernel || !metrics.length;
  const pointsOf = new Map(curves.map((curve) => [curve.run, curve.points]));
  const series = [];
  chosen.forEach((run, number) => {
    const measured = pointsOf.get(run) || [];
    const points = log.checked ? measured.map(([x, y]) => [x, y > 0 ? Math.log10(y) : null]) : measured;
    if (!points.length) return;
    series.push({ name: `${number + 1}: ${run}`, points, marked: points.length < 30, ...lineStyle(number) });
  });
  if (!series.length) {
    const text = chosen.length ? "Nothing measured yet." : "Choose runs in the table to draw their curves.";
    place.replaceChildren(element("p", { class: "ebt-note" }, text));
    return;
  }
  const what = log.checked ? `log10 of ${board.metric}` : board.metric;
  const title = `${what}, ${series.length === 1 ? series[0].name : `${series.length} runs`}`;
  const chart = lineChart(series, { width: 760, height: 300, title, xLabel: "step" });
  place.replaceChildren(element("div", { class: "ebt-columns" }, chart, legend(series)));
}

function drawDifferences(board) {
  const { chosen = [], differences = [] } = board.shown;
  const place = board.parts.differences;
  const key = JSON.stringify([chosen, differences]);
  if (place.dataset.shown === key) return;
  place.dataset.shown = key;
  if (chosen.length < 2) {
    place.replaceChildren();
    return;
  }
  const caption = differences.length ? "Configuration: what differs" : "Configuration: no key differs";
  const lines = differences.map((row) => element("tr", {}, element("th", { scope: "row" }, row.key),
    ...row.values.map((value) => element("td", {}, value))));
  const titles = ["key", ...chosen.map((run, number) => `${number + 1}: ${run}`)];
  place.replaceChildren(dataTable(caption, titles, element("tbody", {}, ...lines)));
}

// ---- sweeps ----

function newSweeps(board) {
  const { node: list, select } = choice("sweep", [], "", (sweep) => { board.sweep = sweep; board.request(); });
  select.disabled = !board.hasKernel;
  const place = element("div");
  return { node: element("section", { "aria-label": "Sweeps", hidden: true }, list, place), select, place };
}

function drawSweeps(board) {
  const { node, select, place } = board.parts.sweeps;
  const { sweeps } = board.table;
  node.hidden = !sweeps.length;
  setOptions(select, ["", ...sweeps]);
  select.value = board.sweep;
  const sweep = board.shown.sweep;
  const key = JSON.stringify(sweep || null);
  if (place.dataset.shown === key) return;
  place.dataset.shown = key;
  if (!sweep || sweep.problem) {
    place.replaceChildren(element("p", { class: "ebt-message" }, sweep ? sweep.problem : ""));
    return;
  }
  const best = sweep.trials.find((trial) => trial.number === sweep.best);
  const value = best && formatNumber(best.value, 5);
  const text = best ? `Best so far: trial ${best.number}, ${sweep.metric} ${value} with ${best.settings}.`
    : "No trial has ended yet.";
  const lines = sweep.trials.map((trial) => {
    const settings = trial.settings + (trial.error ? ` (${trial.error})` : "");
    const number = `${trial.number}${trial === best ? " (best)" : ""}`;
    const cells = [number, trial.state, formatLoss(trial.value), trial.validations, trial.run || "–", settings];
    return element("tr", { class: trial === best ? "ebt-best" : null },
      ...cells.map((cell) => element("td", {}, String(cell))));
  });
  const titles = ["trial", "state", sweep.metric, "validations", "run", "parameters"];
  const table = dataTable(`${sweep.trials.length} trials, ${sweep.goal}`, titles, element("tbody", {}, ...lines));
  place.replaceChildren(element("p", {}, text), table);
}

// ---- what cannot be read, and reports ----

function drawProblems(board) {
  const { problems } = board.table;
  const place = board.parts.problems;
  const key = problems.join("\n");
  if (place.dataset.shown === key) return;
  place.dataset.shown = key;
  const title = `${problems.length} ${problems.length === 1 ? "run" : "runs"} cannot be read`;
  const list = element("ul", {}, ...problems.map((problem) => element("li", {}, problem)));
  const open = place.querySelector("details")?.open;
  const details = element("details", { open }, element("summary", {}, title), list);
  place.replaceChildren(...(problems.length ? [details] : []));
}

// In a frame without rights: what a report holds can reach neither this page nor the kernel.
function showReport(board, answer) {
  const place = board.parts.report;
  const title = `report of ${answer.name}`;
  const page = element("iframe", { sandbox: "allow-scripts", title, class: "ebt-report" });
  page.srcdoc = answer.report;
  const close = button("close the report", () => place.replaceChildren());
  place.replaceChildren(element("div", { class: "ebt-row" }, element("strong", {}, answer.name), close), page);
  close.focus();
}

// ---- the whole ----

function newParts(board) {
  return {
    summary: element("p", { class: "ebt-note" }),
    runs: newRuns(board),
    dialog: element("div", { role: "alertdialog", "aria-label": "Confirm", class: "ebt-confirm", hidden: true }),
    done: element("p", { class: "ebt-note", role: "status" }),
    chart: newChart(board),
    differences: element("div"),
    sweeps: newSweeps(board),
    problems: element("div"),
    report: element("div"),
  };
}

function drawAll(board) {
  drawRuns(board);
  drawChart(board);
  drawDifferences(board);
  drawSweeps(board);
  drawProblems(board);
}

function takeAnswer(board, answer) {
  board.now = answer.now;
  if (answer.done) board.parts.done.textContent = answer.done;
  if (answer.report !== undefined) {
    showReport(board, answer);
    return;
  }
  if (answer.table) {
    board.table = answer.table;
    board.digest = answer.digest;
    setText(board.parts.summary, answer.description);
  }
  board.shown = answer;
  board.metric = answer.metric;
  drawAll(board);
  if (board.table.unread) board.request();
}

// Asks every two seconds while the element is in view; returns a function that ends it.
function startPolling(board, el) {
  let isInView = true;
  const observer = new IntersectionObserver((entries) => { isInView = entries[entries.length - 1].isIntersecting; });
  observer.observe(el);
  const timer = setInterval(() => {
    const isSeen = isInView && document.visibilityState === "visible";
    if (isSeen && el.isConnected && el.dataset.busy !== "true") board.request();
  }, POLL_MS);
  return () => {
    clearInterval(timer);
    observer.disconnect();
  };
}

function render({ model, el }) {
  el.classList.add("ebt-view", "ebt-dashboard");
  const frame = model.get("frame");
  const board = {
    frame, hasKernel: model.get("has_kernel"), table: frame.table, digest: frame.digest, shown: frame, now: frame.now,
    chosen: new Set(frame.chosen), metric: frame.metric, sweep: "", filter: "",
  };
  board.parts = newParts(board);
  const { summary, runs, dialog, done, chart, differences, sweeps, problems, report } = board.parts;
  summary.textContent = model.get("description");
  el.replaceChildren(element("h4", {}, "Runs"), summary, runs.node, dialog, done, chart.node, differences, sweeps.node,
    problems, report);
  const ask = createAsker(model, el, (answer) => takeAnswer(board, answer));
  board.request = (more = {}) => {
    const { digest, metric, sweep } = board;
    ask({ kind: "refresh", digest, metric, sweep, chosen: [...board.chosen], ...more });
  };
  // An action waits until nothing else is asked: of requests that wait only the newest is sent.
  board.act = (more) => {
    if (el.dataset.busy === "true") setTimeout(() => board.act(more), 50);
    else board.request(more);
  };
  drawAll(board);
  if (!board.hasKernel) return undefined;
  board.request();
  return startPolling(board, el);
}

export default { render };
