"""The memory and speed benchmark's logic, on models of a few thousand parameters."""

import json
import weakref

import budgets
import memory_and_speed
import pytest
import torch
from memory_and_speed import COMPILED, EVERY, METHODS, PRESETS, Case, Method, SharedParameters, measure
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification


def small_model(case, device):
    if case.backbone == "resnet50":
        config = ResNetConfig(num_labels=100, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])
        return ResNetForImageClassification(config)
    size = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    return ViTForImageClassification(
        ViTConfig(num_labels=100, image_size=case.image_size, num_hidden_layers=case.layers or 1, **size)
    )


@pytest.fixture(autouse=True)
def _small_models(monkeypatch):
    monkeypatch.setattr(memory_and_speed, "build", small_model)


@pytest.fixture(scope="module")
def vit_rows():
    patch = pytest.MonkeyPatch()
    patch.setattr(memory_and_speed, "build", small_model)
    rows = measure(Case("vit-b", tuple(METHODS), batch_size=2, image_size=32), rounds=1, seed=0, device="cpu")
    patch.undo()
    return {row["method"]: row for row in rows}


def test_every_method_is_measured_or_skipped_with_a_reason(vit_rows):
    assert set(vit_rows) == set(METHODS)
    skipped = {name for name, row in vit_rows.items() if "skipped" in row}
    assert skipped == {"prompt tuning", "prefix tuning"}  # PEFT puts their tokens before text
    for name in set(METHODS) - skipped:
        row = vit_rows[name]
        assert row["peak_bytes"] > 0 and row["step_seconds"] > 0 and row["trainable"] > 0, name


def test_the_methods_are_what_they_are_called(vit_rows):
    trainable = {name: row.get("trainable") for name, row in vit_rows.items()}
    kept = {name: row.get("saved_bytes_per_image") for name, row in vit_rows.items()}
    assert trainable["LoRA-FA"] < trainable["LoRA"] < trainable["DoRA"] < trainable["full fine-tuning"]
    assert kept["LoRA-FA"] < kept["LoRA"] < kept["full fine-tuning"]
    assert kept["LoRA + checkpointing"] < kept["LoRA"]
    assert kept["S2A"] < kept["S2A, activations in full precision"]
    assert trainable["S2A"] == trainable["S2A, no tiles"]


@pytest.mark.slow
def test_loras_other_ways_lie_between_all_and_nothing():
    ways = (
        "LoRA",
        "LoRA + checkpointing every 4th block",
        "LoRA + checkpointing every 2nd block",
        "LoRA + checkpointing",
    )
    rows = measure(Case("vit-b", (*ways, "LoRA, micro-batch 1"), 4, 64, layers=4), rounds=1, seed=0, device="cpu")
    *kept, in_parts = [row["saved_bytes_per_image"] for row in rows]
    peaks = [row["peak_bytes"] for row in rows]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(ways)
    assert in_parts == pytest.approx(kept[0], rel=0.01)  # of one image, but only one image's at a time
    assert peaks[-1] < 0.5 * peaks[0]


def test_micro_batches_add_up_to_the_gradient_of_the_batch():
    model = small_model(Case("vit-b", (), image_size=32), "cpu").double()
    batch = {"pixel_values": torch.randn(3, 3, 32, 32).double(), "labels": torch.tensor([1, 2, 3])}
    gradients = []
    for micro_batch in (None, 2):
        memory_and_speed.loss_of(micro_batch)(model, batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*gradients)


def test_what_a_backbone_does_not_support_is_skipped():
    reasons = {
        "LoRA + checkpointing": "does not support gradient checkpointing",
        "VeLoRA": "VeLoRA does not support adapting conv layers",
        "LoRA-FA": "optimiser for LoRA-FA does not support convolutions",
        "LN tuning": "no layer normalisation",
        "prompt tuning": "need a text model",
        "prefix tuning": "need a text model",
    }
    *rows, last = measure(Case("resnet50", (*reasons, "S2A"), 2, 32), rounds=1, seed=0, device="cpu")
    for row in rows:
        assert reasons[row["method"]] in row["skipped"]
    assert "skipped" not in last


def storage_bytes(*models):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


def applied(name, case):
    torch.manual_seed(0)
    return METHODS[name].apply(small_model(case, "cpu")).train()


