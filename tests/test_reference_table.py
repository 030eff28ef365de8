"The page for users of the reference implementation names what exists: keys, commands, presets, tests, notebooks."

import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

import ebt_nb.cli.main  # noqa: F401 (registers the commands)
from ebt_nb.cli.commands import COMMANDS
from ebt_nb.config.kinds import RUN_KINDS, SECTION_ORDER, data_kinds, section_fields
from ebt_nb.config.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "nbs/coming_from_the_reference.ipynb"
WITHOUT_PROOF = ("not built", "not needed")


class Row(NamedTuple):
    "A line of a table: their name, ours, and the test, notebook or command that shows it (or a reason)."

    reference: str
    here: str
    shown_by: str

    @property
    def names(self) -> list[str]:
        "What stands in backticks in our columns."
        return names_in(f"{self.here} {self.shown_by}")


def names_in(text: str) -> list[str]:
    "Return what stands in backticks."
    return re.findall(r"`([^`]+)`", text)


def is_proof(name: str) -> bool:
    "Return whether a name is that of a test or of a notebook."
    return "::" in name or (ROOT / f"nbs/{name}.ipynb").exists()


@cache
def read_rows() -> list[list[str]]:
    "Return the cells of every row of every table of the page, without headings."
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "reference" and not re.fullmatch("-+", row[0])]


# What is wrong with a name; None if nothing is


@cache
def fields_by_key() -> dict[str, list[FieldInfo]]:
    "Return the fields of each configuration key, in all kinds of runs and data."
    fields: dict[str, list[FieldInfo]] = {}
    for config_class in RUN_KINDS.values():
        for data_kind in data_kinds(config_class):
            for key, field in section_fields(config_class, data_kind).items():
                fields.setdefault(key, []).append(field)
    return fields


def is_accepted(value: str, field: FieldInfo) -> bool:
    "Return whether a key can have a value. Words in capitals stand for any value."
    if re.fullmatch(r"[A-Z][A-Z_:/@]*", value):
        return True
    adapter = TypeAdapter(Annotated[field.annotation, field])
    for candidate in (value, yaml.safe_load(value)):
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        return True
    return False


def fault_of_setting(text: str) -> str | None:
    "Check `section.key` or `section.key=value`."
    key, separator, value = text.partition("=")
    if key not in fields_by_key():
        return f"no key {key}"
    if separator and not any(is_accepted(value, field) for field in fields_by_key()[key]):
        return f"{key} cannot be {value}"
    return None


def fault_of_command(text: str) -> str | None:
    "Check `ebt COMMAND ...`: the command, its options, its settings and, for `ebt run`, the notebook."
    words = shlex.split(text)[1:]
    if words[0] not in COMMANDS:
        return f"no command {words[0]}"
    known = {name for argument in COMMANDS[words[0]].arguments for name in argument.names}
    faults = [f"ebt {words[0]} has no {word}" for word in words if word.startswith("-") and word not in known]
    previous = ""
    for word in words:
        if previous in ("-p", "--set"):
            faults.append(fault_of_setting(word))
        if previous == "--preset" and word not in PRESETS:
            faults.append(f"no preset {word}")
        previous = word
    if words[0] == "run" and not (ROOT / f"nbs/experiments/{words[1]}.ipynb").exists():
        faults.append(f"no experiment {words[1]}")
    return next(filter(None, faults), None)


@cache
def functions_of_file(path: Path) -> set[str]:
    "Return the names of the functions and classes of a Python file."
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def fault_of_test(text: str) -> str | None:
    "Check `tests/file.py::name`."
    file, name = text.split("::")
    return None if name in functions_of_file(ROOT / file) else f"no test {name} in {file}"


def fault_of_function(text: str) -> str | None:
    "Check `ebt_nb.room.module.name`."
    module, _, name = text.rpartition(".")
    return None if name in functions_of_file(ROOT / f"{module.replace('.', '/')}.py") else f"no {name} in {module}"


