"""Gradient refinement: exact mixing carries gradients, and a refined direction does more a nat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.capture import WorkFolder, fingerprint, listen
from calibration.causal import RefusalTokens, Sign
from calibration.config import CalibrationConfig
from calibration.directions import Candidate
from calibration.pipeline import learn_refusals
from calibration.progress import Silent
from calibration.prompts import Prompt
from calibration.refine import RefineSettings, mix_at_budget, refine, teach
from calibration.subject import GradientSubject
from calibration.transformers_subject import TransformersSubject, load_subject
from guard.errors import NoAdmissibleCarrierError
from guard.gate import refusal_probability
from guard.kl import kl_per_token, mix_within_budget
from tests.tiny_refuser import (
    hard_benign_prompts,
    hard_harmful_prompts,
    harmful_prompts,
    harmless_prompts,
)


@dataclass(frozen=True)
class Heard:
    """The tiny refuser, its training prompts, what it says to them, and how it refuses."""

    subject: TransformersSubject
    prompts: list[Prompt]
    responses: list[list[int]]
    tokens: RefusalTokens


@pytest.fixture(scope="module")
def heard(tiny_refuser_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Heard:
    torch.set_num_threads(1)
    subject = load_subject(CalibrationConfig(model=str(tiny_refuser_dir)))
    kinds = [
        ("harmful", "ordinary", harmful_prompts()[::4] + hard_harmful_prompts()[::2]),
        ("benign", "hard", hard_benign_prompts()[::2]),
        ("benign", "ordinary", harmless_prompts()[::4]),
    ]
    prompts = [
        Prompt(f"p-{stratum}-{i}", text, label, stratum, "any", None, "en")  # type: ignore[arg-type]
        for label, stratum, texts in kinds
        for i, text in enumerate(texts)
    ]
    work = WorkFolder(tmp_path_factory.mktemp("heard"), fingerprint("refine"))
    responses = listen(subject, prompts, 12, 32, work, "listen", Silent())
    tokens, _ = learn_refusals(subject, prompts, responses)
    return Heard(subject, prompts, responses, tokens)


def pair(seed: int, spread: float, vocab: int = 40) -> tuple[Tensor, Tensor]:
    """Base and steered log-probabilities of three rows, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, 3, vocab, generator=generator, dtype=torch.float64)
    base, steered = torch.log_softmax(logits, -1)
    return base, steered


@settings(max_examples=40)
@given(st.integers(0, 500), st.floats(0.2, 4.0), st.floats(0.01, 3.0))
def test_a_mixture_spends_its_budget_or_all_that_the_carrier_can(
    seed: int, spread: float, budget: float
) -> None:
    base, steered = pair(seed, spread)
    mixed = mix_at_budget(base, steered, torch.full((3,), budget, dtype=torch.float64))
    expected = kl_per_token(steered, base).clamp_max(budget)
    torch.testing.assert_close(kl_per_token(mixed, base), expected, rtol=2e-2, atol=1e-6)


