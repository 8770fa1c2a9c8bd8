"""What a carrier costs safe prompts beyond the first token, held to the base model's own words.

Candidates are compared on first tokens, which is cheap. Here the chosen carriers meet whole
openings: teacher-forced on what the base model says, each token's KL(p_t ‖ p0) is measured at the
dose at which the carrier was admitted, and once with the carrier ablated instead of added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calibration.causal import Sign, tilt
from calibration.choose import Choice
from calibration.statistics import bootstrap_bounds
from calibration.subject import Subject
from guard.artifact import Interval
from guard.steering import ablate

__all__ = ["safe_kl"]


def safe_kl(
    subject: Subject,
    chosen: Mapping[Sign, Choice],
    groups: Mapping[str, Sequence[str]],
    n_tokens: int,
    batch_size: int,
    seed: int,
) -> dict[Sign, dict[str, Interval]]:
    """Measure KL on safe prompts over the first tokens of the base model's responses.

    Args:
        subject: the model.
        chosen: carriers with the doses at which they were admitted.
        groups: name → texts of benign prompts.
        n_tokens: tokens of a response that are read; shorter responses end earlier.
        batch_size: rows that are run together.
        seed: of the bootstrap, which draws prompts.

    Returns:
        sign → name → nats: `{added,ablated}_kl_{mean,p95}_of_{group}`, with one-sided 95 % bounds
        below and above; n counts prompts.
    """
    found: dict[Sign, dict[str, Interval]] = {sign: {} for sign in chosen}
    layers = sorted({choice.effect.candidate.layer for choice in chosen.values()})
    for group, texts in groups.items():
        prompts, rows = _forced(subject, texts, n_tokens, batch_size)
        nats: dict[tuple[Sign, str], list[Tensor]] = {}
        for start in range(0, len(rows), batch_size):
            part = [prompts[i] + tail for i, tail in rows[start : start + batch_size]]
            step = subject.prefill(part, layers)
            base = torch.log_softmax(step.logits.float(), -1)
            for sign, choice in chosen.items():
                for how, steered, dose in _moves(
                    choice, step.last_hidden(choice.effect.candidate.layer).float(), sign
                ):
                    layer = choice.effect.candidate.layer
                    logits = subject.shadow(step, range(len(part)), layer, steered)
                    delta = (torch.log_softmax(logits, -1) - base).nan_to_num(0.0, 0.0, 0.0)
                    kl = tilt(base, delta, dose).kl_nats.cpu()
                    nats.setdefault((sign, how), []).append(kl)
        owners = torch.tensor([i for i, _ in rows])
        for (sign, how), values in nats.items():
            for name, of in (("mean", torch.mean), ("p95", _p95)):
                found[sign][f"{how}_kl_{name}_of_{group}"] = bootstrap_bounds(
                    torch.cat(values), owners, of, seed
                )
    return found


def _forced(
    subject: Subject, texts: Sequence[str], n_tokens: int, batch_size: int
) -> tuple[list[list[int]], list[tuple[int, list[int]]]]:
    """Prompts, and (prompt, what the model has said so far) for each token that it says next."""
    prompts = [subject.encode(text) for text in texts]
    rows = []
    for start in range(0, len(prompts), batch_size):
        responses = subject.respond(prompts[start : start + batch_size], n_tokens)
        for i, response in enumerate(responses, start):
            rows += [(i, response[:said]) for said in range(max(1, len(response)))]
    return prompts, rows


def _moves(choice: Choice, hidden: Tensor, sign: Sign) -> list[tuple[str, Tensor, float]]:
    """How, (n_rows, d_model) steered, and the mixing strength."""
    effect = choice.effect
    scale = effect.scale if sign == "raise" else -effect.scale
    added = effect.candidate.carrier(scale).apply(hidden)
    direction = effect.candidate.direction.to(hidden.device)
    ablated = ablate(hidden, (direction / direction.norm()).unsqueeze(0))
    return [("added", added, effect.dose), ("ablated", ablated, 1.0)]


def _p95(values: Tensor) -> Tensor:
    return values.quantile(0.95)
