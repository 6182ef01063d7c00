"""The accuracy benchmark's logic, on a backbone of a few thousand parameters."""

import json
import math
from dataclasses import replace

import accuracy
import pytest
import torch
from accuracy import METHODS, SETTINGS, Job, Setting, Split, Study
from environment import write_result
from transformers import Dinov2Config, Dinov2Model


SETTING = Setting(
    image_size=28, train_images=8, validation_images=4, test_images=4, epochs=1, batch_size=4, seeds=(0, 1),
    methods={"toy": ("linear probe", "S2A, full precision", "S2A")},
)  # fmt: skip


def toy_splits() -> dict[str, Split]:
    """Bright and dark images."""
    labels = torch.arange(8) % 2
    split = Split(labels[:, None, None] * torch.rand(8, 8, 8), labels)
    return {"train": split, "validation": split, "test": split}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    path = tmp_path_factory.mktemp("backbone")
    Dinov2Model(config).save_pretrained(path)
    return path


@pytest.fixture
def study(folder):
    return Study(folder, toy_splits(), SETTING, "cpu")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_measured(study, method):
    assert 0 <= study.run(method, 1e-2, 0, "test") <= 100
    memory = study.memory(method)
    assert memory["trainable"] > 0 and memory["peak_bytes"] > 0


def test_quantised_variants_keep_less_than_full_precision(study):
    kept = {bits: study.memory(name)["saved_bytes_per_image"] for bits, name in (
        (2, "S2A, 2 bits"), (4, "S2A"), (32, "S2A, full precision"))}  # fmt: skip
    assert kept[2] < kept[4] < kept[32]


def test_the_same_seed_gives_the_same_run(study):
    torch.manual_seed(1)
    first = study.run("S2A", 1e-2, 3, "test")
    torch.manual_seed(2)
    assert study.run("S2A", 1e-2, 3, "test") == first


def test_the_linear_probe_learns_from_the_backbones_features(folder):
    study = Study(folder, toy_splits(), replace(SETTING, epochs=40), "cpu")
    assert study.run("linear probe", 3e-2, 0, "test") == 100


def test_every_family_searches_around_its_usual_rate_and_quantised_variants_share_one():
    for setting in (SETTINGS["full"], SETTINGS["medium"]):
        keys = [job.key for job in accuracy.search_jobs(setting, {"runs": []}) if job.table == "runs"]
        for dataset, methods in setting.methods.items():
            for family in map(accuracy.family, methods):
                rates = sorted(key["rate"] for key in keys if (key["dataset"], key["method"]) == (dataset, family))
                assert len(rates) == 3 and rates[1] == METHODS[family].rate
        assert not any(key["method"] == "S2A, 2 bits" for key in keys)
        assert all(key["split"] == "validation" and key["seed"] not in setting.seeds for key in keys)


@pytest.mark.parametrize("best", [1e-6, 2e-3, 1.0])
def test_the_search_goes_on_until_the_best_rate_has_neighbours(best):
    setting, runs = replace(SETTING, methods={"toy": ("LoRA",)}), []
    for _ in range(20):
        jobs = [job for job in accuracy.search_jobs(setting, {"runs": runs}) if job.table == "runs"]
        if not jobs:
            break
        runs += [{**job.key, "accuracy": -abs(math.log(job.key["rate"] / best))} for job in jobs]
    rates = sorted(run["rate"] for run in runs)
    assert len(set(rates)) == len(rates) and rates[0] < accuracy.best_rate({"runs": runs}, "toy", "LoRA") < rates[-1]
    assert accuracy.best_rate({"runs": runs}, "toy", "LoRA") == pytest.approx(best, rel=0.7)


def test_the_rate_with_the_best_validation_accuracy_is_taken():
    shared = {"dataset": "toy", "method": "S2A, full precision", "seed": 1000}
    runs = [
        {**shared, "rate": 0.1, "split": "validation", "accuracy": 50},
        {**shared, "rate": 0.2, "split": "validation", "accuracy": 60},
        {**shared, "rate": 0.3, "split": "test", "accuracy": 99},  # must not be looked at
    ]
    assert accuracy.best_rate({"runs": runs}, "toy", "S2A") == 0.2
    assert accuracy.best_rate({"runs": []}, "toy", "S2A") == METHODS["S2A, full precision"].rate


