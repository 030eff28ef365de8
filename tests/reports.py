"What every report of an experiment must be: it opens with its summary, and speaks of its own run only."

from pathlib import Path

import nbformat


def check_report(folder: Path) -> nbformat.NotebookNode:
    "Check the report in an experiment folder, and return the executed notebook."
    report = nbformat.read(folder / "report.ipynb", 4)
    page = (folder / "report.html").read_text(encoding="utf-8")
    title, imports, summary = report.cells[:3]
    assert not imports.outputs and "import ReportSummary" in imports.source
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    text, figure = (output["data"] for output in summary.outputs)
    assert text["text/markdown"].startswith("## Summary\n\n") and "has not finished" not in text["text/markdown"]
    assert "image/png" in figure, figure.keys()
    assert "Traceback" not in page and page.index("<img") < page.index("About this notebook")
    assert page.index("Summary") < page.index("About this notebook")

    assert all(cell.cell_type != "raw" for cell in report.cells) and "skip_exec" not in page
    texts = [cell.source for cell in report.cells] + [page]
    assert not any("committed run" in one for one in texts)

    code = [cell for cell in report.cells if cell.cell_type == "code"]
    is_injected = ["injected-parameters" in cell.metadata.get("tags", []) for cell in code]
    assert all(cell.metadata["jupyter"]["source_hidden"] for cell, skip in zip(code, is_injected) if not skip)
    assert page.count("<summary>Code</summary>") == len(code)
    for output in outputs_of(report):
        if output.output_type == "stream":
            assert sum("tokens/s" in line or "images/s" in line for line in output.text.splitlines()) <= 20
    return report


def outputs_of(report: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    "The outputs of all cells of a notebook."
    return [output for cell in report.cells for output in cell.get("outputs", [])]


def text_of(report: nbformat.NotebookNode) -> str:
    "The text that a notebook printed or displayed."
    return "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/markdown", "") for output in outputs_of(report)
    )


def count_figures(report: nbformat.NotebookNode) -> int:
    "The number of figures in a notebook, the one of the summary included."
    return sum("image/png" in output.get("data", {}) for output in outputs_of(report))
