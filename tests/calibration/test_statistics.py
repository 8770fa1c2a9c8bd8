"""Intervals that cover, and an AUROC that agrees with the one everybody uses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from calibration.statistics import auroc, bootstrap_bounds, mean_interval, share_interval

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)  # integers, so ties occur


def test_the_bootstrap_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        found = mean_interval(torch.randn(40, generator=generator) + 3.0, seed, resamples=300)
        hits += found.low <= 3.0 <= found.high
    # 95 % less the percentile bootstrap's known shortfall at n = 40; 200 draws: deviation 1.6 %.
    assert 0.88 <= hits / 200 <= 0.99


@settings(max_examples=30)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=30), st.integers(0, 9))
def test_the_mean_lies_in_its_interval_and_the_seed_decides_it(
    values: list[float], seed: int
) -> None:
    data = torch.tensor(values, dtype=torch.float64)
    found = mean_interval(data, seed, resamples=200)
    assert found.value == pytest.approx(float(data.mean()))
    assert found.n == len(values)
    assert float(data.min()) - 1e-9 <= found.low <= found.high <= float(data.max()) + 1e-9
    assert found == mean_interval(data, seed, resamples=200)


def test_more_prompts_give_a_narrower_interval() -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(1))
    few, many = mean_interval(values, 0), mean_interval(values.repeat(16), 0)
    assert few.high - few.low > 3 * (many.high - many.low)


@given(st.integers(0, 60), st.integers(0, 60))
def test_a_share_lies_in_its_wilson_interval(hits: int, misses: int) -> None:
    found = share_interval(hits, hits + misses)
    assert 0.0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1.0
    assert found.n == hits + misses
    if found.n:
        assert found.value == hits / found.n
        assert found.high - found.low > 0.0  # none of ten is not "never"


def test_the_wilson_interval_is_the_textbook_one() -> None:
    found = share_interval(3, 10)
    z, p, n = stats.norm.ppf(0.975), 0.3, 10
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half))


@settings(max_examples=60)
@given(SCORES, SCORES)
def test_auroc_agrees_with_scikit_learn_ties_included(
    positive: list[float], negative: list[float]
) -> None:
    found = auroc(torch.tensor(positive), torch.tensor(negative), seed=0, resamples=20)
    labels = [1] * len(positive) + [0] * len(negative)
    assert found.value == pytest.approx(roc_auc_score(labels, positive + negative))
    assert found.n == len(labels)


def test_the_interval_of_an_auroc_holds_its_true_value() -> None:
    generator = torch.Generator().manual_seed(3)
    truth = float(stats.norm.cdf(1.0 / 2**0.5))
    hits = 0
    for seed in range(60):
        positive = torch.randn(60, generator=generator) + 1.0
        negative = torch.randn(60, generator=generator)
        found = auroc(positive, negative, seed, resamples=200)
        hits += found.low <= truth <= found.high
    assert hits >= 52


def test_bounds_draw_prompts_with_all_their_values() -> None:
    """Twenty copies of a prompt's value tell no more than one: the bounds stay as wide."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, generator=generator)
    once = bootstrap_bounds(values, torch.arange(30), torch.mean, seed=0)
    copies = values.repeat_interleave(20)
    often = bootstrap_bounds(copies, torch.arange(30).repeat_interleave(20), torch.mean, seed=0)
    assert often.value == pytest.approx(once.value)
    assert (often.low, often.high) == (pytest.approx(once.low), pytest.approx(once.high))
    assert once.n == often.n == 30
    assert once.low < once.value < once.high


def test_one_sided_bounds_hold_for_nineteen_in_twenty() -> None:
    generator = torch.Generator().manual_seed(1)
    above = 0
    for trial in range(200):
        values = torch.randn(60, generator=generator)
        above += bootstrap_bounds(values, torch.arange(60), torch.mean, trial, 200).high < 0.0
    assert above / 200 == pytest.approx(0.05, abs=0.05)
