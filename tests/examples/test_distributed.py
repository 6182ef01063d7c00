"""The configurations of `examples/distributed/` in two processes on the CPU: losses, adapters and resuming."""

import importlib.util
import json
import shutil

import pytest
import yaml
from example_scripts import EXAMPLES, run_script
from safetensors.torch import load_file


CONFIGURATIONS = EXAMPLES / "distributed"
DDP = ("-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / "ddp.yaml"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FSDP2 = ("-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / "fsdp2.yaml"))
FREE_PORT = ("--main_process_port", "0")
FSDP2_ON_CPU = (*FSDP2, *FREE_PORT, str(CONFIGURATIONS / "fsdp_on_cpu.py"))
ENGINES = {"ddp": (*DDP, *FREE_PORT), "torchrun": TORCHRUN, "fsdp2": FSDP2_ON_CPU}


@pytest.fixture(scope="module")
def train(checkpoint, image_folders, tmp_path_factory):
    def run(*options, launcher=(), output_dir=None):
        """Losses and adapter of 4 steps with batches of 8."""
        output_dir = output_dir or tmp_path_factory.mktemp("run")
        run_script(
            EXAMPLES / "image_classification.py",
            *("--model_name_or_path", checkpoint, "--output_dir", output_dir, "--max_steps", "4"),
            *(("--ddp_backend", "gloo") if "deepspeed" in "".join(launcher) else ("--use_cpu",)),
            *("--train_dir", image_folders / "train", "--validation_dir", image_folders / "validation"),
            *("--method", "s2a", "--activation_bits", "0", "--augmentation", "none", "--learning_rate", "1e-2"),
            *("--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "2"),
            *("--per_device_train_batch_size", "4" if launcher else "8", *options),
            launcher=launcher,
        )
        history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        return output_dir, losses, load_file(output_dir / "adapter_model.safetensors")

    return run


@pytest.fixture(scope="module")
def alone(train):
    return train()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one_and_resume(engine, train, alone, tmp_path):
    _, expected_losses, expected = alone
    folder, losses, adapter = train(launcher=ENGINES[engine])
    assert losses == pytest.approx(expected_losses, rel=1e-4) and losses[-1] < losses[0]
    assert adapter.keys() == expected.keys()
    for name, value in expected.items():
        assert adapter[name].shape == value.shape and (adapter[name] - value).abs().max() < 1e-4, name
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    resume = ("--resume_from_checkpoint", "last")
    _, _, resumed = train(*resume, launcher=ENGINES[engine], output_dir=tmp_path)
    assert all(resumed[name].equal(value) for name, value in adapter.items())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero2_through_accelerate_and_trainer(train, alone, monkeypatch):
    """Two processes on a CPU, which Accelerate counts as two if it is given their backend, and as one otherwise."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / "deepspeed_zero2.yaml"))
    _, expected_losses, expected = alone
    _, losses, adapter = train(launcher=(*launcher, *FREE_PORT))
    assert losses == pytest.approx(expected_losses, rel=1e-3) and losses[-1] < losses[0]
    assert adapter.keys() == expected.keys()
    for name, value in expected.items():
        assert adapter[name].shape == value.shape and (adapter[name] - value).abs().max() < 1e-3, name


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_known_to_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    written, read = yaml.safe_load(path.read_text()), load_config_from_file(str(path))
    assert read.num_processes == written["num_processes"] == 2
    assert read.distributed_type == written["distributed_type"]
