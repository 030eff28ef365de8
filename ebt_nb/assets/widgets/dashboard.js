// All runs below a folder: a table, the curves of chosen runs, sweeps, and buttons that stop and resume.
// The page asks every two seconds while it is seen, and never while it is hidden.

const POLL_MS = 2000;

const STATE_MARKS = { running: "▶", done: "✓", failed: "✗", killed: "✗", interrupted: "❚❚", queued: "…" };

function formatAge(seconds) {
  if (!(seconds >= 0)) return "–";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

function formatLoss(value) {
  return value === null || value === undefined ? "–" : value.toFixed(4);
}

// What distinguishes a line beyond the seventh: its colour returns, dashed.
function lineStyle(number) {
  return { color: COLORS[number % COLORS.length], dashed: number >= COLORS.length };
}

function render({ model, el }) {
  el.classList.add("ebt-view", "ebt-dashboard");
  const frame = model.get("frame");
  const hasKernel = model.get("has_kernel");
  const state = {
    table: frame.table, digest: frame.digest, shown: frame, now: frame.now, chosen: new Set(frame.chosen),
    metric: frame.metric, sweep: "", filter: "", action: null,
  };
  const summary = element("p", { class: "ebt-note", "aria-live": "off" }, model.get("description"));
  const parts = {
    runs: runsPart(), chart: chartPart(), differences: element("div"), sweeps: sweepsPart(), problems: element("div"),
    dialog: element("div", { role: "alertdialog", "aria-label": "Confirm", class: "ebt-confirm", hidden: true }),
    done: element("p", { class: "ebt-note", role: "status" }), report: element("div"),
  };
  el.replaceChildren(element("h4", {}, "Runs"), summary, parts.runs.controls, parts.runs.node, parts.dialog, parts.done,
    parts.chart.node, parts.differences, parts.sweeps.node, parts.problems, parts.report);
  const ask = createAsker(model, el, takeAnswer);

  function request(more = {}) {
    ask({
      kind: "refresh", digest: state.digest, chosen: [...state.chosen], metric: state.metric, sweep: state.sweep, ...more,
    });
  }

  // An action waits until nothing else is asked: of requests that wait only the newest is sent.
  function act(more) {
    if (el.dataset.busy === "true") setTimeout(() => act(more), 50);
    else request(more);
  }

  function takeAnswer(answer) {
    state.now = answer.now;
    if (answer.table) {
      state.table = answer.table;
      state.digest = answer.digest;
      summary.textContent = answer.description;
    }
    if (answer.done) parts.done.textContent = answer.done;
    if (answer.report) return showReport(answer);
    state.shown = { ...state.shown, ...answer };
    state.metric = answer.metric ?? state.metric;
    draw();
    if (state.table.unread) request();
    return undefined;
  }

  function draw() {
    drawRuns();
    drawChart();
    drawDifferences();
    drawSweeps();
    drawProblems();
  }

  // ---- the table ----

  function runsPart() {
    const filter = element("input", { type: "search", class: "ebt-text", "aria-label": "Show runs whose name holds" });
    filter.addEventListener("input", () => { state.filter = filter.value; drawRuns(); });
    filter.addEventListener("keydown", (event) => event.stopPropagation());
    const none = button("choose none", () => { state.chosen.clear(); draw(); request(); }, { disabled: !hasKernel });
    const count = element("span", { class: "ebt-note" });
    const label = element("label", { class: "ebt-control" }, element("span", {}, "filter"), filter);
    const body = element("tbody");
    const titles = ["", "run", "status", "model", "step", "train loss", "val loss", "lowest", "speed", "started",
      "last change", ""];
    const head = element("thead", {}, element("tr", {}, ...titles.map((title, i) => element("th", { scope: "col" },
      title || element("span", { class: "ebt-hidden" }, i ? "actions" : "draw")))));
    const table = element("table", { "aria-label": "Runs, the newest first" }, head, body);
    return {
      controls: element("div", { class: "ebt-row" }, label, none, count), body, count,
      node: element("div", { class: "ebt-scroll", tabindex: 0, role: "region", "aria-label": "Table of runs" }, table),
    };
  }

  function visibleRuns() {
    const words = state.filter.toLowerCase().split(/\s+/);
    const text = (row) => `${row.run} ${row.name} ${row.model} ${row.status}`.toLowerCase();
    return state.table.runs.filter((row) => words.every((word) => text(row).includes(word)));
  }

  // Rows are kept from one drawing to the next, so that focus stays where it was.
  const rows = new Map();

  function drawRuns() {
    const visible = visibleRuns();
    const kept = new Set();
    visible.forEach((row, place) => {
      kept.add(row.run);
      if (!rows.has(row.run)) rows.set(row.run, newRow(row.run));
      const entry = rows.get(row.run);
      fillRow(entry, row);
      const present = parts.runs.body.children[place];
      if (present !== entry.node) parts.runs.body.insertBefore(entry.node, present || null);
    });
    for (const [run, entry] of rows) {
      if (kept.has(run)) continue;
      entry.node.remove();
      rows.delete(run);
    }
    const unread = state.table.unread ? `, ${state.table.unread} still to be read` : "";
    parts.runs.count.textContent = `${visible.length} of ${state.table.runs.length} runs${unread}`;
  }

  function newRow(run) {
    const box = element("input", { type: "checkbox", "aria-label": `draw ${run}`, disabled: !hasKernel });
    box.addEventListener("change", () => {
      if (box.checked) state.chosen.add(run);
      else state.chosen.delete(run);
      request();
    });
    const cells = Array.from({ length: 9 }, () => element("td"));
    const name = element("th", { scope: "row" }, run);
    const actions = element("td", { class: "ebt-actions" });
    const node = element("tr", {}, element("td", {}, box), name, ...cells, actions);
    return { node, box, cells, actions, shown: "" };
  }

  function fillRow(entry, row) {
    const steps = row.max_steps ? `${row.step ?? 0} of ${row.max_steps}` : String(row.step ?? "–");
    const speed = row.speed === null ? "–" : `${Math.round(row.speed).toLocaleString("en")} ${row.unit}/s`;
    const texts = [
      `${STATE_MARKS[row.status] || ""} ${row.status}${row.job ? ` (job ${row.job})` : ""}`, row.model, steps,
      formatLoss(row.train_loss), formatLoss(row.val_loss), formatLoss(row.lowest_val_loss), speed,
      `${formatAge(state.now - Date.parse(row.started) / 1000)} ago`, `${formatAge(state.now - row.changed)} ago`,
    ];
    texts.forEach((text, i) => { if (entry.cells[i].textContent !== text) entry.cells[i].textContent = text; });
    entry.cells[0].title = row.error || "";
    entry.cells[0].className = `ebt-state-${row.status}`;
    entry.box.checked = state.chosen.has(row.run);
    const shown = `${row.action} ${row.report}`;
    if (entry.shown === shown) return;
    entry.shown = shown;
    entry.actions.replaceChildren(...actionButtons(row));
  }

  function actionButtons(row) {
    const found = [];
    if (row.report && frame.report_url) {
      found.push(element("a", { href: frame.report_url + encodeURIComponent(row.report), target: "_blank",
        rel: "noopener", "aria-label": `open the report of ${row.run}` }, "report"));
    } else if (row.report && hasKernel) {
      found.push(button("report", () => act({ kind: "report", report: row.report }),
        { "aria-label": `show the report of ${row.run}` }));
    }
    if (row.action && frame.allow_actions && hasKernel) {
      found.push(button(row.action, (event) => confirmAction(row, event.target),
        { "aria-label": `${row.action} ${row.run}` }));
    }
    return found;
  }

  // ---- stop and resume: asked twice ----

  function confirmAction(row, origin) {
    const texts = {
      stop: ["It saves a checkpoint after the current update, and can be resumed.", "yes, stop it", "keep it running"],
      resume: ["`ebt resume` is started on this machine, and goes on without this page.", "yes, resume it", "leave it"],
    };
    const [note, yes, no] = texts[row.action];
    const close = () => { parts.dialog.hidden = true; if (origin.isConnected) origin.focus(); };
    const confirmed = () => {
      close();
      parts.done.textContent = "";
      act({ action: row.action, run: row.run });
    };
    const refuse = button(no, close);
    parts.dialog.replaceChildren(element("p", {}, element("strong", {}, `Really ${row.action} ${row.run}? `), note),
      element("div", { class: "ebt-row" }, button(yes, confirmed), refuse));
    parts.dialog.onkeydown = (event) => {
      event.stopPropagation();
      if (event.key === "Escape") close();
    };
    parts.dialog.hidden = false;
    refuse.focus();
  }

  // ---- curves ----

  function chartPart() {
    const select = choice("metric", [], "", (metric) => { state.metric = metric; request(); });
    select.select.disabled = !hasKernel;
    const log = element("input", { type: "checkbox", onchange: () => drawChart() });
    const place = element("div");
    const label = element("label", { class: "ebt-control" }, log, element("span", {}, "logarithmic"));
    return { node: element("section", { "aria-label": "Curves" }, element("div", { class: "ebt-row" }, select.node, label),
      place), select: select.select, place, log };
  }

  function drawChart() {
    const { select, place, log } = parts.chart;
    const metrics = state.shown.metrics || [];
    if (metrics.join() !== [...select.options].map((option) => option.value).join()) {
      select.replaceChildren(...metrics.map((name) => element("option", { value: name }, name)));
    }
    select.value = state.metric;
    const chosen = state.shown.chosen || [];
    const curves = new Map((state.shown.curves || []).map((curve) => [curve.run, curve.points]));
    const scale = ([x, y]) => (log.checked ? [x, y > 0 ? Math.log10(y) : null] : [x, y]);
    const series = chosen.map((run, number) => ({
      name: run, points: (curves.get(run) || []).map(scale), marked: (curves.get(run) || []).length < 30,
      ...lineStyle(number),
    })).filter((one) => one.points.length);
    if (!series.length) {
      const text = chosen.length ? "Nothing measured yet." : "Choose runs in the table to draw their curves.";
      place.replaceChildren(element("p", { class: "ebt-note" }, text));
      return;
    }
    const yLabel = log.checked ? "log10" : "";
    const title = series.length === 1 ? `${state.metric} of ${series[0].name}` : `${state.metric} of ${series.length} runs`;
    place.replaceChildren(lineChart(series, { width: 760, height: 300, title, xLabel: "step", yLabel }), legend(series));
  }

  function drawDifferences() {
    const rows = state.shown.differences || [];
    const chosen = state.shown.chosen || [];
    if (chosen.length < 2) return parts.differences.replaceChildren();
    const caption = rows.length ? "Configuration: what differs" : "Configuration: no key differs";
    const numbers = chosen.map((run, i) => element("th", { scope: "col", title: run }, `${i + 1}: ${run}`));
    const lines = rows.map((row) => element("tr", {}, element("th", { scope: "row" }, row.key),
      ...row.values.map((value) => element("td", {}, value))));
    const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "key"), ...numbers));
    return parts.differences.replaceChildren(element("div", { class: "ebt-scroll", tabindex: 0, role: "region",
      "aria-label": caption }, element("table", {}, element("caption", {}, caption), head, element("tbody", {}, ...lines))));
  }

  // ---- sweeps ----

  function sweepsPart() {
    const select = choice("sweep", [], "", (sweep) => { state.sweep = sweep; request(); });
    select.select.disabled = !hasKernel;
    const place = element("div");
    return { node: element("section", { "aria-label": "Sweeps", hidden: true }, select.node, place),
      select: select.select, place };
  }

  function drawSweeps() {
    const { node, select, place } = parts.sweeps;
    const sweeps = ["", ...state.table.sweeps];
    node.hidden = sweeps.length === 1;
    if (sweeps.join() !== [...select.options].map((option) => option.value).join()) {
      select.replaceChildren(...sweeps.map((name) => element("option", { value: name }, name || "none")));
    }
    select.value = state.sweep;
    const sweep = state.shown.sweep;
    if (!sweep || sweep.sweep !== state.sweep) return place.replaceChildren();
    if (sweep.problem) return place.replaceChildren(element("p", { class: "ebt-message" }, sweep.problem));
    const best = sweep.trials.find((trial) => trial.number === sweep.best);
    const text = best ? `best so far: trial ${best.number}, ${sweep.metric} ${formatNumber(best.value, 5)} with ${
      best.settings}` : "no trial has ended yet";
    const titles = ["trial", "state", sweep.metric, "validations", "run", "parameters"];
    const head = element("thead", {}, element("tr", {}, ...titles.map((one) => element("th", { scope: "col" }, one))));
    const lines = sweep.trials.map((trial) => element("tr", { class: trial === best ? "ebt-best" : null },
      ...[trial.number, trial.state, formatLoss(trial.value), trial.validations, trial.run || "–",
        trial.settings + (trial.error ? ` (${trial.error})` : "")].map((cell) => element("td", {}, String(cell)))));
    return place.replaceChildren(element("p", {}, text), element("div", { class: "ebt-scroll", tabindex: 0, role: "region",
      "aria-label": "Trials" }, element("table", {}, element("caption", {}, `${sweep.trials.length} trials, ${sweep.goal}`),
      head, element("tbody", {}, ...lines))));
  }

  // ---- what cannot be read, and reports ----

  function drawProblems() {
    const { problems } = state.table;
    if (!problems.length) return parts.problems.replaceChildren();
    const list = element("ul", {}, ...problems.map((problem) => element("li", {}, problem)));
    const isOpen = parts.problems.querySelector("details")?.open;
    return parts.problems.replaceChildren(element("details", { open: isOpen }, element("summary", {},
      `${problems.length} ${problems.length === 1 ? "run" : "runs"} cannot be read`), list));
  }

  // In a frame without rights: what a report holds can reach neither this page nor the kernel.
  function showReport(answer) {
    const page = element("iframe", { sandbox: "allow-scripts", title: `report of ${answer.name}`, class: "ebt-report" });
    page.srcdoc = answer.report;
    const close = button("close the report", () => parts.report.replaceChildren());
    parts.report.replaceChildren(element("div", { class: "ebt-row" }, element("strong", {}, answer.name), close), page);
    close.focus();
  }

  draw();
  if (!hasKernel) return undefined;
  let inView = true;
  const observer = new IntersectionObserver((entries) => { inView = entries[entries.length - 1].isIntersecting; });
  observer.observe(el);
  const timer = setInterval(() => {
    if (inView && document.visibilityState === "visible" && el.isConnected && el.dataset.busy !== "true") request();
  }, POLL_MS);
  request();
  return () => { clearInterval(timer); observer.disconnect(); };
}

export default { render };
