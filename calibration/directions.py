"""Candidate refusal directions. Pure tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guard.steering import Carrier

__all__ = ["Candidate", "difference_in_means", "random_directions"]


@dataclass(frozen=True)
class Candidate:
    """A direction that might become a carrier.

    Attributes:
        layer: decoder layer whose input it is added to.
        position: prompt position it was read at, from the end (−1 is the last token).
        direction: (d_model,) float32, in units of the residual stream.
        norm_share: its norm over the mean norm of the residual stream at that place.
        family: how it was found.
    """

    layer: int
    position: int
    direction: Tensor
    norm_share: float
    family: str = "difference_in_means"

    def carrier(self, scale: float = 1.0) -> Carrier:
        """The carrier that adds `scale` times the direction."""
        return Carrier.additive(self.layer, scale * self.direction)


def difference_in_means(harmful: Tensor, harmless: Tensor) -> list[Candidate]:
    """Return mean(harmful) − mean(harmless) at every layer and post-instruction position.

    Args:
        harmful: (n, n_layers, n_positions, d_model) resid_pre, positions counted to the last token.
        harmless: (m, n_layers, n_positions, d_model).

    Returns:
        n_layers · n_positions candidates less those that vanish (as in layer 0, where the template
        tokens are the same for every prompt).

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """
    difference = harmful.float().mean(0) - harmless.float().mean(0)
    norms = torch.cat([harmful, harmless]).float().norm(dim=-1).mean(0)
    n_layers, n_positions, _ = difference.shape
    found = []
    for layer in range(n_layers):
        for position in range(n_positions):
            direction = difference[layer, position]
            share = float(direction.norm() / norms[layer, position].clamp_min(1e-12))
            if share > 1e-4:
                found.append(Candidate(layer, position - n_positions, direction.clone(), share))
    return found


def random_directions(like: Tensor, n: int, seed: int) -> Tensor:
    """Return n isotropic random directions with the norm of `like`.

    Args:
        like: (d_model,) direction to be matched in norm.
        n: how many.
        seed: of the generator.

    Returns:
        (n, d_model) float32.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, like.numel(), generator=generator)
    found: Tensor = noise * (like.norm().cpu() / noise.norm(dim=1, keepdim=True))
    return found
