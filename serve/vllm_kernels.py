# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The guard's arithmetic on a GPU: a few Triton kernels without a word to the host.

`mix_rows` is `guard.kl.mix_rows` over a grid of (row, piece of the vocabulary). Every launch sums
its piece at the strength that the sums of the launch before imply; each program of a row adds those
up by itself, in the same order, so no launch waits for another. Rows that are done do nothing.

    extremes ─► sums at t = 1 ─► Newton × 12 ─► write row, KL in float64 ─► shrink if above ─► book

The search works in float32 and only proposes: the row that is written is measured again in
float64, from the very values that were written, and goes back toward the base row until it fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from guard.kl import Moved
from guard.probe import Probe

__all__ = [
    "StepRows",
    "gate_readings",
    "gate_scores",
    "gather_rows",
    "mix_rows",
    "project_tokens",
]

_CHUNK = 4096
_PART = 256  # of a chunk at once: float64 takes many registers
_SEARCHES = 12
_SHRINKS = (1e-6, 1e-4, 1e-2)  # what is given up beyond the estimate where rounding went over
_N_STATE, _N_SUMS = 8, 8

# state: 0 t, 1 low, 2 KL(low), 3 high, 4 max base, 5 max target − max base, 6 log Z(0), 7 faulty


@triton.jit
def _load(base, difference, at, inside):
    """One piece of a row: base logits, what to add to them, and where the row is broken."""
    b = tl.load(base + at, mask=inside, other=float("-inf")).to(tl.float32)
    d = tl.load(difference + at, mask=inside, other=0.0).to(tl.float32)
    plus = float("inf")
    return b, d, (b != b) | (d != d) | (b == plus) | (d == plus)