def test_the_gradient_is_that_of_mixing_at_a_fixed_kl_not_at_a_fixed_strength() -> None:
    base, steered = pair(3, 2.0)
    budget = torch.full((3,), 0.4, dtype=torch.float64)

    def goal(logits: Tensor) -> Tensor:
        return mix_at_budget(base, torch.log_softmax(logits, -1), budget)[:, 0].sum()

    logits = steered.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(goal(logits), [logits])
    step = 1e-3 * torch.randn(steered.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        # Solved to the last digit on both sides: the difference is of the order of the step.
        ends = [
            torch.log(mixed_exactly(base, torch.log_softmax(steered + s * step, -1), 0.4)[:, 0])
            for s in (0.5, -0.5)
        ]
    assert float((gradient * step).sum()) == pytest.approx(
        float((ends[0] - ends[1]).sum()), rel=0.05
    )


def mixed_exactly(base: Tensor, steered: Tensor, budget: float) -> Tensor:
    """Probabilities at KL = budget, by bisection in float64."""
    low, high = torch.zeros(len(base)).double(), torch.ones(len(base)).double()
    for _ in range(80):
        t = 0.5 * (low + high)
        mixed = torch.log_softmax(base + t[:, None] * (steered - base), -1)
        fits = kl_per_token(mixed, base) <= budget
        low, high = torch.where(fits, t, low), torch.where(fits, high, t)
    return torch.log_softmax(base + low[:, None] * (steered - base), -1).exp()


@pytest.mark.parametrize("sign", ["raise", "lower"])
def test_a_refined_direction_does_more_at_the_same_budget_than_where_it_began(
    sign: Sign, heard: Heard
) -> None:
    subject = heard.subject
    assert isinstance(subject, GradientSubject)
    layer = subject.identity.n_layers // 2
    lessons = teach(subject, heard.prompts, heard.responses, heard.tokens, sign, [layer])
    assert lessons is not None
    noise = torch.randn(subject.identity.d_model, generator=torch.Generator().manual_seed(0))
    start = Candidate(layer, -1, noise, 0.1)
    *_, refined = refine(subject, lessons, start, sign, RefineSettings(), seed=0)
    assert refined.family == "gradient_refined"
    assert refined.norm_share <= 0.5 + 1e-4
    towards = 1.0 if sign == "raise" else -1.0

    def refusal_at_half_a_nat(direction: Tensor) -> float:
        rows = [i for i, (ids, _) in enumerate(lessons.wanted) if len(ids) > 1 or i == 0]
        hidden = lessons.step.last_hidden(layer)[rows].float()
        steered = subject.shadow(lessons.step, rows, layer, hidden + towards * direction)
        base = lessons.step.logits[rows].float()
        mixed = mix_within_budget(base, steered, torch.full((len(rows),), 0.5))
        tokens = heard.tokens
        return float(refusal_probability(mixed.logits, tokens.ids, tokens.weights).mean())

    begun = noise * refined.direction.norm() / noise.norm()
    gain = refusal_at_half_a_nat(refined.direction) - refusal_at_half_a_nat(begun)
    assert towards * gain > 0.1


def test_at_four_nats_a_direction_refined_for_them_does_more_than_one_refined_for_one(
    heard: Heard,
) -> None:
    subject = heard.subject
    layer = subject.identity.n_layers // 2
    lessons = teach(subject, heard.prompts, heard.responses, heard.tokens, "raise", [layer])
    assert lessons is not None
    noise = torch.randn(subject.identity.d_model, generator=torch.Generator().manual_seed(0))
    start = Candidate(layer, -1, noise, 0.1)
    tokens = heard.tokens
    rows = [i for i, (ids, _) in enumerate(lessons.wanted) if torch.equal(ids, tokens.ids)]

    def refusal_at(nats: float, settings: RefineSettings) -> float:
        *_, refined = refine(subject, lessons, start, "raise", settings, seed=0)
        hidden = lessons.step.last_hidden(layer)[rows].float() + refined.direction
        steered = subject.shadow(lessons.step, rows, layer, hidden)
        base = lessons.step.logits[rows].float()
        mixed = mix_within_budget(base, steered, torch.full((len(rows),), nats))
        return float(refusal_probability(mixed.logits, tokens.ids, tokens.weights).mean())

    for_one, for_four = (RefineSettings(steps=24, budget_nats=nats) for nats in (1.0, 4.0))
    assert refusal_at(4.0, for_four) > refusal_at(4.0, for_one) + 0.01


def test_refusals_that_do_not_go_with_harm_carry_nothing(heard: Heard) -> None:
    refusal = next(r for r in heard.responses if heard.subject.decode(r).startswith("i cannot"))
    answer = heard.responses[-1]  # to an ordinary prompt
    responses = [refusal if i % 3 == 0 else answer for i in range(len(heard.prompts))]
    with pytest.raises(NoAdmissibleCarrierError, match=r"harmful prompts and \d+ of \d+ ordinary"):
        learn_refusals(heard.subject, heard.prompts, responses)


def test_nothing_can_be_learned_where_nothing_is_refused(heard: Heard) -> None:
    answer = heard.responses[-1]  # to an ordinary prompt
    answers = [answer] * len(heard.prompts)
    subject, prompts, tokens = heard.subject, heard.prompts, heard.tokens
    assert teach(subject, prompts, answers, tokens, "raise", [1]) is None
