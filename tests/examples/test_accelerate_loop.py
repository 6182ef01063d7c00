"""The loop on Accelerate: one process and two (DDP over gloo) train the same adapter."""

import re

import pytest
from example_scripts import EXAMPLES, run_script
from safetensors.torch import load_file


TWO_PROCESSES = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


def fine_tune(checkpoint, image_folders, output_dir, *options, **processes):
    return run_script(
        EXAMPLES / "accelerate_loop.py",
        *("--model_name_or_path", checkpoint, "--output_dir", output_dir, "--cpu"),
        *("--train_dir", image_folders / "train", "--validation_dir", image_folders / "validation"),
        *("--num_train_epochs", "2", "--batch_size", "12", "--learning_rate", "1e-2", "--seed", "3"),
        *options,
        **processes,
    )


def accuracies(printed):
    return [float(value) for value in re.findall(r"accuracy ([\d.]+)", printed)]


@pytest.mark.parametrize(
    ("activation_bits", "tolerance", "processes"),
    # Columns of norms are standardised over the tokens of a batch, so a process with half of the batch rounds
    # differently.
    [(0, 1e-5, {"processes": 2}), pytest.param(4, 0.1, {"launcher": TWO_PROCESSES}, marks=pytest.mark.slow)],
)
def test_two_processes_end_with_the_adapter_of_one(
    checkpoint, image_folders, tmp_path, activation_bits, tolerance, processes
):
    options = ("--method", "s2a", "--augmentation", "none", "--activation_bits", str(activation_bits))
    printed = fine_tune(checkpoint, image_folders, tmp_path / "one", *options)
    assert "1 processes on cpu" in printed
    assert accuracies(printed)[-1] > 0.9, "nothing was learned"
    printed = fine_tune(checkpoint, image_folders, tmp_path / "two", *options, **processes)
    assert "2 processes on cpu" in printed
    assert accuracies(printed)[-1] > 0.9
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    scale = max(value.abs().max() for value in one.values()) if activation_bits else 1
    for name, value in one.items():
        assert (value - two[name]).abs().max() < tolerance * scale, name


def test_mixed_precision_and_gradient_accumulation_learn_with_lora(checkpoint, image_folders, tmp_path):
    options = ("--method", "lora", "--mixed_precision", "bf16", "--gradient_accumulation_steps", "2")
    printed = fine_tune(checkpoint, image_folders, tmp_path, *options, "--num_train_epochs", "4")
    assert len(accuracies(printed)) == 4
    assert accuracies(printed)[-1] > 0.9
