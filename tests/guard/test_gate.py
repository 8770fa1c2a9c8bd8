"""The gate: conformal thresholds keep their promise, zones follow the table in the docs."""

from __future__ import annotations

import math

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
    prospect,
    refusal_logit,
    refusal_probability,
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
    zone = choose_zone(GateReading(score, refusal_prob), thresholds, allow_lower)
    assert zone in (Zone.PASS, prospect(score, thresholds, allow_lower))
    agreeing = {choose_zone(GateReading(score, p), thresholds, allow_lower) for p in (0.0, 1.0)}
    assert prospect(score, thresholds, allow_lower) in agreeing
    assert prospect(float("nan"), thresholds, allow_lower) is Zone.PASS


@given(st.integers(30, 400), st.floats(0.05, 0.5), st.floats(0.5, 0.99))
def test_a_confidence_makes_thresholds_stricter_and_its_rank_is_the_binomials(
    n: int, alpha: float, confidence: float
) -> None:
    scores = torch.arange(float(n))
    if n < math.ceil(math.log(1 - confidence) / math.log(1 - alpha) - 1e-9):
        with pytest.raises(InputError, match="with confidence"):
            conformal_upper(scores, alpha, confidence)
        return
    k = int(conformal_upper(scores, alpha, confidence)) + 1

    def below(rank: int) -> float:  # P(Bin(n, 1 − α) < rank)
        return sum(math.comb(n, i) * (1 - alpha) ** i * alpha ** (n - i) for i in range(rank))

    assert below(k) >= confidence - 1e-9
    assert below(k - 1) < confidence + 1e-9


def test_with_confidence_nearly_all_calibrations_keep_their_promise() -> None:
    """Share of calibrations whose threshold lets more than α through: about half, and ≤ 5 %."""
    alpha, n, trials = 0.1, 200, 600
    generator = torch.Generator().manual_seed(0)
    broken = {None: 0, 0.95: 0}
    for _ in range(trials):
        scores = torch.rand(n, generator=generator)
        for confidence in broken:
            broken[confidence] += 1.0 - conformal_upper(scores, alpha, confidence) > alpha
    assert 0.35 < broken[None] / trials < 0.6
    assert broken[0.95] / trials < 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_a_confidence_says_how_many_prompts_it_needs() -> None:
    with pytest.raises(InputError, match=r"delta 0\.05 with confidence 0\.95 needs at least 59"):
        conformal_lower(torch.randn(58), 0.05, 0.95)
    assert conformal_lower(torch.arange(59.0), 0.05, 0.95) == 0.0
    with pytest.raises(InputError, match="confidence lies strictly between"):
        conformal_upper(torch.randn(58), 0.05, 1.0)
