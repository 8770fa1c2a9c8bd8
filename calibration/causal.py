"""What a candidate does to the model, measured the way it will be applied.

Prompts are prefilled once; each candidate then costs one shadow token per prompt. All doses are
compared at one price: base and steered distributions are mixed, p_t ∝ p0^(1−t)·p1^t with one t for
all prompts, until the mean KL(p_t ‖ p0) on safe prompts is `safe_kl_nats`. There the effect is
read.
"""

from __future__ import annotations

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
from guard.shadow import BaseStep

__all__ = ["Admission", "Bench", "Effect", "RefusalTokens", "admit", "dose_response", "measure"]

Sign = Literal["raise", "lower"]
_SCALES = (1.0, 2.0, 4.0)
_CONTROL_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class RefusalTokens:
    """How the model opens its refusals.

    Attributes:
        ids: (n_tokens,) int64 first tokens.
        weights: (n_tokens,) float32, share of the responses opening so that refuse.
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Bench:
    """Prompts, run once, on which candidates are compared.

    Attributes:
        step: the base pass over all of them, resid_pre of every layer kept at the last token.
        safe: rows on which KL is measured (ordinary and hard benign prompts).
        targets: rows on which the effect is measured: for "raise" harmful prompts that the base
            is about to answer, for "lower" benign prompts that it is about to refuse.
        tokens: the model's refusal openings.
        safe_kl_nats: the price of every dose.
        seed: of bootstraps and controls.
    """

    step: BaseStep
    safe: list[int]
    targets: dict[Sign, list[int]]
    tokens: RefusalTokens
    safe_kl_nats: float
    seed: int

    def rows(self, sign: Sign) -> list[int]:
        """Safe rows, then target rows."""
        return [*self.safe, *self.targets[sign]]


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
        effect: the candidate's.
        at_kl: controls scaled and mixed to the same KL.
        at_norm: controls of the same norm at dose 1, whatever they spend.
    """

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
        if not self.effect.can_spend:
            return f"cannot spend the KL: {self.effect.full_kl:.3g} nats at full strength"
        best = max((c.shift.high for c in self.at_kl), default=0.0)
        return f"shift {self.effect.shift} does not stand apart from the best control ({best:.3f})"


def measure(
    subject: Subject, bench: Bench, candidates: Sequence[Candidate], sign: Sign
) -> list[Effect]:
    """Measure candidates of one layer at equal KL.

    Each is tried at full strength first and, only if it cannot spend the KL, scaled up.
    """
    results: dict[int, Effect] = {}
    waiting = list(range(len(candidates)))
    for scale in _SCALES:
        effects = _measure_at(subject, bench, [candidates[i] for i in waiting], sign, scale)
        results.update(zip(waiting, effects, strict=True))
        waiting = [i for i in waiting if not results[i].can_spend]
        if not waiting:
            break
    return [results[i] for i in range(len(candidates))]


