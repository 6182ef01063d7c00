"""The module the scripts share: reading images, preprocessing them, and making a model trainable by each method."""

import random

import datasets
import evaluate
import numpy as np
import pytest
import torch
from example_scripts import CLASSES
from finetuning import (
    ACCURACY,
    METHODS,
    DataArguments,
    ImageTransform,
    MethodArguments,
    ModelArguments,
    load_backbone,
    load_images,
    prepare_model,
    trainable_parameters,
)
from PIL import Image
from sklearn.metrics import accuracy_score
from transformers import (
    AutoImageProcessor,
)


class TestLoadImages:
    def test_image_folders_become_two_splits_with_class_names(self, image_folders):
        images = load_images(
            DataArguments(train_dir=f"{image_folders}/train", validation_dir=f"{image_folders}/validation")
        )
        assert {split: len(rows) for split, rows in images.items()} == {"train": 48, "validation": 12}
        assert images["train"].features["label"].names == list(CLASSES)
        assert isinstance(images["train"][0]["image"], Image.Image)

    def test_without_validation_images_a_share_of_the_training_images_is_held_out(self, image_folders):
        images = load_images(DataArguments(train_dir=f"{image_folders}/train", validation_share=0.25))
        assert {split: len(rows) for split, rows in images.items()} == {"train": 36, "validation": 12}

    def test_samples_are_limited_at_random_but_alike_for_a_seed(self, image_folders):
        arguments = DataArguments(train_dir=f"{image_folders}/train", max_train_samples=9, max_eval_samples=3)
        one, same, other = (load_images(arguments, seed=seed) for seed in (1, 1, 2))
        assert (len(one["train"]), len(one["validation"])) == (9, 3)
        pixels = [[image.tobytes() for image in images["train"]["image"]] for images in (one, same, other)]
        assert pixels[0] == pixels[1] != pixels[2]

    def test_a_folder_serves_as_dataset_name(self, image_folders):
        images = load_images(DataArguments(dataset_name=str(image_folders)))
        assert {split: len(rows) for split, rows in images.items()} == {"train": 48, "validation": 12}

    @pytest.mark.parametrize("suffix", ["parquet", "csv"])
    def test_files_with_other_column_names_and_labels_as_text(self, image_folders, tmp_path, suffix):
        files = sorted(image_folders.glob("train/*/*.png"))
        rows = datasets.Dataset.from_dict(
            {
                "photo": list(map(str, files)),
                "kind": [file.parent.name for file in files],
                "id": list(range(len(files))),
            }
        )
        if suffix == "parquet":
            rows = rows.cast_column("photo", datasets.Image())
            rows.to_parquet(tmp_path / "train.parquet")
        else:
            rows.to_csv(tmp_path / "train.csv", index=False)
        images = load_images(
            DataArguments(
                train_file=f"{tmp_path}/train.{suffix}",
                image_column_name=None if suffix == "parquet" else "photo",
                label_column_name="kind",
                validation_share=0.5,
            )
        )
        assert images["train"].column_names == ["image", "label"]
        assert images["train"].features["label"].names == list(CLASSES)
        example = images["validation"][0]
        brightness = np.asarray(example["image"].convert("L")).mean()
        assert CLASSES[example["label"]] == CLASSES[int(np.abs(np.array([30, 128, 220]) - brightness).argmin())]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "--dataset_name, --train_dir and --train_file"),
            ({"dataset_name": "a", "train_dir": "b"}, "got dataset_name, train_dir"),
            ({"train_file": "rows.xlsx"}, "must end in one of"),
        ],
    )
    def test_unclear_sources_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            load_images(DataArguments(**arguments))

    def test_unknown_columns_are_refused_with_the_known_ones(self, image_folders):
        with pytest.raises(ValueError, match=r"--label_column_name .* got colour.* columns are image, label"):
            load_images(DataArguments(train_dir=f"{image_folders}/train", label_column_name="colour"))


