"""The figures in README and docs are those of the committed result files, and those say what they were measured on."""

import json

import pytest
import readme
from environment import RESULTS, describe_environment, slug, write_result


@pytest.mark.parametrize("document", readme.DOCUMENTS)
def test_documents_say_what_the_result_files_say(document):
    text = (readme.ROOT / document).read_text()
    assert "<!-- results: " in text
    assert readme.render(text, document) == text, f"{document} is out of date: run benchmarks/readme.py"


def test_every_section_has_one_place():
    text = "".join((readme.ROOT / document).read_text() for document in readme.DOCUMENTS)
    for name in readme.SECTIONS:
        assert text.count(f"<!-- results: {name} -->\n") == 1, name


def test_the_readme_is_a_page():
    text = (readme.ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 90
    assert text.count("\n| --- |") == 1 and text.count("![") == 1, "one table, one figure"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_names_its_hardware_versions_and_date(path):
    environment = json.loads(path.read_text())["environment"]
    assert environment.keys() >= {"device", "date", "python", "torch", "peft", "transformers"}
    if path.stem not in (
        "checkpointing",
        "default_sizes",
        "demo",
        "dense_prediction",
        "models",
        "plans",
        "ranks",
        "traffic",
        "widths",
    ):  # one of each: made anywhere
        assert path.stem.endswith(slug(environment["device"]))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results that the README is rendered from."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    return tmp_path


def test_sections_without_results_are_empty(results):
    text = "before\n<!-- results: fidelity -->\nold\n<!-- /results -->\nafter"
    assert readme.render(text, "README.md") == "before\n<!-- results: fidelity -->\n<!-- /results -->\nafter"


def test_reduced_runs_are_left_out_and_devices_stand_side_by_side(results):
    row = {"operator": "norm", "bits": 4, "variant": "nearest", "cosine": 0.5}
    for name in ("full-cpu", "full-gpu", "reduced-cpu"):
        environment = {**describe_environment(), "device": name}
        write_result(
            results / f"fidelity-{name}.json", {"environment": environment, "settings": {"batches": 1}, "rows": [row]}
        )
    section = readme.section("fidelity")
    assert section.count("| norm | 0.5000 |") == 2
    assert "full-cpu" in section and "full-gpu" in section and "reduced-cpu" not in section


def test_memory_is_given_beside_lora_of_the_same_backbone(results):
    shared = {"axis": None, "batch_size": 8, "autocast": False}
    rows = [
        {
            **shared,
            "backbone": backbone,
            "method": method,
            "saved_bytes_per_image": size * 2**20,
            "peak_bytes": size * 2**20,
            "step_seconds": size,
        }
        for backbone, lora in (("a", 10), ("b", 100))
        for method, size in (("LoRA", lora), ("S2A", lora / 4), ("S2A, no tiles", lora))
    ]
    rows.append({**shared, "backbone": "b", "method": "LoRA + checkpointing", "skipped": "not supported"})
    write_result(results / "memory_and_speed-main-x.json", {"environment": describe_environment(), "rows": rows})
    section = readme.section("memory")
    assert "| a | S2A | 2.5 | 2 | 0.25 | 0.25 |" in section
    assert "| b | S2A | 25.0 | 25 | 0.25 | 0.25 |" in section
    assert "no tiles" not in section and "checkpointing |" not in section


def test_the_summary_says_where_s2a_loses(results):
    shared = {"axis": None, "batch_size": 8, "autocast": False, "saved_bytes_per_image": 1}
    sizes = {
        "a": {"LoRA": (10, 1.0), "LoRA + checkpointing": (2, 1.5), "S2A": (3, 1.2)},
        "b": {"LoRA": (10, 1.0), "S2A": (3, 0.5)},
    }
    rows = [
        {**shared, "backbone": backbone, "method": method, "peak_bytes": peak * 2**20, "step_seconds": seconds}
        for backbone, found in sizes.items()
        for method, (peak, seconds) in found.items()
    ]
    write_result(results / "memory_and_speed-main-x.json", {"environment": describe_environment(), "rows": rows})
    section = readme.section("summary")
    assert "|  | a | b |" in section
    assert "| LoRA + checkpointing | 2 MiB, 1.50 | - |" in section
    assert "| **S2A** | **3 MiB, 1.20** | **3 MiB, 0.50** |" in section
    assert "Less memory than S2A: LoRA + checkpointing on a. LoRA is faster on a." in section


def fitted(budget, micro_batch, rate=None, measured=True):
    return {
        "budget_bytes": budget * 2**30,
        "micro_batch": micro_batch,
        "images_per_second": rate,
        "measured": measured,
    }


def test_the_first_table_is_of_budgets_where_these_were_measured_and_says_where_s2a_loses(results):
    rows = [
        {"backbone": "a", "method": "LoRA", "smallest_bytes": 90 * 2**20, "fits": [fitted(0.5, 0), fitted(8, 9, 7.0)]},
        {"backbone": "a", "method": "S2A", "smallest_bytes": 80 * 2**20,
         "fits": [fitted(0.5, 4, 3.0), fitted(8, 99, 5.0, False)]},
        {"backbone": "b", "method": "S2A", "smallest_bytes": 80 * 2**20, "fits": [fitted(0.5, 4, 3.0), fitted(8, 9, 4.0)]},
        {"backbone": "b", "method": "LoRA + checkpointing every 2nd block", "smallest_bytes": 1,
         "fits": [fitted(0.5, 1, 9.0), fitted(8, 9, 9.0)]},
    ]  # fmt: skip
    step = {"axis": None, "batch_size": 8, "autocast": False, "backbone": "a", "method": "S2A", "peak_bytes": 1,
            "step_seconds": 1.0}  # fmt: skip
    write_result(results / "memory_and_speed-main-x.json", {"environment": describe_environment(), "rows": [step]})
    write_result(results / "memory_and_speed-budget-x.json", {"environment": describe_environment(), "budgets": rows})
    section = readme.section("summary")
    assert "| backbone | method | one image | 0.5 GiB | 8 GiB |" in section
    assert "| a | LoRA | 90 MiB | - | 7.00 (9) |" in section
    assert "| **a** | **S2A** | **80 MiB** | **3.00 (4)** | **~5.00 (99)** |" in section
    assert "Where S2A loses: a: another method is faster in 8 GiB; b: nowhere." in section
    assert "every 2nd" not in section and "every 2nd" in readme.section("budget")
    assert "b: another method is faster in 0.5 GiB, 8 GiB and one image takes less with" in readme.section("budget")


def test_models_without_checkpointing_are_named_by_task(results):
    rows = [
        {"model_type": "resnet", "supported": {"classification": False, "backbone": False}},
        {"model_type": "vit", "supported": {"classification": True}},
    ]
    write_result(results / "checkpointing.json", {"environment": describe_environment(), "rows": rows})
    section = readme.section("without_checkpointing")
    assert "| classification | 1 of 2 | resnet |" in section and "| backbone | 1 of 1 | resnet |" in section


def test_compiled_steps_stand_beside_eager_lora(results):
    shared = {"axis": None, "batch_size": 8, "autocast": False, "backbone": "a"}
    rows = [
        {**shared, "method": "LoRA", "peak_bytes": 10 * 2**20, "step_seconds": 2.0},
        {
            **shared,
            "method": "LoRA, compiled",
            "peak_bytes": 5 * 2**20,
            "step_seconds": 1.0,
            "first_step_seconds": 60.0,
        },
        {**shared, "method": "S2A, compiled", "skipped": "no compiler"},
    ]
    write_result(results / "memory_and_speed-compiled-x.json", {"environment": describe_environment(), "rows": rows})
    section = readme.section("compiled")
    assert "| a | LoRA, compiled | 5 | 0.50 | 0.50 | 60 |" in section
    assert "| a | S2A, compiled | no compiler |" in section


def test_fidelity_in_training_is_a_row_a_structure(results):
    rows = [
        {"structure": "bias", "bits": 4, "step": step, "cosine": 0.9 + step / 1000, "worst_cosine": 0.8}
        for step in (0, 10)
    ]
    data = {"environment": describe_environment(), "settings": {"batches": 2}, "rows": rows}
    write_result(results / "fidelity-training-x.json", data)
    section = readme.section("fidelity_in_training")
    assert "| structure | start | step 10 |" in section and "| bias | 0.9000 (0.8000) | 0.9100 (0.8000) |" in section
    assert readme.section("fidelity") == ""


@pytest.mark.parametrize(("seeds", "stated"), [(3, False), (12, True)])
def test_differences_in_accuracy_are_stated_only_with_seeds_enough(results, seeds, stated):
    runs = [
        {"dataset": "toy", "method": method, "seed": seed, "split": "test", "accuracy": value + seed % 2}
        for seed in range(seeds)
        for method, value in (("S2A, full precision", 80.0), ("S2A", 81.0))
    ]
    text = readme.differences({"runs": runs}, ["toy"])
    assert ("+1.00 points" in text) is stated and ("too few" in text) is not stated


def test_the_matrix_has_all_methods_and_says_why_some_are_missing(results):
    shared = {"axis": None, "batch_size": 4, "autocast": False}

    def measured(backbone, method, size):
        sizes = {"saved_bytes_per_image": size * 2**20, "peak_bytes": size * 2**20, "step_seconds": size}
        return {**shared, "backbone": backbone, "method": method, **sizes}

    rows = [
        measured("a", "LoRA", 10),
        measured("a", "S2A", 2.5),
        {**shared, "backbone": "a", "method": "prefix tuning", "skipped": "for text only."},
        {**shared, "backbone": "b", "method": "LoRA", "skipped": "out of memory"},
        measured("b", "S2A", 7),
        {**shared, "backbone": "b", "method": "prefix tuning", "skipped": "for text only."},
        {**measured("c", "LoRA", 1), "axis": "images"},  # of the slopes below
    ]
    slope = {"backbone": "c", "batch_size": 4, "at": [2, 4], "peak_bytes_slope": 3 * 2**20}
    slopes = [{**slope, "method": "LoRA", "axis": axis} for axis in ("images", "tokens", "blocks")]
    slopes.append({**slope, "method": "S2A", "axis": "images", "peak_bytes_slope": 2**18})
    data = {"environment": describe_environment(), "rows": rows, "slopes": slopes}
    write_result(results / "memory_and_speed-wide-x.json", data)
    section = readme.section("wide")
    assert "| LoRA | 10.0, 1.00, 1.00 | (2) |" in section
    assert "| S2A | 2.5, 0.25, 0.25 | 7.0, -, - |" in section
    assert "| prefix tuning | (1) | (1) |" in section
    assert "(1) For text only. (2) Out of memory." in section
    assert "| LoRA | 3 | 3 | 3 |" in section and "| S2A | 0.25 |  |  |" in section
    assert "another token in each of 4 images, MiB" in section and "images 2, 4; tokens 2, 4; blocks 2, 4" in section
    assert readme.section("memory") == ""


def test_plots_are_shown_where_there_are_some(results):
    assert readme.picture(results / "a.json", "what") == ""
    (results / "a.png").touch()
    assert readme.picture(results / "a.json", "what") == "![what](a.png)"
