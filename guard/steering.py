"""Apply a carrier to the residual stream. Pure functions over tensors, no hooks and no I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Carrier", "Steer", "ablate", "add", "affine"]

Steer = Callable[[Tensor], Tensor]
"""(…, d_model) hidden states to steered hidden states of the same shape and type."""


def add(hidden: Tensor, direction: Tensor, strength: float = 1.0) -> Tensor:
    """Return hidden + strength · direction.

    Args:
        hidden: (…, d_model) residual stream.
        direction: (d_model,) in units of the residual stream.
        strength: factor on the direction; 0 returns `hidden` itself.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.4.
    """
    if strength == 0:
        return hidden
    return (hidden.float() + strength * direction.float()).to(hidden.dtype)


def ablate(hidden: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """Return hidden − strength · BᵀB hidden: take out the part that lies in span(B).

    Args:
        hidden: (…, d_model) residual stream.
        basis: (k, d_model), orthonormal rows.
        strength: 1 removes the subspace whole; 0 returns `hidden` itself.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.4.
    """
    if strength == 0:
        return hidden
    wide, rows = hidden.float(), basis.float()
    return (wide - strength * (wide @ rows.T) @ rows).to(hidden.dtype)


def affine(hidden: Tensor, basis: Tensor, target: Tensor, strength: float = 1.0) -> Tensor:
    """Return hidden + strength · Bᵀ(target − B hidden): move the coordinates in span(B) to target.

    Args:
        hidden: (…, d_model) residual stream.
        basis: (k, d_model), orthonormal rows.
        target: (k,) coordinates to reach; strength 1 reaches them, whatever `hidden` was.
        strength: 0 returns `hidden` itself.
    """
    if strength == 0:
        return hidden
    wide, rows = hidden.float(), basis.float()
    return (wide + strength * (target.float() - wide @ rows.T) @ rows).to(hidden.dtype)


@dataclass(frozen=True)
class Carrier:
    """A calibrated refusal carrier: where it acts and what it does there.

    Attributes:
        layer: decoder layer whose input (resid_pre) is steered, from 0.
        kind: "add" (basis[0] added) or "affine" (coordinates in span(basis) moved to `target`).
        basis: (k, d_model) float32; k = 1 for "add".
        target: (k,) float32 for "affine", empty for "add".
    """

    layer: int
    kind: Literal["add", "affine"]
    basis: Tensor
    target: Tensor

    @classmethod
    def additive(cls, layer: int, direction: Tensor) -> Carrier:
        """A carrier that adds `direction` (d_model,) to the input of `layer`."""
        return cls(layer, "add", direction.float().reshape(1, -1).clone(), torch.empty(0))

    def apply(self, hidden: Tensor, strength: float = 1.0) -> Tensor:
        """Steer (…, d_model) hidden states; strength 0 is the identity."""
        if self.kind == "add":
            return add(hidden, self.basis[0].to(hidden.device), strength)
        basis, target = self.basis.to(hidden.device), self.target.to(hidden.device)
        return affine(hidden, basis, target, strength)
