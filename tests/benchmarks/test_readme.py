"""The README's figures are those of the committed result files."""

import runpy
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_says_what_the_result_files_say():
    render = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))["render"]
    readme = (ROOT / "README.md").read_text()
    assert "<!-- results: demo -->\n|" in readme, "no demo results: run benchmarks/readme.py"
    assert render(readme) == readme, "the README is out of date: run benchmarks/readme.py"
