"""What a candidate does to the model, measured the way it will be applied.

Prompts are prefilled once; each candidate then costs one shadow token per prompt. All doses are
compared at one price: base and steered distributions are mixed, p_t ∝ p0^(1−t)·p1^t with one t for
all prompts, until the mean KL(p_t ‖ p0) on safe prompts is `safe_kl_nats`. There the effect is
read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from calibration.directions import Candidate, random_directions
from calibration.statistics import mean_interval
from calibration.subject import Subject
from guard.artifact import Interval
from guard.gate import refusal_logit, refusal_probability
from guard.kl import mix_within_budget
from guard.shadow import BaseStep

__all__ = [
    "Admission",
    "Bench",
    "Effect",
    "RefusalTokens",
    "admit",
    "dose_response",
    "measure",
    "opening_refusal",
]

Sign = Literal["raise", "lower"]
_SCALES = (1.0, 2.0, 4.0)
_CONTROL_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
_ROWS_AT_ONCE = 448


@dataclass(frozen=True)
class RefusalTokens:
    """How the model opens its refusals.

    Attributes:
        ids: (n_tokens,) int64 first tokens.
        weights: (n_tokens,) float32, share of the responses opening so that refuse.
    """

    ids: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> RefusalTokens:
        """The same, where logits are."""
        return RefusalTokens(self.ids.to(device), self.weights.to(device))


@dataclass(frozen=True)
class Bench:
    """Prompts, run once, on which candidates are compared.

    Attributes:
        step: the base pass over all of them, resid_pre of every layer kept at the last token.
        prompts: their texts, row by row.
        safe: rows on which KL is measured (ordinary and hard benign prompts).
        targets: rows on which the effect is measured: for "raise" harmful prompts that the base
            is about to answer, for "lower" benign prompts that it is about to refuse.
        admitting: likewise, more of them, on which a candidate is put against controls.
        confirming: likewise, those that confirm a carrier by whole responses.
        tokens: the model's refusal openings.
        safe_kl_nats: the price of every dose.
        seed: of bootstraps and controls.
    """

    step: BaseStep
    prompts: list[str]
    safe: list[int]
    targets: dict[Sign, list[int]]
    admitting: dict[Sign, list[int]]
    confirming: dict[Sign, list[int]]
    tokens: RefusalTokens
    safe_kl_nats: float
    seed: int

    def rows(self, sign: Sign) -> list[int]:
        """Safe rows, then target rows."""
        return [*self.safe, *self.targets[sign]]

    def base_logprobs(self, sign: Sign) -> Tensor:
        """(n_rows, vocab) float32, of `rows(sign)`."""
        return torch.log_softmax(self.step.logits[self.rows(sign)].float(), -1)


@dataclass(frozen=True)
class Effect:
    """What one direction does.

    Attributes:
        candidate: the direction.
        sign: toward refusal or away from it.
        scale: factor at which it was applied.
        dose: the mixing strength t at which the safe KL is met; 1 if it cannot spend it.
        can_spend: at dose 1 it moves safe prompts by at least `safe_kl_nats`.
        safe_kl: mean KL on safe prompts at that dose, nats.
        shift: mean shift of the refusal logit on the target prompts at that dose, in the direction
            asked for: more refusal for "raise", less for "lower".
        full_kl: mean KL on safe prompts at dose 1.
        full_shift: the shift at dose 1.
    """

    candidate: Candidate
    sign: Sign
    scale: float
    dose: float
    can_spend: bool
    safe_kl: Interval
    shift: Interval
    full_kl: float
    full_shift: Interval

    @property
    def shift_per_nat(self) -> float:
        """Refusal-logit shift per nat on safe prompts: what candidates are ranked by."""
        return self.shift.value / self.safe_kl.value if self.safe_kl.value > 1e-6 else 0.0


@dataclass(frozen=True)
class Admission:
    """A candidate against random controls.

    Attributes:
        compared: the candidate's effect as all candidates were compared.
        effect: the same on the rows that the controls were measured on.
        at_kl: controls scaled and mixed to the same KL.
        at_norm: controls of the same norm at dose 1, whatever they spend.
    """

    compared: Effect
    effect: Effect
    at_kl: list[Effect]
    at_norm: list[Effect]

    @property
    def admissible(self) -> bool:
        """It spends the KL and beats every control, both matched ways, with intervals apart."""
        best_kl = max((c.shift.high for c in self.at_kl), default=0.0)
        best_norm = max((c.full_shift.high for c in self.at_norm), default=0.0)
        mine = self.effect
        return (
            mine.can_spend
            and mine.shift.low > max(best_kl, 0.0)
            and mine.full_shift.low > max(best_norm, 0.0)
        )

    @property
    def why_not(self) -> str:
        """One sentence for a report; empty if admissible."""
        if self.admissible:
            return ""
        mine = self.effect
        if not mine.can_spend:
            return f"cannot spend the KL: {mine.full_kl:.3g} nats at full strength"
        best = max((c.shift.high for c in self.at_kl), default=0.0)
        if mine.shift.low <= max(best, 0.0):
            return (
                f"at equal KL its shift {mine.shift} does not stand apart from the best control"
                f" ({best:.3f})"
            )
        best = max((c.full_shift.high for c in self.at_norm), default=0.0)
        return (
            f"at equal norm its shift {mine.full_shift} does not stand apart from the best control"
            f" ({best:.3f})"
        )


def measure(
    subject: Subject, bench: Bench, candidates: Sequence[Candidate], sign: Sign
) -> list[Effect]:
    """Measure candidates of one layer at equal KL.

    Each is tried at full strength first and, only if it cannot spend the KL, scaled up.
    """
    effects = _measure_at(subject, bench, candidates, sign, _SCALES[0])
    return _scale_up(subject, bench, effects, _SCALES)


def admit(subject: Subject, bench: Bench, effect: Effect, n_controls: int) -> Admission:
    """Put a candidate against random directions matched in norm and matched in KL.

    It is measured again with them, on the rows of `bench.admitting`, where intervals are narrower.
    """
    bench, candidate = replace(bench, targets=bench.admitting), effect.candidate
    (again,) = measure(subject, bench, [candidate], effect.sign)
    noise = random_directions(again.scale * candidate.direction, n_controls, bench.seed)
    controls = [
        replace(candidate, direction=row, family="random_control", subspace=None) for row in noise
    ]
    at_norm = _measure_at(subject, bench, controls, effect.sign, 1.0)
    at_kl = _scale_up(subject, bench, at_norm, _CONTROL_SCALES)
    return Admission(effect, again, at_kl, at_norm)


@torch.inference_mode()
def dose_response(
    subject: Subject, bench: Bench, candidate: Candidate, sign: Sign, scale: float, doses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean safe KL, mean target KL and mean target refusal probability at mixing strengths.

    Args:
        subject: the model.
        bench: prompts, run once.
        candidate: the direction.
        sign: toward refusal or away from it.
        scale: factor on the direction.
        doses: (n_doses,) mixing strengths in [0, 1].

    Returns:
        Three (n_doses,) tensors on the CPU: nats, nats, probability.
    """
    base = bench.base_logprobs(sign)
    delta = _deltas(subject, bench, [candidate], sign, scale, base)[0]
    n_safe = len(bench.safe)
    tilts = [tilt(base, delta, float(dose)) for dose in doses.tolist()]
    kl = torch.stack([tilt.kl_nats for tilt in tilts])
    refusals = torch.stack([tilt.refusal_prob(bench.tokens)[n_safe:].mean() for tilt in tilts])
    return kl[:, :n_safe].mean(1).cpu(), kl[:, n_safe:].mean(1).cpu(), refusals.cpu()