class TestImageTransform:
    @pytest.fixture
    def batch(self):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 4), dtype=np.uint8)
        images = [Image.fromarray(image) for image in pixels]
        return {"image": [images[0].convert("L"), images[1].convert("RGB"), images[2]], "label": [2, 0, 1]}

    def test_without_augmentation_it_is_the_image_processor(self, checkpoint, batch):
        image_processor = AutoImageProcessor.from_pretrained(checkpoint)
        outputs = ImageTransform(image_processor)(batch)
        expected = image_processor([image.convert("RGB") for image in batch["image"]], return_tensors="pt")
        torch.testing.assert_close(torch.stack(outputs["pixel_values"]), expected["pixel_values"], rtol=0, atol=0)
        assert outputs["labels"] == [2, 0, 1]

    def test_flips_half_of_the_images(self, checkpoint, batch):
        image_processor = AutoImageProcessor.from_pretrained(checkpoint)
        transform = ImageTransform(image_processor, "flip")
        image = {"image": batch["image"][1:2], "label": [0]}
        (plain,) = ImageTransform(image_processor)(image)["pixel_values"]
        random.seed(0)
        flipped = 0
        for _ in range(40):
            (outputs,) = transform(image)["pixel_values"]
            # Resizing a mirror image rounds a grey level differently here and there.
            mirrored = torch.allclose(outputs, plain.flip(-1), atol=0.02)
            assert mirrored or torch.equal(outputs, plain)
            flipped += mirrored
        assert 10 <= flipped <= 30

    def test_crops_follow_the_random_state(self, checkpoint, batch):
        transform = ImageTransform(AutoImageProcessor.from_pretrained(checkpoint), "crop_flip")
        random.seed(0)
        first, second = (torch.stack(transform(batch)["pixel_values"]) for _ in range(2))
        random.seed(0)
        again = torch.stack(transform(batch)["pixel_values"])
        assert first.shape == (3, 3, 16, 16)
        assert torch.equal(first, again)
        assert not torch.equal(first, second)


class TestMethods:
    @pytest.mark.parametrize("method", METHODS)
    def test_trains_what_it_says_from_the_base_models_outputs(self, checkpoint, method):
        torch.manual_seed(0)
        model, _ = load_backbone(ModelArguments(str(checkpoint)), list(CLASSES))
        pixel_values = torch.randn(2, 3, 16, 16)
        model.eval()
        expected = model(pixel_values=pixel_values).logits
        total = trainable_parameters(model)
        model = prepare_model(model, MethodArguments(method=method))
        model.eval()
        torch.testing.assert_close(model(pixel_values=pixel_values).logits, expected, rtol=0, atol=0)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        head = {name for name in trained if "classifier" in name}
        assert len(head) == 2
        if method == "full":
            assert trainable_parameters(model) == total
        elif method == "linear":
            assert trained == head
        else:
            assert len(trained) > len(head)
            assert trainable_parameters(model) < total

    def test_options_reach_the_configurations(self, checkpoint):
        model, _ = load_backbone(ModelArguments(str(checkpoint)), list(CLASSES))
        options = {"side_rank": 5, "num_prompt_tokens": 3, "lora_rank": 2, "lora_alpha": 7}
        configs = {
            method: METHODS[method].config(model, MethodArguments(method=method, **options))
            for method in ("s2a", "s2a_prompt", "s2a_side", "lora")
        }
        assert (configs["s2a"].side_rank, configs["s2a"].num_prompt_tokens) == (5, 3)
        assert configs["s2a_prompt"].num_prompt_tokens == 3
        assert configs["s2a_side"].side_rank == 5
        assert (configs["lora"].r, configs["lora"].lora_alpha) == (2, 7)

    @pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("s2a")])
    def test_s2a_keeps_4_bit_activations_unless_told_otherwise(self, checkpoint, method):
        model, _ = load_backbone(ModelArguments(str(checkpoint)), list(CLASSES))
        default, two, full = (
            METHODS[method].config(model, MethodArguments(method=method, **options)).activation_quantization
            for options in ({}, {"activation_bits": 2}, {"activation_bits": 0})
        )
        assert (default.bits, two.bits, full) == (4, 2, None)

    def test_a_ladder_is_of_side_branches_only(self, checkpoint):
        model, _ = load_backbone(ModelArguments(str(checkpoint)), list(CLASSES))
        config = METHODS["s2a"].config(model, MethodArguments(method="s2a", side_mode="ladder"))
        assert (config.side_mode, config.structures) == ("ladder", ("side",))


def test_accuracy_metric_counts_equal_labels():
    metric = evaluate.load(str(ACCURACY), keep_in_memory=True)
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(0, 3, (2, 50))
    assert metric.compute(predictions=predictions, references=references) == {
        "accuracy": accuracy_score(references, predictions)
    }
