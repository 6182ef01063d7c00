"""The demo at a reduced setting: its table, and the adapter that a new process loads."""

import re

import pytest
from example_scripts import EXAMPLES, run_script
from safetensors.torch import load_file


def test_compares_methods_and_reloads_the_adapter(tmp_path):
    printed = run_script(
        *(EXAMPLES / "demo.py", "--output_dir", tmp_path, "--seeds", "0", "--num_train_epochs", "1"),
        *("--methods", "linear", "s2a", "--num_train", "300", "--num_test", "200", "--num_classified", "20"),
        columns=80,
        quiet=True,
    )
    lines = printed.splitlines()
    assert len(lines) <= 24 and max(map(len, lines[:12])) <= 80, "one screen"
    assert "…" not in printed and not re.search(r"\w\.\.\. ", printed), "no heading is cut"
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    rows = {match[1]: float(match[2]) for match in re.finditer(r"│ (linear probe|S2A) +│ +([\d.]+)", printed)}
    assert rows.keys() == {"linear probe", "S2A"}
    assert min(rows.values()) > 20  # per cent, of ten classes
    assert "every one as the trained model did" in " ".join(printed.split())
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_the_search_tries_five_rates_for_each_method(tmp_path):
    printed = run_script(
        *(EXAMPLES / "demo.py", "--search", "--seeds", "0", "--num_train_epochs", "1", "--methods", "linear"),
        *("--num_train", "100", "--output_dir", tmp_path),
    )
    (row,) = (line for line in printed.splitlines() if line.startswith("│ linear probe"))
    rates = [float(rate) for rate in re.findall(r"lr ([\d.e-]+)\)", row)]
    assert len(set(rates)) == 5
