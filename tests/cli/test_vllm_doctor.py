"""What `trimtab doctor --engine vllm` makes of what vLLM's processes say; needs no vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli.doctor import Check
from cli.main import main
from cli.vllm_doctor import check_records, check_status
from guard.policy import Policy

POLICY = Policy()
STATUS = {
    "rank": 0,
    "armed": True,
    "guard": "abc",
    "model": "0123456789abcdef0123",
    "mode": "enforce",
    "policy": POLICY.digest,
    "runner": "V1",
    "layers": [12, 20],
    "canary": [
        {"carrier": "raise", "layer": 20, "gap": 0.01, "tolerance": 0.1, "change": 1.5},
    ],
}
RAISED = {"zone": "raise", "kl_nats": 1.5, "budget_nats": 4.0, "shadow_passes": 8, "applied": True}
PASSED = {"zone": "pass", "kl_nats": 0.0, "budget_nats": 0.0, "shadow_passes": 0, "applied": True}


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.ok]


def test_an_armed_rank_shows_guard_model_mode_runner_layers_and_canary() -> None:
    armed, canary = check_status(STATUS, "abc", POLICY)
    assert armed.ok
    for part in ("guard abc", "0123456789abcdef", "enforce", "V1 runner", "layers 12, 20"):
        assert part in armed.detail
    assert canary.name == "shadow pass, raise carrier"


@pytest.mark.parametrize("name", ["armed", "guard", "policy"])
def test_a_rank_that_is_armed_otherwise_fails(name: str) -> None:
    (check,) = check_status({**STATUS, name: False}, "abc", POLICY)
    assert not check.ok
    assert name in check.detail


def test_one_raised_and_one_passed_request_are_the_proof() -> None:
    assert failed(check_records([PASSED, RAISED], POLICY)) == []


@pytest.mark.parametrize(
    ("records", "named"),
    [
        ([PASSED], ["a raised request"]),
        ([RAISED], ["a passed request"]),
        ([], ["a raised request", "a passed request"]),
        ([PASSED, {**RAISED, "kl_nats": 0.0}], ["a raised request"]),
        ([PASSED, {**RAISED, "kl_nats": 4.1}], ["a raised request"]),
        ([PASSED, {**RAISED, "budget_nats": 8.0}], ["a raised request"]),
        ([PASSED, {**RAISED, "applied": False}], ["a raised request"]),
        ([{**PASSED, "shadow_passes": 1}, RAISED], ["a passed request"]),
    ],
)
def test_whatever_is_not_proven_fails(records: list[dict[str, Any]], named: list[str]) -> None:
    assert failed(check_records(records, POLICY)) == named


def test_in_observe_mode_nothing_may_have_been_applied() -> None:
    observe = Policy(mode="observe")
    checks = check_records([PASSED, {**RAISED, "applied": False}], observe)
    assert failed(checks) == []
    assert "nothing was changed" in checks[0].detail
    assert failed(check_records([PASSED, RAISED], observe)) == ["a raised request"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--engine", "vllm"], "--engine vllm needs MODEL"),
        (["M", "--guard", "g", "--", "--seed", "1"], "options after -- need --engine vllm"),
        (["M", "--guard", "g", "--engine", "vllm", "--device", "cpu"], "--device"),
    ],
)
def test_options_that_do_not_fit_are_named(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    assert main(["doctor", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_a_policy_with_mode_off_cannot_be_proven(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("mode: off\n")
    assert main(["doctor", "M", "--guard", "g", "--policy", str(policy)]) == 2
    assert "mode off" in capsys.readouterr().err
