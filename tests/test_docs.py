"""The README and the pages in docs/: their code runs, their commands exist, and the messages they explain are ours."""

import ast
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._functorch.config
from transformers import AutoModelForImageClassification, Trainer, ViTConfig, ViTForImageClassification
from typer.main import get_command

from peft_s2a.cli import app


ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def ids(page: Path) -> str:
    return page.name


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder to run in that holds the examples, where checkpoints of the Hub are small models."""
    (tmp_path / "examples").mkdir()
    shutil.copytree(ROOT / "examples" / "backbone", tmp_path / "examples" / "backbone")
    monkeypatch.chdir(tmp_path)
    load = AutoModelForImageClassification.from_pretrained

    def from_pretrained(name, num_labels=10, **settings):
        if Path(name).is_dir():
            return load(name, **settings)
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(**VIT, image_size=32, patch_size=8, num_labels=num_labels))

    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", from_pretrained)
    return tmp_path


@pytest.fixture
def names(clone):
    """What the code of the README and of the page on sharing takes for granted."""
    from peft import get_peft_model

    import peft_s2a

    model = AutoModelForImageClassification.from_pretrained("google/vit")
    get_peft_model(model, peft_s2a.S2AConfig()).save_pretrained("me/my-adapter")
    return {"images": [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(4)]}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python", "py")], ids=ids)
def test_code_runs(page, names, monkeypatch):
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: (setattr(self.args, "num_train_epochs", 1), train(self))[1])
    for code in blocks(page, "python", "py"):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_no_block_of_code_goes_untested(page):
    languages = set(re.findall(r"^```(\w*)\n.*?^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    assert languages <= {"python", "py", "sh", "text"}  # text: what something prints


COMMANDS = [
    (page, line)
    for page in PAGES
    for code in blocks(page, "sh")
    for line in code.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_commands_exist(page, line):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[0] == "peft-s2a":
        command = get_command(app)
        command.commands[words[1]].make_context(words[1], words[2:])  # refuses unknown options
    elif words[0] == "export":  # a switch of torch's
        assert words[1].split("=")[0] in Path(torch._functorch.config.__file__).read_text()
    elif scripts := [word for word in words if word.endswith(".py")]:
        (script,) = scripts
        text = (ROOT / script).read_text() + (ROOT / "examples" / "finetuning.py").read_text()
        options = [word for word in words[words.index(script) + 1 :] if word.startswith("--")]
        for option in options:
            known = option[2:] in text or option in ("--output_dir",)
            assert known, f"{script} has no {option}"
    else:
        assert words[:2] in (["pip", "install"], ["python", "-m"], ["python", "benchmarks/readme.py"])


def texts_of_the_package() -> list[list[str]]:
    """The constant parts of every string in the package, in order."""
    found = []
    for path in (ROOT / "peft_s2a").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_explained_messages_are_those_of_the_package():
    headings = re.findall(r"^### `([^`]*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(headings) > 15
    texts = texts_of_the_package()
    for heading in headings:
        parts = [part.strip() for part in heading.split("…") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)), flags=re.DOTALL)
        assert any(pattern.search(text) for text in texts), heading


def test_links_between_files_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), (page.name, target)


def test_files_and_constants_that_pages_name_exist():
    source = "".join(path.read_text() for folder in ("peft_s2a", "tests") for path in (ROOT / folder).rglob("*.py"))
    for page in PAGES:
        for name in re.findall(r"`([^`\n]+)`", page.read_text()):
            if re.fullmatch(r"(peft_s2a|tests|examples|benchmarks|docs)/[\w/]+\.\w+", name):
                assert (ROOT / name).is_file(), (page.name, name)
            elif re.fullmatch(r"[A-Z]+_[A-Z_]+", name):
                assert re.search(rf"^{name}\b", source, flags=re.MULTILINE), (page.name, name)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    menu = (tmp_path / "index.html").read_text()
    assert all(f'href="{page.stem}.html"' in menu for page in PAGES if page.stem not in ("README", "index"))
    for page in itertools.islice(tmp_path.rglob("*.html"), 50):
        fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]*)"', page.read_text())
        assert not fetched, (page.name, fetched)
    assert "calibrate_activations" in (tmp_path / "api.html").read_text()
