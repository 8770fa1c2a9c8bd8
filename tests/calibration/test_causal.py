"""The causal bench: every dose is compared at one price, and admission never gives way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from calibration.causal import (
    Admission,
    Bench,
    Effect,
    RefusalTokens,
    Sign,
    _dose_at,
    admit,
    dose_response,
    measure,
    opening_refusal,
    tilt,
)
from calibration.directions import Candidate
from calibration.evaluate import force
from calibration.transformers_subject import TransformersSubject
from guard.artifact import CarrierArtifact, Interval
from guard.gate import Zone, refusal_probability
from guard.policy import Policy
from guard.session import GuardSession
from tests.tiny_refuser import (
    PLANTED_LAYER,
    REFUSAL_TEXT,
    hard_benign_prompts,
    hard_harmful_prompts,
    harmless_prompts,
    planted_direction,
)

SAFE_KL = 0.1


# --- the price ------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    st.integers(0, 500),
    st.integers(1, 6),
    st.integers(2, 200),
    st.floats(0.1, 6.0),
    st.floats(0.01, 0.95),
)
@example(203, 1, 2, 2.0, 0.5)  # almost all of the price between t = 0.9 and 1
def test_the_dose_meets_the_price_within_a_few_percent(
    seed: int, n_rows: int, vocab: int, size: float, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.log_softmax(2 * torch.randn(n_rows, vocab, generator=generator), -1)
    steered = torch.log_softmax(base + size * torch.randn(n_rows, vocab, generator=generator), -1)
    delta = steered - base
    whole = float(tilt(base, delta, 1.0).kl_nats.mean())
    nats = share * whole
    if nats < 1e-3:  # nothing to be spent
        return
    dose = _dose_at(base, delta, nats, whole)
    assert 0.0 < dose <= 1.0
    assert float(tilt(base, delta, dose).kl_nats.mean()) == pytest.approx(nats, rel=0.02)


@given(st.integers(0, 200), st.floats(0.0, 1.0))
def test_a_mixture_is_a_distribution_between_base_and_steered(seed: int, dose: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.log_softmax(torch.randn(2, 30, generator=generator), -1)
    steered = torch.log_softmax(torch.randn(2, 30, generator=generator), -1)
    found = tilt(base, steered - base, dose)
    kl, mixed = found.kl_nats, (found.weights / found.total.unsqueeze(-1)).log()
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(2))
    # In float64, by another formula: Σ p_t (log p_t − log p0).
    other = torch.nn.functional.kl_div(
        base.double(), mixed.double(), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(kl.double(), other, rtol=1e-3, atol=1e-5)
    if dose == 0.0:
        torch.testing.assert_close(mixed, base)


# --- admission ------------------------------------------------------------------------------------


def interval(low: float, high: float) -> Interval:
    return Interval(value=(low + high) / 2, low=low, high=high, n=24)


def effect(
    shift: tuple[float, float], full_shift: tuple[float, float], can_spend: bool = True
) -> Effect:
    """An effect of which only the two shifts matter."""
    return Effect(
        Candidate(1, -1, torch.ones(4), 0.5),
        "raise",
        1.0,
        0.5,
        can_spend,
        interval(0.1, 0.1),
        interval(*shift),
        1.0,
        interval(*full_shift),
    )


WEAK = effect((-0.2, 0.3), (-0.2, 0.6))


def test_a_carrier_whose_intervals_stand_apart_both_ways_is_admissible() -> None:
    mine = effect((0.31, 0.5), (0.61, 0.9))
    admission = Admission(mine, mine, [WEAK] * 20, [WEAK] * 20)
    assert admission.admissible
    assert admission.why_not == ""


@pytest.mark.parametrize(
    "mine",
    [
        effect((0.30, 0.5), (0.61, 0.9)),  # touches at equal KL
        effect((0.31, 0.5), (0.60, 0.9)),  # touches at equal norm
        effect((0.20, 0.9), (0.61, 0.9)),  # overlaps, though its mean is higher
        effect((0.31, 0.5), (0.61, 0.9), can_spend=False),
    ],
)
def test_what_touches_or_overlaps_or_cannot_spend_is_not_admissible(mine: Effect) -> None:
    admission = Admission(mine, mine, [WEAK] * 20, [WEAK] * 20)
    assert not admission.admissible
    assert admission.why_not != ""


def test_one_strong_control_of_either_kind_is_enough_to_refuse_a_carrier() -> None:
    mine = effect((0.4, 0.5), (0.7, 0.9))
    by_kl, by_norm = effect((0.3, 0.45), (0, 0.1)), effect((0, 0.1), (0.3, 0.75))
    assert Admission(mine, mine, [WEAK] * 19 + [WEAK], [WEAK] * 20).admissible
    assert not Admission(mine, mine, [WEAK] * 19 + [by_kl], [WEAK] * 20).admissible
    assert not Admission(mine, mine, [WEAK] * 20, [WEAK] * 19 + [by_norm]).admissible


def test_an_effect_that_may_be_nothing_is_not_admissible_whatever_the_controls() -> None:
    bad = effect((-0.9, -0.8), (-0.9, -0.8))
    for mine in (effect((0.0, 0.5), (0.1, 0.9)), effect((0.1, 0.5), (-0.1, 0.9))):
        assert not Admission(mine, mine, [bad] * 20, [bad] * 20).admissible


def test_the_reason_names_the_way_in_which_the_carrier_failed() -> None:
    """It beats every control at equal KL, so the KL figures do not explain the refusal."""
    mine = effect((0.4, 0.5), (0.5, 0.9))
    admission = Admission(mine, mine, [WEAK] * 20, [WEAK] * 20)
    assert not admission.admissible
    assert str(mine.full_shift) in admission.why_not


# --- the tiny refuser, whose direction is known ---------------------------------------------------


@pytest.fixture(scope="module")
def subject(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> TransformersSubject:
    return TransformersSubject(tiny_model, tiny_tokenizer, "tiny-refuser")


@pytest.fixture(scope="module")
def bench(subject: TransformersSubject, tiny_tokenizer: PreTrainedTokenizerFast) -> Bench:
    texts = [
        *harmless_prompts()[:16],
        *hard_benign_prompts()[:16],
        *hard_harmful_prompts()[:16],
    ]
    step = subject.prefill([subject.encode(t) for t in texts], range(4))
    opening = tiny_tokenizer.convert_tokens_to_ids(REFUSAL_TEXT.split()[0])
    return Bench(
        step,
        texts,
        list(range(32)),
        {"raise": list(range(32, 48)), "lower": list(range(16, 32))},
        {"raise": list(range(32, 48)), "lower": list(range(16, 32))},
        {"raise": list(range(32, 48)), "lower": list(range(16, 32))},
        RefusalTokens(torch.tensor([opening]), torch.ones(1)),
        SAFE_KL,
        seed=0,
    )


def planted(strength: float = 24.0, layer: int = PLANTED_LAYER) -> Candidate:
    return Candidate(layer, -1, strength * planted_direction(), 1.0)


@pytest.mark.parametrize("sign", ["raise", "lower"])
def test_the_planted_direction_moves_refusal_the_way_that_was_asked_for(
    subject: TransformersSubject, bench: Bench, sign: Sign
) -> None:
    (found,) = measure(subject, bench, [planted()], sign)
    (backwards,) = measure(subject, bench, [planted(-24.0)], sign)
    assert found.can_spend
    assert found.safe_kl.value == pytest.approx(SAFE_KL, rel=0.02)
    assert found.shift.low > 0.5
    assert backwards.shift.high < 0.0


def test_a_weak_direction_is_scaled_up_until_it_can_spend(
    subject: TransformersSubject, bench: Bench
) -> None:
    strong, weak, hopeless = measure(
        subject, bench, [planted(), planted(8.0), planted(1e-3)], "raise"
    )
    assert (strong.scale, strong.can_spend) == (1.0, True)
    assert weak.scale in (2.0, 4.0)
    assert weak.can_spend
    assert (hopeless.scale, hopeless.can_spend, hopeless.dose) == (4.0, False, 1.0)
    assert hopeless.shift_per_nat == 0.0
    assert hopeless.full_kl < SAFE_KL


def test_candidates_measured_together_get_what_each_gets_alone(
    subject: TransformersSubject, bench: Bench
) -> None:
    candidates = [planted(s) for s in (24.0, 6.0, -24.0, 3.0, 8.0, 10.0, 1.0)]
    together = measure(subject, bench, candidates, "raise")
    for candidate, found in zip(candidates, together, strict=True):
        (alone,) = measure(subject, bench, [candidate], "raise")
        assert found.candidate is candidate
        assert found.scale == alone.scale
        assert found.shift.value == pytest.approx(alone.shift.value, abs=1e-4)


def test_controls_match_the_candidate_in_norm_and_in_kl(
    subject: TransformersSubject, bench: Bench
) -> None:
    (found,) = measure(subject, bench, [planted()], "raise")
    admission = admit(subject, bench, found, 20)
    assert len(admission.at_kl) == len(admission.at_norm) == 20
    for control in admission.at_norm:
        assert float(control.candidate.direction.norm()) == pytest.approx(24.0, rel=1e-4)
        assert control.scale == 1.0
    spending = [c for c in admission.at_kl if c.can_spend]
    assert len(spending) >= 15
    for control in spending:
        assert control.safe_kl.value == pytest.approx(SAFE_KL, rel=0.05)
    assert all(c.full_shift.high < found.full_shift.low for c in admission.at_norm)


def test_a_candidate_meets_its_controls_on_the_rows_for_admitting(
    subject: TransformersSubject, bench: Bench
) -> None:
    fewer = replace(bench, targets={"raise": bench.admitting["raise"][:4], "lower": []})
    (found,) = measure(subject, fewer, [planted()], "raise")
    admission = admit(subject, fewer, found, 20)
    (again,) = measure(subject, bench, [planted()], "raise")
    assert admission.compared.shift.n == 4
    assert admission.effect.shift == again.shift
    assert {c.shift.n for c in (*admission.at_kl, *admission.at_norm)} == {16}


def test_a_random_direction_is_not_admissible(subject: TransformersSubject, bench: Bench) -> None:
    noise = torch.randn(64, generator=torch.Generator().manual_seed(11))
    candidate = replace(planted(), direction=24.0 * noise / noise.norm())
    (found,) = measure(subject, bench, [candidate], "raise")
    assert not admit(subject, bench, found, 20).admissible


def test_the_dose_response_begins_at_the_base_and_rises(
    subject: TransformersSubject, bench: Bench
) -> None:
    doses = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0])
    safe, target, refusal = dose_response(subject, bench, planted(), "raise", 1.0, doses)
    assert float(safe[0]) == pytest.approx(0.0, abs=1e-6)
    for curve in (safe, target, refusal):
        assert bool((curve.diff() > 0).all())
    assert float(refusal[-1]) > 0.75 > 0.55 > float(refusal[0])
    _, _, lowered = dose_response(subject, bench, planted(), "lower", 1.0, doses)
    assert float(lowered[-1]) < 0.2 < 0.55 < float(lowered[0])


# --- sampled openings -----------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["raise", "lower"])
def test_a_larger_budget_opens_more_refusals_until_the_carrier_is_spent(
    subject: TransformersSubject, bench: Bench, sign: Sign
) -> None:
    rows = bench.targets[sign]
    found = [
        opening_refusal(subject, bench, planted(), sign, 1.0, rows, nats)
        for nats in (0.0, 0.1, 0.4, 30.0, 60.0)
    ]
    opens = [interval.value for interval in found]
    tokens = bench.tokens
    alone = refusal_probability(bench.step.logits[rows], tokens.ids, tokens.weights)
    assert opens[0] == pytest.approx(float(alone.mean()), abs=1e-6)
    assert opens[3] == opens[4]  # all that there is
    ordered = opens[:4] if sign == "raise" else opens[3::-1]
    assert ordered[0] < ordered[1] < ordered[2] < ordered[3]
    assert {interval.n for interval in found} == {16}


@pytest.mark.parametrize(("sign", "zone"), [("raise", Zone.RAISE), ("lower", Zone.LOWER)])
def test_it_is_how_often_served_responses_open_with_a_refusal(
    subject: TransformersSubject,
    bench: Bench,
    tiny_guard: CarrierArtifact,
    sign: Sign,
    zone: Zone,
) -> None:
    """Drawn at temperature 1, through sessions that keep the budget."""
    n_draws, nats, rows = 200, 0.3, bench.targets[sign]
    expected = opening_refusal(subject, bench, planted(), sign, 1.0, rows, nats).value
    guard = replace(
        tiny_guard, raise_carrier=planted().carrier(1.0), lower_carrier=planted().carrier(-1.0)
    )
    policy = Policy(raise_budget_nats=nats, lower_budget_nats=nats)
    refusing, opened = bench.tokens.ids.tolist(), 0
    for row in rows:
        sessions = [GuardSession(guard, policy) for _ in range(n_draws)]
        for session in sessions:
            session.open(force(guard, zone))
        prompt = subject.encode(bench.prompts[row])
        seeds = range(row * n_draws, (row + 1) * n_draws)
        drawn = subject.respond([prompt] * n_draws, 1, sessions, 1.0, seeds)
        opened += sum(response[0] in refusing for response in drawn if response)
    # four standard errors of 3,200 draws, at most
    assert opened / (n_draws * len(rows)) == pytest.approx(expected, abs=4 * (0.25 / 3200) ** 0.5)
    assert 0.05 < expected < 0.95
