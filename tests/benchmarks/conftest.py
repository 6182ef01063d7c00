"""The benchmarks are scripts in a folder of their own, and import each other by name."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
