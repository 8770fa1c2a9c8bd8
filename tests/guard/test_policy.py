"""The policy file: defaults as documented, anything unknown or out of range is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard.errors import PolicyError
from guard.policy import Policy, load_policy


def test_an_absent_or_empty_file_gives_the_documented_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "policy.yaml"
    empty.write_text("# nothing\n")
    assert load_policy(None) == load_policy(empty) == Policy()
    assert (Policy().raise_budget_nats, Policy().lower_budget_nats) == (4.0, 1.0)
    assert (Policy().shadow_tokens, Policy().mode, Policy().debug_fields) == (16, "enforce", False)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("raise_budget_nat: 1", "raise_budget_nat"),
        ("raise_budget_nats: -1", "raise_budget_nats"),
        ("raise_budget_nats: .nan", "raise_budget_nats"),
        ("shadow_tokens: 0", "shadow_tokens"),
        ("mode: maybe", "mode"),
        ("- a list", "mapping"),
        ("a: [", "cannot read"),
    ],
)
def test_a_wrong_policy_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=named) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot read"):
        load_policy(tmp_path / "none.yaml")