@torch.inference_mode()
def opening_refusal(
    subject: Subject,
    bench: Bench,
    candidate: Candidate,
    sign: Sign,
    scale: float,
    rows: Sequence[int],
    budget_nats: float,
) -> Interval:
    """How likely a response sampled at temperature 1 opens with a refusal, steered as in serving.

    An expectation over the first token, mixed exactly within the budget, so nothing is drawn: a
    greedy response shows only which token is the most likely one.

    Args:
        subject: the model.
        bench: prompts, run once.
        candidate: the direction.
        sign: toward refusal or away from it.
        scale: factor on the direction.
        rows: of the bench, at least one.
        budget_nats: of each response, ≥ 0.

    Returns:
        The mean over the rows, a probability.
    """
    base = bench.step.logits[list(rows)].float()
    hidden = bench.step.last_hidden(candidate.layer)[list(rows)].float()
    carrier = candidate.carrier(scale if sign == "raise" else -scale)
    steered = subject.shadow(bench.step, rows, candidate.layer, carrier.apply(hidden))
    budgets = torch.full((len(rows),), budget_nats, dtype=torch.float64)
    mixed = mix_within_budget(base, steered, budgets.to(base.device)).logits
    opens = refusal_probability(mixed, bench.tokens.ids, bench.tokens.weights)
    return mean_interval(opens, bench.seed)


