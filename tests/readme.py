"""Write README.md from nbs/index.ipynb. With --check, write nothing and exit with 1 if README.md is out of date.

python tests/readme.py [--check]
"""

import re
import sys
from pathlib import Path

import nbconvert
import nbformat

ROOT = Path(__file__).resolve().parents[1]


def readme(notebook: Path) -> str:
    "The notebook as Markdown: hidden cells and directives left out, links as seen from the folder above."
    book = nbformat.read(notebook, as_version=4)
    book.cells = [cell for cell in book.cells if not re.match(r"#\|\s*hide\b", cell.source)]
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
    text = nbconvert.MarkdownExporter().from_notebook_node(book)[0]
    text = re.sub(r"\]\((?!\w+:|#|/|\.\./)", "](nbs/", text).replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main(root: Path = ROOT, check: bool = False) -> int:
    text, path = readme(root / "nbs" / "index.ipynb"), root / "README.md"
    if not check:
        path.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        print("README.md is out of date: python tests/readme.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
