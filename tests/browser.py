"""JupyterLab in a real browser, as a person uses it: what the tests in a browser share.

`serve_lab` starts `ebt lab`, `open_browser` a headless Chromium. A page opens a notebook (`open_notebook`), runs it
(`run_all`) and saves it (`save`).
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LIMIT = 120  # seconds that a page may take for anything: another process may have the cores
NOTEBOOK = ".jp-NotebookPanel:not(.lm-mod-hidden)"


def clone_working_tree(root: Path, target: Path) -> Path:
    "Copy a checkout as it is now, with what is not committed yet, into a git repository of its own; return its path."
    names = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate").split("\0")
    for name in filter(None, names):
        if (root / name).is_file() and not name.startswith("tests/fixtures/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)
    git(target, "init", "--quiet")
    git(target, "-c", "core.compression=0", "add", ".")
    git(target, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "--quiet", "--message", "all")
    return target


def git(folder: Path, *words: str) -> str:
    "Run git in a folder and return what it prints."
    return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab.

    Attributes:
        url: its address.
        token: what a page has to know to open it.
        root: the folder that it serves.
    """

    url: str
    token: str
    root: Path


@contextmanager
def serve_lab(command: list[str], root: Path, scratch: Path, environment: dict[str, str]) -> Iterator[Lab]:
    "Run `ebt lab`, the command, until the block ends; nothing of the user's Jupyter is read or written."
    names = {"CONFIG": "config", "DATA": "data", "RUNTIME": "runtime"}
    folders = {f"JUPYTER_{name}_DIR": str(scratch / folder) for name, folder in names.items()}
    options = ["--no-browser", "--ip", "127.0.0.1", "--port", "0", "--IdentityProvider.token=secret"]
    options += ["--allow-root"] * (os.geteuid() == 0)
    output = scratch / "lab.log"
    with (
        output.open("w") as log,
        subprocess.Popen(
            [*command, *options],
            env=environment | folders,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        try:
            file = scratch / f"runtime/jpserver-{server.pid}.json"  # `ebt lab` becomes the server, so it has its pid
            end = time.monotonic() + LIMIT
            while not (file.is_file() and file.read_text().strip().endswith("}")):
                assert server.poll() is None and time.monotonic() < end, output.read_text()
                time.sleep(0.1)
            yield Lab(json.loads(file.read_text())["url"], "secret", root)
        finally:
            server.terminate()


@contextmanager
def open_browser() -> Iterator:
    "Run a headless Chromium until the block ends."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def wait_idle(page) -> None:
    "Wait until the kernel of the current notebook is idle, and no cell waits to be run."
    page.locator(".jp-StatusBar-Widget").get_by_text(re.compile(r"\| Idle")).first.wait_for()
    waiting = page.locator(f"{NOTEBOOK} .jp-InputPrompt", has_text="[*]")
    page.wait_for_function(
        "selector => ![...document.querySelectorAll(selector)].some(prompt => prompt.textContent.includes('[*]'))",
        arg=f"{NOTEBOOK} .jp-InputPrompt",
    )
    assert waiting.count() == 0


def open_notebook(page, lab: Lab, path: str | None = None) -> None:
    "Open a notebook (the page that Lab opens by itself, without a path), and wait for its kernel."
    page.goto(f"{lab.url}{f'lab/tree/{path}' if path else ''}?token={lab.token}")
    page.locator(NOTEBOOK).wait_for()
    if path:  # Lab opens what was open before as well
        name = Path(path).name
        page.locator(".lm-TabBar-tab.lm-mod-current", has_text=name).first.wait_for()
        page.locator(".jp-StatusBar-Widget").get_by_text(name, exact=True).first.wait_for()
    wait_idle(page)


def choose(page, menu: str, *items: str) -> None:
    "Choose an item of a menu."
    page.get_by_role("menuitem", name=menu, exact=True).click()
    for item in items:
        page.locator(".lm-Menu").get_by_text(item, exact=True).click()


def run_all(page) -> None:
    "Run every cell of the current notebook, and wait until all have run. Fails where a cell shows an error."
    choose(page, "Run", "Run All Cells")
    last = page.locator(f"{NOTEBOOK} .jp-CodeCell .jp-InputPrompt").last
    page.wait_for_function(
        "selector => /\\[\\d+\\]/.test([...document.querySelectorAll(selector)].at(-1).textContent)",
        arg=f"{NOTEBOOK} .jp-CodeCell .jp-InputPrompt",
    )
    wait_idle(page)
    assert "[" in last.text_content()
    errors = error_outputs(page)
    assert not errors, errors


def error_outputs(page) -> list[str]:
    "Return the errors that the current notebook shows."
    selector = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
    return page.locator(NOTEBOOK).locator(selector).all_text_contents()


def save(page) -> None:
    "Save the current notebook, which must have changes, and wait until it is saved."
    page.keyboard.press("Escape")
    with page.expect_response(lambda answer: answer.request.method == "PUT" and "/api/contents/" in answer.url) as done:
        choose(page, "File", "Save Notebook")
    assert done.value.ok
    assert page.locator(".jp-Dialog").count() == 0
