"""Geometry of subspaces where the right answer is known by construction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibration.geometry import (
    effective_rank,
    participation_ratio,
    principal_angles,
    split_half_cosine,
)


def orthonormal(k: int, d: int, seed: int) -> Tensor:
    """(k, d) orthonormal rows."""
    noise = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(noise).Q.T
    return rows


@given(st.integers(1, 8), st.integers(0, 99), st.floats(1e-3, 1e3))
def test_k_equal_orthogonal_rows_have_rank_k(k: int, seed: int, length: float) -> None:
    rows = length * orthonormal(k, 12, seed)
    assert effective_rank(rows) == pytest.approx(k, rel=1e-6)
    assert participation_ratio(rows) == pytest.approx(k, rel=1e-6)


@given(st.integers(1, 30), st.integers(0, 99))
def test_many_copies_of_one_row_have_rank_one(copies: int, seed: int) -> None:
    rows = orthonormal(1, 12, seed).expand(copies, -1)
    assert effective_rank(rows) == pytest.approx(1.0, abs=1e-5)
    assert participation_ratio(rows) == pytest.approx(1.0, abs=1e-5)


@given(st.integers(2, 6), st.integers(2, 9), st.integers(0, 99))
def test_ranks_lie_between_one_and_the_number_of_rows(n: int, d: int, seed: int) -> None:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    most = min(n, d) + 1e-6
    assert 1.0 - 1e-6 <= participation_ratio(rows) <= most
    assert 1.0 - 1e-6 <= effective_rank(rows) <= most


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    rows = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(rows) == pytest.approx(math.exp(entropy))
    assert participation_ratio(rows) == pytest.approx((9 + 1) ** 2 / (81 + 1))


@given(st.integers(0, 99), st.floats(1.0, 89.0), st.floats(1.0, 89.0))
def test_principal_angles_are_the_angles_of_the_rotation(
    seed: int, first: float, second: float
) -> None:
    frame = orthonormal(4, 10, seed)
    radians = torch.deg2rad(torch.tensor([first, second], dtype=torch.float64))
    rotated = radians.cos()[:, None] * frame[:2] + radians.sin()[:, None] * frame[2:]
    mixing = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)  # another basis
    angles = principal_angles(frame[:2], mixing @ rotated)
    expected = torch.tensor(sorted([first, second]), dtype=torch.float64)
    torch.testing.assert_close(angles, expected, rtol=0.0, atol=1e-4)


def test_a_space_makes_no_angle_with_itself_and_a_right_one_with_its_complement() -> None:
    frame = orthonormal(4, 10, 1)
    turned = torch.tensor([[0.0, 1.0], [5.0, 2.0]], dtype=torch.float64) @ frame[:2]
    assert float(principal_angles(frame[:2], turned).max()) < 1e-4
    assert float(principal_angles(frame[:2], frame[2:]).min()) > 90 - 1e-4
    assert principal_angles(frame[:1], frame).shape == (1,)


def test_split_halves_of_a_strong_signal_agree_and_of_noise_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    harmless = torch.randn(200, 64, generator=generator)
    noise = torch.randn(200, 64, generator=generator)
    signal = noise + 3.0
    assert split_half_cosine(signal, harmless, seed=0) > 0.99
    assert abs(split_half_cosine(noise, harmless, seed=0)) < 0.3
    assert split_half_cosine(signal, harmless, 5) == split_half_cosine(signal, harmless, 5)
