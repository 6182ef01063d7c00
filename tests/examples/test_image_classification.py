"""The Trainer script: what it prints and saves, and that a resumed run ends where an uninterrupted one does."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import image_classification
import pytest
from example_scripts import CLASSES, EXAMPLES, run_script
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification


def fine_tune(checkpoint, image_folders, output_dir, *options):
    return run_script(
        EXAMPLES / "image_classification.py",
        *("--model_name_or_path", checkpoint, "--output_dir", output_dir),
        *("--train_dir", image_folders / "train", "--validation_dir", image_folders / "validation"),
        *("--per_device_train_batch_size", "8", "--learning_rate", "1e-2"),
        *options,
    )


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, image_folders, tmp_path_factory):
    """(what was printed, the output folder) of three epochs with S2A: checkpoints after 6, 12 and 18 steps."""
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    options = ("--method", "s2a", "--num_train_epochs", "3", "--save_total_limit", "3")
    return fine_tune(checkpoint, image_folders, output_dir, *options), output_dir


def test_reports_accuracy_parameters_time_and_memory(uninterrupted):
    printed, output_dir = uninterrupted
    accuracy = json.loads((output_dir / "all_results.json").read_text())["eval_accuracy"]
    assert accuracy > 0.6  # three classes
    for line in ("accuracy", "trainable parameters", "time", "peak memory of a training step"):
        assert line in printed
    assert f"{accuracy:.4f}" in printed


def test_adapter_folder_classifies_with_the_folders_names(uninterrupted, image_folders):
    images = [image_folders / "validation" / name / "0.png" for name in CLASSES]
    printed = run_script(
        EXAMPLES / "inference.py", "--adapter", uninterrupted[1], "--images", *images, "--top_k", "2", "--json"
    )
    results = json.loads(printed)
    assert [result["image"] for result in results] == list(map(str, images))
    assert sum(result["labels"][0] == name for result, name in zip(results, CLASSES, strict=True)) >= 2
    for result in results:
        assert len(set(result["labels"])) == 2 and set(result["labels"]) < set(CLASSES)
        assert 1 >= sum(result["probabilities"]) >= result["probabilities"][0] >= result["probabilities"][1] >= 0


def test_a_resumed_run_goes_on_from_the_checkpoint_and_ends_alike(uninterrupted, checkpoint, image_folders, tmp_path):
    shutil.copytree(uninterrupted[1] / "checkpoint-12", tmp_path / "checkpoint-12")
    options = ("--method", "s2a", "--num_train_epochs", "3", "--resume_from_checkpoint", "last")
    fine_tune(checkpoint, image_folders, tmp_path, *options)
    assert not (tmp_path / "checkpoint-6").exists(), "it started over"
    assert (tmp_path / "checkpoint-18").exists()
    expected, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (uninterrupted[1], tmp_path))
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert (value - resumed[name]).abs().max() < 1e-5, name


def test_a_linear_probe_is_saved_as_a_complete_model(checkpoint, image_folders, tmp_path):
    printed = fine_tune(checkpoint, image_folders, tmp_path, "--method", "linear", "--max_steps", "2")
    assert "linear probe" in printed
    saved = AutoModelForImageClassification.from_pretrained(tmp_path)
    base = AutoModelForImageClassification.from_pretrained(checkpoint)
    assert [saved.config.id2label[index] for index in range(3)] == list(CLASSES)
    for name, parameter in base.vit.named_parameters():
        assert (saved.vit.get_parameter(name) == parameter).all(), name


def test_pushes_adapter_labels_processor_and_card_to_the_hub(checkpoint, image_folders, tmp_path, monkeypatch):
    uploads = []

    class Hub:
        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path, **options):
            uploads.append((repo_id, {file.name for file in Path(folder_path).iterdir()}))
            return SimpleNamespace(is_done=lambda: True, result=lambda: None)

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    command = (
        *("image_classification.py", "--model_name_or_path", checkpoint, "--output_dir", tmp_path / "photos"),
        *("--train_dir", image_folders / "train", "--method", "s2a_bias", "--max_steps", "2", "--use_cpu"),
        *("--push_to_hub", "--hub_strategy", "end"),
    )
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    image_classification.main()
    ((repo_id, files),) = uploads
    assert repo_id == "me/photos"
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "config.json", "preprocessor_config.json"}
    assert {"image-classification", "s2a_bias"} <= set(ModelCard.load(tmp_path / "photos" / "README.md").data.tags)
