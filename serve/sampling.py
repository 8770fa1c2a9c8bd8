"""Sampling one response, in the same steps and from the same random stream as `model.generate`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from serve.engine import SamplingOptions

__all__ = ["Sampler"]

_GREEDY_BELOW = 1e-5  # float32 logits divided by less would overflow


class Sampler:
    """Draws the tokens of one response.

    Args:
        options: of the request.
        device: on which logits lie, and the request's own random generator.

    Attributes:
        greedy: the most likely token is taken.
        temperature: at which KL is measured and logprobs are given; 1 for greedy decoding.
    """

    def __init__(self, options: SamplingOptions, device: torch.device) -> None:
        self.greedy = options.temperature < _GREEDY_BELOW
        self.temperature = 1.0 if self.greedy else float(options.temperature)
        self._generator = torch.Generator(device)
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed % 2**64)
        self._warpers = [] if self.greedy else list(_warpers(options))

    def draw(self, logits: Tensor) -> int:
        """Return a token.

        Args:
            logits: (vocab,) float32, before temperature.
        """
        if self.greedy:
            return int(logits.argmax())
        scores = logits.unsqueeze(0)
        for warper in self._warpers:
            scores = warper(None, scores)
        probs = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probs, 1, generator=self._generator))


def _warpers(
    options: SamplingOptions,
) -> list[TemperatureLogitsWarper | TopKLogitsWarper | TopPLogitsWarper]:
    """The warpers that `model.generate` would use, in its order."""
    warpers: list[TemperatureLogitsWarper | TopKLogitsWarper | TopPLogitsWarper] = []
    if options.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        warpers.append(TopPLogitsWarper(options.top_p))
    return warpers
