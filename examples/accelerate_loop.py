"""The same fine-tuning as `image_classification.py`, without `Trainer`: a plain loop on Accelerate.

    python examples/accelerate_loop.py --train_dir photos/train --method s2a --output_dir outputs/photos
    accelerate launch --num_processes 2 examples/accelerate_loop.py --train_dir photos/train --method s2a
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py --cpu --train_dir photos/train

The last line runs two processes on the CPU, over gloo: `--multi_gpu` is what makes `accelerate launch` start torch's
launcher. `--batch_size` counts the images of all processes together, and which images make a batch depends on `--seed`
alone, so one process and several compute the same steps (up to rounding, and to augmentation, which each process draws
for itself).
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from finetuning import (
    METHODS,
    DataArguments,
    ImageTransform,
    MethodArguments,
    ModelArguments,
    load_accuracy,
    load_backbone,
    load_images,
    prepare_model,
    trainable_parameters,
)
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser, default_data_collator, get_scheduler


@dataclass
class LoopArguments:
    output_dir: str = field(default="outputs/accelerate_loop", metadata={"help": "Where the adapter is saved."})
    num_train_epochs: int = 5
    batch_size: int = field(default=32, metadata={"help": "Images in a batch, over all processes."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches for each optimizer step."})
    learning_rate: float | None = field(default=None, metadata={"help": "None: the method's own default."})
    weight_decay: float = 0.0
    warmup_share: float = field(default=0.1, metadata={"help": "Share of the steps with a rising learning rate."})
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    num_workers: int = field(default=0, metadata={"help": "Processes that read images, for each training process."})
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is a GPU."})
    seed: int = 0


def fine_tune(
    accelerator: Accelerator, model: torch.nn.Module, batches: DataLoader, args: LoopArguments
) -> Iterator[tuple[int, float]]:
    """Train the parameters of `model` that require gradients. Yields (epoch, mean loss) after each epoch."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        fused=True,  # as Trainer does: one kernel for all of an adapter's many small tensors
    )
    model, batches, optimizer = accelerator.prepare(model, batches, optimizer)
    steps = args.num_train_epochs * math.ceil(len(batches) / args.gradient_accumulation_steps)
    scheduler = get_scheduler("cosine", optimizer, round(args.warmup_share * steps), steps)
    for epoch in range(args.num_train_epochs):
        model.train()
        total = torch.zeros((), device=accelerator.device)
        for batch in tqdm(
            batches, desc=f"epoch {epoch + 1}", leave=False, disable=not accelerator.is_local_main_process
        ):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
            total += loss.detach()
        yield epoch, accelerator.reduce(total / len(batches), "mean").item()


@torch.inference_mode()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, batches: DataLoader) -> float:
    """Accuracy of `model` over `batches`, which `accelerator.prepare` has seen."""
    model.eval()
    accuracy = load_accuracy()
    for batch in batches:
        predictions = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
        accuracy.add_batch(predictions=predictions, references=references)
    return accuracy.compute()["accuracy"]


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, MethodArguments, LoopArguments))
    model_args, data_args, method_args, args = parser.parse_args_into_dataclasses()
    if args.learning_rate is None:
        args.learning_rate = METHODS[method_args.method].learning_rate
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    set_seed(args.seed)

    with accelerator.main_process_first():
        images = load_images(data_args, seed=args.seed)
    model, image_processor = load_backbone(model_args, images["train"].features["label"].names)
    model = prepare_model(model, method_args)
    train_batches = DataLoader(
        images["train"].with_transform(ImageTransform(image_processor, data_args.augmentation)),
        batch_size=args.batch_size,
        shuffle=True,
        collate_fn=default_data_collator,
        num_workers=args.num_workers,
    )
    eval_batches = accelerator.prepare(
        DataLoader(
            images["validation"].with_transform(ImageTransform(image_processor)),
            batch_size=args.batch_size,
            collate_fn=default_data_collator,
            num_workers=args.num_workers,
        )
    )

    accelerator.print(
        f"{METHODS[method_args.method].title}: {trainable_parameters(model):,} trainable parameters, "
        f"{accelerator.num_processes} processes on {accelerator.device.type}"
    )
    start = time.perf_counter()
    for epoch, loss in fine_tune(accelerator, model, train_batches, args):
        accuracy = evaluate(accelerator, model, eval_batches)
        accelerator.print(
            f"epoch {epoch + 1}: loss {loss:.4f}, accuracy {accuracy:.4f}, {time.perf_counter() - start:.1f} s"
        )

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        model.config.save_pretrained(args.output_dir)  # the labels, for inference.py
        image_processor.save_pretrained(args.output_dir)
        print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
