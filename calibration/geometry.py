"""Shape of the refusal directions: how many there are in truth, and how stable. Pure tensors.

It explains; it admits nothing. The paper finds that rank and drift alone explain neither
robustness nor over-refusal (arXiv:2604.27019), so carriers are chosen by function.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_rank", "participation_ratio", "principal_angles", "split_half_cosine"]


def effective_rank(rows: Tensor) -> float:
    """exp(H(σ / Σσ)) of (n, d) rows: how many directions carry them.

    Source: Roy & Vetterli 2007, the effective rank.
    """
    sigma = torch.linalg.svdvals(rows.double())
    share = sigma / sigma.sum().clamp_min(1e-300)
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return float(entropy.exp())


def participation_ratio(rows: Tensor) -> float:
    """(Σσ²)² / Σσ⁴ of (n, d) rows."""
    power = torch.linalg.svdvals(rows.double()).square()
    return float(power.sum().square() / power.square().sum().clamp_min(1e-300))


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles in degrees between the row spaces of (k, d) and (m, d), rising, (min(k, m),)."""
    q1 = torch.linalg.qr(first.double().T).Q
    q2 = torch.linalg.qr(second.double().T).Q
    cosines = torch.linalg.svdvals(q1.T @ q2).clamp(-1.0, 1.0)
    return torch.rad2deg(torch.acos(cosines))


def split_half_cosine(harmful: Tensor, harmless: Tensor, seed: int, repeats: int = 10) -> float:
    """Mean cosine between the differences in means of two random halves.

    Args:
        harmful: (n, d_model) hidden states.
        harmless: (m, d_model).
        seed: of the halving.
        repeats: how many halvings are averaged.
    """
    generator = torch.Generator().manual_seed(seed)

    def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(rows), generator=generator)
        middle = len(rows) // 2
        return rows[order[:middle]].float().mean(0), rows[order[middle:]].float().mean(0)

    total = 0.0
    for _ in range(repeats):
        (h1, h2), (b1, b2) = halves(harmful), halves(harmless)
        total += float(torch.cosine_similarity(h1 - b1, h2 - b2, dim=0))
    return total / repeats
