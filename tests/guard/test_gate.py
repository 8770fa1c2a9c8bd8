"""The gate: conformal thresholds keep their promise, zones follow the table in the docs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import InputError
from guard.gate import (
    GateReading,
    Thresholds,
    Zone,
    choose_zone,
    conformal_lower,
    conformal_upper,
    refusal_logit,
    refusal_probability,
    undecided,
)

THRESHOLDS = Thresholds(raise_above=2.0, lower_below=-2.0)


@pytest.mark.parametrize(
    ("score", "refusal_prob", "zone"),
    [
        (3.0, 0.1, Zone.RAISE),
        (3.0, 0.99, Zone.PASS),
        (2.0, 0.1, Zone.PASS),
        (0.0, 0.1, Zone.PASS),
        (0.0, 0.99, Zone.PASS),
        (-3.0, 0.99, Zone.LOWER),
        (-3.0, 0.01, Zone.PASS),
    ],
)
def test_zones_follow_the_table(score: float, refusal_prob: float, zone: Zone) -> None:
    assert choose_zone(GateReading(score, refusal_prob), THRESHOLDS) is zone


def test_lower_needs_a_certified_threshold_and_permission() -> None:
    reading = GateReading(-3.0, 0.99)
    assert choose_zone(reading, Thresholds(2.0, None)) is Zone.PASS
    assert choose_zone(reading, THRESHOLDS, allow_lower=False) is Zone.PASS


def test_fresh_benign_scores_pass_the_threshold_at_most_alpha_of_the_time() -> None:
    generator = torch.Generator().manual_seed(0)
    over = []
    for _ in range(400):
        scores = torch.randn(100, generator=generator)
        tau = conformal_upper(scores[:60], 0.1)
        over.append((scores[60:] > tau).float().mean().item())
    assert sum(over) / len(over) <= 0.1 + 0.01


@settings(max_examples=100, deadline=None)
@given(st.integers(9, 200), st.floats(0.1, 0.5))
def test_at_most_alpha_of_the_calibration_scores_lie_above(n: int, alpha: float) -> None:
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
    assert (scores > conformal_upper(scores, alpha)).sum() <= alpha * (n + 1)
    assert (scores < conformal_lower(scores, alpha)).sum() <= alpha * (n + 1)


def test_too_few_prompts_for_alpha_says_how_many_would_do() -> None:
    with pytest.raises(InputError, match="at least 99"):
        conformal_upper(torch.randn(50), 0.01)
    assert conformal_upper(torch.arange(99.0), 0.01) == 98.0


def test_the_refusal_probability_is_a_weighted_sum() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    p = refusal_probability(logits, torch.tensor([0, 2]), torch.tensor([1.0, 0.5]))
    assert p.item() == pytest.approx(0.625)
    assert refusal_logit(torch.tensor([0.5])).item() == pytest.approx(0.0)
    assert torch.isfinite(refusal_logit(torch.tensor([0.0, 1.0]))).all()


@given(
    score=st.floats(-5, 5),
    refusal_prob=st.floats(0, 1),
    raise_above=st.floats(-4, 4),
    below=st.none() | st.floats(-4, 4),
    allow_lower=st.booleans(),
)
def test_a_score_that_decides_by_itself_passes_whatever_the_refusal_probability(
    score: float, refusal_prob: float, raise_above: float, below: float | None, allow_lower: bool
) -> None:
    thresholds = Thresholds(raise_above, below)
    if not undecided(score, thresholds, allow_lower):
        reading = GateReading(score, refusal_prob)
        assert choose_zone(reading, thresholds, allow_lower) is Zone.PASS
    assert undecided(float("nan"), thresholds, allow_lower)
