"""What a reader of the Hub finds in an adapter's folder who does not have the package."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_s2a import ActivationQuantizationConfig, S2ABiasConfig, S2AConfig, S2ASideConfig
from peft_s2a.callbacks import MemoryCallback


BASE = "someone/a-backbone"


@pytest.fixture
def base() -> transformers.PreTrainedModel:
    model = families.build("vit")
    model.config._name_or_path = BASE
    model.name_or_path = BASE
    return model


@pytest.fixture
def uploads(monkeypatch) -> list[dict[str, str]]:
    """What would be uploaded, {file: text}; stands in for the Hub's client."""
    found: list[dict[str, str]] = []

    def upload(self, working_dir, repo_id, *args, **kwargs):
        found.append({path.name: path.read_bytes().decode(errors="replace") for path in Path(working_dir).iterdir()})

    from peft_s2a.card import _with_card

    monkeypatch.setattr("transformers.utils.PushToHubMixin._upload_modified_files", _with_card(upload))
    client = SimpleNamespace(create_repo=lambda name, **options: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *args, **kwargs: client)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda *args, **kwargs: client)
    card = ModelCard("---\ntags:\n- from-the-hub\n---\n# A card of the Hub\n")
    for place in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{place}.create_and_tag_model_card", lambda *args, **kwargs: card)
    return found


def check(text: str, *phrases: str, tags: set[str]) -> ModelCard:
    card = ModelCard(text)
    for phrase in ("pip install peft-s2a", "import peft_s2a", "PeftModel.from_pretrained(", BASE, *phrases):
        assert phrase in card.text, phrase
    assert card.text.index("import peft_s2a") < card.text.index("PeftModel.from_pretrained(")
    assert card.data["library_name"] == "peft" and card.data["base_model"] == BASE
    assert tags | {"s2a"} <= set(card.data["tags"])
    assert card.text.count("## How to load this adapter") == 1
    return card


CASES = {
    "all": (S2AConfig(), {"s2a-bias", "s2a-prompt", "s2a-side"}, "backward: 4 bits"),
    "bias, full precision": (S2ABiasConfig(activation_quantization=None), {"s2a-bias"}, "backward: full precision"),
    "ladder": (S2ASideConfig(side_mode="ladder"), {"s2a-ladder"}, "Structures: ladder"),
    "mixed bits": (
        S2ABiasConfig(activation_quantization=ActivationQuantizationConfig(bits={"norm": 8, "default": 2})),
        {"s2a-bias"},
        "backward: 2 to 8 bits, by operator",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_save_pretrained(case, base, tmp_path):
    config, tags, phrase = CASES[case]
    model = get_peft_model(base, config)
    for _ in range(2):  # the second time the card is there already
        model.save_pretrained(tmp_path)
        check((tmp_path / "README.md").read_text(), phrase, "ViTForImageClassification.from_pretrained(", tags=tags)


def test_the_configuration_says_how_to_load_it(base, tmp_path):
    get_peft_model(base, S2AConfig(how_to_load="run this")).save_pretrained(tmp_path / "peft")
    base = families.build("vit")
    base.add_adapter(S2AConfig())
    base.save_pretrained(tmp_path / "transformers")
    for folder in ("peft", "transformers"):
        written = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert "pip install peft-s2a" in written["how_to_load"] and "import peft_s2a" in written["how_to_load"]


def test_push_to_hub_of_a_peft_model(base, uploads):
    get_peft_model(base, S2AConfig()).push_to_hub("adapter")
    (files,) = uploads
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files.keys()
    card = check(files["README.md"], tags={"s2a-side", "from-the-hub"})
    assert "# A card of the Hub" in card.text


def test_push_to_hub_of_a_transformers_model(base, uploads):
    base.add_adapter(S2ABiasConfig())
    base.push_to_hub("adapter")
    (files,) = uploads
    check(files["README.md"], tags={"s2a-bias"})


def test_the_trainers_card(base, tmp_path):
    model = get_peft_model(base, S2AConfig())
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], label_names=["labels"]
    )
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 5} for index in range(4)]
    trainer = Trainer(model, arguments, train_dataset=images)
    trainer.add_callback(MemoryCallback(trainer, print_report=False))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = check((tmp_path / "README.md").read_text(), "measured on cpu at batch size 2", tags={"s2a-prompt"})
    assert "## Training procedure" in card.text


def test_other_tuners_have_their_own_card(base, tmp_path):
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "peft_s2a" not in (tmp_path / "README.md").read_text()
    assert "how_to_load" not in (tmp_path / "adapter_config.json").read_text()
