"""JupyterLab as a person uses it, in a headless Chromium: Lab opens on `start_here`, which runs and is saved.

`lab` and `page` are for further tests of views: `open_notebook(page, lab, path)`, `run_all(page)`, `wait_idle(page)`.
A page that a test failed on is kept as a picture in the test's folder of pytest.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from browser import (
    CHROMIUM,
    LIMIT,
    NOTEBOOK,
    choose,
    clone_working_tree,
    error_outputs,
    git,
    open_browser,
    open_notebook,
    run_all,
    save,
    serve_lab,
    wait_idle,
)
from nbformat.v4 import new_code_cell, new_notebook
from test_dashboard import Visitor, make_run
from test_views import FIND_FAULTS

from ebt_nb.runs.metrics import MetricsFile

MISSING = [
    name
    for name, is_there in {
        "Chromium": CHROMIUM,
        "playwright (the extra browser)": importlib.util.find_spec("playwright"),
        "git": shutil.which("git"),
    }.items()
    if not is_there
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def lab(root, tmp_path_factory):
    "JupyterLab on a copy of the checkout, which is a git repository of its own."
    scratch = tmp_path_factory.mktemp("lab")
    checkout = clone_working_tree(root, scratch / "checkout")
    environment = os.environ | {"PYTHONPATH": str(checkout), "IN_TEST": "1", "OMP_NUM_THREADS": "2"}
    with serve_lab([str(Path(sys.prefix, "bin/ebt")), "lab"], checkout, scratch, environment) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with open_browser() as chromium:
        yield chromium


@pytest.fixture
def page(browser, request, tmp_path):
    "A new page; its picture is kept when the test fails."
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(1000 * LIMIT)
    failed_before = request.session.testsfailed
    yield page
    if request.session.testsfailed > failed_before:
        page.screenshot(path=tmp_path / "failed.png")
        print(f"the page when the test failed: {tmp_path}/failed.png")
    page.close()


def test_lab_opens_start_here(lab, page):
    open_notebook(page, lab)
    assert page.locator(".lm-TabBar-tab.lm-mod-current", has_text="start_here.ipynb").count() == 1
    assert page.locator(".jp-FileBrowser .jp-BreadCrumbs").text_content().replace(" ", "").endswith("/nbs/")
    assert page.locator(".jp-Dialog").count() == 0  # no kernel has to be chosen
    assert page.locator(".jp-toastContainer .jp-Notification-Toast, .Toastify__toast").count() == 0  # no news
    assert page.locator(f"{NOTEBOOK} .jp-CodeCell .cm-lineWrapping").count() > 0
    titles = page.locator(f"{NOTEBOOK} .jp-MarkdownCell h1, {NOTEBOOK} .jp-MarkdownCell h2").all_text_contents()
    assert [title.rstrip("¶") for title in titles][:3] == ["Start here", "The idea in three sentences", "A landscape"]
    assert "energy falls" in figure_description(page)
    explorer = page.locator(f"{NOTEBOOK} .ebt-view").first  # it has not run: its text alternative
    assert explorer.text_content().startswith("Energy of candidates")


def figure_description(page):
    "Return the text alternative of the first picture of an output."
    images = page.locator(f"{NOTEBOOK} .jp-OutputArea-output img")
    images.first.wait_for()
    return images.first.get_attribute("alt")


def test_start_here_runs_and_leaves_the_checkout_clean(lab, page):
    open_notebook(page, lab, "nbs/start_here.ipynb")
    run_all(page)
    assert "energy falls" in figure_description(page)
    trained, explored = page.locator(f"{NOTEBOOK} .ebt-view").all()[1:3]
    assert "finished" in trained.text_content() and "He" in explored.text_content()
    walk_in_landscape(page.locator(f"{NOTEBOOK} .ebt-view").first)  # of the shipped model
    walk_in_landscape(explored)  # of the model that has just been trained
    save(page)
    assert git(lab.root, "status", "--short") == ""
    page.locator(f'{NOTEBOOK} [data-command="notebook:insert-cell-below"]').first.click()
    choose(page, "Edit", "Delete Cell")
    save(page)  # Lab does not take the cleaned file for one that another program has changed
    assert git(lab.root, "status", "--short") == ""
    assert len(list((lab.root / "runs/first").iterdir())) == 1


def test_a_text_is_thought_and_a_prompt_is_continued(lab, page):
    sources = [
        "from ebt_nb.widgets.prompt import prompt_box\nfrom ebt_nb.widgets.thinking import watch_thinking",
        "watch_thinking(text='It was a truth universally acknowledged.')",
        "prompt_box()",
    ]
    book = new_notebook(cells=[new_code_cell(source) for source in sources])
    (lab.root / "runs").mkdir(exist_ok=True)  # git ignores it
    nbformat.write(book, lab.root / "runs/views.ipynb")
    open_notebook(page, lab, "runs/views.ipynb")
    run_all(page)
    player, box = page.locator(f"{NOTEBOOK} .ebt-view").all()
    choose_token(player)
    player.locator('input[aria-label="steps"]').press("End")
    page.locator(f'{NOTEBOOK} .ebt-view[data-busy="false"]').first.wait_for()
    write_prompt(box, "She was")
    wait_idle(page)
    assert error_outputs(page) == []


VIEWS = """
import io
from contextlib import redirect_stderr

