"""The policy file: defaults as documented, anything unknown or out of range is an error."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from guard.errors import PolicyError, RequestError
from guard.gate import Zone
from guard.kl import Ledger
from guard.policy import Policy, load_policy, looser_in
from guard.session import shadow_due


def test_an_absent_or_empty_file_gives_the_documented_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "policy.yaml"
    empty.write_text("# nothing\n")
    assert load_policy(None) == load_policy(empty) == Policy()
    assert (Policy().raise_budget_nats, Policy().lower_budget_nats) == (4.0, 1.0)
    assert (Policy().shadow_tokens, Policy().mode, Policy().debug_fields) == (16, "enforce", False)


def test_the_page_on_the_policy_names_every_key_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", page, re.MULTILINE))
    assert rows.keys() == Policy.model_fields.keys()
    in_words = {
        "answer_marker": "found",
        "policies": "none",
        "preset": "none",
        "debug_fields": "false",
    }
    told = {name: str(value) for name, value in Policy().model_dump().items()} | in_words
    assert {name: default.strip() for name, default in rows.items()} == told


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
        ("steer_from: thinking", "steer_from"),
        ("steer_from: answer\nanswer_marker: ' '", "answer_marker"),
        ("answer_marker: </think>", "no effect without steer_from: answer"),
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


def test_an_unquoted_off_is_the_word_and_not_yamls_false(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("mode: off\nlower: off\n")
    assert (load_policy(path).mode, load_policy(path).lower) == ("off", "off")


def test_the_start_of_steering_is_the_response_or_the_answer_of_all_published_policies(
    tmp_path: Path,
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "steer_from: answer\nanswer_marker: '[/THINK]'\npolicies: {strict: {lower: off}}\n"
    )
    policy = load_policy(path)
    for each in (policy, policy.published("strict")):
        assert (each.steer_from, each.answer_marker) == ("answer", "[/THINK]")
    assert (Policy().steer_from, Policy().answer_marker) == ("response", None)


# ------------------------------------------------------------------ published policies


def test_a_published_policy_is_the_default_with_what_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "raise_budget_nats: 2.0\nshadow_tokens: 8\non_failure: open\npolicies:\n"
        "  strict: {raise_budget_nats: 6.0, lower: off, shadow_tokens: 32}\n"
        "  sure: {on_failure: closed}\n"
    )
    policy = load_policy(path)
    strict, sure = policy.published("strict"), policy.published("sure")
    assert policy.published(None) is policy
    assert (strict.raise_budget_nats, strict.lower, strict.shadow_tokens) == (6.0, "off", 32)
    assert (strict.on_failure, strict.token_cap_nats, strict.policies) == ("open", 4.0, {})
    assert sure == Policy(raise_budget_nats=2.0, shadow_tokens=8, on_failure="closed")


@pytest.mark.parametrize("name", ["", "default", "Strict", "strict ", "__class__"])
def test_a_policy_that_is_not_published_is_the_clients_fault(name: str) -> None:
    policy = Policy.model_validate({"policies": {"strict": {"raise_budget_nats": 8.0}}})
    with pytest.raises(RequestError, match="publishes strict") as caught:
        policy.published(name)
    assert caught.value.param == "trimtab_policy"
    with pytest.raises(RequestError, match="publishes none"):
        Policy().published("strict")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("raise_budget_nats: 3.9", "raise_budget_nats"),
        ("token_cap_nats: 3.9", "raise_budget_nats"),
        ("shadow_tokens: 15", "raised response"),
        ("lower_budget_nats: 1.1", "lower_budget_nats"),
        ("shadow_tokens: 17", "on no more tokens"),
        ("on_failure: open", "on_failure must stay closed"),
        ("mode: observe", "mode is the whole server's"),
        ("mode: off", "mode is the whole server's"),
        ("debug_fields: true", "debug_fields is the whole server's"),
        ("steer_from: answer", "steer_from is the whole server's"),
        ("policies: {other: {}}", "publishes policies of its own"),
        ("raise_budget_nat: 8", "raise_budget_nat"),
        ("raise_budget_nats: .nan", "raise_budget_nats"),
    ],
)
def test_a_policy_that_is_not_stricter_cannot_be_published(
    tmp_path: Path, change: str, named: str
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"policies:\n  mild: {{{change}}}\n")
    with pytest.raises(PolicyError, match=named) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("mode: off\npolicies: {strict: {}}", "mode off has no guard"),
        ("policies: {Strict: {}}", "policy name 'Strict'"),
        ("policies: [strict]", "policies"),
        ("policies: {strict: 3}", "strict"),
        ("policies: {7: {}}", "policies"),
        ("lower: off\npolicies: {mild: {lower: certified}}", "lower must stay off"),
    ],
)
def test_policies_that_make_no_sense_are_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=named):
        load_policy(path)


NATS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 4.0])
POLICIES = st.builds(
    Policy,
    raise_budget_nats=NATS,
    lower_budget_nats=NATS,
    token_cap_nats=NATS,
    shadow_tokens=st.integers(1, 4),
    lower=st.sampled_from(["certified", "off"]),
    on_failure=st.sampled_from(["closed", "open"]),
)
STATES = [(position, spent / 4) for position in range(5) for spent in range(17)]


def allowance(policy: Policy, zone: Zone, position: int, spent: float) -> float:
    """What a session lets response token `position` spend after `spent` nats, read off the code."""
    if zone is Zone.LOWER and policy.lower == "off":
        return 0.0
    nats = {Zone.RAISE: policy.raise_budget_nats, Zone.LOWER: policy.lower_budget_nats}[zone]
    if not shadow_due(zone, position, policy.shadow_tokens):
        return 0.0
    ledger = Ledger(nats, math.inf)
    if spent > nats:
        return 0.0
    ledger.charge(spent)
    capped = Ledger(ledger.allowance_nats, policy.token_cap_nats)
    return capped.allowance_nats


@given(policy=POLICIES, default=POLICIES)
@settings(max_examples=500)
def test_stricter_means_in_every_state_no_less_raising_and_no_more_lowering(
    policy: Policy, default: Policy
) -> None:
    raises = all(
        allowance(policy, Zone.RAISE, *state) >= allowance(default, Zone.RAISE, *state)
        for state in STATES
    )
    lowers = all(
        allowance(policy, Zone.LOWER, *state) <= allowance(default, Zone.LOWER, *state)
        for state in STATES
    )
    stays_off = default.lower == "certified" or policy.lower == "off"
    stays_closed = default.on_failure == "open" or policy.on_failure == "closed"
    assert (looser_in(policy, default) == []) == (raises and lowers and stays_off and stays_closed)


@given(a=POLICIES, b=POLICIES, c=POLICIES)
@settings(max_examples=500)
def test_stricter_is_reflexive_and_transitive(a: Policy, b: Policy, c: Policy) -> None:
    assert looser_in(a, a) == []
    if not looser_in(a, b) and not looser_in(b, c):
        assert looser_in(a, c) == []


@given(default=POLICIES, other=POLICIES)
def test_a_file_publishes_exactly_what_is_stricter(default: Policy, other: Policy) -> None:
    changes = other.model_dump(exclude={"policies", "mode", "debug_fields"})
    raw = {**default.model_dump(exclude={"policies"}), "policies": {"other": changes}}
    if looser_in(other, default):
        with pytest.raises(ValidationError, match="not stricter than the default"):
            Policy.model_validate(raw)
    else:
        assert Policy.model_validate(raw).published("other") == other
