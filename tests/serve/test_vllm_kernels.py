"""The GPU's mixing and scoring against their references.

Without a GPU it takes Triton's interpreter, which has to be asked for before the start:
`TRITON_INTERPRET=1 python -m pytest tests/serve/test_vllm_kernels.py`.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before the start", allow_module_level=True)

from guard.kl import kl_per_token, log_probs, mix_rows
from guard.probe import project
from serve import vllm_kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def passes(n: int, vocab: int, spread: float, push: float) -> tuple[Tensor, Tensor]:
    """Base logits and differences of bfloat16 rows."""
    base = (torch.randn(n, vocab) * spread).to(torch.bfloat16)
    return base.to(DEVICE), (push * torch.randn(n, vocab)).to(torch.bfloat16).to(DEVICE)


def recomputed(mixed: Tensor, base: Tensor, temperature: Tensor) -> Tensor:
    """KL(mixed ‖ base), nats, from its definition."""
    return kl_per_token(log_probs(mixed, temperature), log_probs(base, temperature))


@pytest.mark.parametrize("vocab", [37, 4096, 9001])
@pytest.mark.parametrize(("spread", "push"), [(2.5, 0.5), (4.0, 3.0), (1.0, 12.0), (8.0, 0.01)])
def test_the_kernels_spend_what_the_reference_spends_and_never_more_than_the_budget(
    vocab: int, spread: float, push: float
) -> None:
    torch.manual_seed(vocab)
    budgets = torch.tensor([0.0, 1e-6, 1e-3, 0.05, 1.0, 4.0, 64.0], dtype=torch.float64).to(DEVICE)
    temperature = torch.tensor([1, 0.3, 1, 0.7, 2, 1, 1], dtype=torch.float64).to(DEVICE)
    base, difference = passes(len(budgets), vocab, spread, push)
    found = vllm_kernels.mix_rows(base, difference, budgets, temperature)
    wanted = mix_rows(base, difference, budgets, temperature)
    nats = found.outcome[:, 0]
    again = recomputed(found.logits, base, temperature)
    assert bool((nats <= budgets).all())
    assert bool((again <= budgets + 1e-12).all())
    assert torch.allclose(nats, again, rtol=1e-9, atol=1e-12)
    assert torch.allclose(nats, wanted.outcome[:, 0], rtol=3e-4, atol=2e-6)
    assert torch.equal(found.logits[0], base[0].float())
    assert torch.allclose(found.logits, wanted.logits, rtol=1e-3, atol=2e-3 * max(push, 1.0))
    assert float((found.outcome[:, 1] != wanted.outcome[:, 1]).sum()) <= 1  # ties of bfloat16
    assert not bool(found.outcome[:, 2].any())


def test_a_pass_that_steers_nothing_returns_the_base_row_bit_for_bit() -> None:
    torch.manual_seed(0)
    base, nothing = passes(3, 5000, 3.0, 0.0)
    ones = torch.ones(3, dtype=torch.float64, device=DEVICE)
    found = vllm_kernels.mix_rows(base, nothing, ones, ones)
    assert torch.equal(found.logits, base.float())
    assert not bool(found.outcome.any())


@pytest.mark.parametrize("spare", [True, False])
def test_a_broken_row_says_so_and_leaves_the_others_alone(spare: bool) -> None:
    torch.manual_seed(1)
    base, difference = passes(5, 4500, 3.0, 1.0)
    ones = torch.ones(5, dtype=torch.float64, device=DEVICE)
    alone = vllm_kernels.mix_rows(base[4:], difference[4:], ones[4:], ones[4:])
    difference[0, 4400] = float("nan")
    difference[1, 3] = float("inf")
    base[2, 7] = float("nan")
    base[3] = float("-inf")
    row = torch.arange(4500.0, device=DEVICE) if spare else None
    for mix in (vllm_kernels.mix_rows, mix_rows):
        found = mix(base, difference, ones, ones, row)
        assert found.outcome[:, 2].tolist() == [1, 1, 1, 1, 0]
        assert not bool(found.outcome[:4, :2].any())
        expected = base[:4].float() if row is None else row.expand(4, -1)
        assert torch.equal(found.logits[:4].nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.allclose(found.logits[4], alone.logits[0], atol=1e-3)


def test_tokens_that_cannot_occur_stay_impossible() -> None:
    torch.manual_seed(2)
    base, difference = passes(2, 4200, 3.0, 1.0)
    base[:, 10:20] = float("-inf")
    difference[1, 30:40] = float("-inf")
    ones = torch.full((2,), 1.0, dtype=torch.float64, device=DEVICE)
    found = vllm_kernels.mix_rows(base, difference, ones, ones)
    wanted = mix_rows(base, difference, ones, ones)
    assert bool((found.logits[:, 10:20] == float("-inf")).all())
    assert bool((found.logits[1, 30:40] == float("-inf")).all())
    assert torch.allclose(found.outcome[:, 0], wanted.outcome[:, 0], rtol=3e-4)


def test_projections_are_the_probes_and_go_to_their_slots() -> None:
    torch.manual_seed(3)
    hidden = torch.randn(6, 70).to(torch.bfloat16).to(DEVICE)
    weight = torch.randn(5, 70, device=DEVICE)
    kept = torch.full((20, 5), float("nan"), device=DEVICE)
    slots = torch.tensor([3, 19, 0, -1, 7, 8], device=DEVICE)
    vllm_kernels.project_tokens(hidden, weight, slots, kept)
    there = slots >= 0
    assert torch.allclose(kept[slots[there]], project(hidden, weight)[there], atol=1e-4)
    assert int(kept.isnan().sum()) == 75
