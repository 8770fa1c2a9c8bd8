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

__all__ = ["gate_places", "read_gates"]


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


def read_gates(
    artifact: CarrierArtifact, step: BaseStep, prompts: Sequence[Sequence[int]]
) -> list[GateReading]:
    """Return score and refusal probability of every row.

    Args:
        artifact: the guard.
        step: base pass over the ends of the prompts, padded on the left, with resid_pre of
            `artifact.manifest.gate.layers`.
        prompts: n_rows lists of token ids, template included, without padding.
    """
    gate = artifact.manifest.gate
    places = [gate_places(artifact, ids) for ids in prompts]
    from_end = [
        tuple([place - len(ids) for place in some] for some in both)
        for both, ids in zip(places, prompts, strict=True)
    ]
    hidden = step.resid_pre[gate.layer]
    scores = pooled_scores(hidden, [f[0] for f in from_end], artifact.probe_weight) + gate.bias
    if gate.message is not None and artifact.message_weight is not None:
        hidden = step.resid_pre[gate.message.layer]
        scores = scores + pooled_scores(hidden, [f[1] for f in from_end], artifact.message_weight)
    device = step.logits.device
    refusals = refusal_probability(
        step.logits,
        artifact.refusal_token_ids.to(device),
        artifact.refusal_token_weights.to(device),
    )
    pairs = zip(scores.tolist(), refusals.tolist(), strict=True)
    return [GateReading(score, refusal) for score, refusal in pairs]
