"""What S2A keeps beside full fine-tuning, on models at their default sizes."""

import json

import default_sizes
import dense_prediction
import models
import pytest


# Of these no training step on images can be followed by shapes: a library that is not there, inputs that are no images or
# whose values decide.
NOT_MEASURED = {"dinat", "imagegpt", "pp_lcnet", "shieldgemma2", "siglip2", "timm_wrapper"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(default_sizes.classifiers()) - NOT_MEASURED))
def test_at_most_a_fifth_is_kept(name):
    row = default_sizes.measure(name)
    assert "failed" not in row, row
    assert row["s2a"] <= row["full"] / 5, row


def test_the_page_lists_the_largest_share_first_and_what_has_none():
    rows = [
        {"model": "one", "full": 4 << 20, "s2a": 1 << 19, "full_precision": 1 << 18},
        {"model": "two", "full": 4 << 20, "s2a": 1 << 20, "full_precision": 0},
        {"model": "three", "failed": "ValueError: a|b"},
    ]
    text = models.render_sizes({"rows": rows, "batch_size": 4, "known": ["one", "two", "three", "four"]})
    assert text.index("| two | 4.0 | 1.0 | 25.0% | 0% |") < text.index("| one | 4.0 | 0.5 | 12.5% | 50% |")
    assert "* three: ValueError: a/b" in text
    assert "Not yet measured: four." in text


@pytest.mark.slow
@pytest.mark.parametrize("name", dense_prediction.models())
def test_of_dense_predictions_with_coded_inputs_a_sixth(name):
    row = dense_prediction.measure(name)
    assert row["s2a_coded_inputs"] <= row["s2a"] <= row["full"] / 2
    assert row["s2a_coded_inputs"] <= row["full"] / 6, row


def test_the_page_shows_what_is_recorded_of_dense_prediction():
    result = json.loads(dense_prediction.RESULT.read_text())
    assert [row["model"] for row in result["rows"]] == list(dense_prediction.models())
    assert models.render_dense(result) in models.PAGE.read_text()
