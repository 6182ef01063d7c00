"""The notebook runs, offline, from its own folder, and says what it promises."""

import re

import nbformat
import pytest
from example_scripts import EXAMPLES
from nbclient import NotebookClient


@pytest.mark.slow
def test_the_notebook_runs():
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "saved with its outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    kept = dict(re.findall(r"(LoRA|S2A): ([\d,]+) KiB kept", printed))
    assert int(kept["S2A"].replace(",", "")) < int(kept["LoRA"].replace(",", "")) / 4
    (percent,) = re.findall(r"([\d.]+)% of the test digits", printed)
    assert float(percent) > 50  # of ten classes
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
