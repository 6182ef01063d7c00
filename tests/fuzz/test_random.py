"""Random cases do with quantised activations what they do without. More of them: ``python -m tests.fuzz --seeds 1000``."""

import pytest

from peft_s2a.activations.plans.watch import Watch

from .found import FOUND
from .networks import Network, draw, failures, share_planned


SEEDS = range(1000, 1016)


@pytest.mark.filterwarnings("ignore")
class TestRandomCases:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_random_case_is_stock(self, seed):
        spec = draw(seed)
        found = failures(spec)
        assert not found, f"{spec}\n" + "\n".join(found[:5])

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(2000, 2600))
    def test_many_random_cases_are_stock(self, seed):
        spec = draw(seed)
        found = failures(spec)
        assert not found, f"{spec}\n" + "\n".join(found[:5])

    @pytest.mark.parametrize("name", FOUND)
    def test_what_was_found_before(self, name):
        found = failures(FOUND[name])
        assert not found, "\n".join(found[:5])


@pytest.mark.filterwarnings("ignore")
def test_a_good_part_of_the_cases_runs_by_plans():
    assert share_planned([draw(seed) for seed in range(1000, 1010)]) > 0.25


@pytest.mark.filterwarnings("ignore")
def test_planted_defects_are_found(monkeypatch):
    """A plan that is used whatever changed: flags and modes that are switched between steps go unnoticed."""
    specs = [s for s in map(draw, range(400)) if {"flag", "switch mode", "switch gradients"} & {e for e, _ in s.edits}]
    specs = [s for s in specs if len(s.batches) == 2 and s.pieces and not s.adapter]
    holds = Watch.holds
    monkeypatch.setattr(Watch, "holds", lambda self: holds(self) or True)
    assert any(failures(spec) for spec in specs[:12])


def test_a_case_is_the_same_from_its_seed():
    assert draw(5) == draw(5) and str(draw(5)) != str(draw(6))
    assert Network(draw(1)).edits == Network(draw(1)).edits
