"""Proof that the guard works on this very setup: the shadow pass is exact, and carriers act.

Two short prompts, one left-padded, run through prefill and one decoding step. At each carrier's
layer a pass that steers nothing must reproduce the base logits up to rounding, and the carrier at
full strength must move them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from guard.artifact import CarrierArtifact
from guard.errors import NotArmedError, NumericsError
from guard.probe import pool_message, probe_scores, project
from guard.shadow import BaseStep, ShadowModel
from guard.steering import Carrier

__all__ = ["CanaryReading", "check_reading", "compare", "run_canary"]

# In standard deviations of the base logits over the vocabulary. Rounding: at most 2e-5 logits of
# deviation 2.5 in float32 (Qwen2.5 0.5B, CPU), up to 0.2 in bfloat16 where a kernel depends on the
# number of rows. A pass at a position that is off by one is away by 0.12 to 0.6.
_EXACT = 4e-4
_EXACT_HALF = 0.1


@dataclass(frozen=True)
class CanaryReading:
    """What one carrier showed.

    Attributes:
        carrier: "raise" or "lower".
        layer: where it acts.
        gap: largest |logit(nothing steered) − base logit|, in standard deviations of the latter.
        tolerance: what `gap` may be.
        change: largest |logit(steered) − base logit|, in the same unit.
    """

    carrier: str
    layer: int
    gap: float
    tolerance: float
    change: float


@torch.inference_mode()
def run_canary(
    model: ShadowModel, artifact: CarrierArtifact, prompt: Sequence[int]
) -> list[CanaryReading]:
    """Return what each carrier showed; it returns only if the guard works.

    Args:
        model: with its base and shadow passes.
        artifact: the guard.
        prompt: token ids of any short conversation, at least two.

    Raises:
        NotArmedError: it does not work here; the message says what was seen.
        UnsupportedModelError: this model's cache allows no exact shadow pass.
    """
    carriers = {"raise": artifact.raise_carrier, "lower": artifact.lower_carrier}
    present = {name: carrier for name, carrier in carriers.items() if carrier is not None}
    for layer in artifact.manifest.gate.layers:
        if layer >= model.n_layers:
            raise NotArmedError(f"the gate reads layer {layer} of a {model.n_layers}-layer model")
    capture = artifact.layers
    readings = []
    try:
        for step in _prefill_and_decode(model, prompt, capture):
            _check_gate(artifact, step)
            readings = [_try_carrier(model, step, *item) for item in present.items()]
            for reading in readings:
                check_reading(reading)
    except NumericsError as error:
        raise NotArmedError(f"guard {artifact.artifact_id} fails its canary: {error}") from error
    return readings


def _prefill_and_decode(
    model: ShadowModel, prompt: Sequence[int], capture: Sequence[int]
) -> Iterator[BaseStep]:
    """A prefill of the prompt and of its second half, and the decoding step after it."""
    skip = len(prompt) // 2
    ids = torch.tensor([list(prompt), [0] * skip + list(prompt[skip:])], device=model.device)
    mask = torch.ones_like(ids)
    mask[1, :skip] = 0
    cache = DynamicCache(config=model.model.config)
    step = model.base(ids, mask, cache, capture)
    yield step
    mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    yield model.base(step.logits.argmax(-1, keepdim=True), mask, cache, capture)


def _check_gate(artifact: CarrierArtifact, step: BaseStep) -> None:
    gate, n_rows = artifact.manifest.gate, len(step.logits)
    probe = artifact.probe.map(lambda weight: weight.to(step.logits.device))
    template = project(step.last_hidden(gate.layer), probe.template)
    message = None
    if gate.message is not None and probe.message is not None:
        projected = project(step.last_hidden(gate.message.layer), probe.message).unsqueeze(1)
        there = torch.ones(n_rows, 1, dtype=torch.bool, device=projected.device)
        message = pool_message(projected, there, gate.message.n_heads)
    if not bool(torch.isfinite(probe_scores(probe, template, message)).all()):
        raise NumericsError("the gate's score is not finite")


def _try_carrier(model: ShadowModel, step: BaseStep, name: str, carrier: Carrier) -> CanaryReading:
    rows = [0, 1]
    unsteered = model.replay(step, rows, carrier.layer)
    hidden = carrier.apply(step.last_hidden(carrier.layer).float())
    steered = model.shadow(step, rows, carrier.layer, hidden)
    return compare(name, carrier.layer, step.logits, unsteered, steered)


def compare(
    name: str, layer: int, logits: Tensor, unsteered: Tensor, steered: Tensor
) -> CanaryReading:
    """Return how far two shadow passes are from the base pass.

    Args:
        name: of the carrier.
        layer: where it acts.
        logits: (n_rows, vocab) of the base pass, in the model's type.
        unsteered: (n_rows, vocab) of a shadow pass that steers nothing, on its own.
        steered: (n_rows, vocab) with the carrier at full strength.
    """
    base = logits.float()
    unit = float(base[torch.isfinite(base)].std())
    return CanaryReading(
        carrier=name,
        layer=layer,
        gap=_largest_difference(unsteered.float(), base) / unit,
        tolerance=_EXACT if logits.dtype in (torch.float32, torch.float64) else _EXACT_HALF,
        change=_largest_difference(steered.float(), base) / unit,
    )


def _largest_difference(logits: Tensor, base: Tensor) -> float:
    same = logits == base  # −inf for tokens that cannot occur
    return float(torch.where(same, 0.0, (logits - base).abs()).max())


def check_reading(reading: CanaryReading) -> None:
    """Refuse a setup on which the guard does not work.

    Raises:
        NotArmedError: the message says what was seen.
    """
    where = f"the {reading.carrier} carrier at layer {reading.layer}"
    if not reading.gap <= reading.tolerance:
        raise NotArmedError(
            f"a shadow pass without {where} does not reproduce the base logits: off by"
            f" {reading.gap:.2g} standard deviations, at most {reading.tolerance:.2g} is rounding."
            " Something in this model depends on more than its inputs and its KV cache"
        )
    if not reading.change > _EXACT:
        raise NotArmedError(
            f"{where} changes nothing: {reading.change:.2g} standard deviations at full strength;"
            " re-run `trimtab calibrate`"
        )
