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

from guard.gate import refusal_probability
from guard.kl import kl_per_token, log_probs, mix_rows
from guard.probe import Probe, linear_probe, pool_message, probe_scores, project
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
    vllm_kernels.project_tokens([(hidden, weight, kept)], slots)
    there = slots >= 0
    assert torch.allclose(kept[slots[there]], project(hidden, weight)[there], atol=1e-4)
    assert int(kept.isnan().sum()) == 75


def test_a_tokens_projections_are_the_same_bits_whatever_else_is_in_the_step() -> None:
    torch.manual_seed(4)
    hidden = torch.randn(7, 1100).to(torch.bfloat16).to(DEVICE)
    weight = torch.randn(6, 1100, device=DEVICE)
    whole, alone = (torch.full((7, 6), float("nan"), device=DEVICE) for _ in range(2))
    slots = torch.arange(7, device=DEVICE)
    vllm_kernels.project_tokens([(hidden, weight, whole)], slots)
    for i in range(7):
        vllm_kernels.project_tokens([(hidden[i : i + 1], weight, alone)], slots[i : i + 1])
    assert torch.equal(whole, alone)
    assert torch.allclose(whole, project(hidden, weight), atol=1e-3)


def test_two_layers_are_projected_in_one_launch_each_with_its_weights() -> None:
    torch.manual_seed(5)
    hidden = [torch.randn(5, 600).to(torch.bfloat16).to(DEVICE) for _ in range(2)]
    weights = [torch.randn(width, 600, device=DEVICE) for width in (6, 3)]
    kept = [torch.full((9, len(weight)), float("nan"), device=DEVICE) for weight in weights]
    slots = torch.tensor([8, 1, 2, -1, 4], device=DEVICE)
    vllm_kernels.project_tokens(list(zip(hidden, weights, kept, strict=True)), slots)
    there = slots >= 0
    for states, weight, found in zip(hidden, weights, kept, strict=True):
        assert torch.allclose(found[slots[there]], project(states, weight)[there], atol=1e-3)
        assert int(found.isnan().sum()) == 5 * len(weight)


def probes() -> list[Probe]:
    """One of each form: attention with a hidden layer and without, and a line."""
    heads, values, template, units = 3, 5, 6, 10
    features = heads * values + template
    message = torch.randn(heads + values, 8, device=DEVICE)
    read = torch.randn(template, 8, device=DEVICE)
    hidden = torch.randn(units, features + 1, device=DEVICE)
    return [
        Probe(read, torch.randn(units + 1, device=DEVICE), message, heads, hidden),
        Probe(read, torch.randn(features + 1, device=DEVICE), message, heads),
        Probe(read, torch.randn(template + 1, device=DEVICE)),
        linear_probe(torch.randn(8), 0.3).map(lambda tensor: tensor.to(DEVICE)),
    ]


@pytest.mark.parametrize("form", range(4))
def test_gate_scores_are_the_probes_through_the_block_table(form: int) -> None:
    torch.manual_seed(form)
    probe, block_size, window, n_pooled = probes()[form], 4, 11, 2
    table = torch.randperm(24, device=DEVICE)[:20].reshape(4, 5).to(torch.int32)
    slots = 24 * block_size
    template = torch.randn(slots, len(probe.template), device=DEVICE)
    message = None
    if probe.message is not None:
        message = torch.randn(slots, len(probe.message), device=DEVICE)
    # row, last place of the template, first place of the message, its length
    asked = [(2, 19, 4, 11), (0, 0, 0, 1), (3, 7, 2, 3), (2, 6, 3, 2)]

    def slot(row: int, place: int) -> int:
        return int(table[row, place // block_size]) * block_size + place % block_size

    wanted = []
    for row, last, first, length in asked:
        pooled = None
        if message is not None:
            kept = message[[slot(row, first + i) for i in range(length)]].unsqueeze(0)
            there = torch.ones(1, length, dtype=torch.bool, device=DEVICE)
            pooled = pool_message(kept, there, probe.n_heads)
        read = template[[slot(row, max(0, last - i)) for i in range(n_pooled)]].mean(0, True)
        wanted.append(float(probe_scores(probe, read, pooled)))
    numbers = torch.tensor(asked, dtype=torch.int32, device=DEVICE)
    found = vllm_kernels.gate_scores(
        probe, numbers, table, block_size, template, message, n_pooled, window
    )
    assert found.tolist() == pytest.approx(wanted, abs=2e-4)
    alone = vllm_kernels.gate_scores(
        probe, numbers[2:3], table, block_size, template, message, n_pooled, window
    )
    assert torch.equal(found[2:3], alone)


def test_a_slot_that_was_never_written_makes_the_score_nan() -> None:
    torch.manual_seed(6)
    probe = probes()[0]
    assert probe.message is not None
    template, message = (torch.randn(8, n, device=DEVICE) for n in (6, len(probe.message)))
    table = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
    asked = torch.tensor([[0, 5, 1, 3], [0, 5, 4, 2]], dtype=torch.int32, device=DEVICE)
    for broken in (message, template):
        before = broken[2 if broken is message else 5].clone()
        broken[2 if broken is message else 5] = float("nan")
        scores = vllm_kernels.gate_scores(probe, asked, table, 4, template, message, 2, 4)
        assert scores.isnan().tolist() == [True, broken is template]
        broken[2 if broken is message else 5] = before


@pytest.mark.parametrize("vocab", [40, 4096, 9003])
def test_refusal_probabilities_are_the_gates(vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(5, vocab) * 4).to(torch.bfloat16).to(DEVICE)
    logits[1, 5:30] = float("-inf")
    logits[2, 7] = 60.0
    ids = torch.tensor([7, 3, 12, 39], device=DEVICE)
    weights = torch.tensor([1.0, 0.5, 0.25, 1.0], device=DEVICE)
    asked = torch.tensor([[4, 0], [1, 0], [2, 0]], dtype=torch.int32, device=DEVICE)
    scores = torch.tensor([2.0, -2.0, 2.0], device=DEVICE)
    wanted = refusal_probability(logits[[4, 1, 2]], ids, weights)
    for cut in (0.0, float(wanted[0]), 0.5):
        limits = torch.tensor([1.0, cut, cut], dtype=torch.float64, device=DEVICE)
        (told, found), agrees = vllm_kernels.gate_readings(
            logits, asked, ids, weights, scores, limits
        )
        assert torch.equal(told, scores)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-7)
        first, second, third = found.tolist()
        assert agrees.tolist() == [first < cut, second > cut, third < cut]
    assert float(found[2]) == pytest.approx(1.0, abs=1e-6)


def test_a_broken_row_has_no_refusal_probability() -> None:
    torch.manual_seed(7)
    logits = torch.randn(4, 4200, device=DEVICE)
    logits[0, 4150] = float("nan")
    logits[1, 3] = float("inf")
    logits[3] = float("-inf")
    asked = torch.arange(4, dtype=torch.int32, device=DEVICE).unsqueeze(1)
    ids, weights = torch.tensor([9], device=DEVICE), torch.ones(1, device=DEVICE)
    scores = torch.tensor([5.0, -5.0, 5.0, 5.0], device=DEVICE)
    limits = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64, device=DEVICE)
    (_, found), agrees = vllm_kernels.gate_readings(logits, asked, ids, weights, scores, limits)
    assert found.isnan().tolist() == [True, True, False, True]
    assert agrees.tolist() == [0.0, 0.0, 1.0, 0.0]  # what is not known lets nothing be steered


