"""Steering as CUDA graphs: shadow pass and mixture of a few rows, replayed without Python.

A shadow pass of half a 7B model is some hundred small launches: eagerly 5 to 8 ms, whatever the
number of rows, against 1 to 2 ms of work. So it is captured once per carrier and number of rows.
Rows are copied into buffers that stay, padded with copies of the first row whose budget is zero.

Steered logits are compared with those of a null row, which runs beside the steered one with
nothing added: so a carrier that does nothing moves nothing, to the last bit. Above 64 rows they
are compared with the base pass itself, for there null rows are half of the arithmetic that a device
is bound by; what a carrier does then comes with the rounding of another batch shape,
as any row of vLLM does from step to step. The budget is exact either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from guard.kl import Moved
from guard.steering import Carrier
from serve.vllm_guard import Steering, on_device

__all__ = ["SteeringGraphs"]

_WITH_NULL_ROWS = 64
_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)

Run = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(first layer, (n, d_model) hidden, sequence lengths, block table) → (n, d_model) last states.

One query token a row; the states are normed.
"""


class SteeringGraphs:
    """Captured steering of up to `max_rows` rows at a time.

    Args:
        run: the layers from one on.
        difference: (2n, d_model) normed null and steered states → (n, vocab) steered − null logits.
        kernels: the module of `mix_rows` and `gather_rows`.
        max_rows: that are steered at once.
        d_model: width of the residual stream.
        n_blocks: width of the block table.
        dtype: of the residual stream.
        device: of the model.
    """

    def __init__(
        self,
        run: Run,
        difference: Callable[[Tensor], Tensor],
        kernels: Any,
        *,
        max_rows: int,
        d_model: int,
        n_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._run, self._difference, self._kernels = run, difference, kernels
        self._device = device
        self._sizes = [size for size in _SIZES if size < max_rows] + [max_rows]
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._hidden = torch.zeros(max_rows, d_model, dtype=dtype, device=device)
        self._last = torch.zeros_like(self._hidden)
        self._seq_lens = torch.ones(max_rows, dtype=torch.int32, device=device)
        self._table = torch.zeros(max_rows, n_blocks, dtype=torch.int32, device=device)
        self._index = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._limits = torch.ones(2, max_rows, dtype=torch.float64, device=device)
        self._spare: Tensor | None = None
        self._spare_from: Tensor | None = None  # whose numbers it holds
        self._base: Tensor | None = None
        self._moved: Moved | None = None

    @torch.inference_mode()
    def capture(self, carrier: Carrier) -> None:
        """Capture this carrier's steering, the largest number of rows first."""
        for size in reversed(self._sizes):
            self._steer(carrier, size)  # compiles kernels, and sizes buffers
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool):
                self._steer(carrier, size)
            self._graphs[id(carrier), size] = graph

    def can(self, work: Steering) -> bool:
        """True if this work was captured."""
        return (id(work.carrier), self._sizes[-1]) in self._graphs and (
            len(work.rows) <= self._sizes[-1]
        )

    def steer(self, work: Steering, step: Any, ends: Tensor) -> tuple[Tensor, Moved]:
        """Steer some rows of a step.

        Args:
            work: what to do.
            step: `vllm_kernels.StepRows` of the step.
            ends: (n_rows,) indices of the last tokens.

        Returns:
            (n,) int64 indices of the rows, and what became of them; valid until the next call.
        """
        n = len(work.rows)
        size = next(size for size in self._sizes if size >= n)
        pad = size - n
        numbers = on_device(
            [
                [*work.rows, *[work.rows[0]] * pad],
                [*work.budgets_nats, *[0.0] * pad],
                [*work.temperatures, *[1.0] * pad],
            ],
            torch.float64,
            self._device,
        )
        base, moved = self._buffers(step.logits)
        rows = self._kernels.StepRows(self._hidden, base, self._last, self._seq_lens, self._table)
        self._kernels.gather_rows(
            numbers, work.only_if, ends, step, rows, self._index, self._limits,
            with_last=size > _WITH_NULL_ROWS,
        )  # fmt: skip
        if self._spare is not None and work.spare is not None:
            if work.spare is not self._spare_from:
                self._spare.copy_(work.spare)
            self._spare_from = work.spare
        self._graphs[id(work.carrier), size].replay()
        found = Moved(moved.logits[:n], moved.outcome[:n])
        if work.spare is None:  # captured with a spare row: give the base row back
            faulty = found.outcome[:, 2:] > 0
            found = Moved(torch.where(faulty, base[:n].float(), found.logits), found.outcome)
        return self._index[:n], found

    def _buffers(self, logits: Tensor) -> tuple[Tensor, Moved]:
        """Base rows in, moved rows out; made when the first logits show their size and type."""
        if self._base is None or self._moved is None:
            rows, vocab = len(self._hidden), logits.shape[1]
            self._base = torch.zeros(rows, vocab, dtype=logits.dtype, device=self._device)
            self._spare = torch.zeros(vocab, device=self._device)
            self._moved = Moved(
                torch.empty(rows, vocab, device=self._device),
                torch.empty(rows, 3, dtype=torch.float64, device=self._device),
            )
        return self._base, self._moved

    def _steer(self, carrier: Carrier, n: int) -> None:
        null = self._hidden[:n]
        steered = carrier.apply(null.float()).to(null.dtype)
        seq_lens, table = self._seq_lens[:n], self._table[:n]
        if n <= _WITH_NULL_ROWS:
            both = torch.cat([seq_lens, seq_lens]), torch.cat([table, table])
            last = self._run(carrier.layer, torch.cat([null, steered]), *both)
        else:
            last = torch.cat([self._last[:n], self._run(carrier.layer, steered, seq_lens, table)])
        difference = self._difference(last)
        base, moved = self._buffers(difference)
        self._kernels.mix_rows(
            base[:n],
            difference,
            *self._limits[:, :n],
            spare=self._spare,
            out=Moved(moved.logits[:n], moved.outcome[:n]),
        )
