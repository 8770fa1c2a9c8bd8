"""Directions: a planted one is found, where nothing differs none is, and controls match in norm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.directions import category_subspaces, difference_in_means, random_directions

N_LAYERS, N_POSITIONS, D_MODEL = 3, 2, 48
PLANTED = (1, 0)  # layer, position


def states(seed: int, n: int, planted: Tensor | None = None) -> Tensor:
    """(n, n_layers, n_positions, d_model) of noise, `planted` added at one place."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, N_LAYERS, N_POSITIONS, D_MODEL, generator=generator)
    if planted is not None:
        hidden[:, PLANTED[0], PLANTED[1]] += planted
    return hidden


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(3.0, 20.0))
def test_a_planted_direction_is_recovered(seed: int, strength: float) -> None:
    axis = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed + 5000))
    planted = strength * axis / axis.norm()
    found = difference_in_means(states(seed, 400, planted), states(seed + 1, 400))
    strongest = max(found, key=lambda c: float(c.direction.norm()))
    assert (strongest.layer, strongest.position) == (PLANTED[0], PLANTED[1] - N_POSITIONS)
    assert float(torch.cosine_similarity(strongest.direction, planted, dim=0)) > 0.9
    # Every coordinate is a mean over 400: three numbers in a thousand are off by 0.21.
    assert float((strongest.direction - planted).abs().max()) < 0.4


def test_the_direction_points_from_harmless_to_harmful_and_not_back() -> None:
    planted = torch.zeros(D_MODEL)
    planted[7] = 5.0
    harmful, harmless = states(0, 200, planted), states(1, 200)
    there = difference_in_means(harmful, harmless)
    back = difference_in_means(harmless, harmful)
    for one, other in zip(there, back, strict=True):
        torch.testing.assert_close(one.direction, -other.direction)
    assert max(float(c.direction[7]) for c in there) > 4.0


def test_a_place_where_all_prompts_are_equal_gives_no_candidate() -> None:
    harmful, harmless = states(0, 50), states(1, 50)
    harmful[:, 0] = harmless[:, 0] = torch.randn(D_MODEL)
    found = difference_in_means(harmful, harmless)
    assert {c.layer for c in found} == {1, 2}
    assert len(found) == 2 * N_POSITIONS


def test_the_norm_share_is_the_norm_over_the_mean_norm_of_the_stream() -> None:
    harmful = torch.zeros(10, 1, 1, 4)
    harmful[..., 0] = 3.0
    harmless = torch.zeros(10, 1, 1, 4)
    harmless[..., 0] = 1.0
    (found,) = difference_in_means(harmful, harmless)
    assert found.norm_share == pytest.approx(2.0 / 2.0)
    assert found.position == -1


def test_half_precision_states_are_averaged_in_float32() -> None:
    # In bfloat16 a sum of 4000 ones stops at 256.
    harmful = torch.ones(4000, 1, 1, 2, dtype=torch.bfloat16)
    harmless = torch.zeros(4000, 1, 1, 2, dtype=torch.bfloat16)
    (found,) = difference_in_means(harmful, harmless)
    assert found.direction.dtype is torch.float32
    torch.testing.assert_close(found.direction, torch.ones(2))


@given(st.integers(1, 40), st.integers(2, 64), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_random_directions_have_the_norm_of_what_they_control(
    n: int, d_model: int, norm: float, seed: int
) -> None:
    like = torch.full((d_model,), norm / d_model**0.5)
    rows = random_directions(like, n, seed)
    assert rows.shape == (n, d_model)
    torch.testing.assert_close(rows.norm(dim=1), like.norm().expand(n), rtol=1e-4, atol=0.0)
    assert torch.equal(rows, random_directions(like, n, seed))
    assert not torch.equal(rows, random_directions(like, n, seed + 1))


def test_random_directions_prefer_no_side() -> None:
    like = torch.zeros(64)
    like[0] = 1.0
    rows = random_directions(like, 4000, 0)
    # A mean of 4000 coordinates of variance 1/64 has a deviation of 0.002.
    assert float(rows.mean(0).abs().max()) < 0.01
    assert float(rows.square().mean(0).max()) < 1.25 / 64


def test_a_candidate_becomes_a_carrier_that_adds_it_scaled() -> None:
    (found,) = difference_in_means(torch.ones(4, 1, 1, 3), torch.zeros(4, 1, 1, 3))
    carrier = found.carrier(-2.0)
    torch.testing.assert_close(carrier.apply(torch.zeros(2, 3)), torch.full((2, 3), -2.0))
    assert carrier.layer == 0


def test_a_planted_subspace_is_recovered_and_moves_states_to_the_class_means() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(D_MODEL, 2, generator=generator)).Q.T
    names = [f"category {i % 6}" for i in range(600)]
    weights = torch.randn(6, 2, generator=generator) + torch.tensor([4.0, 0.0])
    harmful = torch.randn(600, 1, D_MODEL, generator=generator)
    harmful[:, 0] += 3.0 * torch.stack([weights[i % 6] for i in range(600)]) @ axes
    harmless = torch.randn(600, 1, D_MODEL, generator=generator)

    found = category_subspaces(harmful, names, harmless, [2])
    assert [c.family for c in found] == ["subspace_2_affine", "subspace_2_additive"]
    affine, additive = found
    assert affine.subspace is not None
    basis = affine.subspace.basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(2), atol=1e-5, rtol=0.0)
    inside = (axes @ basis.T).norm(dim=1)  # how much of each planted axis lies in the span
    assert float(inside.min()) > 0.97

    hidden = harmless[:5, 0]
    raised, lowered = affine.carrier(1.0).apply(hidden), affine.carrier(-1.0).apply(hidden)
    means = [harmful[:, 0].mean(0), harmless[:, 0].mean(0)]
    for moved, mean in zip((raised, lowered), means, strict=True):
        torch.testing.assert_close(moved @ basis.T, (mean @ basis.T).expand(5, 2))
    half = affine.carrier(0.5).apply(hidden) @ basis.T
    torch.testing.assert_close(half, 0.5 * (hidden @ basis.T + raised @ basis.T))
    assert additive.carrier().kind == "add"
    torch.testing.assert_close(additive.direction, (means[0] - means[1]) @ basis.T @ basis)


def test_categories_too_few_for_the_subspace_give_none() -> None:
    harmful, harmless = torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    assert category_subspaces(harmful, ["only"] * 20, harmless, [2, 4]) == []
