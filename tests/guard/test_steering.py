"""Carriers: strength zero is the identity, addition and affine moves land where they say."""

from __future__ import annotations

import pytest
import torch

from guard.steering import Carrier, ablate, add, affine


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def basis() -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(1)))
    return q.T


def test_strength_zero_returns_the_same_tensor(hidden: torch.Tensor, basis: torch.Tensor) -> None:
    target = torch.zeros(2)
    assert add(hidden, basis[0], 0.0) is hidden
    assert ablate(hidden, basis, 0.0) is hidden
    assert affine(hidden, basis, target, 0.0) is hidden


def test_ablation_leaves_nothing_in_the_subspace(hidden: torch.Tensor, basis: torch.Tensor) -> None:
    left = ablate(hidden, basis)
    assert (left @ basis.T).abs().max() < 1e-5
    other = hidden - (hidden @ basis.T) @ basis
    assert torch.allclose(left, other, atol=1e-5)


def test_an_affine_move_reaches_its_target(hidden: torch.Tensor, basis: torch.Tensor) -> None:
    target = torch.tensor([3.0, -1.0])
    moved = Carrier(2, "affine", basis, target).apply(hidden)
    assert torch.allclose(moved @ basis.T, target.expand(3, 5, 2), atol=1e-5)


def test_an_additive_carrier_adds_its_direction_in_the_input_type(hidden: torch.Tensor) -> None:
    direction = torch.arange(16.0)
    carrier = Carrier.additive(1, direction)
    assert torch.allclose(carrier.apply(hidden, -2.0), hidden - 2.0 * direction)
    assert carrier.apply(hidden.bfloat16()).dtype == torch.bfloat16