def _scale_up(
    subject: Subject, bench: Bench, effects: Sequence[Effect], scales: Sequence[float]
) -> list[Effect]:
    """Measure again, at a larger scale, those that cannot spend the KL; all of one layer."""
    found = list(effects)
    while True:
        waiting: dict[float, list[int]] = {}
        for i, effect in enumerate(found):
            if not effect.can_spend and effect.scale < scales[-1]:
                # KL grows about as the square of the scale: skip what cannot be enough.
                aim = effect.scale * (bench.safe_kl_nats / max(effect.full_kl, 1e-12)) ** 0.5
                larger = [scale for scale in scales if scale > effect.scale]
                chosen = next((scale for scale in larger if scale >= aim), larger[-1])
                waiting.setdefault(chosen, []).append(i)
        if not waiting:
            return found
        for scale, group in waiting.items():
            candidates = [found[i].candidate for i in group]
            again = _measure_at(subject, bench, candidates, found[group[0]].sign, scale)
            for i, effect in zip(group, again, strict=True):
                found[i] = effect


@torch.inference_mode()
def _measure_at(
    subject: Subject, bench: Bench, candidates: Sequence[Candidate], sign: Sign, scale: float
) -> list[Effect]:
    base = bench.base_logprobs(sign)
    scratch = torch.empty_like(base)
    per_call = max(1, _ROWS_AT_ONCE // len(base))
    effects = []
    for start in range(0, len(candidates), per_call):
        chunk = candidates[start : start + per_call]
        deltas = _deltas(subject, bench, chunk, sign, scale, base)
        for candidate, delta in zip(chunk, deltas, strict=True):
            effects.append(_effect(bench, candidate, sign, scale, base, delta, scratch))
    return effects


def _deltas(
    subject: Subject,
    bench: Bench,
    candidates: Sequence[Candidate],
    sign: Sign,
    scale: float,
    base: Tensor,
) -> Tensor:
    """(n_candidates, n_rows, vocab): log p1 − log p0, 0 where a token cannot occur."""
    rows = bench.rows(sign)
    layer = candidates[0].layer
    hidden = bench.step.last_hidden(layer)[rows].float()
    factor = scale if sign == "raise" else -scale
    steered = torch.cat([c.carrier(factor).apply(hidden) for c in candidates])
    logits = subject.shadow(bench.step, rows * len(candidates), layer, steered)
    deltas = logits.reshape(len(candidates), len(rows), -1)
    for delta in deltas:  # in place, one candidate at a time: 150k-wide rows are slow to copy
        delta.sub_(delta.logsumexp(-1, keepdim=True)).sub_(base)
        delta.nan_to_num_(0.0, 0.0, 0.0)
    return deltas


def _effect(
    bench: Bench,
    candidate: Candidate,
    sign: Sign,
    scale: float,
    base: Tensor,
    delta: Tensor,
    scratch: Tensor,
) -> Effect:
    n_safe = len(bench.safe)
    towards = 1.0 if sign == "raise" else -1.0
    before = refusal_logit(
        refusal_probability(base[n_safe:], bench.tokens.ids, bench.tokens.weights)
    )

    def shift(tilt: Tilt) -> Interval:
        after = refusal_logit(tilt.refusal_prob(bench.tokens)[n_safe:])
        return mean_interval(towards * (after - before), bench.seed)

    full = tilt(base, delta, 1.0, scratch)
    full_kl, full_shift = full.kl_nats[:n_safe], shift(full)
    can_spend = float(full_kl.mean()) >= bench.safe_kl_nats
    dose, kl, dose_shift = 1.0, full_kl, full_shift
    if can_spend:
        dose = _dose_at(
            base[:n_safe],
            delta[:n_safe],
            bench.safe_kl_nats,
            float(full_kl.mean()),
            scratch[:n_safe],
        )
        mixed = tilt(base, delta, dose, scratch)
        kl, dose_shift = mixed.kl_nats[:n_safe], shift(mixed)
    return Effect(
        candidate,
        sign,
        scale,
        dose,
        can_spend,
        mean_interval(kl, bench.seed),
        dose_shift,
        float(full_kl.mean()),
        full_shift,
    )


@dataclass(frozen=True)
class Tilt:
    """p_t ∝ p0·exp(t·Δ) of some rows: a measurement in float32, not the serving bound.

    Attributes:
        weights: (n_rows, vocab), p_t before normalisation.
        total: (n_rows,), their sums.
        kl_nats: (n_rows,), KL(p_t ‖ p0) = t·E_t[Δ] − log Σ p0·exp(t·Δ).
    """

    weights: Tensor
    total: Tensor
    kl_nats: Tensor

    def refusal_prob(self, tokens: RefusalTokens) -> Tensor:
        """(n_rows,): how likely p_t is to open with a refusal."""
        return (self.weights[:, tokens.ids] @ tokens.weights / self.total).clamp(0.0, 1.0)


def tilt(base: Tensor, delta: Tensor, dose: float, scratch: Tensor | None = None) -> Tilt:
    """Mix at one strength for all rows; `scratch` (n_rows, vocab) saves an allocation."""
    weights = torch.add(base, delta, alpha=dose, out=scratch).exp_()
    total = weights.sum(-1)
    mean = torch.bmm(weights.unsqueeze(1), delta.unsqueeze(2)).flatten() / total
    return Tilt(weights, total, (dose * mean - total.log()).clamp_min(0.0))


def _dose_at(
    base: Tensor, delta: Tensor, nats: float, full_nats: float, scratch: Tensor | None = None
) -> float:
    """The t in (0, 1] at which the mean KL over the rows is `nats`; it rises with t.

    Args:
        base: (n_rows, vocab) log-probabilities.
        delta: (n_rows, vocab) log p1 − log p0.
        nats: wanted.
        full_nats: the mean KL at t = 1, not less than `nats`.
        scratch: as for `tilt`.
    """
    low, high = 0.0, 1.0
    known_t, known_kl, power = 1.0, full_nats, 2.0  # KL is nearly quadratic where t is small
    for step in range(40):
        aim = known_t * (nats / known_kl) ** (1.0 / power) if known_kl > 0 else 0.0
        t = aim if low < aim < high and step % 4 != 3 else 0.5 * (low + high)
        kl = float(tilt(base, delta, t, scratch).kl_nats.mean())
        if abs(kl - nats) <= 0.01 * nats:
            break
        low, high = (t, high) if kl < nats else (low, t)
        if kl > 0 and known_kl > 0 and t != known_t:
            power = max(0.1, math.log(kl / known_kl) / math.log(t / known_t))
        known_t, known_kl = t, kl
    return t
