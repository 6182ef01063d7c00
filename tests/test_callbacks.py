import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from peft_s2a.callbacks import MemoryCallback


def lora_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["classifier"]))


class Listener(TrainerCallback):
    """Sees what TensorBoard and the like see."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trainer(tmp_path, **arguments):
    torch.manual_seed(1)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 10} for index in range(16)]
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 2} | arguments
    settings |= {
        "report_to": [],
        "save_strategy": "no",
        "label_names": ["labels"],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    listener = Listener()
    trainer = Trainer(
        lora_model(), TrainingArguments(str(tmp_path), **settings), train_dataset=rows, callbacks=[listener]
    )
    return trainer, listener


def test_logs_reach_others_and_the_trainers_own_logs_stay(tmp_path, capsys):
    run, listener = trainer(tmp_path)
    callback = MemoryCallback(run)
    run.add_callback(callback)
    run.train()
    memory = [logs for logs in listener.logs if "peak_memory_mib" in logs]
    assert len(memory) == 2 and all(logs["step_seconds"] > 0 for logs in memory)
    assert memory[-1]["peak_memory_mib"] == pytest.approx(callback.report.peak_bytes / 2**20, abs=0.01)
    assert memory[-1]["saved_activations_mib"] == pytest.approx(callback.report.saved_bytes / 2**20, abs=0.01)
    assert sum("loss" in logs for logs in listener.logs) == 2
    assert capsys.readouterr().out.count("memory of a training step") == 1


def test_report_is_of_a_training_step(tmp_path):
    run, _ = trainer(tmp_path)
    callback = MemoryCallback(run, print_report=False)
    run.add_callback(callback)
    run.train()
    assert callback.report.batch_size == 4
    assert callback.report.optimizer_bytes > 0 and callback.report.step_seconds > 0
    assert "training_step" not in vars(run)


def test_training_is_not_changed(tmp_path):
    results = []
    for watched in (False, True):
        run, _ = trainer(tmp_path, seed=3)
        if watched:
            run.add_callback(MemoryCallback(run, print_report=False))
        run.train()
        results.append({name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())


@pytest.mark.parametrize("arguments", [{"max_steps": 1}, {"gradient_accumulation_steps": 2}, {"logging_steps": 100}])
def test_short_runs_accumulation_and_rare_logs_are_reported_too(tmp_path, arguments):
    run, listener = trainer(tmp_path, **arguments)
    callback = MemoryCallback(run, print_report=False)
    run.add_callback(callback)
    run.train()
    assert callback.report is not None and callback.report.batch_size == 4
    assert any("saved_activations_mib" in logs for logs in listener.logs)
