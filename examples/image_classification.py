"""Fine-tune an image classifier with S2A, LoRA, a linear probe or in full, with transformers' `Trainer`.

    python examples/image_classification.py --dataset_name uoft-cs/cifar10 --method s2a --output_dir outputs/cifar10
    python examples/image_classification.py --train_dir photos/train --validation_dir photos/val \\
        --model_name_or_path facebook/dinov2-small --method s2a_side --side_rank 16 --num_train_epochs 10

All of `TrainingArguments` is understood: `--bf16`, `--gradient_accumulation_steps`, `--push_to_hub`, and so on. A run
that was cut off goes on with `--resume_from_checkpoint last`. On several GPUs: `accelerate launch` or `torchrun`
instead of `python`. The output folder holds what `examples/inference.py` needs: the adapter, the labels and the image
processor.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
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
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator, set_seed
from transformers.trainer_utils import get_last_checkpoint

from peft_s2a import profile_memory


@dataclass
class FineTuningArguments(TrainingArguments):
    output_dir: str = field(default="outputs/image_classification", metadata={"help": "Where everything is written."})
    learning_rate: float | None = field(default=None, metadata={"help": "None: the method's own default."})
    num_train_epochs: float = 5.0
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warm-up, or their share if below 1."})
    lr_scheduler_type: str = "cosine"
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    logging_steps: float = 10
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    report_to: str = "none"


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, MethodArguments, FineTuningArguments))
    model_args, data_args, method_args, args = parser.parse_args_into_dataclasses()
    if args.learning_rate is None:
        args.learning_rate = METHODS[method_args.method].learning_rate
    if args.resume_from_checkpoint == "last":  # none yet: a run that starts now
        args.resume_from_checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    # The transform makes the columns the model takes, so Trainer must not drop the others before it; and it cannot
    # read the name of the labels off a PeftModel.
    args.remove_unused_columns = False
    args.label_names = ["labels"]
    set_seed(args.seed)

    images = load_images(data_args, seed=args.seed)
    model, image_processor = load_backbone(model_args, images["train"].features["label"].names)
    model.add_model_tags(["image-classification", method_args.method])  # of the model card
    model = prepare_model(model, method_args)
    metric = load_accuracy()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=images["train"].with_transform(ImageTransform(image_processor, data_args.augmentation)),
        eval_dataset=images["validation"].with_transform(ImageTransform(image_processor)),
        data_collator=default_data_collator,
        processing_class=image_processor,
        compute_metrics=lambda evaluated: metric.compute(
            predictions=evaluated.predictions.argmax(-1), references=evaluated.label_ids
        ),
    )

    start = time.perf_counter()
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    metrics = trained.metrics | trainer.evaluate()
    trainer.save_metrics("all", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        model.config.save_pretrained(args.output_dir)  # the labels, for examples/inference.py
    if args.push_to_hub:
        trainer.push_to_hub(tasks="image-classification", dataset=data_args.dataset_name or "local images")
    else:
        trainer.save_model()

    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.accelerator.print(f"accuracy {metrics['eval_accuracy']:.4f}, saved to {args.output_dir}")
    elif trainer.is_world_process_zero():  # one process alone can take a step of a model that is not sharded
        size = min(args.per_device_train_batch_size, len(trainer.train_dataset))
        batch = default_data_collator([trainer.train_dataset[index] for index in range(size)])
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        memory = profile_memory(model, batch, autocast=autocast)
        table = Table(
            title=f"{METHODS[method_args.method].title} on {model_args.model_name_or_path}", show_header=False
        )
        table.add_row("accuracy", f"{metrics['eval_accuracy']:.4f}")
        table.add_row("trainable parameters", f"{trainable_parameters(model):,}")
        table.add_row("time", f"{seconds:.1f} s")
        table.add_row("peak memory of a training step", f"{memory.peak_bytes / 2**20:.1f} MiB")
        table.add_row("saved to", args.output_dir)
        Console().print(table)


if __name__ == "__main__":
    main()
