"""Read the gate from a base pass over prompts: one function for serving and calibration."""

from __future__ import annotations

from collections.abc import Sequence

from guard.artifact import CarrierArtifact
from guard.gate import (
    GateReading,
    gate_positions,
    message_positions,
    pooled_scores,
    refusal_probability,
)
from guard.shadow import BaseStep

__all__ = ["gate_places", "gate_scores", "read_gates", "refusal_probs"]


def gate_places(
    artifact: CarrierArtifact, prompt_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the token indices that the gate's probe, and its second one, average over.

    Args:
        artifact: the guard.
        prompt_ids: (n_tokens,), template included, without padding.

    Returns:
        Two lists; the second is empty where there is no second probe.
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
    first: list[list[int]] = []
    second: list[list[int]] = []
    for ids in prompts:
        for found, places in zip((first, second), gate_places(artifact, ids), strict=True):
            found.append([place - len(ids) for place in places])
    scores = pooled_scores(step.resid_pre[gate.layer], first, artifact.probe_weight) + gate.bias
    if gate.message is not None and artifact.message_weight is not None:
        hidden = step.resid_pre[gate.message.layer]
        scores = scores + pooled_scores(hidden, second, artifact.message_weight)
    numbers: list[float] = scores.tolist()
    return numbers


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
