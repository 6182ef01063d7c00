import json
from html.parser import HTMLParser

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


def test_plan_for_several_processes(tiny):
    arguments = ["plan", tiny, "-m", "lora", "-b", "2", "--processes", "2", "--sharding", "fsdp2"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "in each of 2 processes (FSDP2)" in " ".join(result.stdout.split())
    result = runner.invoke(app, [*arguments[:-4], "--sharding", "fsdp2"])
    assert result.exit_code == 1 and "for several processes" in " ".join(result.output.split())


def test_plan_as_json_is_pure_and_plot_is_written(tiny, tmp_path):
    path = tmp_path / "plan.png"
    result = runner.invoke(app, ["plan", tiny, "-m", "s2a", "--budget", "3MiB", "--json", "--plot", str(path)])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["budget_bytes"] == 3 * 2**20 and data["methods"][0]["largest_batch_size"] > 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plan_as_a_page_has_the_table_and_a_picture_of_every_method(tiny, tmp_path):
    path = tmp_path / "plan.html"
    methods = ("full", "lora")
    arguments = [part for method in methods for part in ("-m", method)]
    result = runner.invoke(
        app, ["plan", tiny, *arguments, "-b", "2", "--budget", "3MiB", "--html", str(path), "--json"]
    )
    assert result.exit_code == 0, result.output
    page = Page()
    page.feed(path.read_text())
    assert page.open == []
    assert not page.links, "a page that stands alone fetches nothing"
    header, *rows = page.rows
    assert header[0] == "method" and header[-1].startswith("largest batch")
    assert [row[0] for row in rows] == list(methods)
    for row, planned in zip(rows, json.loads(result.stdout)["methods"]):
        assert row[2] == f"{planned['report']['trainable_parameters']:,}"
        assert row[-1] == str(planned["largest_batch_size"])
    assert page.labels[0] == "peak of each method"
    assert page.labels[1:] == [f"live memory over the step of {method}" for method in methods]


def test_names_in_a_page_are_text_and_missing_methods_say_why():
    from peft_s2a.memory.html import plan_page
    from peft_s2a.memory.methods import Method
    from peft_s2a.memory.models import VisionModel
    from peft_s2a.memory.plan import Plan, PlannedMethod

    row = PlannedMethod(Method("a<b", "", lambda model: model), problem="not <here>")
    page = Page()
    page.feed(plan_page(Plan(VisionModel("<script>", None), 1, None, (row,))))
    assert page.open == [] and "script" not in page.tags
    assert page.rows[1] == ["a<b", "not <here>"]


class Page(HTMLParser):
    """The structure of a page: elements left open, rows of tables, labels of pictures, addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.rows, self.labels, self.links = [], set(), [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self.labels += [value for name, value in attributes if name == "aria-label"]
        if tag != "meta":  # which has no end
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


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
