"""Read the gate from a base pass over prompts: one function for serving and calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from guard.artifact import CarrierArtifact
from guard.gate import (
    GateReading,
    gate_positions,
    message_positions,
    refusal_probability,
)
from guard.probe import pool_message, probe_scores, project
from guard.shadow import BaseStep

__all__ = ["gate_places", "gate_scores", "padded", "read_gates", "refusal_probs"]


def gate_places(
    artifact: CarrierArtifact, prompt_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the indices of the template's and the message's tokens that the gate reads.

    Args:
        artifact: the guard.
        prompt_ids: (n_tokens,), template included, without padding.

    Returns:
        Two lists; the second is empty where the message is not read.
    """
    gate = artifact.manifest.gate
    places = gate_positions(prompt_ids, gate.instruction_suffix_ids, gate.n_pooled)
    message = gate.message
    if message is None:
        return places, []
    return places, message_positions(
        prompt_ids, message.suffix_ids, message.opening_ids, message.width
    )


def gate_scores(
    artifact: CarrierArtifact, step: BaseStep, prompts: Sequence[Sequence[int]]
) -> list[float]:
    """Return the score of every prompt.

    Args:
        artifact: the guard.
        step: base pass over the ends of the prompts, padded on the left, with resid_pre of
            `artifact.manifest.gate.layers`.
        prompts: n_rows lists of token ids, template included, without padding.
    """
    gate = artifact.manifest.gate
    probe = artifact.probe.map(lambda weight: weight.to(step.logits.device))
    found = [gate_places(artifact, ids) for ids in prompts]
    first, second = [places for places, _ in found], [places for _, places in found]
    ends = [[place - len(ids) for place in p] for p, ids in zip(first, prompts, strict=True)]
    template = project(_at(step.resid_pre[gate.layer], ends), probe.template).mean(1)
    message = None
    if gate.message is not None and probe.message is not None:
        # As wide for every prompt: a sum's rounding must not depend on what is read beside it.
        places, present = padded(second, gate.message.width)
        ends = [[p - len(ids) for p in row] for row, ids in zip(places, prompts, strict=True)]
        # Projected before they are laid out: what is padding then has a few numbers, no stream.
        reach = -min(map(min, ends))
        hidden = step.resid_pre[gate.message.layer]
        projected = _at(project(hidden[:, -reach:], probe.message), ends)
        there = torch.tensor(present, device=projected.device)
        message = pool_message(projected, there, gate.message.n_heads)
    numbers: list[float] = probe_scores(probe, template, message).tolist()
    return numbers


def padded(places: Sequence[Sequence[int]], width: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Return lists of one length, which repeat their first entry, and which entries count.

    Args:
        places: lists of at least one and at most `width` entries.
        width: of the lists returned.
    """
    filled = [[*p, *[p[0]] * (width - len(p))] for p in places]
    present = [[True] * len(p) + [False] * (width - len(p)) for p in places]
    return filled, present


def _at(hidden: Tensor, ends: Sequence[Sequence[int]]) -> Tensor:
    """(n, n_places, d_model): tokens of each row, counted from its end."""
    rows = torch.arange(len(ends), device=hidden.device).unsqueeze(1)
    return hidden[rows, torch.tensor(ends, device=hidden.device)]


def refusal_probs(artifact: CarrierArtifact, step: BaseStep) -> list[float]:
    """Return the base model's chance to open with a refusal at the next token of each row."""
    device = step.logits.device
    numbers: list[float] = refusal_probability(
        step.logits,
        artifact.refusal_token_ids.to(device),
        artifact.refusal_token_weights.to(device),
    ).tolist()
    return numbers


def read_gates(
    artifact: CarrierArtifact, step: BaseStep, prompts: Sequence[Sequence[int]]
) -> list[GateReading]:
    """Return score and refusal probability of every row; arguments as for `gate_scores`."""
    pairs = zip(gate_scores(artifact, step, prompts), refusal_probs(artifact, step), strict=True)
    return [GateReading(score, refusal) for score, refusal in pairs]
