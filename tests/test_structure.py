"The shape of the package: rooms import only from rooms below, and modules, functions and lines stay short."

import json
import re

import structure

from ebt_nb.jobs.reports import WIDGET_VIEW


def test_imports_go_down_and_not_in_circles():
    found = structure.measure()
    assert not found.modules_outside_rooms
    assert not found.upward_imports
    assert not found.circles


def test_modules_define_what_they_use():
    assert not structure.measure().undefined_names


def test_cells_hold_imports_or_other_code():
    mixed = structure.mixed_import_cells(structure.ROOT)
    assert not mixed, f"move the imports into a cell of their own: {', '.join(mixed)}"


def test_modules_functions_and_lines_are_short():
    found = structure.measure()
    assert not found.large_modules
    assert not found.long_functions
    assert not found.long_lines


def test_a_circle_an_upward_import_a_long_function_and_mixed_cells_are_found(tmp_path):
    package = tmp_path / "ebt_nb"
    for name, text in {
        "config/sections.py": "def f():\n    from ebt_nb.jobs.launch import start\n",
        "jobs/launch.py": "from ..config.sections import f\n" + "def start():\n" + "    x = 1\n" * 60,
        "loose.py": "x = '" + "a" * 130 + "'\ndef g(y):\n    return len(x) + y + z\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    cells = [
        "#| export\nimport os\nx = 1",
        "import os",
        "import os\nx = 1",
        "def f():\n    import os\n    x = 1",
        "x = 1",
    ]
    cells = [dict(cell_type="code", id=f"c{number}", source=source) for number, source in enumerate(cells)]
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/00_mixed.ipynb").write_text(json.dumps(dict(cells=cells)))
    found = structure.measure(tmp_path)
    assert found.mixed_import_cells == ["00_mixed.ipynb:c2", "00_mixed.ipynb:c3"]
    assert found.upward_imports == ["config.sections imports jobs.launch"]
    assert found.circles == ["config.sections -> jobs.launch -> config.sections"]
    assert found.modules_outside_rooms == ["loose"] and found.long_lines == ["loose:1"]
    assert found.long_functions == ["jobs.launch:start: 61 lines"]
    assert found.undefined_names == ["loose:g: z"]


def test_notebooks_and_modules_that_are_mentioned_exist():
    "Prose names notebooks as `room/NN_name` and modules as `ebt_nb.room.name`; both are there."
    nbs, missing = structure.ROOT / "nbs", []
    known = {str(path.relative_to(nbs).with_suffix("")) for path in nbs.rglob("*.ipynb")}
    modules = set(structure.package_files(structure.ROOT))
    rooms = "|".join(structure.BELOW)
    files = [*nbs.rglob("*.ipynb"), *(structure.ROOT / "tests").glob("*.py"), structure.ROOT / "README.md"]
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        mentioned = set(re.findall(rf"\b(?:{rooms})/\d\d_\w+", text))
        missing += [f"{path.name}: {name}" for name in mentioned - known]
        named = set(re.findall(rf"\bebt_nb\.((?:{rooms})\.[a-z]\w+)", text))
        missing += [f"{path.name}: ebt_nb.{name}" for name in named - modules]
    assert not missing


def test_committed_outputs_need_no_kernel():
    "A live widget in a committed output would hide what it shows without a kernel (`jobs/27_lab`)."
    live = []
    for path in sorted((structure.ROOT / "nbs").rglob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if any(WIDGET_VIEW in output.get("data", {}) for output in cell.get("outputs", ())):
                live.append(f"{path.name}: {cell['id']}")
    assert not live, f"save them in `ebt lab --keep-outputs`: {live}"
