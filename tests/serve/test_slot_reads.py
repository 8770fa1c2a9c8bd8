"""Projections that live beside the KV cache; no vLLM needed."""

from __future__ import annotations

import pytest
import torch

from guard.errors import NotArmedError
from serve.vllm_guard import SlotReads
from serve.vllm_patch import wrap

CPU = torch.device("cpu")


def test_projections_are_read_where_they_were_written_and_nan_elsewhere() -> None:
    torch.manual_seed(0)
    reads = SlotReads(64, 3, CPU)
    hidden, weight = torch.randn(5, 8), torch.randn(3, 8)
    slots = torch.tensor([3, 40, 41, 7, 63])
    reads.write(slots, hidden, weight)
    torch.testing.assert_close(reads.read(slots), hidden @ weight.T)
    assert bool(reads.read(torch.tensor([[0], [4], [62]])).isnan().all())
    reads.clear()
    assert bool(reads.read(slots).isnan().all())


def test_long_prompts_are_written_in_parts_without_a_gap() -> None:
    n = 5000
    reads = SlotReads(n, 1, CPU)
    hidden = torch.arange(n, dtype=torch.float32).reshape(n, 1)
    reads.write(torch.arange(n).flip(0), hidden, torch.ones(1, 1))
    assert reads.read(torch.arange(n)).flatten().tolist() == list(map(float, reversed(range(n))))


def test_they_follow_copies_of_whole_blocks_even_when_they_chain() -> None:
    reads = SlotReads(12, 2, CPU)
    weight = torch.tensor([[1.0], [10.0]])
    reads.write(torch.arange(12), torch.arange(12.0).reshape(12, 1), weight)
    reads.copy_blocks([(0, 1), (1, 2)], n_blocks=3)
    found = reads.read(torch.arange(12))
    assert found[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(found[:, 1], 10 * found[:, 0])


def test_a_method_that_this_vllm_does_not_have_is_an_error() -> None:
    class Owner:
        pass

    with pytest.raises(NotArmedError, match="method_of_tomorrow"):
        wrap(Owner, "method_of_tomorrow", print)
