"Figures in committed notebooks: described in words, sharp, small, and made in one place."

import base64
import json
import re
import struct
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
FIGURES = NOTEBOOKS / "runs/10_figures.ipynb"


def notebooks():
    "Yield each notebook's path and content."
    for path in sorted(NOTEBOOKS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            yield path, json.loads(path.read_text(encoding="utf-8"))


def pictures():
    "Yield place, PNG file and metadata of each picture in an output of a notebook."
    for path, notebook in notebooks():
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    png = base64.b64decode("".join(output["data"]["image/png"]))
                    place = f"{path.relative_to(NOTEBOOKS)} cell {cell['id']}"
                    yield place, png, output["metadata"].get("image/png", {})


@pytest.mark.agreement
def test_every_picture_has_a_text_alternative():
    missing = [place for place, _, metadata in pictures() if not metadata.get("alt", "").strip()]
    assert not missing, "run these notebooks again; figures come from runs.figures.create_figure"


@pytest.mark.agreement
def test_figures_are_sharp_and_small():
    soft, large, dated = [], [], []
    for place, png, metadata in pictures():
        if "width" not in metadata:  # a picture that is no figure, or one that was drawn before figures were sharp
            continue
        width = struct.unpack(">I", png[16:20])[0]
        soft += [place] * (abs(width - 2 * metadata["width"]) > 1)
        large += [place] * (len(png) > 70_000)
        dated += [place] * (b"Software" in png or b"tIME" in png)
    assert not soft and not large and not dated, (soft, large, dated)


@pytest.mark.agreement
def test_figures_are_made_in_one_place():
    by_hand = []
    for path, notebook in notebooks():
        sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
        if path != FIGURES and any(re.search(r"\bplt\.subplots\(", source) for source in sources):
            by_hand.append(str(path.relative_to(NOTEBOOKS)))
    assert not by_hand, "use ebt_nb.runs.figures.create_figure"


@pytest.mark.agreement
def test_kept_pages_of_views_hold_the_present_scripts():
    script = (NOTEBOOKS.parent / "ebt_nb/assets/widgets/common.js").read_text(encoding="utf-8")
    pages, stale = 0, []
    for path, notebook in notebooks():
        for cell in notebook["cells"]:
            htmls = ["".join(output.get("data", {}).get("text/html", "")) for output in cell.get("outputs", [])]
            views = [html for html in htmls if 'class="ebt-view" data-view=' in html]
            pages += len(views)
            if not all(script in html for html in views):
                stale.append(f"{path.relative_to(NOTEBOOKS)} cell {cell['id']}")
    assert pages >= 8 and not stale, "run these notebooks again, and keep the pages of their views"
