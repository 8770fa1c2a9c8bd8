"""A session keeps its budget on every path and says afterwards what it did."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard.answer import AnswerStart
from guard.artifact import CarrierArtifact, CarrierSpec, GateSpec, Manifest, ModelIdentity
from guard.errors import BudgetError, NotArmedError
from guard.gate import GateReading, Zone
from guard.kl import mix_within_budget
from guard.policy import Policy
from guard.probe import linear_probe
from guard.refusal import Verdict
from guard.session import GuardSession, Record, shadow_due
from guard.steering import Carrier

RAISE = GateReading(score=2.0, refusal_prob=0.2)
LOWER = GateReading(score=-2.0, refusal_prob=0.8)
PASS = GateReading(score=0.0, refusal_prob=0.5)
REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "Sure, here is how it works."


def make_guard(lower: bool = True) -> CarrierArtifact:
    """A guard that raises above 1 and, if `lower`, lowers below -1."""
    carrier = CarrierSpec(layer=1, kind="add", family="difference_in_means", norm_share=0.5)
    manifest = Manifest(
        created="2026-01-01T00:00:00Z",
        model=ModelIdentity(
            model_id="example/model",
            architecture="LlamaForCausalLM",
            n_layers=2,
            d_model=4,
            vocab_size=8,
            dtype="float32",
            config_sha256="a" * 64,
            tokenizer_sha256="b" * 64,
            chat_template_sha256="c" * 64,
            weights_sha256="d" * 64,
        ),
        seed=0,
        safe_kl_nats=0.1,
        datasets={},
        libraries={},
        raise_carrier=carrier,
        lower_carrier=carrier if lower else None,
        gate=GateSpec(
            layer=1,
            instruction_suffix_ids=[1],
            raise_above=1.0,
            lower_below=-1.0 if lower else None,
            raise_if_refusal_below=0.9,
            lower_if_refusal_above=0.1,
            alpha=0.05,
            delta=0.05,
            n_by_stratum={},
        ),
    )
    direction = torch.ones(4)
    return CarrierArtifact(
        manifest,
        raise_carrier=Carrier.additive(1, direction),
        lower_carrier=Carrier.additive(1, -direction) if lower else None,
        probe=linear_probe(torch.ones(4)),
        refusal_token_ids=torch.tensor([3]),
        refusal_token_weights=torch.ones(1),
    )


GUARD = make_guard()


def opened(reading: GateReading, policy: Policy | None = None) -> GuardSession:
    session = GuardSession(GUARD, policy or Policy())
    session.open(reading)
    return session


# The zone decides the carrier and the budget


def test_a_session_does_nothing_before_its_gate_is_read() -> None:
    session = GuardSession(GUARD, Policy())
    assert session.zone is None
    assert session.carrier is None
    assert session.ledger.budget_nats == 0
    assert not session.wants_shadow(0)
    record = session.record(REFUSAL)
    assert (record.zone, record.gate_score, record.refusal_prob) == (None, None, None)
    assert record.gate_says == "uncertain"
    assert not record.suspected_over_refusal


@pytest.mark.parametrize(
    ("reading", "zone", "carrier", "budget_nats"),
    [
        (RAISE, Zone.RAISE, GUARD.raise_carrier, 3.0),
        (LOWER, Zone.LOWER, GUARD.lower_carrier, 0.5),
        (PASS, Zone.PASS, None, 0.0),
        (replace(RAISE, refusal_prob=0.95), Zone.PASS, None, 0.0),
        (replace(LOWER, refusal_prob=0.05), Zone.PASS, None, 0.0),
    ],
    ids=["raise", "lower", "uncertain", "refuses by itself", "answers by itself"],
)
def test_the_zone_gives_carrier_and_budget(
    reading: GateReading, zone: Zone, carrier: Carrier | None, budget_nats: float
) -> None:
    session = GuardSession(GUARD, Policy(raise_budget_nats=3.0, lower_budget_nats=0.5))
    assert session.open(reading) is zone
    assert session.zone is zone
    assert session.carrier is carrier
    assert session.ledger.budget_nats == budget_nats
    assert session.wants_shadow(0) is (zone is not Zone.PASS)


def test_nothing_is_lowered_where_the_policy_or_the_guard_does_not_allow_it() -> None:
    assert opened(LOWER, Policy(lower="off")).zone is Zone.PASS
    session = GuardSession(make_guard(lower=False), Policy())
    assert session.open(LOWER) is Zone.PASS
    assert session.record().gate_says == "benign"


def test_the_guard_without_a_lower_carrier_never_lowers_whatever_its_threshold_says() -> None:
    session = GuardSession(replace(GUARD, lower_carrier=None), Policy())
    assert session.open(LOWER) is Zone.PASS


# When a shadow pass is due


@pytest.mark.parametrize("zone", [Zone.RAISE, Zone.LOWER])
def test_a_shadow_pass_is_due_for_the_first_k_tokens_of_a_flagged_request(zone: Zone) -> None:
    assert [shadow_due(zone, position, 3) for position in range(5)] == [True] * 3 + [False] * 2
    assert not any(shadow_due(Zone.PASS, position, 3) for position in range(5))


def test_a_session_wants_no_shadow_after_k_tokens_or_with_nothing_left_to_spend() -> None:
    session = opened(RAISE, Policy(raise_budget_nats=1.0, shadow_tokens=2))
    assert [session.wants_shadow(position) for position in range(3)] == [True, True, False]
    session.charge(1.0, flipped=True)
    assert not session.wants_shadow(1)
    assert not opened(RAISE, Policy(raise_budget_nats=0.0)).wants_shadow(0)
    assert not opened(RAISE, Policy(token_cap_nats=0.0)).wants_shadow(0)


# What may be charged


@pytest.mark.parametrize("kl_nats", [1.0 + 1e-9, 4.0, -1e-9, math.nan, math.inf, -math.inf])
def test_a_charge_beyond_the_allowance_is_a_budget_error_and_books_nothing(kl_nats: float) -> None:
    session = opened(RAISE, Policy(raise_budget_nats=4.0, token_cap_nats=1.0))
    before = session.record()
    with pytest.raises(BudgetError, match=r"allowance 1\.0"):
        session.charge(kl_nats, flipped=True)
    assert session.record() == before


@pytest.mark.parametrize("reading", [PASS, None], ids=["pass", "not read"])
def test_a_request_that_is_not_flagged_can_be_charged_nothing(reading: GateReading | None) -> None:
    session = opened(reading) if reading else GuardSession(GUARD, Policy())
    with pytest.raises(BudgetError):
        session.charge(1e-12, flipped=False)


def test_the_last_nat_cannot_be_spent_twice() -> None:
    session = opened(RAISE, Policy(raise_budget_nats=1.0))
    session.charge(0.75, flipped=False)
    with pytest.raises(BudgetError):
        session.charge(0.5, flipped=False)
    session.charge(0.25, flipped=False)
    assert session.ledger.spent_nats == 1.0
    assert session.record().exhausted


readings = st.builds(
    GateReading,
    score=st.floats(-50, 50),
    refusal_prob=st.floats(0, 1),
)
policies = st.builds(
    Policy,
    mode=st.sampled_from(["observe", "enforce"]),
    raise_budget_nats=st.floats(0, 8),
    lower_budget_nats=st.floats(0, 8),
    token_cap_nats=st.floats(0, 8),
    shadow_tokens=st.integers(1, 12),
    lower=st.sampled_from(["certified", "off"]),
)


@given(
    reading=readings,
    policy=policies,
    seed=st.integers(0, 2**31),
    spread=st.floats(0, 30),
    temperature=st.floats(0.2, 2),
)
def test_no_path_of_mixed_tokens_spends_more_than_the_budget_of_its_zone(
    reading: GateReading, policy: Policy, seed: int, spread: float, temperature: float
) -> None:
    session = GuardSession(GUARD, policy)
    zone = session.open(reading)
    budget_nats = {
        Zone.RAISE: policy.raise_budget_nats,
        Zone.LOWER: policy.lower_budget_nats,
        Zone.PASS: 0.0,
    }[zone]
    generator = torch.Generator().manual_seed(seed)
    total, n_shadows = 0.0, 0
    for position in range(policy.shadow_tokens + 2):
        if not session.wants_shadow(position):
            continue
        base, steered = torch.randn(2, 1, 8, generator=generator) * spread
        allowance = session.ledger.allowance_nats
        mixture = mix_within_budget(base, steered, torch.tensor([allowance]), temperature)
        kl_nats = float(mixture.kl_nats)
        assert kl_nats <= min(allowance, policy.token_cap_nats)
        session.charge(kl_nats, flipped=bool(mixture.logits.argmax() != base.argmax()))
        total, n_shadows = total + kl_nats, n_shadows + 1
    record = session.record()
    assert record.kl_nats <= record.budget_nats == budget_nats
    assert total <= budget_nats * (1 + 1e-12)
    assert record.kl_nats == pytest.approx(total, rel=1e-12)
    assert record.steered_tokens <= record.shadow_passes == n_shadows <= policy.shadow_tokens
    # Not ≤ steered_tokens: two logits closer than rounding can change places at a KL of 0.
    assert record.token_flips <= record.shadow_passes


@given(policy=policies, charges=st.lists(st.floats(0, 1), max_size=40))
def test_any_shares_of_the_allowance_add_up_to_at_most_the_budget(
    policy: Policy, charges: list[float]
) -> None:
    session = opened(RAISE, policy)
    for share in charges:
        session.charge(share * session.ledger.allowance_nats, flipped=False)
        assert session.ledger.spent_nats <= policy.raise_budget_nats


# What the record says


@pytest.mark.parametrize(("mode", "applies"), [("enforce", True), ("observe", False)])
def test_observe_decides_and_books_like_enforce_but_applies_nothing(
    mode: str, applies: bool
) -> None:
    session = opened(RAISE, Policy.model_validate({"mode": mode}))
    session.charge(0.5, flipped=True)
    record = session.record()
    assert session.applies is applies
    assert record.applied is applies
    enforced = opened(RAISE, Policy(mode="enforce"))
    enforced.charge(0.5, flipped=True)
    assert replace(record, applied=True) == enforced.record()


def test_the_record_counts_shadow_passes_steered_tokens_and_flips() -> None:
    session = opened(RAISE, Policy(raise_budget_nats=4.0))
    for kl_nats, flipped in ((0.5, True), (0.0, False), (0.25, False), (0.25, True)):
        session.charge(kl_nats, flipped)
    assert session.record() == Record(
        zone=Zone.RAISE,
        gate_score=2.0,
        refusal_prob=0.2,
        kl_nats=1.0,
        budget_nats=4.0,
        steered_tokens=3,
        shadow_passes=4,
        token_flips=2,
        exhausted=False,
        applied=True,
        gate_says="harmful",
        verdict=None,
    )


@pytest.mark.parametrize(
    ("reading", "text", "verdict", "over", "under"),
    [
        (LOWER, REFUSAL, Verdict.REFUSED, True, False),
        (LOWER, ANSWER, Verdict.COMPLIED, False, False),
        (RAISE, REFUSAL, Verdict.REFUSED, False, False),
        (RAISE, ANSWER, Verdict.COMPLIED, False, True),
        (PASS, REFUSAL, Verdict.REFUSED, False, False),
        (PASS, ANSWER, Verdict.COMPLIED, False, False),
        (LOWER, "", Verdict.UNCLEAR, False, False),
        (RAISE, "", Verdict.UNCLEAR, False, False),
    ],
)
def test_a_refusal_is_suspected_only_against_what_the_gate_says(
    reading: GateReading, text: str, verdict: Verdict, over: bool, under: bool
) -> None:
    record = opened(reading).record(text)
    assert record.verdict is verdict
    assert record.suspected_over_refusal is over
    assert record.suspected_under_refusal is under


def test_nothing_is_suspected_of_a_response_that_is_not_finished() -> None:
    for reading in (LOWER, RAISE):
        record = opened(reading).record()
        assert record.verdict is None
        assert not record.suspected_over_refusal
        assert not record.suspected_under_refusal


def test_a_benign_request_that_passes_can_still_be_a_suspected_over_refusal() -> None:
    record = opened(replace(LOWER, refusal_prob=0.05)).record(REFUSAL)
    assert record.zone is Zone.PASS
    assert record.suspected_over_refusal


def test_the_record_holds_no_text_of_the_user() -> None:
    record = opened(LOWER).record("Sure, the word is xylophone.")
    assert "xylophone" not in str([getattr(record, field.name) for field in fields(record)])


def test_in_lockstep_the_schedule_knows_nothing_of_the_ledger() -> None:
    policy = Policy(raise_budget_nats=0.5, shadow_tokens=4)
    alone = GuardSession(GUARD, policy)
    ranks = GuardSession(GUARD, policy, lockstep=True)
    for session in (alone, ranks):
        session.open(RAISE)
        session.charge(0.5, flipped=False)
    assert [alone.wants_shadow(p) for p in range(6)] == [False] * 6
    assert [ranks.wants_shadow(p) for p in range(6)] == [True] * 4 + [False] * 2
    ranks.charge(0.0, flipped=False)
    assert ranks.record().kl_nats == 0.5
    with pytest.raises(BudgetError):
        ranks.charge(1e-9, flipped=False)


# Steering from the answer's start


def thinking(prompt: str = "<assistant>", **settings: float | str) -> GuardSession:
    policy = Policy.model_validate({"steer_from": "answer", **settings})
    return GuardSession(GUARD, policy, answer=AnswerStart("</think>", prompt))


def walk(session: GuardSession, tokens: list[str], readings: list[GateReading]) -> list[str]:
    """What happens before each token: "open", "shadow", both, or neither."""
    seen, text = [], ""
    for position, token in enumerate(tokens):
        events = []
        if session.reads_gate:
            session.open(readings.pop(0), position)
            events.append("open")
        if session.wants_shadow(position):
            session.charge(0.1, flipped=False)
            events.append("shadow")
        seen.append(" ".join(events))
        text += token
        session.see(text)
    return seen


def test_k_tokens_are_counted_from_the_answers_start() -> None:
    session = thinking(shadow_tokens=2)
    tokens = ["hm", "</think>", "Sure", ",", "here"]
    assert walk(session, tokens, [RAISE]) == ["", "", "open shadow", "shadow", ""]
    assert session.record().refusal_prob == RAISE.refusal_prob
    assert session.record().shadow_passes == 2


def test_a_response_whose_marker_never_comes_is_never_steered() -> None:
    session = thinking()
    assert walk(session, ["hm"] * 40, []) == [""] * 40
    record = session.record("")
    assert (record.zone, record.kl_nats, record.shadow_passes) == (None, 0.0, 0)
    with pytest.raises(BudgetError):
        session.charge(1e-9, flipped=False)


def test_the_gate_is_asked_again_behind_whitespace_unless_it_has_flagged_already() -> None:
    tokens = ["</think>", "\n\n", "I", "'m", "sorry"]
    # Before the line break nothing refuses; before the answer the base is about to.
    lowered = walk(thinking(), tokens, [replace(LOWER, refusal_prob=0.0), LOWER])
    assert lowered == ["", "open", "open shadow", "shadow", "shadow"]
    raised = walk(thinking(), tokens, [RAISE])
    assert raised == ["", "open shadow", "shadow", "shadow", "shadow"]
    passed = walk(thinking(), tokens, [PASS, PASS])
    assert passed == ["", "open", "open", "", ""]


def test_under_a_template_with_an_empty_thinking_block_all_is_as_from_the_response() -> None:
    tokens = ["Sure", ",", "here"]
    closed = thinking("<assistant><think>\n\n</think>\n\n", shadow_tokens=2)
    plain = GuardSession(GUARD, Policy(shadow_tokens=2))
    assert walk(closed, tokens, [RAISE]) == walk(plain, tokens, [RAISE])
    assert closed.record(ANSWER) == plain.record(ANSWER)


def test_an_engine_that_does_not_watch_for_the_answer_gets_no_session() -> None:
    with pytest.raises(NotArmedError, match="steer_from: response"):
        GuardSession(GUARD, Policy(steer_from="answer"))


@given(
    tokens=st.lists(st.sampled_from(["a", " ", "</think>", "</th", "ink>"]), max_size=30),
    gate=st.lists(readings, min_size=30, max_size=30),
    policy=policies,
    share=st.floats(0, 1),
)
def test_wherever_the_answer_begins_the_budget_and_k_hold(
    tokens: list[str], gate: list[GateReading], policy: Policy, share: float
) -> None:
    policy = policy.model_copy(update={"steer_from": "answer"})
    session = GuardSession(GUARD, policy, answer=AnswerStart("</think>", ""))
    text, total, shadows = "", 0.0, []
    for position, token in enumerate(tokens):
        if session.reads_gate:
            session.open(gate[position], position)
        if session.wants_shadow(position):
            nats = share * session.ledger.allowance_nats
            session.charge(nats, flipped=False)
            total += nats
            shadows.append(position)
            assert "</think>" in text
        text += token
        session.see(text)
    budgets = {Zone.RAISE: policy.raise_budget_nats, Zone.LOWER: policy.lower_budget_nats}
    assert total <= budgets.get(session.zone, 0.0) * (1 + 1e-12)  # type: ignore[arg-type]
    assert not shadows or shadows[-1] - shadows[0] < policy.shadow_tokens


@given(score=st.floats(-4, 4), lower=st.sampled_from(["certified", "off"]))
def test_the_outlook_is_what_opening_leads_to_if_the_refusal_probability_agrees(
    score: float, lower: str
) -> None:
    guard, policy = make_guard(), Policy.model_validate({"lower": lower, "token_cap_nats": 0.5})
    expected = GuardSession(guard, policy).outlook(score)
    found = set()
    for refusal_prob in (0.0, 1.0):
        session = GuardSession(guard, policy)
        session.open(GateReading(score, refusal_prob))
        found.add((id(session.carrier), session.ledger.allowance_nats))
    carrier, allowance = expected
    assert (id(carrier), allowance) in found
    assert (allowance > 0.0) == (score > 1.0 or (score < -1.0 and lower == "certified"))