@pytest.mark.parametrize("name", ["linear probe", "LoRA", "OFT", "S2A"])
def test_frozen_parameters_of_a_second_model_cost_nothing(name):
    case, shared = Case("vit-b", (), 2, 32), SharedParameters()
    first, second = applied("IA3", case), applied(name, case)
    alone = {key: value.clone() for key, value in second.state_dict().items()}
    own = sum(p.nbytes for p in second.parameters() if p.requires_grad)
    new = sum(p.nbytes for key, p in second.named_parameters() if "side" in key and not p.requires_grad)
    before = storage_bytes(first)
    shared.share(first)
    assert storage_bytes(first) == before  # its many equal biases stay apart
    shared.share(second)
    assert storage_bytes(first, second) == before + own + new
    assert all(torch.equal(value, alone[key]) for key, value in second.state_dict().items())


def test_parameters_that_differ_or_are_trained_are_not_shared():
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.load_state_dict(first.state_dict())
    first.requires_grad_(False)
    second.weight.requires_grad_(False)[0, 0] += 1
    shared = SharedParameters()
    shared.share(first)
    shared.share(second)
    assert storage_bytes(first, second) == storage_bytes(first) + storage_bytes(second)


@pytest.mark.parametrize("name", ["LoRA-FA", "IA3", "OFT", "LN tuning", "S2A", "S2A ladder"])
def test_sharing_changes_no_result(vit_rows, name):
    (alone,) = measure(Case("vit-b", (name,), batch_size=2, image_size=32), rounds=1, seed=0, device="cpu")
    for key in ("saved_bytes_per_image", "peak_bytes", "first_loss", "trainable", "parameters"):
        assert vit_rows[name][key] == alone[key], key


NOT_FOR_VISION = {"prompt tuning", "prefix tuning"}
NOT_FOR_CONVOLUTIONS = {"LoRA-FA", "VeLoRA", "LN tuning", *(name for name in METHODS if "checkpointing" in name)}


@pytest.mark.parametrize(
    ("backbone", "name"),
    [("vit-b", name) for name in METHODS if name not in NOT_FOR_VISION]
    + [("resnet50", name) for name in METHODS if name not in NOT_FOR_VISION | NOT_FOR_CONVOLUTIONS],
)
def test_no_method_changes_what_models_share(backbone, name):
    model = applied(name, Case(backbone, (), 2, 32))
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([3, 5])}
    frozen = {key: p for key, p in model.named_parameters() if not p.requires_grad}
    before = {key: p.clone() for key, p in frozen.items()}
    step = memory_and_speed.training_step(model, batch, METHODS[name].optimizer or memory_and_speed.adamw, False)
    first, second = step(), step()
    assert first != second
    assert all(torch.equal(p, before[key]) for key, p in frozen.items())


def out_of_memory_after(steps):
    """LoRA on a model that runs out of memory after as many forward passes."""

    def apply(model):
        def count(*_):
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore details")

        model.register_forward_hook(count)
        return METHODS["LoRA"].apply(model)

    return Method(apply)


@pytest.mark.parametrize("steps", [0, 3, 5, 6])  # the preparation takes 5, and each of two rounds 1
def test_running_out_of_memory_ends_a_method_and_not_the_run(monkeypatch, steps):
    monkeypatch.setitem(METHODS, "large", out_of_memory_after(steps))
    large, small = measure(Case("vit-b", ("large", "LoRA"), 2, 32), rounds=2, seed=0, device="cpu")
    assert large["skipped"] == "CUDA out of memory. Tried to allocate" and "peak_bytes" not in large
    assert len(small["all_step_seconds"]) == 2


@pytest.mark.parametrize("steps", [0, 5])
def test_what_a_failed_method_held_is_freed_before_the_next_step(monkeypatch, steps):
    failing, next_one = out_of_memory_after(steps), METHODS["LoRA"]
    models = []

    def remembered(model):
        models.append(weakref.ref(model))
        model.itself = [model]  # a cycle
        return failing.apply(model)

    def checked(model):
        model.register_forward_hook(lambda *_: alive.append(models[0]() is not None))
        return next_one.apply(model)

    alive = []
    monkeypatch.setitem(METHODS, "large", Method(remembered))
    monkeypatch.setitem(METHODS, "checked", Method(checked))
    measure(Case("vit-b", ("large", "checked"), 2, 32), rounds=2, seed=0, device="cpu")
    assert alive == ([False] * 7 if steps == 0 else [True] * 5 + [False] * 2)


def test_depth_can_be_changed():
    shallow, deep = (
        measure(Case("vit-b", ("LoRA",), 2, 32, layers=layers, axis="blocks"), 1, 0, "cpu")[0] for layers in (1, 3)
    )
    assert deep["saved_bytes_per_image"] > 2 * shallow["saved_bytes_per_image"]


