"""Policies from a table of outcomes: what each setting does, the presets, and what is certain."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from calibration.evaluate import Answered
from calibration.policies import (
    Outcome,
    Pace,
    Setting,
    Spending,
    compile_policies,
    grid,
    needed,
    tabulate,
)
from guard.gate import GateReading, Thresholds, Zone, choose_zone
from guard.policy import Policy
from guard.refusal import Verdict
from guard.session import Record

LIMITS = Thresholds(raise_above=2.0, lower_below=-1.0)
RAISE_ABOVE = {0.02: 3.0, 0.1: 1.0, 0.3: 0.0}


def outcome(
    group: str, score: float, refusal: float, refused: bool, raised: bool = True
) -> Outcome:
    """A prompt that is answered once lowered, and refused once raised if `raised` says so."""
    steered = {
        (Zone.RAISE, Spending(1.0)): (raised, 0.9),
        (Zone.RAISE, Spending(4.0)): (True, 2.0),
        (Zone.LOWER, Spending(1.0)): (False, 0.5),
    }
    return Outcome(group, GateReading(score, refusal), refused, steered)


def world(n: int = 60) -> list[Outcome]:
    """Harmful prompts score 0.5 to 3.5, hard benign -2 to 0.5, ordinary ones far below."""
    found = []
    for i in range(n):
        part = i / n
        found.append(outcome("harmful", 0.5 + 3.0 * part, 0.4, i % 2 == 0, raised=i % 3 > 0))
        found.append(outcome("hard_benign", -2.0 + 2.5 * part, 0.35, i % 2 == 0))
        found.append(outcome("ordinary", -5.0, 0.15, False))
    return found


def settings(budgets: tuple[float, ...] = (1.0, 4.0)) -> list[Setting]:
    return grid(LIMITS, RAISE_ABOVE, (0.1, 0.3), budgets, 1.0)


def test_the_grid_holds_every_combination_and_lower_never_reaches_into_raise() -> None:
    found = settings()
    assert len(found) == 3 * 2 * 2
    for setting in found:
        limits = setting.thresholds
        assert limits.raise_above == RAISE_ABOVE[setting.alpha]
        assert limits.lower_below is not None
        assert limits.lower_below <= limits.raise_above


def test_rates_are_those_of_the_responses_that_a_setting_picks() -> None:
    outcomes = world()
    points, _, _ = compile_policies(outcomes, settings(), None, None, seed=0)
    point = next(p for p in points if p.name == "α 0.1" and p.raise_budget_nats == 1.0)
    harmful = [o for o in outcomes if o.group == "harmful"]
    expected = sum(
        o.steered[Zone.RAISE, Spending(1.0)][0] if o.reading.score > 1.0 else o.refused
        for o in harmful
    )
    assert point.harmful_refused.value == pytest.approx(expected / len(harmful))
    assert point.harmful_refused.n == len(harmful)
    hard = [o for o in outcomes if o.group == "hard_benign"]
    expected = sum(o.refused and o.reading.score >= -1.0 for o in hard)
    assert point.hard_benign_refused.value == pytest.approx(expected / len(hard))


def test_ordinary_prompts_are_not_lowered_for_nothing() -> None:
    """A p_R of 0.15 is below the threshold that removes as many over-refusals as 0.1 does."""
    _, presets, _ = compile_policies(world(), settings(), None, None, seed=0)
    assert {p.lower_if_refusal_above for p in presets.values()} == {0.3}
    assert presets["balanced"].rates["ordinary_nats"].value == 0.0


def test_presets_stand_in_their_order() -> None:
    _, presets, notes = compile_policies(world(), settings(), None, None, seed=0)
    assert notes == []
    assert set(presets) == {"strict", "balanced", "permissive"}
    harm = {name: p.rates["harmful_refused"].value for name, p in presets.items()}
    over = {name: p.rates["hard_benign_refused"].value for name, p in presets.items()}
    assert harm["strict"] >= harm["balanced"] >= harm["permissive"]
    assert over["strict"] >= over["balanced"] >= over["permissive"]
    assert harm["strict"] > harm["permissive"]


def test_a_budget_leaves_out_what_costs_more() -> None:
    points, presets, _ = compile_policies(world(), settings(), None, 1.0, seed=0)
    assert {p.raise_budget_nats for p in points} == {1.0}
    assert presets["strict"].raise_budget_nats == 1.0


def test_a_target_is_kept_with_confidence_or_said_to_be_out_of_reach() -> None:
    few, presets, notes = compile_policies(world(60), settings(), 0.02, None, seed=0)
    assert "chosen" not in presets
    assert f"{needed(0.02)} prompts would do" in notes[0]
    assert sum(p.chosen for p in few) == 1
    _, presets, notes = compile_policies(world(160), settings(), 0.02, None, seed=0)
    assert notes == []
    assert presets["chosen"].rates["ordinary_refused"].value == 0.0
    assert presets["chosen"].alpha == 0.3  # the most permissive that is certain refuses most harm


def test_testing_stops_at_the_first_setting_that_is_not_certain() -> None:
    outcomes = world(160)
    for i, raised in enumerate(o for o in outcomes if o.group == "ordinary"):
        if i < 8:
            raised.reading = GateReading(0.5, 0.15)  # raised by the setting with α 0.3 only
    _, presets, _ = compile_policies(outcomes, settings(), 0.02, None, seed=0)
    assert presets["chosen"].alpha == 0.1


def test_the_number_of_prompts_needed_is_the_rule_of_three() -> None:
    assert needed(0.02) == 149
    assert needed(0.05) == 59


def test_only_what_some_setting_flags_is_answered_again() -> None:
    bare = [Outcome(o.group, o.reading, o.refused) for o in world()]
    asked: dict[tuple[Zone, Spending], list[int]] = {}

    def answer(rows: Sequence[int], zone: Zone, spending: Spending) -> list[Answered]:
        asked[zone, spending] = list(rows)
        verdict = Verdict.REFUSED if zone is Zone.RAISE else Verdict.COMPLIED
        budget = spending.budget_nats
        record = Record(
            zone, 0.0, 0.0, 0.25 * budget, budget, 1, 1, 0, False, True, "uncertain", verdict
        )
        return [Answered("", "", "", Verdict.COMPLIED, record) for _ in rows]

    found = settings()
    tabulate(bare, found, answer)
    raises = {(Zone.RAISE, Spending(budget)) for budget in (1.0, 4.0)}
    assert set(asked) == {*raises, (Zone.LOWER, Spending(1.0))}
    for (zone, spending), rows in asked.items():
        flagged = [
            i
            for i, o in enumerate(bare)
            if any(choose_zone(o.reading, setting.thresholds) is zone for setting in found)
        ]
        assert sorted(rows) == flagged
        assert 0 < len(rows) < len(bare)
        assert {bare[i].steered[zone, spending] for i in rows} == {
            (zone is Zone.RAISE, 0.25 * spending.budget_nats)
        }


def test_k_and_token_cap_are_chosen_with_the_budget_and_come_with_the_preset() -> None:
    """Raising costs ordinary prompts their answer only where a whole budget goes at once."""
    paces = (Pace(4, 0.25), Pace(16, 0.25), Pace(16, 1.0))
    outcomes = world(160)
    for i, o in enumerate(o for o in outcomes if o.group == "ordinary"):
        if i < 8:
            o.reading = GateReading(0.5, 0.15)  # raised by the setting with α 0.3
    for o in outcomes:
        harmful = o.group == "harmful"
        for budget in (1.0, 4.0):
            o.steered |= {
                (Zone.RAISE, Spending(budget, Pace(4, 0.25))): (False, 0.25),
                (Zone.RAISE, Spending(budget, Pace(16, 0.25))): (harmful, 0.5),
                (Zone.RAISE, Spending(budget, Pace(16, 1.0))): (True, 1.0),
            }
        o.steered |= {
            (Zone.LOWER, Spending(1.0, Pace(k, share))): (False, 0.5)
            for k in (4, 16)
            for share in (0.25, 1.0)
        }
    found = grid(LIMITS, RAISE_ABOVE, (0.1, 0.3), (1.0, 4.0), 1.0, paces)
    assert len(found) == 3 * 2 * 2 * 3
    points, presets, _ = compile_policies(outcomes, found, 0.02, 1.0, seed=0)
    chosen = presets["chosen"]
    assert (chosen.alpha, chosen.shadow_tokens, chosen.token_cap_nats) == (0.3, 16, 0.25)
    assert chosen.as_policy("chosen") == {
        "preset": "chosen",
        "raise_budget_nats": 1.0,
        "lower_budget_nats": 1.0,
        "token_cap_nats": 0.25,
        "shadow_tokens": 16,
    }
    assert Policy.model_validate(chosen.as_policy("chosen")).preset == "chosen"
    mark = next(p for p in points if p.chosen)
    assert (mark.shadow_tokens, mark.token_cap_nats) == (16, 0.25)


def test_a_lowered_response_has_the_token_cap_of_the_policy_too() -> None:
    setting = Setting(0.1, LIMITS, 4.0, 1.0, Pace(8, 0.125))
    assert setting.token_cap_nats == 0.5
    assert setting.spending(Zone.RAISE).policy.token_cap_nats == 0.5
    assert setting.spending(Zone.LOWER).policy.token_cap_nats == 0.5
    assert setting.spending(Zone.LOWER).policy.shadow_tokens == 8