def admit(subject: Subject, bench: Bench, effect: Effect, n_controls: int) -> Admission:
    """Put a candidate against random directions matched in norm and matched in KL."""
    candidate = effect.candidate
    noise = random_directions(effect.scale * candidate.direction, n_controls, bench.seed)
    controls = [replace(candidate, direction=row, family="random_control") for row in noise]
    at_norm = _measure_at(subject, bench, controls, effect.sign, 1.0)
    at_kl = list(at_norm)
    for scale in _CONTROL_SCALES[1:]:
        short = [i for i, control in enumerate(at_kl) if not control.can_spend]
        if not short:
            break
        again = _measure_at(subject, bench, [controls[i] for i in short], effect.sign, scale)
        for i, control in zip(short, again, strict=True):
            at_kl[i] = control
    return Admission(effect, at_kl, at_norm)


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
        Three (n_doses,) tensors: nats, nats, probability.
    """
    base, steered = _logprobs(subject, bench, [candidate], sign, scale)
    delta = (steered[0] - base).nan_to_num(0.0, 0.0, 0.0)
    n_safe = len(bench.safe)
    kls, refusals = [], []
    for dose in doses.tolist():
        kl, mixed = _mixture(base, delta, float(dose))
        kls.append(kl)
        refusals.append(
            refusal_probability(mixed[n_safe:], bench.tokens.ids, bench.tokens.weights).mean()
        )
    kl_rows = torch.stack(kls)
    return kl_rows[:, :n_safe].mean(1), kl_rows[:, n_safe:].mean(1), torch.stack(refusals)


def _measure_at(
    subject: Subject, bench: Bench, candidates: Sequence[Candidate], sign: Sign, scale: float
) -> list[Effect]:
    per_call = max(1, _ROWS_AT_ONCE // len(bench.rows(sign)))
    effects = []
    for start in range(0, len(candidates), per_call):
        chunk = candidates[start : start + per_call]
        base, steered = _logprobs(subject, bench, chunk, sign, scale)
        for candidate, logprobs in zip(chunk, steered, strict=True):
            effects.append(_effect(bench, candidate, sign, scale, base, logprobs))
    return effects


def _logprobs(
    subject: Subject, bench: Bench, candidates: Sequence[Candidate], sign: Sign, scale: float
) -> tuple[Tensor, Tensor]:
    """Base (n_rows, vocab) and steered (n_candidates, n_rows, vocab) log-probabilities."""
    rows = bench.rows(sign)
    layer = candidates[0].layer
    hidden = bench.step.last_hidden(layer)[rows].float()
    factor = scale if sign == "raise" else -scale
    steered = torch.cat([c.carrier(factor).apply(hidden) for c in candidates])
    logits = subject.shadow(bench.step, rows * len(candidates), layer, steered)
    base = torch.log_softmax(bench.step.logits[rows].float(), -1)
    return base, torch.log_softmax(logits, -1).reshape(len(candidates), len(rows), -1)


def _effect(
    bench: Bench,
    candidate: Candidate,
    sign: Sign,
    scale: float,
    base: Tensor,
    steered: Tensor,
) -> Effect:
    n_safe = len(bench.safe)
    delta = (steered - base).nan_to_num(0.0, 0.0, 0.0)
    full_kl, full = _mixture(base, delta, 1.0)
    can_spend = float(full_kl[:n_safe].mean()) >= bench.safe_kl_nats
    dose = _dose_at(base[:n_safe], delta[:n_safe], bench.safe_kl_nats) if can_spend else 1.0
    kl, mixed = _mixture(base, delta, dose) if can_spend else (full_kl, full)
    towards = 1.0 if sign == "raise" else -1.0

    def shift(logprobs: Tensor) -> Interval:
        ids, weights = bench.tokens.ids, bench.tokens.weights
        before = refusal_logit(refusal_probability(base[n_safe:], ids, weights))
        after = refusal_logit(refusal_probability(logprobs[n_safe:], ids, weights))
        return mean_interval(towards * (after - before), bench.seed)

    return Effect(
        candidate,
        sign,
        scale,
        dose,
        can_spend,
        mean_interval(kl[:n_safe], bench.seed),
        shift(mixed),
        float(full_kl[:n_safe].mean()),
        shift(full),
    )


def _mixture(base: Tensor, delta: Tensor, dose: float) -> tuple[Tensor, Tensor]:
    """KL(p_t ‖ p0) per row and log p_t, float32: a measurement, not the serving bound."""
    mixed = torch.log_softmax(base + dose * delta, -1)
    reach = torch.where(mixed == -torch.inf, 0.0, mixed - base)
    return (mixed.exp() * reach).sum(-1).clamp_min(0.0), mixed


def _dose_at(base: Tensor, delta: Tensor, nats: float) -> float:
    """The t in (0, 1] at which the mean KL over the rows is `nats`; it rises with t."""
    low, high, t = 0.0, 1.0, 0.5
    for _ in range(12):
        kl = float(_mixture(base, delta, t)[0].mean())
        if abs(kl - nats) <= 0.01 * nats:
            break
        low, high = (t, high) if kl < nats else (low, t)
        # KL is nearly quadratic in t: aim with that, stay inside the bracket.
        aim = t * (nats / kl) ** 0.5 if kl > 0 else high
        t = aim if low < aim < high else 0.5 * (low + high)
    return t