@cache
def source_names() -> set[str]:
    "Return the texts in quotes in the modules of data, among which are the names of all sources."
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "ebt_nb/data").glob("*.py")]
    return {name for text in texts for name in re.findall(r'"([\w-]+)"', text)}


def fault_of_source(text: str) -> str | None:
    "Check the name of data in `data.source=NAME` and in `--data NAME`."
    names = re.findall(r"(?:data\.source=|--data )([a-z][\w-]*)(?![\w/.])", text)
    return next((f"no data {name}" for name in names if name not in source_names()), None)


def find_fault(name: str) -> str | None:
    "Return what is wrong with a name of the page; None if it exists."
    if name.startswith("ebt "):
        return fault_of_command(name) or fault_of_source(name)
    if "::" in name:
        return fault_of_test(name)
    if name.startswith(("text/", "image/", "video/")):
        return None if name in PRESETS else f"no preset {name}"
    if name.partition(".")[0] in SECTION_ORDER and "." in name:
        return fault_of_setting(name) or fault_of_source(name)
    if name.startswith("ebt_nb."):
        return fault_of_function(name)
    if (ROOT / f"nbs/{name}.ipynb").exists() or (ROOT / name).exists():
        return None
    return f"{name} is neither a key, a command, a preset, a test, a function, a notebook nor a file"


# Tests


def test_no_cell_is_empty():
    rows = read_rows()
    assert len(rows) > 300
    assert [row for row in rows if len(row) != 3 or not all(row)] == []


def test_every_row_names_what_shows_it():
    "A test or a notebook; of what is left out the column has the reason."
    built = [row for row in map(Row._make, read_rows()) if not row.here.startswith(WITHOUT_PROOF)]
    assert [row.reference for row in built if not any(map(is_proof, names_in(row.shown_by)))] == []


def test_every_name_exists():
    faults = [(row.reference, find_fault(name)) for row in map(Row._make, read_rows()) for name in row.names]
    assert [fault for fault in faults if fault[1]] == []


@pytest.mark.parametrize(
    "name, part",
    [
        ("thinking.stepz", "no key thinking.stepz"),
        ("model.kind=video", "model.kind cannot be video"),
        ("trainer.val_every=often", "trainer.val_every cannot be often"),
        ("data.source=lambda", "no data lambda"),
        ("ebt evaluat RUN", "no command evaluat"),
        ("ebt evaluate RUN --dada lambada", "ebt evaluate has no --dada"),
        ("ebt evaluate RUN --data lambda", "no data lambda"),
        ("ebt train -p trainer.max_step=1", "no key trainer.max_step"),
        ("ebt train --preset text/ebt_s3", "no preset text/ebt_s3"),
        ("ebt run inspect_text", "no experiment inspect_text"),
        ("text/ebt_s3", "no preset text/ebt_s3"),
        ("tests/test_parity.py::test_cases", "no test test_cases"),
        ("tests/test_nothing.py::test_case", "no test test_case"),
        ("ebt_nb.inference.lm_harness.register", "no register in ebt_nb.inference.lm_harness"),
        ("tutorials/02_minimal", "neither"),
        ("--limit", "neither"),
    ],
)
def test_a_wrong_name_is_found(name, part):
    assert part in find_fault(name)


@pytest.mark.parametrize(
    "name",
    [
        "thinking.steps",
        "model.kind=image_ebt",
        "data.source=lambada",
        "trainer.callbacks=[early_stopping]",
        "ebt evaluate RUN --data lambada -p inference.noise=1",
        "ebt run inspect_data",
        "text/ebt_s1",
        "tests/test_parity.py::test_case",
        "ebt_nb.inference.lm_harness.register_with_lm_eval",
        "training/02_objectives",
        "job_scripts/sweep.sh",
    ],
)
def test_a_right_name_is_accepted(name):
    assert find_fault(name) is None
