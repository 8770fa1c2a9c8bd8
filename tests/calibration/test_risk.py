"""Conformal risk control: the expected loss stays at the target, and no threshold is too high."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.risk import check_feasible, controlled, expected_at_most
from guard.errors import InputError

MOST = 4.0
LOSSES = st.lists(
    st.tuples(st.floats(-5, 5, width=32), st.floats(0, MOST, width=32)), min_size=40, max_size=80
)


def after(scores: torch.Tensor, losses: torch.Tensor, tau: float) -> float:
    return expected_at_most(losses[scores > tau], len(scores), MOST)


@given(LOSSES, st.floats(0.15, 2.0), st.floats(-2.0, 2.0))
def test_the_threshold_keeps_the_target_and_the_next_lower_one_does_not(
    rows: list[tuple[float, float]], target: float, least: float
) -> None:
    scores, losses = torch.tensor(rows).T
    tau = controlled(scores, losses, least, MOST, target)
    assert tau >= least
    assert after(scores, losses, tau) <= target
    lower = [s for s in [least, *scores.tolist()] if least <= s < tau]
    assert all(after(scores, losses, s) > target for s in lower)


def test_the_expected_loss_of_fresh_prompts_stays_at_the_target_over_many_calibrations() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2000):
        scores = torch.randn(61, generator=generator)
        losses = MOST * torch.rand(61, generator=generator) * (scores > 0)
        tau = controlled(scores[:60], losses[:60], -1.0, MOST, 0.3)
        found.append(float(losses[60]) if float(scores[60]) > tau else 0.0)
    mean = torch.tensor(found).mean()
    error = torch.tensor(found).std() / len(found) ** 0.5
    assert 0.3 - 2 * MOST / 61 - 3 * error < mean < 0.3 + 3 * error


def test_where_raising_costs_nothing_the_threshold_stays() -> None:
    scores = torch.arange(50.0)
    assert controlled(scores, torch.zeros(50), 30.0, MOST, 0.1) == 30.0


@pytest.mark.parametrize(("most", "target", "needed"), [(4.0, 0.02, 199), (1.0, 0.02, 49)])
def test_a_target_that_so_few_prompts_cannot_certify_names_how_many_can(
    most: float, target: float, needed: int
) -> None:
    check_feasible(needed, most, target, "nats")
    with pytest.raises(InputError, match=rf"nats: 0.02 .* at least {needed} are needed"):
        check_feasible(needed - 1, most, target, "nats")
