"""Candidate refusal directions. Pure tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guard.steering import Carrier

__all__ = ["Candidate", "category_subspaces", "difference_in_means", "random_directions"]

_MIN_IN_CATEGORY = 4


@dataclass(frozen=True)
class Subspace:
    """A small subspace, and the coordinates in it that refusing and complying prompts have.

    Attributes:
        basis: (k, d_model), orthonormal rows.
        refusing: (k,) mean coordinates of harmful prompts.
        complying: (k,) mean coordinates of harmless prompts.
    """

    basis: Tensor
    refusing: Tensor
    complying: Tensor


@dataclass(frozen=True)
class Candidate:
    """A direction or subspace that might become a carrier.

    Attributes:
        layer: decoder layer whose input it acts on.
        position: prompt position it was read at, from the end (−1 is the last token).
        direction: (d_model,) float32, in units of the residual stream: what is added, or, with a
            subspace, the difference of its two means.
        norm_share: its norm over the mean norm of the residual stream at that place.
        family: how it was found.
        subspace: move the coordinates in it to a mean (saturating) in place of adding.
    """

    layer: int
    position: int
    direction: Tensor
    norm_share: float
    family: str = "difference_in_means"
    subspace: Subspace | None = None

    def carrier(self, scale: float = 1.0) -> Carrier:
        """The carrier at a strength: toward refusal where `scale` > 0, away from it below."""
        if self.subspace is None:
            return Carrier.additive(self.layer, scale * self.direction)
        space = self.subspace
        target = space.refusing if scale >= 0 else space.complying
        # h + s·Bᵀ(c − B h) is an affine move of strength 1 with √s·B and √s·c.
        root = abs(scale) ** 0.5
        return Carrier(self.layer, "affine", root * space.basis, root * target)


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


def category_subspaces(
    harmful: Tensor, categories: Sequence[str], harmless: Tensor, sizes: Sequence[int]
) -> list[Candidate]:
    """Return subspaces spanned by the leading per-category differences, at the last token.

    The rows mean(harmful of a category) − mean(harmless) are decomposed by SVD; the first k right
    singular vectors span the subspace. Each is a candidate as an affine move of the coordinates to
    the mean of harmful (raise) or harmless (lower) prompts; the smallest also additively, as the
    difference in means projected on it.

    Args:
        harmful: (n, n_layers, d_model) resid_pre at the last token.
        categories: n names; those with fewer than `_MIN_IN_CATEGORY` prompts are left out.
        harmless: (m, n_layers, d_model).
        sizes: values of k.

    Returns:
        Up to n_layers · (len(sizes) + 1) candidates; none if there are fewer categories than k.
    """
    names = sorted({c for c in categories if categories.count(c) >= _MIN_IN_CATEGORY})
    if len(names) < max(sizes):
        return []
    rows = [torch.tensor([c == name for c in categories]) for name in names]
    refusing, complying = harmful.float().mean(0), harmless.float().mean(0)
    differences = torch.stack([harmful[r].float().mean(0) for r in rows], 1)
    differences -= complying.unsqueeze(1)  # (n_layers, n_categories, d_model)
    norms = torch.cat([harmful, harmless]).float().norm(dim=-1).mean(0)
    found = []
    for layer, spread in enumerate(differences):
        if float(spread.norm()) <= 1e-4 * float(norms[layer]) * len(names) ** 0.5:
            continue  # as in layer 0, where the last token is the same for every prompt
        vectors = torch.linalg.svd(spread, full_matrices=False).Vh
        for k in sizes:
            basis = vectors[:k].contiguous()
            space = Subspace(basis, basis @ refusing[layer], basis @ complying[layer])
            move = (space.refusing - space.complying) @ basis
            share = float(move.norm() / norms[layer].clamp_min(1e-12))
            found.append(Candidate(layer, -1, move, share, f"subspace_{k}_affine", space))
            if k == min(sizes):
                found.append(Candidate(layer, -1, move, share, f"subspace_{k}_additive"))
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
