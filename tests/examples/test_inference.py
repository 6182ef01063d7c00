"""Loading an adapter to classify with: where labels and image processor come from."""

import torch
from example_scripts import CLASSES
from finetuning import MethodArguments, ModelArguments, load_backbone, prepare_model
from inference import classify, load_classifier
from PIL import Image


def test_probabilities_are_those_of_the_saved_model(checkpoint, tmp_path):
    model, image_processor = load_backbone(ModelArguments(str(checkpoint)), list(CLASSES))
    model = prepare_model(model, MethodArguments(method="s2a"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    images = [Image.new("RGB", (20, 30), color) for color in ("red", "white")]
    expected = classify(model.eval(), image_processor, images, "cpu")

    loaded, loaded_processor = load_classifier(str(tmp_path))
    assert [loaded.config.id2label[index] for index in range(3)] == list(CLASSES)
    torch.testing.assert_close(classify(loaded, loaded_processor, images, "cpu"), expected, rtol=0, atol=0)


def test_labels_come_from_the_base_checkpoint_where_the_adapter_has_none(checkpoint, tmp_path):
    model, _ = load_backbone(ModelArguments(str(checkpoint)), [f"LABEL_{index}" for index in range(10)])
    model = prepare_model(model, MethodArguments(method="lora"))
    model.peft_config["default"].base_model_name_or_path = "moved/elsewhere"
    model.save_pretrained(tmp_path)
    loaded, _ = load_classifier(str(tmp_path), base_model=str(checkpoint))
    assert loaded.config.id2label[9] == "LABEL_9"
