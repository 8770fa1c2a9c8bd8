"""Intervals for the numbers that a calibration reports."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from guard.artifact import Interval

__all__ = ["auroc", "bootstrap_bounds", "mean_interval", "share_interval"]


def mean_interval(values: Tensor, seed: int, resamples: int = 1000) -> Interval:
    """Mean with its 95 % percentile bootstrap interval over prompts.

    Args:
        values: (n,), one number a prompt.
        seed: of the resampling.
        resamples: bootstrap samples.
    """
    data = values.double().cpu().numpy()
    mean = float(data.mean()) if data.size else 0.0
    if data.size < 2 or float(np.ptp(data)) == 0.0:
        return Interval(value=mean, low=mean, high=mean, n=int(data.size))
    result = stats.bootstrap(
        (data,),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    ci = result.confidence_interval
    return Interval(value=mean, low=float(ci.low), high=float(ci.high), n=int(data.size))


def bootstrap_bounds(
    values: Tensor,
    owners: Tensor,
    of: Callable[[Tensor], Tensor],
    seed: int,
    resamples: int = 500,
) -> Interval:
    """A statistic of several values per prompt, with one-sided 95 % bounds below and above.

    Args:
        values: (n_values,).
        owners: (n_values,) int64: the prompt of each; prompts are drawn, with all their values.
        of: the statistic, from (m,) to a number.
        seed: of the resampling.
        resamples: bootstrap samples.
    """
    prompts = [values[owners == owner].double() for owner in sorted(set(owners.tolist()))]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(prompts), (resamples, len(prompts)), generator=generator)
    draws = [of(torch.cat([prompts[i] for i in row])) for row in drawn.tolist()]
    low, high = torch.stack(draws).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    return Interval(
        value=float(of(values.double())), low=float(low), high=float(high), n=len(prompts)
    )


def share_interval(hits: int, n: int) -> Interval:
    """Share hits / n with its 95 % Wilson interval."""
    if n == 0:
        return Interval(value=0.0, low=0.0, high=1.0, n=0)
    ci = stats.binomtest(hits, n).proportion_ci(method="wilson")
    return Interval(value=hits / n, low=float(ci.low), high=float(ci.high), n=n)


def auroc(positive: Tensor, negative: Tensor, seed: int, resamples: int = 500) -> Interval:
    """Chance that a positive scores above a negative, with a bootstrap interval.

    Args:
        positive: (n,) scores that should be high.
        negative: (m,) scores that should be low.
        seed: of the resampling.
        resamples: bootstrap samples; both sides are drawn anew in each.
    """

    def area(high: np.ndarray, low: np.ndarray) -> float:
        # Mann-Whitney U over n·m
        ranks = stats.rankdata(np.concatenate([high, low]))[: len(high)]
        u = float(ranks.sum()) - len(high) * (len(high) + 1) / 2
        return u / (len(high) * len(low))

    high, low = positive.double().numpy(), negative.double().numpy()
    rng = np.random.default_rng(seed)
    draws = [area(rng.choice(high, len(high)), rng.choice(low, len(low))) for _ in range(resamples)]
    lower, upper = np.quantile(draws, [0.025, 0.975])
    return Interval(
        value=area(high, low), low=float(lower), high=float(upper), n=len(high) + len(low)
    )
