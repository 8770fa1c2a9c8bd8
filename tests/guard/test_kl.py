"""The bound: whatever the carrier does, no token and no request passes its KL budget."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from guard.errors import BudgetError, NumericsError
from guard.kl import Ledger, kl_per_token, log_probs, mix_rows, mix_within_budget

LOGIT = st.one_of(
    st.floats(-60, 60, width=32),
    st.just(-math.inf),
    st.sampled_from([0.0, 1.0, 1e4, -1e4]),
)


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocab = draw(st.integers(1, 4)), draw(st.integers(2, 24))
    pair = []
    for _ in range(2):
        z = torch.tensor(draw(hnp.arrays("float32", (rows, vocab), elements=LOGIT)))
        hot = draw(st.integers(0, vocab - 1))
        z[:, hot] = torch.where(z.amax(-1) == -math.inf, torch.zeros(rows), z[:, hot])
        pair.append(z)
    return pair[0], pair[1]


BUDGET = st.one_of(st.floats(0, 8), st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 0.25, 1.0, 50.0]))


@settings(max_examples=300, deadline=None)
@given(logit_pairs(), BUDGET, st.sampled_from([0.3, 0.7, 1.0, 1.2]), st.booleans())
def test_kl_never_exceeds_the_budget(
    pair: tuple[torch.Tensor, torch.Tensor], budget: float, temperature: float, half: bool
) -> None:
    base, steered = (z.bfloat16() if half else z for z in pair)
    mixed = mix_within_budget(base, steered, torch.tensor(budget), temperature)
    again = kl_per_token(log_probs(mixed.logits, temperature), log_probs(base, temperature))
    assert bool((mixed.kl_nats <= budget).all())
    assert torch.allclose(again, mixed.kl_nats, atol=1e-12)
    assert bool(((mixed.strength >= 0) & (mixed.strength <= 1)).all())


@settings(max_examples=100, deadline=None)
@given(logit_pairs())
def test_kl_is_monotone_in_strength(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, steered = pair
    budgets = (0.0, 1e-3, 1e-2, 0.1, 0.5, 1.0, 4.0, 16.0)
    mixtures = [mix_within_budget(base, steered, torch.tensor(b)) for b in budgets]
    # What is sampled from is float32: logits of 10,000 lie 0.001 apart.
    rounding = 1e-6 + 2e-7 * float(torch.nan_to_num(torch.stack(pair), 0.0, 0.0, 0.0).abs().max())
    for less, more in itertools.pairwise(mixtures):
        assert bool((more.strength >= less.strength * (1 - 1e-2)).all())
        assert bool((more.kl_nats >= less.kl_nats - 2e-4 * less.kl_nats - rounding).all())


def test_the_whole_way_is_taken_when_the_budget_allows() -> None:
    generator = torch.Generator().manual_seed(0)
    base, steered = torch.randn(2, 8, 500, generator=generator)
    mixed = mix_within_budget(base, steered, torch.full((8,), 50.0))
    assert torch.equal(mixed.strength, torch.ones(8, dtype=torch.float64))
    assert torch.allclose(mixed.logits.softmax(-1), steered.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_150k_vocabulary_spends_its_budget_and_not_more(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(3, 151_936, generator=generator) * 4).to(dtype)
    steered = (base.float() + torch.randn(3, 151_936, generator=generator) * 2).to(dtype)
    budget = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    mixed = mix_within_budget(base, steered, budget)
    assert bool((mixed.kl_nats <= budget).all())
    assert bool((mixed.kl_nats >= budget * 0.99).all())


def test_budget_zero_is_bit_identical_to_base() -> None:
    base = torch.randn(4, 333).bfloat16()
    mixed = mix_within_budget(base, torch.randn(4, 333), torch.zeros(4))
    assert torch.equal(mixed.logits, base.float())
    assert not mixed.kl_nats.any()


def test_supports_that_do_not_meet_leave_the_base_alone() -> None:
    base = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]])
    steered = torch.tensor([[-math.inf, -math.inf, 0.0, 1.0]])
    mixed = mix_within_budget(base, steered, torch.tensor([4.0]))
    assert torch.equal(mixed.logits, base)
    assert mixed.kl_nats.item() == 0.0


def test_one_hot_steering_reaches_the_budget_exactly_where_it_can() -> None:
    base = torch.zeros(1, 8)
    steered = torch.full((1, 8), -200.0)
    steered[0, 3] = 200.0
    mixed = mix_within_budget(base, steered, torch.tensor([1.0]))
    assert mixed.kl_nats.item() == pytest.approx(1.0, rel=1e-3)
    whole = mix_within_budget(base, steered, torch.tensor([math.log(8) + 1e-9]))
    assert whole.logits.softmax(-1)[0, 3].item() == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = torch.zeros(2, 5)
    broken = logits.clone()
    broken[1, 2] = bad
    with pytest.raises(NumericsError):
        mix_within_budget(broken, logits, torch.ones(2))
    with pytest.raises(NumericsError):
        mix_within_budget(logits, broken, torch.ones(2))


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 10), st.floats(0, 5), st.lists(st.floats(0, 1), max_size=40))
def test_the_ledger_never_passes_its_budget(budget: float, cap: float, shares: list[float]) -> None:
    ledger = Ledger(budget, cap)
    for share in shares:
        ledger.charge(min(share * 8, ledger.allowance_nats))
        assert 0.0 <= ledger.spent_nats <= budget
        assert ledger.allowance_nats <= cap


def test_a_charge_above_the_allowance_is_an_error() -> None:
    ledger = Ledger(1.0, 0.5)
    with pytest.raises(BudgetError):
        ledger.charge(0.6)
    with pytest.raises(BudgetError):
        ledger.charge(math.nan)
    assert ledger.spent_nats == 0.0


def test_rows_are_mixed_around_their_base_and_a_broken_one_keeps_to_itself() -> None:
    torch.manual_seed(0)
    base, difference = torch.randn(3, 50), torch.randn(3, 50)
    difference[1, 7] = math.nan
    ones = torch.ones(3, dtype=torch.float64)
    spare = torch.zeros(50)
    moved = mix_rows(base, difference, ones * 0.1, ones, spare)
    alone = mix_within_budget(base[[0, 2]], (base + difference)[[0, 2]], ones[:2] * 0.1)
    assert torch.equal(moved.logits[[0, 2]], alone.logits)
    assert torch.equal(moved.logits[1], spare)
    assert moved.outcome[:, 2].tolist() == [0.0, 1.0, 0.0]
    assert moved.outcome[[0, 2], 0].tolist() == alone.kl_nats.tolist()
    assert float(moved.outcome[1, 0]) == 0.0
    unsteered = mix_rows(base, torch.zeros(3, 50), ones, ones)
    assert torch.equal(unsteered.logits, base)
    assert not bool(unsteered.outcome.any())