def test_growth_is_the_slope_of_a_line():
    rows = [
        {"axis": "images", "backbone": "b", "method": "m", "batch_size": size, "image_size": 224, "layers": None,
         "peak_bytes": 100 + 7 * size, "step_seconds": 1 + 0.5 * size}
        for size in (2, 4, 8)
    ]  # fmt: skip
    rows.append({**rows[0], "axis": None, "peak_bytes": 10**9})
    (line,) = memory_and_speed.slopes(rows)
    assert line["peak_bytes_slope"] == pytest.approx(7) and line["peak_bytes_intercept"] == pytest.approx(100)
    assert line["step_seconds_slope"] == pytest.approx(0.5)
    assert line["at"] == [2, 4, 8]


def test_ratios_are_to_lora_under_the_same_circumstances():
    rows = [
        {"backbone": "b", "method": method, "batch_size": size, "image_size": 224, "layers": None, "autocast": False,
         "axis": None}
        for size in (2, 4)
        for method in ("LoRA", "S2A")
    ]  # fmt: skip
    assert memory_and_speed.lora_of(rows[3], rows) is rows[2]
    assert memory_and_speed.lora_of(rows[1], rows) is rows[0]
    assert memory_and_speed.lora_of(rows[1], rows[1:]) is None


def test_all_methods_start_as_the_base_model(vit_rows):
    losses = {name: row["first_loss"] for name, row in vit_rows.items() if "skipped" not in row}
    assert losses == {name: pytest.approx(losses["full fine-tuning"], rel=1e-6) for name in losses}


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["memory_and_speed.py", *map(str, arguments)])
    memory_and_speed.main()


def test_a_run_that_was_cut_is_resumed(monkeypatch, tmp_path):
    cases = tuple(Case("vit-b", ("LoRA",), size, 32, axis="images") for size in (1, 2))
    arguments = ("--preset", "small", "--device", "cpu", "--out", tmp_path / "out.json", "--resume")
    measured = []

    def measure_one(case, *settings):
        measured.append(case.batch_size)
        return measure(case, *settings)

    monkeypatch.setattr(memory_and_speed, "measure", measure_one)
    for count in (1, 2, 2):
        monkeypatch.setitem(PRESETS, "small", memory_and_speed.Preset(cases[:count], 1))
        run(monkeypatch, *arguments)
    result = json.loads((tmp_path / "out.json").read_text())
    assert measured == [1, 2]
    assert [row["batch_size"] for row in result["rows"]] == result["slopes"][0]["at"] == [1, 2]


def test_other_settings_are_not_resumed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "small", memory_and_speed.Preset((Case("vit-b", ("LoRA",), 1, 32),), 1))
    arguments = ("--preset", "small", "--device", "cpu", "--out", tmp_path / "out.json", "--resume")
    run(monkeypatch, *arguments)
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments, "--seed", 1)
    assert "was measured with seed 0, this run would be with 1" in capsys.readouterr().err


def test_presets_name_known_methods():
    for preset in PRESETS.values():
        assert all(set(case.methods) <= set(EVERY) for case in preset.cases)


def of_batch(batch_size, total_bytes, seconds=1.0, axis="images", method="LoRA"):
    """A row of a backbone that takes a given memory and time."""
    return {"backbone": "b", "method": method, "batch_size": batch_size, "total_bytes": total_bytes, "axis": axis,
            "step_seconds": seconds}  # fmt: skip


def test_the_largest_micro_batch_is_the_last_that_the_line_and_the_measurement_let_in():
    rows = [of_batch(1, 110), of_batch(4, 140, seconds=2.0)]  # 100 + 10 for each image
    assert [budgets.planned_batch(rows, size) for size in (99, 100, 109, 110, 119, 120, 205)] == [0, 0, 0, 1, 1, 2, 10]
    assert budgets.fit(rows, 205) == budgets.Fit(205, 10, 2.0, measured=False)
    assert budgets.fit(rows, 140) == budgets.Fit(140, 4, 2.0, measured=True)
    assert budgets.fit(rows, 109) == budgets.Fit(109, 0, None, measured=True)
    assert list(budgets.to_measure(rows, (109, 140, 150, 205, 1205), longest_step=5.0)) == [5, 10]
    rows.append(of_batch(10, 206, seconds=4.0, axis="budget"))  # a byte too much: it gives way to 9
    rows = budgets.rows_of(rows, "b", "LoRA")
    assert budgets.planned_batch(rows, 205) == 10
    assert budgets.fit(rows, 205) == budgets.Fit(205, 9, 2.5, measured=False)
    assert list(budgets.to_measure(rows, (205,), longest_step=5.0)) == [9]
    rows = budgets.rows_of([*rows, of_batch(9, 196, seconds=3.0, axis="budget")], "b", "LoRA")
    assert budgets.fit(rows, 205) == budgets.Fit(205, 9, 3.0, measured=True)
    assert budgets.line_of(rows) == pytest.approx((100, 10))  # what was measured for a budget does not bend it


