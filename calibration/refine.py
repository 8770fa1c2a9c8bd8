"""Refine a direction by gradient, for what serving does with it.

The model is frozen and teacher-forced: rows are prompts followed by the first tokens of a refusal,
run once by the base pass. Each step sends some of them through the shadow pass, mixes exactly at a
budget, p_t ∝ p0^(1−t)·p1^t with KL(p_t ‖ p0) = min(budget, KL(p1 ‖ p0)), and descends

    raise   −log p_t(the refusal's next token)
    lower   −log(1 − p_t(the refusal's next token))     plus  penalty · KL(p1 ‖ p0) on safe prompts

The gradient passes through t, too: a direction that only spends more is worth nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibration.causal import RefusalTokens, Sign
from calibration.directions import Candidate
from calibration.prompts import Prompt
from calibration.subject import GradientSubject, Subject
from guard.refusal import Verdict, judge
from guard.shadow import BaseStep

__all__ = ["Lessons", "RefineSettings", "mix_at_budget", "refine", "teach"]

_OPENING = 6
_LESSONS = 48
_SAFE = 16
_MIN_LESSONS = 4
_SEARCH_STEPS = 40
_CLOSE = 5e-3
_FLOOR = -60.0


@dataclass(frozen=True)
class Lessons:
    """Rows to learn from, run once by the base pass.

    Attributes:
        step: base pass over all rows, resid_pre of the layers in question kept.
        wanted: (ids, weights) of the refusal's next token, for each of the first rows.
        n_safe: rows behind these on which little is to change.
    """

    step: BaseStep
    wanted: list[tuple[Tensor, Tensor]]
    n_safe: int


@dataclass(frozen=True)
class RefineSettings:
    """How long and how far.

    Attributes:
        steps: of Adam; the direction is handed out after every quarter of them.
        rows_per_step: rows of a step; half as many safe rows are added.
        budget_nats: rows are mixed at budgets drawn anew between a quarter of it and all of it.
        penalty: of the KL on safe prompts, per nat.
        norm_share: the direction's norm is held below this share of the residual stream's.
        learning_rate: as a share of that norm, per step.
    """

    steps: int = 40
    rows_per_step: int = 32
    budget_nats: float = 1.0
    penalty: float = 0.1
    norm_share: float = 0.5
    learning_rate: float = 0.1


def teach(
    subject: Subject,
    heard: Sequence[Prompt],
    responses: Sequence[list[int]],
    tokens: RefusalTokens,
    sign: Sign,
    layers: Sequence[int],
) -> Lessons | None:
    """Run the prompts that are to be answered otherwise, and some that are not, once.

    To raise: harmful prompts that the model answers, each followed by nothing, and by the first
    words of its own most frequent refusal. To lower: benign prompts that it refuses, each followed
    by nothing, and by the first words of its refusal.

    Args:
        subject: the model.
        heard: training prompts.
        responses: the model's own, as token ids.
        tokens: the first tokens of refusals.
        sign: what is to be learned.
        layers: whose resid_pre is kept.

    Returns:
        None if there are too few such prompts.
    """
    refused = [
        judge(subject.decode(r)) in (Verdict.REFUSED, Verdict.PARTIAL) if r else False
        for r in responses
    ]
    openings = Counter(tuple(r[:_OPENING]) for r, no in zip(responses, refused, strict=True) if no)
    if not openings:
        return None
    opening = list(openings.most_common(1)[0][0])
    rows: list[list[int]] = []
    wanted: list[tuple[Tensor, Tensor]] = []
    safe: list[list[int]] = []
    for prompt, response, no in zip(heard, responses, refused, strict=True):
        ids = subject.encode(prompt.text)
        if sign == "raise":
            taught, forced = prompt.label == "harmful" and not no, opening
        else:
            taught, forced = prompt.label == "benign" and no, response[:_OPENING]
        if taught and len(rows) < 2 * _LESSONS:
            rows.append(ids)
            wanted.append((tokens.ids, tokens.weights))
            # One later place each: the whole opening is learned, at two rows a prompt.
            place = 1 + (len(rows) // 2) % max(1, len(forced) - 1)
            if place < len(forced):
                rows.append([*ids, *forced[:place]])
                wanted.append((torch.tensor([forced[place]]), torch.ones(1)))
        elif prompt.label == "benign" and not no:
            safe.append(ids)
    if len(rows) < 2 * _MIN_LESSONS or not safe:
        return None
    every = max(1, len(safe) // (2 * _SAFE))
    safe = safe[::every][: 2 * _SAFE]
    step = subject.prefill([*rows, *safe], layers)
    kept = {layer: hidden[:, -1:].clone() for layer, hidden in step.resid_pre.items()}
    return Lessons(replace(step, resid_pre=kept), wanted, len(safe))


def refine(
    subject: GradientSubject,
    lessons: Lessons,
    start: Candidate,
    sign: Sign,
    settings: RefineSettings,
    seed: int,
) -> Iterator[Candidate]:
    """Yield the direction four times on the way of Adam from `start`: validation stops it early."""
    layer = start.layer
    towards = 1.0 if sign == "raise" else -1.0
    norm = float(lessons.step.last_hidden(layer).float().norm(dim=-1).mean())
    most = settings.norm_share * norm
    origin = towards * start.direction.to(lessons.step.logits.device)
    move = (origin * min(1.0, 0.5 * most / float(origin.norm()))).clone().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    rate = settings.learning_rate * most / move.numel() ** 0.5
    optimizer = torch.optim.Adam([move], lr=rate)
    n = len(lessons.wanted)
    for number in range(1, settings.steps + 1):
        picked = _draw(n, settings.rows_per_step, generator)
        calm = [n + i for i in _draw(lessons.n_safe, settings.rows_per_step // 2, generator)]
        drawn = torch.rand(len(picked), generator=generator)
        budgets = settings.budget_nats * (0.25 + 0.75 * drawn)
        loss = _loss(subject, lessons, layer, move, sign, picked, calm, budgets, settings.penalty)
        (move.grad,) = torch.autograd.grad(loss, [move])  # the model's weights get none
        optimizer.step()
        with torch.no_grad():
            move.mul_(min(1.0, most / float(move.norm())))
        if number % max(1, settings.steps // 4) == 0:
            direction = towards * move.detach().cpu().clone()
            share = float(direction.norm()) / norm
            yield replace(
                start,
                direction=direction,
                norm_share=share,
                family="gradient_refined",
                subspace=None,
            )


def mix_at_budget(base: Tensor, steered: Tensor, budget_nats: Tensor) -> Tensor:
    """Return log p_t with KL(p_t ‖ p0) = min(budget, KL(p1 ‖ p0)), differentiable in `steered`.

    t is found without gradients; one more Newton step, whose value is nearly zero and whose
    gradient is dt/dz = −(∂KL/∂z)/(∂KL/∂t), carries them (implicit differentiation).

    Args:
        base: (n_rows, vocab) log-probabilities.
        steered: (n_rows, vocab) log-probabilities, with gradients.
        budget_nats: (n_rows,), > 0.

    Returns:
        (n_rows, vocab) log-probabilities.
    """
    delta = steered - base
    with torch.no_grad():
        t = _strengths(base, delta, budget_nats)
        _, slope = _kl_and_slope(base, delta, t)
    kl, _ = _kl_and_slope(base, delta, t)
    step = (budget_nats - kl) / slope.clamp_min(1e-6)
    t = torch.where(t < 1.0, t + step - step.detach(), t)
    return torch.log_softmax(base + t.unsqueeze(-1) * delta, -1)


def _loss(
    subject: GradientSubject,
    lessons: Lessons,
    layer: int,
    move: Tensor,
    sign: Sign,
    picked: list[int],
    calm: list[int],
    budgets: Tensor,
    penalty: float,
) -> Tensor:
    rows = [*picked, *calm]
    hidden = lessons.step.last_hidden(layer)[rows].float() + move
    base = _logprobs(lessons.step.logits[rows].float())
    steered = _logprobs(subject.shadow_with_gradient(lessons.step, rows, layer, hidden))
    n = len(picked)
    mixed = mix_at_budget(base[:n], steered[:n], budgets.to(base.device))
    refusals = []
    for row, logprobs in zip(picked, mixed, strict=True):
        ids, weights = lessons.wanted[row]
        refusals.append((logprobs[ids.to(base.device)].exp() * weights.to(base.device)).sum())
    refusal = torch.stack(refusals).clamp(1e-6, 1.0 - 1e-6)
    effect = refusal.log() if sign == "raise" else (1.0 - refusal).log()
    safe_kl = (steered[n:].exp() * (steered[n:] - base[n:])).sum(-1)
    return penalty * safe_kl.mean() - effect.mean()


def _logprobs(logits: Tensor) -> Tensor:
    """Return log softmax with a floor, so that a token that cannot occur (−inf) gives no NaN."""
    return torch.log_softmax(logits, -1).clamp_min(_FLOOR)


def _strengths(base: Tensor, delta: Tensor, budget_nats: Tensor) -> Tensor:
    """(n_rows,): the t ≤ 1 that meets the budget, by Newton on sqrt(KL), kept in its bracket."""
    low, high = torch.zeros_like(budget_nats), torch.ones_like(budget_nats)
    t = high.clone()
    for _ in range(_SEARCH_STEPS):
        kl, slope = _kl_and_slope(base, delta, t)
        fits = kl <= budget_nats
        low, high = torch.where(fits, t, low), torch.where(fits, high, t)
        if bool(((kl / budget_nats - 1.0).abs() < _CLOSE).logical_or(low >= 1.0).all()):
            break
        root = kl.clamp_min(0.0).sqrt()
        aim = t + (budget_nats.sqrt() - root) * 2.0 * root / slope.clamp_min(1e-12)
        t = torch.where((aim > low) & (aim < high), aim, 0.5 * (low + high))
    return torch.where(low >= 1.0, low, t)


def _kl_and_slope(base: Tensor, delta: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p_t ‖ p0) and its derivative t·Var[Δ], (n_rows,) each."""
    mixed = torch.log_softmax(base + t.unsqueeze(-1) * delta, -1)
    weight = mixed.exp()
    mean = (weight * delta).sum(-1)
    variance = (weight * delta.square()).sum(-1) - mean.square()
    return (weight * (mixed - base)).sum(-1), t * variance.clamp_min(0.0)


def _draw(n: int, most: int, generator: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(n, generator=generator)[:most].tolist()
    return order
