"""What a carrier is refined for, and which of several that do is taken."""

from __future__ import annotations

import pytest
import torch

from calibration.causal import Admission, Effect, Sign
from calibration.choose import Choice, _best, _refinement
from calibration.config import CalibrationConfig
from calibration.directions import Candidate
from calibration.evaluate import Answered
from guard.artifact import Interval
from guard.refusal import Verdict
from guard.session import Record

N_PROMPTS = 24
NOTHING = Interval(value=0.0, low=0.0, high=0.0, n=0)
ANSWERED = Answered(
    "how",
    "so",
    "no",
    Verdict.COMPLIED,
    Record(None, None, None, 0, 0, 0, 0, 0, False, True, "benign"),
)


def trial(sign: Sign, moved: int, opens: float, nats: float) -> Choice:
    """A carrier that moved so many of 24 greedy responses."""
    candidate = Candidate(1, -1, torch.ones(4), 0.5)
    effect = Effect(candidate, sign, 1.0, 0.5, True, NOTHING, NOTHING, 0.0, NOTHING)
    difference = (moved if sign == "raise" else -moved) / N_PROMPTS
    rates = {
        name: Interval(value=value, low=value, high=value, n=N_PROMPTS)
        for name, value in {
            "refused_difference": difference,
            "sampled_opening_refuses": opens,
            "kl_nats": nats,
        }.items()
    }
    admission = Admission(effect, effect, [], [])
    return Choice(effect, admission, 1.0, [ANSWERED] * N_PROMPTS, rates, torch.empty(0))


def test_what_greedy_responses_cannot_tell_apart_is_told_by_sampled_openings() -> None:
    weak, strong = trial("raise", 12, 0.77, 1.3), trial("raise", 11, 0.97, 2.7)
    assert _best([weak, strong], "raise") is strong
    assert _best([strong, weak], "raise") is strong


def test_of_carriers_that_open_as_many_refusals_the_one_that_spends_least_is_taken() -> None:
    """The one that spends all it is given writes over refusals that have begun."""
    dear, cheap = trial("raise", 12, 0.964, 4.0), trial("raise", 12, 0.960, 2.34)
    assert _best([dear, cheap], "raise") is cheap
    plainly = trial("raise", 12, 0.99, 4.0)
    assert _best([plainly, cheap], "raise") is plainly


def test_two_prompts_more_are_worth_more_than_any_opening() -> None:
    more, opens = trial("raise", 13, 0.5, 1.3), trial("raise", 11, 0.97, 2.7)
    assert _best([opens, more], "raise") is more


def test_of_equal_carriers_to_lower_the_one_that_spends_least_is_taken() -> None:
    cheap, dear = trial("lower", 12, 0.3, 0.7), trial("lower", 13, 0.1, 0.9)
    assert _best([dear, cheap], "lower") is cheap


@pytest.mark.parametrize("sign", ["raise", "lower"])
def test_a_direction_is_refined_at_the_budget_it_will_be_given(sign: Sign) -> None:
    config = CalibrationConfig(
        model="any", raise_budget_nats=3.0, lower_budget_nats=0.5, refine_steps=7
    )
    settings = _refinement(sign, config)
    assert settings.budget_nats == {"raise": 3.0, "lower": 0.5}[sign]
    assert settings.steps == 7