def test_adding_up_gradients_keeps_its_micro_batch_and_needs_it_to_fit():
    rows = [of_batch(1, 110, 1.0), of_batch(4, 112, 2.0)]
    assert budgets.fit(rows, 10**6, micro_batch=1) == budgets.Fit(10**6, 1, 2.0, measured=True)
    assert budgets.fit(rows, 109, micro_batch=1).micro_batch == 0


def test_skipped_methods_and_single_points_have_no_figures():
    rows = [of_batch(1, 110), of_batch(4, 140), of_batch(1, 90, method="S2A")]
    rows.append({"backbone": "b", "method": "LoRA + checkpointing", "axis": "images", "skipped": "not supported"})
    (found,) = budgets.figures(rows, (140, 10**4), lambda name: None)
    assert (found["method"], found["smallest_bytes"]) == ("LoRA", 110)
    assert [budgets.cell(fitted) for fitted in found["fits"]] == ["4.00 (4)", "~4.00 (990)"]


def test_budgets_are_measured_on_models_and_resumed(monkeypatch, tmp_path, capsys):
    methods = ("LoRA", "LoRA, micro-batch 1", "S2A")
    cases = tuple(Case("vit-b", methods, size, 64, axis="images") for size in (1, 4))
    preset = memory_and_speed.Preset(cases, 1, budgets=(10**5, 2 * 10**6, 10**12), longest_step=60)
    monkeypatch.setitem(PRESETS, "small", preset)
    arguments = ("--preset", "small", "--device", "cpu", "--out", tmp_path / "out.json", "--resume")
    run(monkeypatch, *arguments)
    result = json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert {row["method"] for row in result["budgets"]} == {"LoRA", "LoRA, micro-batch 1", "S2A"}
    measured = {(row["method"], row["batch_size"]): row["total_bytes"] for row in result["rows"]}
    for row in result["budgets"]:
        assert row["smallest_bytes"] == measured[row["method"], 1] > 4 * result["rows"][0]["parameters"]
        nothing, some, most = row["fits"]
        assert nothing["micro_batch"] == 0 and not (most["measured"] and row["method"] != "LoRA, micro-batch 1")
        if row["method"] != "LoRA, micro-batch 1":  # it was run, and fits
            assert most["micro_batch"] > some["micro_batch"] > 1 and some["measured"]
            assert measured[row["method"], some["micro_batch"]] <= 2 * 10**6
    monkeypatch.setattr(memory_and_speed, "measure", lambda *_: pytest.fail("there was nothing left to measure"))
    run(monkeypatch, *arguments)
    assert json.loads((tmp_path / "out.json").read_text())["budgets"] == result["budgets"]


def test_offloading_needs_a_gpu():
    (row,) = measure(Case("vit-b", ("LoRA + checkpointing, offloaded",), 2, 32), rounds=1, seed=0, device="cpu")
    assert "needs a CUDA device" in row["skipped"]


@pytest.mark.slow
def test_compiled_methods_start_as_eager_ones_and_are_compiled_each_for_itself():
    methods = ("LoRA", *COMPILED, "S2A")
    rows = {
        row["method"]: row for row in measure(Case("vit-b", methods, 4, 64, layers=4), rounds=1, seed=0, device="cpu")
    }
    losses = {name: row["first_loss"] for name, row in rows.items()}
    assert losses == {name: pytest.approx(losses["LoRA"], rel=1e-4) for name in losses}
    assert all(rows[name]["first_step_seconds"] > 20 * rows[name]["step_seconds"] for name in COMPILED)
    peaks = [rows[f"LoRA, compiled{share}"]["peak_bytes"] for share in ("", ", keeps half", ", keeps a fifth")]
    assert min(peaks[1:]) < peaks[0]  # on tiny models the smaller budget may save less than the larger one


def test_tables_and_plots_can_be_drawn(vit_rows, tmp_path):
    rows = list(vit_rows.values())
    assert memory_and_speed.table_of(rows).row_count == len(rows)
    memory_and_speed.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
