import json

import pytest
from transformers import ViTConfig
from typer.testing import CliRunner

from peft_s2a.cli import app


runner = CliRunner()


@pytest.fixture
def tiny(tmp_path):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5, architectures=["ViT"]).save_pretrained(
        tmp_path / "m"
    )
    return str(tmp_path / "m")


def test_plan_prints_a_table(tiny):
    result = runner.invoke(app, ["plan", tiny, "-m", "full", "-m", "lora", "-b", "2", "--budget", "3MiB"])
    assert result.exit_code == 0, result.output
    assert "full" in result.stdout and "lora" in result.stdout and "largest batch" in result.stdout
    assert "s2a" not in result.stdout


def test_plan_as_json_is_pure_and_plot_is_written(tiny, tmp_path):
    path = tmp_path / "plan.png"
    result = runner.invoke(app, ["plan", tiny, "-m", "s2a", "--budget", "3MiB", "--json", "--plot", str(path)])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["budget_bytes"] == 3 * 2**20 and data["methods"][0]["largest_batch_size"] > 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plan_where_nothing_fits_exits_with_3(tiny):
    assert runner.invoke(app, ["plan", tiny, "-m", "lora", "--budget", "1kib"]).exit_code == 2
    assert runner.invoke(app, ["plan", tiny, "-m", "lora", "--budget", "10000B"]).exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["--budget", "much"], "is no size"), (["-m", "magic"], "unknown method"), (["-b", "0"], "greater than or")],
)
def test_wrong_usage_exits_with_2_and_says_what_is_allowed(tiny, arguments, hint):
    result = runner.invoke(app, ["plan", tiny, *arguments])
    assert result.exit_code == 2 and hint in " ".join(result.output.split())


def test_unknown_model_exits_with_1_and_a_message():
    result = runner.invoke(app, ["plan", "vit-q"])
    assert result.exit_code == 1 and "no such model" in result.output and "Traceback" not in result.output


def test_profile_measures_a_step(tiny, tmp_path):
    path = tmp_path / "step.png"
    arguments = ["profile", tiny, "-m", "lora", "-b", "2", "--device", "cpu", "--json", "--plot", str(path)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["source"] == "profile" and data["batch_size"] == 2 and data["step_seconds"] > 0
    assert path.exists()


def test_env_names_versions_and_backends():
    result = runner.invoke(app, ["env", "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["torch"] and "reference" in facts["backends"]


@pytest.mark.parametrize("command", [[], ["plan"], ["profile"], ["env"]])
def test_help_teaches(command):
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    if command in (["plan"], ["profile"]):
        assert "Examples" in result.stdout
