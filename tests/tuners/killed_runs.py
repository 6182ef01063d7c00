"""Run by `test_kills.py`: trains, kills, resumes, and compares the adapters.

    python killed_runs.py KILLS FOLDER

KILLS are those of each kind of run. This process imports everything once and forks each run: a run is a process of its
own, which SIGKILL ends at a random moment, from its start to its last step, while it trains or writes a checkpoint.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from families import FAMILIES
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_s2a import S2AConfig


STEPS = 8
ADAPTER = "adapter_model.safetensors"


def examples() -> list[dict]:
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images)]


def adapted() -> PeftModel:
    set_seed(0)
    return get_peft_model(FAMILIES["vit"](), S2AConfig())


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that `Trainer` has finished: it writes the state last."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return checkpoint
    return None


def train_with_trainer(folder: Path) -> None:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_steps=1,
        save_total_limit=3,
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=100,
        report_to="none",
    )
    trainer = Trainer(adapted(), args, train_dataset=examples(), data_collator=default_data_collator)
    checkpoint = whole_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(folder / "last"))


def train_with_accelerate(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, STEPS)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    done = max((int(path.name.split("-")[1]) for path in folder.glob("step-*")), default=0)
    if done:
        accelerator.load_state(str(folder / f"step-{done}"))
    model.train()
    per_epoch = len(examples()) // 8
    for step in range(done, STEPS):
        # an epoch's order is its number's alone, so that a resumed run meets the same batches
        order = torch.Generator().manual_seed(step // per_epoch)
        batches = DataLoader(
            examples(), 8, shuffle=True, generator=order, collate_fn=default_data_collator, num_workers=0
        )
        state = torch.get_rng_state()  # which an iterator draws from
        batch = list(batches)[step % per_epoch]
        torch.set_rng_state(state)
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        unfinished = folder / f"unfinished-{os.getpid()}"  # under its name only when it is whole
        accelerator.save_state(str(unfinished))
        unfinished.rename(folder / f"step-{step + 1}")
    model.save_pretrained(folder / "last")


RUNS = {"trainer": train_with_trainer, "accelerate": train_with_accelerate}


def start(kind: str, folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        folder.mkdir(exist_ok=True)
        RUNS[kind](folder)
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finished(process: int) -> None:
    _, status = os.waitpid(process, 0)
    assert status == 0, f"a run ended with status {status}"


def has_checkpoint(folder: Path) -> bool:
    return bool(whole_checkpoint(folder) or list(folder.glob("step-*")))


def check(kind: str, kills: int, root: Path, rng: random.Random) -> None:
    """Kill runs of one kind, the first in the middle, others anywhere; each ends with the undisturbed adapter."""
    begin = time.monotonic()
    finished(start(kind, root / "undisturbed"))
    duration = time.monotonic() - begin
    expected = load_file(root / "undisturbed" / "last" / ADAPTER)
    folder, killed, resumed, ended = root / "run", 0, 0, 0
    while killed < kills or folder.exists():
        resumed += has_checkpoint(folder)
        process = start(kind, folder)
        if killed < kills:
            while not (killed or has_checkpoint(folder)):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.9 if killed else 0.05) * duration)
            os.kill(process, signal.SIGKILL)  # of one that has ended, and waits to be asked, nothing comes
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        assert status == 0, f"a run ended with status {status}"
        found = load_file(folder / "last" / ADAPTER)
        assert found.keys() == expected.keys()
        different = [name for name, value in expected.items() if not value.equal(found[name])]
        assert not different, f"after {killed} kills: {different}"
        shutil.rmtree(folder)
        ended += 1
    print(f"{kind}: {killed} kills, {resumed} resumed, {ended} runs ended alike, undisturbed {duration:.1f} s")


def main() -> None:
    for kind in RUNS:
        root = Path(sys.argv[2]) / kind
        root.mkdir()
        check(kind, int(sys.argv[1]), root, random.Random(0))


if __name__ == "__main__":
    main()