def test_test_images_are_not_trained_on():
    splits = accuracy.load_splits("digits", SETTINGS["full"])
    assert [len(split.labels) for split in splits.values()] == [800, 200, 797]
    images = torch.cat([split.inputs.flatten(1) for split in splits.values()])
    from images import digits

    assert torch.equal(images.sum(0), digits()[0].flatten(1).sum(0)), "every image is in exactly one split"


def test_generated_tasks_have_splits_of_their_own():
    setting = replace(SETTING, train_images=16, validation_images=8, test_images=8)
    splits = accuracy.load_splits("count", setting)
    assert [len(split.labels) for split in splits.values()] == [16, 8, 8]
    images = torch.cat([split.inputs.flatten(1) for split in splits.values()])
    assert len(images.unique(dim=0)) == 32, "no image is in two splits"


def test_a_finished_result_file_is_not_run_again(tmp_path, folder, monkeypatch):
    setting = replace(SETTING, search=False, seeds=(0,), methods={"toy": ("linear probe",)})
    memory = {"method": "linear probe", "trainable": 1}
    run = {"dataset": "toy", "method": "linear probe", "rate": 1e-2, "seed": 0, "split": "test", "accuracy": 1.0}
    path = tmp_path / "result.json"
    header = {"setting": {"image_size": 28}}
    write_result(path, {**header, "memory": [memory], "runs": [run]})
    monkeypatch.setattr(accuracy, "do", lambda *args: pytest.fail("ran again"))
    result = accuracy.run_all(path, header, folder, setting, "cpu", workers=1)
    assert result["runs"] == [run]
    with pytest.raises(SystemExit, match="another setting"):
        accuracy.run_all(path, {"setting": {"image_size": 56}}, folder, setting, "cpu", workers=1)


def test_a_row_holds_what_identifies_it_and_what_was_found(folder, monkeypatch):
    monkeypatch.setattr(accuracy, "load_splits", lambda dataset, setting: toy_splits())
    key = {"dataset": "toy", "method": "linear probe", "rate": 1e-2, "seed": 0, "split": "test"}
    row = accuracy.do(Job("runs", "toy", key), folder, SETTING, "cpu")
    assert row.items() >= key.items() and row["accuracy"] % 12.5 == 0
    assert json.loads(json.dumps(row)) == row


def test_the_cost_of_quantisation_is_that_of_pairs_of_equal_seeds():
    pairs = {0: (80.0, 81.0), 1: (84.0, 83.0), 2: (82.0, 81.0), 3: (None, 99.0)}
    runs = [
        {"dataset": "toy", "method": method, "seed": seed, "split": "test", "accuracy": value}
        for seed, values in pairs.items()
        for method, value in zip(("S2A, full precision", "S2A"), values)
        if value is not None
    ]
    cost = accuracy.cost_of_quantisation({"runs": runs}, "toy")
    assert cost["pairs"] == 3
    assert cost["difference"] == pytest.approx(-1 / 3)
    half = 4.302653 * 2 / math.sqrt(3) / math.sqrt(3)  # Student's t for two degrees of freedom, from a table
    assert (cost["low"], cost["high"]) == pytest.approx((-1 / 3 - half, -1 / 3 + half))
    assert cost["seed_noise"] == pytest.approx(2)
    assert accuracy.cost_of_quantisation({"runs": runs[:2]}, "toy") is None


def test_the_mean_over_tasks_is_paired_by_the_seeds_that_all_of_them_have():
    values = {"one": {0: (10, 8), 1: (10, 6), 2: (0, 99)}, "two": {0: (20, 20), 1: (30, 26)}}
    runs = [
        {"dataset": dataset, "method": method, "seed": seed, "split": "test", "accuracy": value}
        for dataset, seeds in values.items()
        for seed, both in seeds.items()
        for method, value in zip(("S2A", "LoRA"), both)
    ]
    found = accuracy.paired_difference({"runs": runs}, "S2A", "LoRA", ["one", "two"])
    assert found["pairs"] == 2 and found["difference"] == pytest.approx((1 + 4) / 2)
    assert accuracy.paired_difference({"runs": runs}, "S2A", "LoRA", ["one", "three"]) is None
