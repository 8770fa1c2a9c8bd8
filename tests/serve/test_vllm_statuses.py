"""What a front end accepts of the ranks behind it; needs no vLLM."""

from __future__ import annotations

import json
from typing import Any

import pytest

from guard.errors import NotArmedError
from guard.policy import Policy
from serve.vllm_patch import check_statuses

POLICY = Policy.model_validate({"policies": {"strict": {"raise_budget_nats": 8.0}}})


def status(rank: int, **changes: Any) -> str:
    return json.dumps(
        {"rank": rank, "armed": True, "guard": "abc", "policy": POLICY.digest} | changes
    )


def test_ranks_that_are_all_armed_alike_are_accepted() -> None:
    check_statuses([status(0), status(1)], "abc", POLICY, 2)


@pytest.mark.parametrize(
    ("second", "named"),
    [
        ({"armed": False}, "rank 1 is not armed"),
        ({"guard": "abd"}, "rank 1 is not armed with guard abc"),
        ({"policy": Policy().digest}, "rank 1 has another policy"),
    ],
)
def test_one_rank_that_differs_is_enough_to_serve_nothing(
    second: dict[str, Any], named: str
) -> None:
    with pytest.raises(NotArmedError, match=named):
        check_statuses([status(0), status(1, **second)], "abc", POLICY, 2)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_rank_too_few_or_too_many_is_an_error(n: int) -> None:
    with pytest.raises(NotArmedError, match=f"{n} of 2 ranks"):
        check_statuses([status(rank) for rank in range(n)], "abc", POLICY, 2)
