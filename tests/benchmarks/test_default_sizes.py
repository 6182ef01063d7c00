"""What S2A keeps beside full fine-tuning, on image classifiers at their default sizes."""

import default_sizes
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
