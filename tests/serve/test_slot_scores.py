"""Gate scores that live beside the KV cache; no vLLM needed."""

from __future__ import annotations

import math

import pytest
import torch

from guard.errors import NotArmedError
from serve.vllm_guard import SlotScores
from serve.vllm_patch import wrap


def test_a_score_is_read_where_it_was_written_and_nan_elsewhere() -> None:
    torch.manual_seed(0)
    scores = SlotScores(64, torch.device("cpu"))
    hidden, weight = torch.randn(5, 8), torch.randn(8)
    slots = torch.tensor([3, 40, 41, 7, 63])
    scores.write(slots, hidden, weight, 0.5)
    one = torch.ones(5, 1)
    assert scores.mean(slots.unsqueeze(1), one).tolist() == pytest.approx(
        (hidden @ weight + 0.5).tolist(), abs=1e-5
    )
    assert all(scores.mean(torch.tensor([[0], [4], [62]]), one[:3]).isnan())
    scores.clear()
    assert all(scores.mean(slots.unsqueeze(1), one).isnan())


def test_pooled_scores_are_means_and_nan_if_one_of_them_was_never_written() -> None:
    scores = SlotScores(8, torch.device("cpu"))
    scores.write(torch.arange(4), torch.tensor([[1.0], [2.0], [4.0], [8.0]]), torch.ones(1), 0.5)
    slots = torch.tensor([[1, 0], [3, 2], [2, 2], [4, 3]])
    shares = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    found = scores.mean(slots, shares).tolist()
    assert found[:3] == [2.0, 6.5, 4.5]
    assert math.isnan(found[3])


def test_scores_of_long_prompts_are_written_in_parts_without_a_gap() -> None:
    n = 5000
    scores = SlotScores(n, torch.device("cpu"))
    hidden = torch.arange(n, dtype=torch.float32).reshape(n, 1)
    scores.write(torch.arange(n).flip(0), hidden, torch.ones(1), 0.0)
    found = scores.mean(torch.arange(n).unsqueeze(1), torch.ones(n, 1))
    assert found.tolist() == list(map(float, reversed(range(n))))


def test_scores_follow_copies_of_whole_blocks_even_when_they_chain() -> None:
    scores = SlotScores(12, torch.device("cpu"))
    scores.write(torch.arange(12), torch.arange(12.0).reshape(12, 1), torch.ones(1), 0.0)
    scores.copy_blocks([(0, 1), (1, 2)], n_blocks=3)
    found = scores.mean(torch.arange(12).unsqueeze(1), torch.ones(12, 1))
    assert found.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]


def test_a_method_that_this_vllm_does_not_have_is_an_error() -> None:
    class Owner:
        pass

    with pytest.raises(NotArmedError, match="method_of_tomorrow"):
        wrap(Owner, "method_of_tomorrow", print)