@triton.jit
def _extremes_kernel(
    base, base_row, difference, difference_row, temperature, sums, vocab, n_chunks,
    CHUNK: tl.constexpr, N_SUMS: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab
    b, d, broken = _load(base + row * base_row, difference + row * difference_row, at, inside)
    scale = 1.0 / tl.load(temperature + row)
    possible = inside & (b != float("-inf"))
    target = tl.where(possible, b + d, float("-inf"))
    out = sums + (row * n_chunks + chunk) * N_SUMS
    # masked, for a NaN must not reach the maxima: the row is given up anyway
    tl.store(out, tl.max(tl.where(possible & ~broken, b, -1e30), 0).to(tl.float64) * scale)
    tl.store(out + 1, tl.max(tl.where(possible & ~broken, target, -1e30), 0).to(tl.float64) * scale)
    tl.store(out + 2, tl.max(broken.to(tl.int32), 0).to(tl.float64))


@triton.jit
def _column(sums, row, n_chunks, column, empty, CHUNKS: tl.constexpr, N_SUMS: tl.constexpr):
    """One number of every piece of a row."""
    i = tl.arange(0, CHUNKS)
    return tl.load(
        sums + (row * n_chunks + i) * N_SUMS + column, mask=i < n_chunks, other=empty
    )  # fmt: skip


@triton.jit
def _advance(sums, state, row, n_chunks, cap, log_base, CHUNKS: tl.constexpr, N_SUMS: tl.constexpr):
    """Read KL(t) off the last sums and move the bracket: low fits, high does not."""
    t, low, low_kl = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    high, faulty = tl.load(state + 3), tl.load(state + 7)
    searching = (low < 1.0) & (low_kl < cap * (1.0 - 1e-4)) & (high - low > 1e-9) & (faulty == 0)
    if searching & (cap > 0.0):
        total = tl.sum(_column(sums, row, n_chunks, 0, 0.0, CHUNKS, N_SUMS), 0)
        mean = tl.sum(_column(sums, row, n_chunks, 1, 0.0, CHUNKS, N_SUMS), 0)
        square = tl.sum(_column(sums, row, n_chunks, 2, 0.0, CHUNKS, N_SUMS), 0)
        safe = tl.maximum(total, 1e-300)
        mean = mean / safe
        slope = t * tl.maximum(square / safe - mean * mean, 0.0)
        kl = tl.maximum(t * mean - tl.log(safe) + log_base, 0.0)
        kl = tl.where(total > 0.0, kl, float("inf"))
        fits = kl <= cap
        low_kl = tl.where(fits, kl, low_kl)
        low = tl.where(fits, t, low)
        high = tl.where(fits, high, t)
        root = tl.sqrt(kl)
        # sqrt(KL) is nearly straight in t
        newton = t + (tl.sqrt(cap * (1.0 - 0.5e-4)) - root) * 2.0 * root / tl.maximum(slope, 1e-300)
        t = tl.where((newton > low) & (newton < high), newton, 0.5 * (low + high))
        searching = (low < 1.0) & (low_kl < cap * (1.0 - 1e-4)) & (high - low > 1e-9)
    return t, low, low_kl, high, searching & (cap > 0.0)


@triton.jit
def _search_kernel(
    base, base_row, difference, difference_row, temperature, budget,
    sums, sums_next, state, state_next, vocab, n_chunks,
    STEP: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    N_SUMS: tl.constexpr, N_STATE: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state, state_next = state + row * N_STATE, state_next + row * N_STATE
    cap = tl.load(budget + row)
    if STEP == 0:  # the largest strength first
        top = tl.max(_column(sums, row, n_chunks, 0, -1e300, CHUNKS, N_SUMS), 0)
        shift = tl.max(_column(sums, row, n_chunks, 1, -1e300, CHUNKS, N_SUMS), 0) - top
        faulty = tl.max(_column(sums, row, n_chunks, 2, 0.0, CHUNKS, N_SUMS), 0)
        faulty = tl.where(top > -1e29, faulty, 1.0)  # no possible token
        log_base = top * 0.0
        low, low_kl = top * 0.0, top * 0.0
        t, high = low + 1.0, low + 1.0
        go = (cap > 0.0) & (faulty == 0)
    else:
        top, shift = tl.load(state + 4), tl.load(state + 5)
        log_base, faulty = tl.load(state + 6), tl.load(state + 7)
        if STEP == 1:  # log Z(0) is known now
            total = tl.sum(_column(sums, row, n_chunks, 3, 0.0, CHUNKS, N_SUMS), 0)
            log_base = tl.log(tl.maximum(total, 1e-300))
        t, low, low_kl, high, go = _advance(
            sums, state, row, n_chunks, cap, log_base, CHUNKS, N_SUMS
        )
    if chunk == 0:
        tl.store(state_next, t)
        tl.store(state_next + 1, low)
        tl.store(state_next + 2, low_kl)
        tl.store(state_next + 3, high)
        tl.store(state_next + 4, top)
        tl.store(state_next + 5, shift)
        tl.store(state_next + 6, log_base)
        tl.store(state_next + 7, faulty)
    if go:
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = at < vocab
        b, d, _broken = _load(base + row * base_row, difference + row * difference_row, at, inside)
        scale = (1.0 / tl.load(temperature + row)).to(tl.float32)
        b = b * scale - top.to(tl.float32)
        d = d * scale - shift.to(tl.float32)
        possible = inside & (b != float("-inf"))
        # max(b + t·d) ≤ 0 for every t in [0, 1], so nothing overflows
        weight = tl.where(possible, tl.exp(b + t.to(tl.float32) * d), 0.0)
        reach = tl.where(weight > 0.0, d, 0.0)
        out = sums_next + (row * n_chunks + chunk) * N_SUMS
        tl.store(out, tl.sum(weight, 0).to(tl.float64))
        tl.store(out + 1, tl.sum(weight * reach, 0).to(tl.float64))
        tl.store(out + 2, tl.sum(weight * reach * reach, 0).to(tl.float64))
        if STEP == 0:
            tl.store(out + 3, tl.sum(tl.where(possible, tl.exp(b), 0.0), 0).to(tl.float64))


@triton.jit
def _written_kl(sums, row, n_chunks, t, CHUNKS: tl.constexpr, N_SUMS: tl.constexpr):
    """KL(written row ‖ base row), nats, from float64 sums; 0 for the base row itself."""
    mixed = tl.sum(_column(sums, row, n_chunks, 0, 0.0, CHUNKS, N_SUMS), 0)
    moved = tl.sum(_column(sums, row, n_chunks, 1, 0.0, CHUNKS, N_SUMS), 0)
    base = tl.sum(_column(sums, row, n_chunks, 2, 0.0, CHUNKS, N_SUMS), 0)
    kl = moved / mixed - tl.log(mixed) + tl.log(base)
    kl = tl.where(mixed > 0.0, tl.maximum(kl, 0.0), float("inf"))
    return tl.where(t == 0.0, 0.0, kl)


@triton.jit
def _write_kernel(
    base, base_row, difference, difference_row, temperature, budget, spare,
    sums, sums_next, state, state_next, mixed, mixed_row, vocab, n_chunks, shrink,
    FIRST: tl.constexpr, SPARE: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, N_SUMS: tl.constexpr, N_STATE: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state, state_next = state + row * N_STATE, state_next + row * N_STATE
    cap = tl.load(budget + row)
    top, shift, faulty = tl.load(state + 4), tl.load(state + 5), tl.load(state + 7)
    if FIRST:
        log_base = tl.load(state + 6)
        _at, t, _low_kl, _high, _go = _advance(
            sums, state, row, n_chunks, cap, log_base, CHUNKS, N_SUMS
        )
        t = tl.where((faulty == 0) & (cap > 0.0), t, 0.0)
        go = row >= 0
    else:
        t = tl.load(state)
        kl = _written_kl(sums, row, n_chunks, t, CHUNKS, N_SUMS)
        go = kl > cap
        back = tl.sqrt(cap / tl.maximum(kl, 1e-300)) * (1.0 - shrink)  # KL is nearly square in t
        t = tl.where(go, t * back, t)
    if chunk == 0:
        tl.store(state_next, t)
        tl.store(state_next + 4, top)
        tl.store(state_next + 5, shift)
        tl.store(state_next + 7, faulty)
    out = sums_next + (row * n_chunks + chunk) * N_SUMS
    if go:
        scale = 1.0 / tl.load(temperature + row)
        weights = tl.zeros((PART,), dtype=tl.float64)
        moved, base_weights = weights, weights
        best_m = tl.full((PART,), float("-inf"), dtype=tl.float32)
        best_b = best_m
        token_m = tl.zeros((PART,), dtype=tl.int32) + vocab
        token_b = token_m
        for start in range(0, CHUNK, PART):  # few registers, and one reduction at the end
            at = chunk * CHUNK + start + tl.arange(0, PART)
            inside = at < vocab
            b, d, _broken = _load(
                base + row * base_row, difference + row * difference_row, at, inside
            )  # fmt: skip
            m = tl.where(b == float("-inf"), b, b + t.to(tl.float32) * d)
            m = tl.where(t == 0.0, b, m)
            if SPARE:
                m = tl.where(faulty > 0, tl.load(spare + at, mask=inside, other=0.0), m)
            tl.store(mixed + row * mixed_row + at, m, mask=inside)
            m64 = m.to(tl.float64) * scale
            b64 = b.to(tl.float64) * scale
            possible = inside & (b != float("-inf"))
            weight = tl.where(possible, tl.exp(m64 - (top + t * shift)), 0.0)
            weights += weight
            moved += tl.where(weight > 0.0, weight * (m64 - t * shift - b64), 0.0)
            base_weights += tl.where(possible, tl.exp(b64 - top), 0.0)
            better = inside & (m > best_m)
            best_m, token_m = tl.where(better, m, best_m), tl.where(better, at, token_m)
            better = inside & (b > best_b)
            best_b, token_b = tl.where(better, b, best_b), tl.where(better, at, token_b)
        tl.store(out, tl.sum(weights, 0))
        tl.store(out + 1, tl.sum(moved, 0))
        tl.store(out + 2, tl.sum(base_weights, 0))
        best = tl.max(best_m, 0)
        tl.store(out + 3, best.to(tl.float64))
        tl.store(out + 4, tl.min(tl.where(best_m == best, token_m, vocab), 0).to(tl.float64))
        best = tl.max(best_b, 0)
        tl.store(out + 5, best.to(tl.float64))
        tl.store(out + 6, tl.min(tl.where(best_b == best, token_b, vocab), 0).to(tl.float64))
    else:
        i = tl.arange(0, N_SUMS)
        tl.store(out + i, tl.load(sums + (row * n_chunks + chunk) * N_SUMS + i))


@triton.jit
def _book_kernel(
    base, base_row, budget, sums, state, mixed, mixed_row, outcome, vocab, n_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, N_SUMS: tl.constexpr, N_STATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, faulty = tl.load(state + row * N_STATE), tl.load(state + row * N_STATE + 7)
    kl = _written_kl(sums, row, n_chunks, t, CHUNKS, N_SUMS)
    above = (kl > tl.load(budget + row)) | (kl != kl)
    best = _column(sums, row, n_chunks, 3, float("-inf"), CHUNKS, N_SUMS)
    token = _column(sums, row, n_chunks, 4, 0.0, CHUNKS, N_SUMS)
    chosen = tl.min(tl.where(best == tl.max(best, 0), token, 1e18), 0)
    best = _column(sums, row, n_chunks, 5, float("-inf"), CHUNKS, N_SUMS)
    token = _column(sums, row, n_chunks, 6, 0.0, CHUNKS, N_SUMS)
    before = tl.min(tl.where(best == tl.max(best, 0), token, 1e18), 0)
    if above & (faulty == 0):  # nothing but the base row is left that surely fits
        for chunk in range(CHUNKS):
            at = chunk * CHUNK + tl.arange(0, CHUNK)
            b = tl.load(base + row * base_row + at, mask=at < vocab).to(tl.float32)
            tl.store(mixed + row * mixed_row + at, b, mask=at < vocab)
    moved = ~above & (faulty == 0)
    tl.store(outcome + row * 3, tl.where(moved, kl, 0.0))
    tl.store(outcome + row * 3 + 1, tl.where(moved & (chosen != before), 1.0, 0.0))
    tl.store(outcome + row * 3 + 2, tl.where(faulty > 0, 1.0, 0.0))


def mix_rows(
    base_logits: Tensor,
    difference: Tensor,
    budget_nats: Tensor,
    temperature: Tensor,
    spare: Tensor | None = None,
    out: Moved | None = None,
) -> Moved:
    """`guard.kl.mix_rows` on a GPU, without a synchronisation; it can be captured in a CUDA graph.

    Args:
        base_logits: (n_rows, vocab), any float type, contiguous along the vocabulary.
        difference: (n_rows, vocab), likewise: steered − null logits.
        budget_nats: (n_rows,) float64, ≥ 0.
        temperature: (n_rows,) float64, > 0.
        spare: (vocab,) float32 for rows that cannot be computed; None: their base row.
        out: where to put the result.
    """
    n_rows, vocab = base_logits.shape
    device = base_logits.device
    moved = out or Moved(
        torch.empty(n_rows, vocab, device=device),
        torch.empty(n_rows, 3, dtype=torch.float64, device=device),
    )
    n_chunks = triton.cdiv(vocab, _CHUNK)
    sums = torch.empty(2, n_rows, n_chunks, _N_SUMS, dtype=torch.float64, device=device)
    state = torch.zeros(2, n_rows, _N_STATE, dtype=torch.float64, device=device)
    sizes = {"CHUNK": _CHUNK, "N_SUMS": _N_SUMS}
    more = {**sizes, "CHUNKS": triton.next_power_of_2(n_chunks), "N_STATE": _N_STATE}
    grid = (n_rows, n_chunks)
    rows = (base_logits, base_logits.stride(0), difference, difference.stride(0))
    _extremes_kernel[grid](*rows, temperature, sums[0], vocab, n_chunks, **sizes)
    now = 0
    for step in range(_SEARCHES):
        then = 1 - now
        _search_kernel[grid](
            *rows, temperature, budget_nats, sums[now], sums[then], state[now], state[then],
            vocab, n_chunks, STEP=min(step, 2), num_warps=8, **more,
        )  # fmt: skip
        now = then
    for i, shrink in enumerate((0.0, *_SHRINKS)):
        then = 1 - now
        _write_kernel[grid](
            *rows, temperature, budget_nats, spare if spare is not None else moved.logits,
            sums[now], sums[then], state[now], state[then],
            moved.logits, moved.logits.stride(0), vocab, n_chunks, shrink,
            FIRST=i == 0, SPARE=spare is not None, PART=_PART, num_warps=4, **more,
        )  # fmt: skip
        now = then
    _book_kernel[(n_rows,)](
        base_logits, base_logits.stride(0), budget_nats, sums[now], state[now],
        moved.logits, moved.logits.stride(0), moved.outcome, vocab, n_chunks, **more,
    )  # fmt: skip
    return moved


@triton.jit(do_not_specialize=["n"])  # or the first step of 16 or 32 tokens would be compiled for
def _project_kernel(
    hidden, row_stride, weight, kept, width,
    hidden_2, row_stride_2, weight_2, kept_2, width_2,
    slots, n, d_model, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, n_groups = tl.program_id(1), tl.cdiv(width, UNITS)
    if group >= n_groups:
        hidden, row_stride, weight = hidden_2, row_stride_2, weight_2
        kept, width, group = kept_2, width_2, group - n_groups
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = group * UNITS + tl.arange(0, UNITS)
    total = tl.zeros((ROWS, UNITS, BLOCK), dtype=tl.float32)
    for start in range(0, d_model, BLOCK):  # one reduction, at the end
        at = start + tl.arange(0, BLOCK)
        values = tl.load(
            hidden + row.to(tl.int64)[:, None] * row_stride + at[None, :],
            mask=(row < n)[:, None] & (at < d_model)[None, :],
            other=0.0,
        ).to(tl.float32)
        weights = tl.load(
            weight + unit[:, None] * d_model + at[None, :],
            mask=(unit < width)[:, None] & (at < d_model)[None, :],
            other=0.0,
        )
        total += values[:, None, :] * weights[None, :, :]
    slot = tl.load(slots + row, mask=row < n, other=-1)
    tl.store(
        kept + slot[:, None] * width + unit[None, :],
        tl.sum(total, 2),
        mask=(slot >= 0)[:, None] & (unit < width)[None, :],
    )


def project_tokens(reads: Sequence[tuple[Tensor, Tensor, Tensor]], slots: Tensor) -> None:
    """Write every token's projections, hidden · weightᵀ, to its slot: one launch.

    A token's sums do not depend on what else is in the step, to the last bit.

    Args:
        reads: one or two of hidden states (n_tokens, d_model), contiguous along d_model; weights
            (width, d_model) float32, contiguous; and (n_slots, width) float32, which is written.
        slots: (n_tokens,) int64; negative ones are left out.
    """
    n, d_model = reads[0][0].shape
    arguments: list[Any] = []
    n_groups = 0
    for i in range(2):
        hidden, weight, kept = reads[min(i, len(reads) - 1)]
        width = len(weight) if i < len(reads) else 0
        arguments += [hidden, hidden.stride(0), weight, kept, width]
        n_groups += -(-width // 4)
    _project_kernel[(-(-n // 2), n_groups)](
        *arguments, slots, n, d_model, ROWS=2, UNITS=4, BLOCK=512, num_warps=4
    )


@triton.jit
def _gate_kernel(
    asked, table, table_stride, block_size, template, message, hidden, n_features, out, scores,
    n_pooled, N_TEMPLATE: tl.constexpr, TEMPLATE: tl.constexpr, N_POOLED: tl.constexpr,
    N_HEADS: tl.constexpr, N_VALUES: tl.constexpr, VALUES: tl.constexpr, WINDOW: tl.constexpr,
    N_HIDDEN: tl.constexpr, HIDDEN: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    prompt = tl.program_id(0)
    asked += prompt * 4
    row = tl.load(asked).to(tl.int64)
    last, first, length = tl.load(asked + 1), tl.load(asked + 2), tl.load(asked + 3)
    blocks = table + row * table_stride
    unit = tl.arange(0, HIDDEN)
    weights = hidden + unit * (n_features + 1)  # a row of H each
    total = tl.load(weights + n_features, mask=unit < N_HIDDEN, other=0.0)
    if N_HEADS > 0:
        i = tl.arange(0, WINDOW)
        there = i < length
        place = first + i
        block = tl.load(blocks + place // block_size, mask=there, other=0).to(tl.int64)
        kept = message + (block * block_size + place % block_size) * (N_HEADS + N_VALUES)
        v = tl.arange(0, VALUES)
        value = tl.load(
            kept[:, None] + N_HEADS + v[None, :],
            mask=there[:, None] & (v < N_VALUES)[None, :],
            other=0.0,
        )
        for head in tl.static_range(N_HEADS):
            query = tl.load(kept + head, mask=there, other=float("-inf"))
            share = tl.where(there, tl.exp(query - tl.max(query, 0)), 0.0)
            pooled = tl.sum(value * (share / tl.sum(share, 0))[:, None], 0)  # (VALUES,)
            at = head * N_VALUES + v
            part = tl.load(
                weights[:, None] + at[None, :],
                mask=(unit < N_HIDDEN)[:, None] & (v < N_VALUES)[None, :],
                other=0.0,
            )
            total += tl.sum(part * pooled[None, :], 1)
    back = tl.arange(0, N_POOLED)
    place = tl.maximum(last - back, 0)
    block = tl.load(blocks + place // block_size, mask=back < n_pooled, other=0).to(tl.int64)
    kept = template + (block * block_size + place % block_size) * N_TEMPLATE
    v = tl.arange(0, TEMPLATE)
    inside = (v < N_TEMPLATE)[None, :]
    found = tl.load(kept[:, None] + v[None, :], mask=(back < n_pooled)[:, None] & inside, other=0.0)
    mean = tl.sum(found, 0) / n_pooled
    part = tl.load(
        weights[:, None] + (N_HEADS * N_VALUES + v)[None, :],
        mask=(unit < N_HIDDEN)[:, None] & inside,
        other=0.0,
    )
    total += tl.sum(part * mean[None, :], 1)
    if GELU:
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
        total *= tl.load(out + unit, mask=unit < N_HIDDEN, other=0.0)
        score = tl.sum(total, 0) + tl.load(out + N_HIDDEN)
    else:
        score = tl.sum(total, 0)
    tl.store(scores + prompt, score)


def gate_scores(
    probe: Probe,
    asked: Tensor,
    table: Tensor,
    block_size: int,
    template: Tensor,
    message: Tensor | None,
    n_pooled: int,
    window: int,
) -> Tensor:
    """`probe_scores` of prompts whose tokens' projections are kept by KV slot: one launch.

    Args:
        probe: the weights, contiguous.
        asked: (n, 4) int32: row of the step, place of the last template token that is read, place
            of the message's first token, and how many of it there are, at most `window`.
        table: (n_rows, n_blocks) int32: KV blocks of the step's rows.
        block_size: tokens a block.
        template: (n_slots, n_template) float32.
        message: (n_slots, n_heads + n_values) float32, if the probe reads the message.
        n_pooled: template tokens that are averaged; before the first comes the first again.
        window: most tokens of a message.

    Returns:
        (n,) float32.
    """
    scores = torch.empty(len(asked), dtype=torch.float32, device=asked.device)
    n_template = len(probe.template)
    n_values = 0 if probe.message is None else len(probe.message) - probe.n_heads
    # A linear probe is one row of H without what follows it.
    weights = probe.out.unsqueeze(0) if probe.hidden is None else probe.hidden
    power = triton.next_power_of_2
    _gate_kernel[(len(asked),)](
        asked, table, table.stride(0), block_size, template,
        template if message is None else message, weights, probe.n_features, probe.out, scores,
        n_pooled, N_TEMPLATE=n_template, TEMPLATE=power(n_template), N_POOLED=power(n_pooled),
        N_HEADS=probe.n_heads, N_VALUES=n_values, VALUES=power(max(n_values, 1)),
        WINDOW=power(max(window, 1)), N_HIDDEN=len(weights), HIDDEN=power(len(weights)),
        GELU=probe.hidden is not None, num_warps=4,
    )  # fmt: skip
    return scores


@triton.jit
def _refusal_kernel(
    logits, row_stride, vocab, asked, asked_stride, ids, weights, n_ids, scores, limits,
    readings, agrees, n, CHUNK: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    prompt = tl.program_id(0)
    row = tl.load(asked + prompt * asked_stride).to(tl.int64)
    logits += row * row_stride
    tops = tl.full((CHUNK,), float("-inf"), dtype=tl.float32)
    for start in range(0, vocab, CHUNK):
        at = start + tl.arange(0, CHUNK)
        values = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        tops = tl.maximum(tops, values)
    top = tl.max(tops, 0)
    sums = tl.zeros((CHUNK,), dtype=tl.float32)
    for start in range(0, vocab, CHUNK):
        at = start + tl.arange(0, CHUNK)
        values = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        # a NaN, a +inf, or a row without a possible token makes the sum a NaN
        sums += tl.where(at < vocab, tl.exp(values - top), 0.0)
    j = tl.arange(0, IDS)
    chosen = tl.load(ids + j, mask=j < n_ids, other=0)
    value = tl.load(logits + chosen, mask=j < n_ids, other=0.0).to(tl.float32)
    share = tl.load(weights + j, mask=j < n_ids, other=0.0)
    found = tl.sum(tl.where(j < n_ids, tl.exp(value - top) * share, 0.0), 0) / tl.sum(sums, 0)
    # a comparison, not a minimum, which could lose a NaN
    found = tl.where(found > 1.0, 1.0, found)
    score = tl.load(scores + prompt)
    tl.store(readings + prompt, score)
    tl.store(readings + n + prompt, found)
    score, found = score.to(tl.float64), found.to(tl.float64)
    raises = score > tl.load(limits)
    yes = tl.where(raises, found < tl.load(limits + 1), found > tl.load(limits + 2))
    tl.store(agrees + prompt, yes.to(tl.float64))


def gate_readings(
    logits: Tensor, asked: Tensor, ids: Tensor, weights: Tensor, scores: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores and `guard.gate.refusal_probability` of some rows, and whether the two agree.

    One launch, and no copy of a row.

    Args:
        logits: (n_rows, vocab), any float type, contiguous along the vocabulary.
        asked: (n, …) int32 whose first column is the rows.
        ids: (n_ids,) int64 first tokens of refusals.
        weights: (n_ids,) float32.
        scores: (n,) float32 of the gate.
        limits: (3,) float64: the score above which a row is raised, the probability below which it
            is, and the one above which others are lowered.

    Returns:
        (2, n) float32 scores, and probabilities, NaN where a row holds one, or +inf; and (n,)
        float64, 1 where the probability lets the zone be the one that the score leads to, else 0.
    """
    n, vocab = len(asked), logits.shape[1]
    readings = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    agrees = torch.empty(n, dtype=torch.float64, device=logits.device)
    _refusal_kernel[(n,)](
        logits, logits.stride(0), vocab, asked, asked.stride(0), ids, weights, len(ids), scores,
        limits, readings, agrees, n,
        CHUNK=2 * _CHUNK, IDS=triton.next_power_of_2(len(ids)), num_warps=16,
    )  # fmt: skip
    return readings, agrees


@triton.jit(do_not_specialize=["n", "size"])
def _gather_kernel(
    numbers, only_if, n, size, ends, hidden, hidden_row, logits, logits_row, last, last_row,
    seq_lens, table, table_row, d_model, vocab, n_blocks,
    to_index, to_hidden, to_logits, to_last, to_seq_lens, to_table, to_table_row,
    to_limits, limits_row,
    ONLY_IF: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(numbers + i).to(tl.int64)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    tl.store(
        to_logits + i * vocab + at,
        tl.load(logits + row * logits_row + at, mask=inside),
        mask=inside,
    )
    inside = at < d_model
    token = tl.load(ends + row).to(tl.int64)
    states = tl.load(hidden + token * hidden_row + at, mask=inside)
    tl.store(to_hidden + i * d_model + at, states, mask=inside)
    if LAST:
        states = tl.load(last + row * last_row + at, mask=inside)
        tl.store(to_last + i * d_model + at, states, mask=inside)
    inside = at < n_blocks
    blocks = tl.load(table + row * table_row + at, mask=inside)
    tl.store(to_table + i * to_table_row + at, blocks, mask=inside)
    if piece == 0:
        tl.store(to_index + i, row)
        tl.store(to_seq_lens + i, tl.load(seq_lens + row))
        allowance = tl.load(numbers + size + i)
        if ONLY_IF:
            allowance *= tl.load(only_if + i, mask=i < n, other=0.0)
        tl.store(to_limits + i, allowance)
        tl.store(to_limits + limits_row + i, tl.load(numbers + 2 * size + i))


@dataclass(frozen=True)
class StepRows:
    """What steering needs of rows; of a whole step, or of some rows in their order.

    Attributes:
        hidden: (n_tokens, d_model) entering the carrier's layer; of some rows, one token each.
        logits: (n_rows, vocab) of the base pass.
        last: (n_rows, d_model): the normed last states that those were computed from.
        seq_lens: (n_rows,) int32.
        table: (n_rows, n_blocks) int32, contiguous along the blocks.
    """

    hidden: Tensor
    logits: Tensor
    last: Tensor
    seq_lens: Tensor
    table: Tensor


def gather_rows(
    numbers: Tensor,
    only_if: Tensor | None,
    ends: Tensor,
    step: StepRows,
    rows: StepRows,
    index: Tensor,
    limits: Tensor,
    *,
    with_last: bool,
) -> None:
    """Copy some rows of a step to where they are steered, and what each may spend: one launch.

    Args:
        numbers: (3, size) float64: rows, nats that each may spend, temperatures.
        only_if: (n,) float64, n ≤ size: what the first n allowances are multiplied by, the others
            by 0; None: by nothing.
        ends: (n_rows,) places of the rows' last tokens.
        step: to copy from.
        rows: to copy to: buffers of at least `size` rows, contiguous.
        index: (≥ size,) int64; gets the rows.
        limits: (2, ≥ size) float64; gets allowances and temperatures.
        with_last: copy `last`, too.
    """
    size, vocab = numbers.shape[1], step.logits.shape[1]
    block = 2048
    longest = max(vocab, rows.hidden.shape[1], rows.table.shape[1])
    _gather_kernel[(size, triton.cdiv(longest, block))](
        numbers, numbers if only_if is None else only_if, 0 if only_if is None else len(only_if),
        size, ends, step.hidden, step.hidden.stride(0), step.logits, step.logits.stride(0),
        step.last, step.last.stride(0), step.seq_lens, step.table, step.table.stride(0),
        rows.hidden.shape[1], vocab, rows.table.shape[1],
        index, rows.hidden, rows.logits, rows.last, rows.seq_lens, rows.table,
        rows.table.stride(0), limits, limits.stride(0),
        ONLY_IF=only_if is not None, LAST=with_last, BLOCK=block, num_warps=4,
    )  # fmt: skip