from ebt_nb.config.overrides import build_config
from ebt_nb.training.build import build_module
from ebt_nb.widgets.images import explore_denoising, explore_drawing
from ebt_nb.widgets.landscape import explore_landscape
from ebt_nb.widgets.thinking import watch_thinking
from ebt_nb.widgets.video import explore_rollout

def tiny(preset, **overrides):
    shape = {"model.layers": 1, "model.width": 16, "model.heads": 2}
    return build_module(build_config(preset, shape | overrides))

no_encoders = {"encoder.images": "none", "data.image_size": 8, "model.patch": 4}
%%
explore_landscape(text="She was")
%%
watch_thinking(text="She was very")
%%
explore_denoising(tiny("image/quickstart"), images=2)
%%
explore_drawing(tiny("image/t2i_ebt_s1", **no_encoders))
%%
with redirect_stderr(io.StringIO()):  # the first time, frames are cached, which is said there
    rollout = explore_rollout(tiny("video/quickstart"), clips=2)
rollout
"""


def test_the_kernel_rests_when_the_controls_of_a_view_do(lab, page):
    "Sliders of all views are moved fast, by the keyboard; then every request is answered, and none is sent any more."
    sent = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(frame)))
    book = new_notebook(cells=[new_code_cell(source.strip()) for source in VIEWS.split("%%")])
    (lab.root / "runs").mkdir(exist_ok=True)
    nbformat.write(book, lab.root / "runs/all_views.ipynb")
    open_notebook(page, lab, "runs/all_views.ipynb")
    run_all(page)
    views = page.locator(f"{NOTEBOOK} .ebt-view").all()
    assert len(views) == 5
    assert page.evaluate(FIND_FAULTS)["faults"] == []
    for view in views:
        before, number = view.inner_text(), len(sent)
        for slider in view.locator('input[type="range"]:visible').all():
            for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
                slider.press(key)
        view.locator('xpath=self::*[@data-busy="false"]').wait_for()
        assert view.inner_text() != before and len(sent) > number
        assert not "".join(view.locator(".ebt-message").all_text_contents())
    wait_idle(page)
    number = len(sent)
    page.wait_for_timeout(1500)
    assert len(sent) == number and page.locator('.ebt-view[data-busy="true"]').count() == 0
    assert error_outputs(page) == []


def choose_token(view):
    "Click a token of a text and go through its steps; what is shown of it changes each time."
    tokens = view.get_by_role("option")
    before = view.inner_text()
    tokens.nth(3).click()
    assert tokens.nth(3).get_attribute("aria-selected") == "true" and view.inner_text() != before
    before = view.inner_text()
    view.locator('input[aria-label="step"]').press("Home")
    assert view.inner_text() != before


def write_prompt(view, prompt):
    "Type a prompt and let the model continue it, all at once."
    number = view.get_by_role("option").count()
    view.locator('select[aria-label="show steps"]').select_option(label="at once")
    view.locator('input[aria-label="new tokens"]').press("Home")
    view.locator('input[aria-label="prompt"]').fill(prompt)
    view.get_by_role("button", name="generate").click()
    view.locator("button:disabled", has_text="stop").wait_for(state="attached")
    assert view.get_by_role("option").count() != number
    assert not view.locator(".ebt-message").text_content()


def test_the_dashboard_draws_a_run_that_grows(tmp_path, page):
    run = make_run(tmp_path / "runs/growing", status="running")
    visitor = Visitor(tmp_path / "runs", allow_actions=False)
    try:
        page.goto(visitor.server.url)
        assert "token" not in page.url
        page.get_by_role("checkbox").first.check()
        page.locator(".ebt-chart").first.wait_for()
        before = page.locator("table").first.inner_text()
        MetricsFile(run.dir / "metrics.csv").append({"step": 20, "train/loss": 5.0})
        page.wait_for_function("text => document.querySelector('table').innerText != text", arg=before)
        assert "20 of 100" in page.locator("table").first.inner_text()
    finally:
        visitor.close()


def walk_in_landscape(view):
    "Move the slider of an explorer with the keyboard, then let a candidate descend from a point that is clicked."
    slider, panel = view.locator('input[aria-label="step"]'), view.locator("svg").first
    view.scroll_into_view_if_needed()
    slider.press("Home")
    start = panel.inner_html()
    slider.press("ArrowRight")
    assert panel.inner_html() != start
    assert "landscape 0" in panel.get_attribute("aria-label")
    candidates = view.locator('select[aria-label="candidate"] option')
    panel.click(position={"x": 120, "y": 120})
    candidates.filter(has_text="walk 1").wait_for(state="attached")