def test_tied_tokens_flip_to_the_first_of_them_as_in_pytorch() -> None:
    torch.manual_seed(8)
    base, difference = passes(3, 9001, 1.0, 0.0)
    base[0, [40, 600, 5000, 9000]] = 9.0  # within a piece, across pieces and chunks
    base[1, 8000], base[1, 100] = 9.0, 8.0
    difference[1, 100] = 2.0
    base[2, [4096, 4095]] = 9.0
    difference[2, 4095] = -4.0
    budgets = torch.full((3,), 64.0, dtype=torch.float64, device=DEVICE)
    found = vllm_kernels.mix_rows(base, difference, budgets, torch.ones_like(budgets))
    assert found.logits.argmax(1).tolist() == [40, 100, 4096]
    assert found.outcome[:, 1].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("with_last", [True, False])
def test_rows_are_gathered_with_their_allowances(told: bool, with_last: bool) -> None:
    torch.manual_seed(9)
    n_rows, vocab, d_model, n_blocks = 6, 5000, 70, 9
    step = vllm_kernels.StepRows(
        torch.randn(11, d_model, device=DEVICE).to(torch.bfloat16),
        torch.randn(n_rows, vocab, device=DEVICE).to(torch.bfloat16),
        torch.randn(n_rows, d_model, device=DEVICE).to(torch.bfloat16),
        torch.arange(20, 20 + n_rows, dtype=torch.int32, device=DEVICE),
        torch.randint(100, (n_rows, n_blocks), dtype=torch.int32, device=DEVICE),
    )
    ends = torch.tensor([0, 2, 3, 6, 9, 10], device=DEVICE)
    rows = vllm_kernels.StepRows(
        *[torch.zeros_like(part) for part in (step.hidden, step.logits, step.last)],
        torch.zeros_like(step.seq_lens),
        torch.zeros(n_rows, n_blocks + 3, dtype=torch.int32, device=DEVICE)[:, :n_blocks],
    )
    index = torch.full((n_rows,), -1, device=DEVICE)
    limits = torch.full((2, n_rows), -1.0, dtype=torch.float64, device=DEVICE)
    wanted = [5, 0, 3, 5]
    numbers = torch.tensor(
        [wanted, [1.0, 2.0, 3.0, 0.0], [0.5, 1.0, 2.0, 1.0]], dtype=torch.float64, device=DEVICE
    )
    only_if = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64, device=DEVICE) if told else None
    vllm_kernels.gather_rows(numbers, only_if, ends, step, rows, index, limits, with_last=with_last)
    assert index.tolist() == [*wanted, -1, -1]
    assert torch.equal(rows.hidden[:4], step.hidden[ends[wanted]])
    assert torch.equal(rows.logits[:4], step.logits[wanted])
    assert torch.equal(rows.last[:4], step.last[wanted]) is with_last
    assert torch.equal(rows.seq_lens[:4], step.seq_lens[wanted])
    assert torch.equal(rows.table[:4], step.table[wanted])
    assert not bool(rows.logits[4:].any())
    assert not bool(rows.table[4:].any())
    assert limits[0].tolist() == [1.0, 0.0 if told else 2.0, 3.0, 0.0, -1.0, -1.0]
    assert limits[1].tolist() == [0.5, 1.0, 2.0, 1.0, -1.0, -1.0]
