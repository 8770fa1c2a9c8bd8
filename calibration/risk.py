"""Conformal risk control: what raising benign prompts costs them on average, bounded.

Conformal thresholds bound how many benign prompts are raised. These bound what it does to them: the
nats that are spent, or how many are refused that would have been answered. A loss that only a score
above τ brings about falls as τ rises; with losses of n prompts, none above `most`, a τ at which
(Σ losses + most) / (n + 1) ≤ target keeps the expected loss of a fresh exchangeable prompt at the
target (Angelopoulos et al. 2022, arXiv:2208.02814, theorem 1).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from calibration.causal import Sign
from calibration.choose import Choice, Draft
from calibration.config import CalibrationConfig
from calibration.evaluate import answer_pairs
from calibration.gate_fit import Scored, ThresholdFit
from guard.artifact import Interval
from guard.errors import InputError
from guard.gate import Zone
from guard.refusal import Verdict

__all__ = [
    "check_feasible",
    "controlled",
    "controlled_thresholds",
    "expected_at_most",
    "risks",
]


def expected_at_most(losses: Tensor, n: int, most: float) -> float:
    """Bound of the expected loss of a fresh prompt.

    Args:
        losses: of those of the n prompts that lose anything.
        n: prompts.
        most: that a prompt can lose.
    """
    return (float(losses.sum()) + most) / (n + 1)


def check_feasible(n: int, most: float, target: float, what: str) -> None:
    """Refuse a target that n prompts could not certify even if none of them lost anything.

    Raises:
        InputError: with the n that would do.
    """
    if most / (n + 1) > target:
        raise InputError(
            f"{what}: {target:g} cannot be certified with {n} calibration prompts of the kind,"
            f" each of which could lose {most:g}: at least {math.ceil(most / target - 1e-9) - 1}"
            " are needed; give more prompts or a higher target"
        )


def controlled(scores: Tensor, losses: Tensor, least: float, most: float, target: float) -> float:
    """Return the least τ ≥ `least` that keeps the expected loss at the target.

    Args:
        scores: (n,) of benign calibration prompts.
        losses: (n,) what each loses if it is raised, in [0, most]; read where the score is above
            `least` only.
        least: a threshold that has to hold anyway.
        most: that a prompt can lose.
        target: most expected loss, in the unit of the losses.

    Raises:
        InputError: as `check_feasible`.
    """
    n = len(scores)
    check_feasible(n, most, target, "target")
    above = scores > least
    for tau in [least, *sorted(scores[above].tolist())]:
        if expected_at_most(losses[above & (scores > tau)], n, most) <= target:
            return float(tau)
    raise AssertionError("the highest score leaves nothing above it")


def risks(config: CalibrationConfig) -> list[tuple[str, float, float]]:
    """(what, the most that one prompt can lose, target) of each expected loss to be bounded."""
    wanted = [
        ("nats", config.raise_budget_nats, config.benign_nats),
        ("added_over_refusal", 1.0, config.added_over_refusal),
    ]
    return [(what, most, target) for what, most, target in wanted if target is not None]


def controlled_thresholds(
    draft: Draft, chosen: dict[Sign, Choice], held: Scored
) -> tuple[ThresholdFit, dict[str, Interval]]:
    """Raise τ_hi until raising costs benign prompts no more than asked, each stratum for itself.

    The calibration prompts above the conformal τ_hi are answered with the zone forced; serving
    lets those pass that the model is about to refuse, so the bound is on the safe side. It is for
    the budget of the calibration: a policy with a larger one may cost more.

    Returns:
        The thresholds, and the bounds: expected loss at most `high`.
    """
    config, least = draft.config, draft.thresholds.raise_above
    tau, losses = least, {}
    for stratum in ("ordinary", "hard"):
        mask = held.mask("benign", stratum)
        rows = (mask & (held.scores > least)).nonzero().flatten().tolist()
        pairs = answer_pairs(
            draft.subject,
            draft.artifact(chosen),
            draft.policy,
            [held.prompts[i].text for i in rows],
            config.confirm_tokens,
            config.batch_size,
            Zone.RAISE,
        )
        refusing = (Verdict.REFUSED, Verdict.PARTIAL)
        newly = [p.record.verdict in refusing and p.base_verdict not in refusing for p in pairs]
        for what, values in (
            ("nats", [p.record.kl_nats for p in pairs]),
            ("added_over_refusal", [float(refused) for refused in newly]),
        ):
            lost = torch.zeros(len(held.scores))
            lost[rows] = torch.tensor(values)
            losses[what, stratum] = (held.scores[mask], lost[mask])
    for what, most, target in risks(config):
        for stratum in ("ordinary", "hard"):
            scores, lost = losses[what, stratum]
            if len(scores):
                tau = max(tau, controlled(scores, lost, least, most, target))
    bounds = {}
    for what, most, _ in risks(config):
        for stratum in ("ordinary", "hard"):
            scores, lost = losses[what, stratum]
            if n := len(scores):
                high = expected_at_most(lost[scores > tau], n, most)
                mean = float(lost[scores > tau].sum()) / n
                name = f"{stratum}_benign_{what}_by_raising_expected"
                bounds[name] = Interval(value=mean, low=0.0, high=high, n=n)
    return replace(draft.thresholds, raise_above=tau), bounds
