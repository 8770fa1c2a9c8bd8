"""What vLLM's front end lets in; needs no vLLM."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import RequestError
from guard.policy import POLICY_FIELD, Policy
from serve.vllm_front import check_request

POLICY = Policy.model_validate({"policies": {"strict": {"raise_budget_nats": 8.0}}})
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())


def asks(**extra: Any) -> SimpleNamespace:
    """Sampling parameters as far as the guard looks at them."""
    return SimpleNamespace(extra_args=extra)


@pytest.mark.parametrize(
    "params", [None, SimpleNamespace(extra_args=None), asks(), asks(other=1), asks(kv={"a": 1})]
)
def test_requests_that_ask_nothing_of_the_guard_are_let_in(params: Any) -> None:
    check_request(POLICY, "a prompt", params)


def test_a_published_policy_is_let_in() -> None:
    check_request(POLICY, "a prompt", asks(trimtab_policy="strict"))


@given(value=VALUES)
def test_whatever_else_is_asked_as_a_policy_is_refused(value: Any) -> None:
    if value != "strict":
        with pytest.raises(RequestError, match=POLICY_FIELD):
            check_request(POLICY, "a prompt", asks(trimtab_policy=value))


@given(rest=st.text(), head=st.sampled_from(["trimtab", "TRIMTAB", "TrimTab"]), value=VALUES)
def test_no_other_field_of_the_guards_is_let_in(rest: str, head: str, value: Any) -> None:
    if head + rest != POLICY_FIELD:
        with pytest.raises(RequestError, match="can only name a published policy"):
            check_request(POLICY, "a prompt", asks(**{head + rest: value}))


def test_a_prompt_that_goes_on_is_refused() -> None:
    async def pieces() -> AsyncGenerator[str, None]:
        yield "a piece"

    with pytest.raises(RequestError, match="goes on after the response began"):
        check_request(POLICY, pieces(), None)
