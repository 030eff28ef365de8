"""Views without a kernel: every one has a text alternative, and its controls have names and take the keyboard.

What is kept in notebooks is opened in a headless Chromium. Views with a kernel are tested in tests/test_browser.py.
"""

import importlib.util
import json
import pkgutil
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, open_browser

import ebt_nb.widgets
from ebt_nb.widgets.view import View

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
OPENING = re.compile(r'<div class="ebt-view" data-view="\w+"><p>(.*?)</p></div>', re.DOTALL)


def kept_pages():
    "Return the pages of views that notebooks keep as outputs, by notebook and number."
    pages = {}
    for path in sorted(NOTEBOOKS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                html = "".join(output.get("data", {}).get("text/html", ""))
                if OPENING.search(html):
                    pages[f"{path.relative_to(NOTEBOOKS).as_posix()} {len(pages)}"] = html
    return pages


def subclasses(base):
    "Yield the classes below a class, however deep."
    for child in base.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_view_says_in_words_what_it_shows():
    for module in pkgutil.iter_modules(ebt_nb.widgets.__path__):
        importlib.import_module(f"ebt_nb.widgets.{module.name}")
    views = [view for view in subclasses(View) if view.__module__.startswith("ebt_nb.")]
    silent = [view.__name__ for view in views if view.describe is View.describe]
    assert len(views) >= 8 and not silent
    pages = kept_pages()
    assert len(pages) >= 8
    assert not [name for name, html in pages.items() if len(OPENING.search(html)[1].strip()) < 15]


@pytest.mark.skipif(not CHROMIUM or not importlib.util.find_spec("playwright"), reason="no Chromium or no playwright")
def test_controls_of_kept_pages_have_names_and_take_the_keyboard(tmp_path):
    names = {}
    with open_browser() as browser:
        page = browser.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        for name, html in kept_pages().items():
            (tmp_path / "page.html").write_text(f"<meta charset='utf-8'>{html}", encoding="utf-8")
            page.goto((tmp_path / "page.html").as_uri())
            names[name] = page.evaluate(FIND_FAULTS)
            assert names[name]["controls"] and page.locator(".ebt-view > *").count() > 1, name
    assert faults == []
    assert not {name: found["faults"] for name, found in names.items() if found["faults"]}


# Controls without a name or that Tab does not reach, and pictures without a text alternative.
FIND_FAULTS = """() => {
  const faults = [];
  const controls = [...document.querySelectorAll(".ebt-view :is(input, select, button, [tabindex])")];
  for (const node of controls) {
    const labels = [...(node.labels || [])].map((label) => label.textContent).join("");
    const name = node.getAttribute("aria-label") || labels || node.textContent;
    const isReached = node.disabled || node.tabIndex >= 0 || node.getAttribute("role") === "option";
    if (!name.trim() || !isReached) faults.push(node.outerHTML.slice(0, 120));
  }
  for (const node of document.querySelectorAll(".ebt-view :is(img, canvas, svg)")) {
    const isPart = node.closest("button, [aria-hidden=true]") || node.parentElement.closest("[role=img]");
    const text = node.getAttribute("aria-label") || node.getAttribute("alt");
    if (!text && !isPart) faults.push(node.outerHTML.slice(0, 120));
  }
  return { controls: controls.length, faults };
}"""
