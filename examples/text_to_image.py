"""Teach Stable Diffusion a subject from a few pictures of it, with S2A or LoRA on the denoiser, in the manner of DreamBooth.

    python examples/text_to_image.py --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 --images photos/dog \\
        --prompt "a photo of sks dog" --validation_prompt "sks dog in a bucket" --steps 400

The pipeline is a folder or a Hub id of the `StableDiffusionPipeline` kind: one text encoder, a UNet that predicts noise or
velocity. Every picture is cropped to a square and paired with the same prompt (Ruiz et al. 2023, arXiv:2208.12242, without the
prior-preservation term). Text encoder and autoencoder stay frozen and run once, before training: their outputs are small.

Writes the adapter to `--output_dir` with `save_pretrained`, to be loaded with `PeftModel.from_pretrained(pipeline.unet, ...)`; an
image of `--validation_prompt` beside it; and prints what a training step takes with S2A and with LoRA.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from peft import LoraConfig, PeftConfig, get_peft_model
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import HfArgumentParser, set_seed

from peft_s2a import S2AConfig, profile_memory


IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CONFIGS: dict[str, PeftConfig] = {
    "s2a": S2AConfig(),
    "lora": LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
}


@dataclass
class Arguments:
    pipeline: str = field(metadata={"help": "A Stable Diffusion pipeline: a folder or a Hub id."})
    images: str = field(metadata={"help": "Folder with a few pictures of the subject."})
    prompt: str = field(metadata={"help": "What the pictures show, with a rare word for the subject."})
    validation_prompt: str | None = field(default=None, metadata={"help": "Draw this after training."})
    method: Literal["s2a", "lora"] = field(default="s2a", metadata={"help": "What to train with."})
    output_dir: str = field(default="outputs/text_to_image", metadata={"help": "Where results are written."})
    resolution: int = field(default=512, metadata={"help": "Pixels of a side of the pictures."})
    steps: int = 400
    batch_size: int = 1
    learning_rate: float = 1e-3
    seed: int = 0


def load_pipeline(args: Arguments, device: torch.device) -> DiffusionPipeline:
    """Raises a SystemExit for pipelines of another kind."""
    pipeline = DiffusionPipeline.from_pretrained(args.pipeline, safety_checker=None, requires_safety_checker=False)
    others = [name for name in ("transformer", "text_encoder_2", "prior") if getattr(pipeline, name, None) is not None]
    if others or not all(hasattr(pipeline, name) for name in ("unet", "vae", "text_encoder", "scheduler")):
        raise SystemExit(
            f"{args.pipeline} is a {type(pipeline).__name__}"
            + (f" with {', '.join(others)}" if others else "")
            + ", but this script trains pipelines with a UNet and one text encoder, such as Stable Diffusion 1.5 and 2.1."
        )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def read_images(folder: str, resolution: int) -> Tensor:
    """[N, 3, resolution, resolution], between -1 and 1."""
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
    if not paths:
        raise SystemExit(f"--images {folder} holds no files that end in {', '.join(sorted(IMAGE_ENDINGS))}.")
    pictures = [ImageOps.fit(Image.open(path).convert("RGB"), (resolution, resolution)) for path in paths]
    return torch.stack([torch.from_numpy(np.array(picture)).movedim(-1, 0) / 127.5 - 1 for picture in pictures])


@torch.no_grad()
def encode(pipeline: DiffusionPipeline, images: Tensor, prompt: str) -> tuple[Tensor, Tensor]:
    """(latents of the images, [N, channels, height, width]; the prompt, [1, tokens, width])."""
    vae = pipeline.vae
    latents = [vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist.mean for image in images]
    embedded, _ = pipeline.encode_prompt(prompt, pipeline.device, 1, do_classifier_free_guidance=False)
    return torch.cat(latents) * vae.config.scaling_factor, embedded


class Noise:
    """Batches for a denoiser: noised latents with what is to be predicted."""

    def __init__(
        self, pipeline: DiffusionPipeline, latents: Tensor, prompt: Tensor, batch_size: int, seed: int
    ) -> None:
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise SystemExit(f"Cannot train for predictions of type {self.scheduler.config.prediction_type}.")
        self.latents, self.prompt, self.batch_size = latents, prompt, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> dict[str, Tensor]:
        scheduler, count = self.scheduler, self.batch_size
        chosen = self.latents[torch.randint(len(self.latents), (count,), generator=self.generator)]
        noise = torch.randn(chosen.shape, generator=self.generator).to(chosen)
        times = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=self.generator).to(
            chosen.device
        )
        velocity = scheduler.config.prediction_type == "v_prediction"
        return {
            "sample": scheduler.add_noise(chosen, noise, times),
            "timestep": times,
            "encoder_hidden_states": self.prompt.expand(count, -1, -1),
            "target": scheduler.get_velocity(chosen, noise, times) if velocity else noise,
        }


def denoising_loss(unet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "target"}
    return (unet(**inputs).sample.float() - batch["target"].float()).square().mean()


def train(unet: nn.Module, noise: Noise, args: Arguments, console: Console) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in unet.parameters() if p.requires_grad), lr=args.learning_rate)
    losses = []
    unet.train()
    for step in range(args.steps):
        loss = denoising_loss(unet, noise.batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % max(1, args.steps // 10) == 0:
            recent = losses[-max(1, args.steps // 10) :]
            console.print(f"step {step + 1:5}   loss {sum(recent) / len(recent):.4f}")
    unet.eval()
    return losses


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(args, device)
    latents, prompt = encode(pipeline, read_images(args.images, args.resolution), args.prompt)
    noise = Noise(pipeline, latents, prompt, args.batch_size, args.seed)

    # First, while the denoiser is as it came: each adapter is taken off again.
    memory, table = {}, Table("", "trained", "kept for backward", "peak of a step", title="One training step")
    for method, config in CONFIGS.items():
        unet = get_peft_model(pipeline.unet, config)
        report = profile_memory(unet, noise.batch(), loss_fn=denoising_loss)
        kept, peak = report.saved_bytes, report.step_peak_bytes
        memory[method] = {"saved_bytes": kept, "step_peak_bytes": peak}
        table.add_row(method, f"{report.trainable_parameters:,}", f"{kept / 2**20:.1f} MiB", f"{peak / 2**20:.1f} MiB")
        pipeline.unet = unet.unload()

    unet = get_peft_model(pipeline.unet, CONFIGS[args.method])
    losses = train(unet, noise, args, console)
    unet.save_pretrained(args.output_dir)
    if args.validation_prompt is not None:
        size = {"height": args.resolution, "width": args.resolution}
        drawn = pipeline(args.validation_prompt, generator=torch.Generator().manual_seed(args.seed), **size).images[0]
        drawn.save(Path(args.output_dir) / "validation.png")
    console.print(table)
    (Path(args.output_dir) / "results.json").write_text(
        json.dumps({"losses": losses, "memory": memory}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
