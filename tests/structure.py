"""Measure the shape of the package: imports, circles, long lines and functions, large modules, cells with imports.

python tests/structure.py [CHECKOUT]
"""

import ast
import builtins
import json
import re
import symtable
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINE, MAX_FUNCTION, MAX_MODULE = 120, 50, 400
BELOW = {  # room -> rooms it may import from, its own apart
    "config": "",
    "compute": "",
    "runs": "config",
    "models": "config compute",
    "thinking": "config compute",
    "data": "config compute runs",
    "training": "config compute runs models thinking data",
    "inference": "config compute runs models thinking data training",
    "analysis": "config compute runs models thinking data training inference",
    "jobs": "config compute runs models thinking data training inference",
    "widgets": "config compute runs models thinking data training inference analysis jobs",
    "cli": "config compute runs models thinking data training inference analysis jobs widgets",
}


@dataclass
class Structure:
    "What was found, each entry with the place it was found at."

    long_lines: list[str] = field(default_factory=list)
    long_functions: list[str] = field(default_factory=list)
    large_modules: list[str] = field(default_factory=list)
    modules_outside_rooms: list[str] = field(default_factory=list)
    upward_imports: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)
    undefined_names: list[str] = field(default_factory=list)
    mixed_import_cells: list[str] = field(default_factory=list)


def package_files(root: Path) -> dict[str, Path]:
    "Return the modules of the package by dotted name ('training.fit'), without nbdev's index and empty __init__ files."
    files = {}
    for path in sorted((root / "ebt_nb").rglob("*.py")):
        if path.stem not in ("__init__", "_modidx"):
            files[".".join(path.relative_to(root / "ebt_nb").with_suffix("").parts)] = path
    return files


def imported_modules(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    "Return the modules of the package that a module imports anywhere in it, inside functions too."
    found = set()
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name.removeprefix("ebt_nb.") for alias in node.names if alias.name.startswith("ebt_nb.")]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = name.split(".")[: -node.level]
                base = ".".join([*parent, *([base] if base else [])])
            elif base == "ebt_nb" or base.startswith("ebt_nb."):
                base = base.removeprefix("ebt_nb").removeprefix(".")
            else:
                continue
            targets = [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)]
        found |= {target for target in targets if target in known}
    return found - {name}


def find_circles(imports: dict[str, set[str]]) -> list[str]:
    "Return one chain of imports for each circle that a depth-first walk meets."
    circles, finished = [], set()

    def visit(name, path):
        if name in path:
            circles.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in finished:
            for target in sorted(imports[name]):
                visit(target, [*path, name])
            finished.add(name)

    for name in sorted(imports):
        visit(name, [])
    return circles


def undefined_names(text: str, name: str) -> list[str]:
    """Return the global names that a module uses and does not define, with the scope that uses them.

    A notebook does not show them where a cell of its tests defines them.
    """
    module = symtable.symtable(text, name, "exec")
    symbols = module.get_symbols()
    defined = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}
    defined |= {*dir(builtins), "__file__", "__name__"}
    missing, scopes = [], [module]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            is_global = symbol.is_global() or scope is module
            if is_global and symbol.is_referenced() and symbol.get_name() not in defined:
                missing.append(f"{name}:{scope.get_name()}: {symbol.get_name()}")
    return missing


def notebook_numbers(root: Path) -> dict[str, int]:
    "Return the number of the notebook that exports each module."
    numbers = {}
    for path in (root / "nbs").rglob("*.ipynb"):
        number = re.match(r"\d+", path.name)
        if not number:
            continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            exported = re.match(r"#\|\s*default_exp (\S+)", "".join(cell["source"]))
            if exported:
                numbers[exported[1]] = int(number[0])
    return numbers


def mixed_import_cells(root: Path) -> list[str]:
    """Return the cells that hold imports and other code, as notebook:cell.

    nbdev executes every cell with an import in it when it documents a notebook, and cells that export. A cell that
    does more than import would then compute something, or fail, since the cells before it have not been executed.
    """
    mixed = []
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or re.search(
                r"^#\|\s*(?:exporti?|exports|exec_doc)\b", source, re.MULTILINE
            ):
                continue
            tree = ast.parse(source)
            has_import = any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
            if has_import and not all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
                mixed.append(f"{path.relative_to(root / 'nbs').as_posix()}:{cell['id']}")
    return mixed


def measure(root: Path = ROOT) -> Structure:
    "Measure a checkout."
    found, imports = Structure(), {}
    files, numbers = package_files(root), notebook_numbers(root)
    for name, path in files.items():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        exported = next((n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), None)
        listed = range(exported.lineno, exported.end_lineno + 1) if exported else ()  # nbdev wraps these lines itself
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_LINE and number not in listed:
                found.long_lines.append(f"{name}:{number}")
        if len(lines) > MAX_MODULE:
            found.large_modules.append(f"{name}: {len(lines)} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION:
                    found.long_functions.append(f"{name}:{node.name}: {length} lines")
        imports[name] = imported_modules(name, tree, set(files))
        found.undefined_names += undefined_names(text, name)
    for name, targets in imports.items():
        room = name.partition(".")[0]
        if room not in BELOW or "." not in name:
            found.modules_outside_rooms.append(name)
            continue
        for target in sorted(targets):
            other = target.partition(".")[0]
            is_below = numbers.get(target, 0) < numbers.get(name, 0) if other == room else other in BELOW[room].split()
            if not is_below:
                found.upward_imports.append(f"{name} imports {target}")
    found.circles = find_circles(imports)
    found.mixed_import_cells = mixed_import_cells(root)
    return found


if __name__ == "__main__":
    for kind, places in vars(measure(Path(*sys.argv[1:]) if sys.argv[1:] else ROOT)).items():
        print(f"{kind.replace('_', ' ')}: {len(places)}", *places[:40], sep="\n    ")
