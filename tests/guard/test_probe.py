"""The gate's probe: attention over the message, the template's mean, and what does not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard.probe import Probe, linear_probe, pool_message, probe_scores, project

D_MODEL, N_HEADS, N_VALUES = 8, 2, 3


def random_probe(seed: int = 0, n_hidden: int = 4) -> Probe:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    n_features = N_HEADS * N_VALUES + 2
    return Probe(
        template=random(2, D_MODEL),
        out=random((n_hidden or n_features) + 1),
        message=random(N_HEADS + N_VALUES, D_MODEL),
        n_heads=N_HEADS,
        hidden=random(n_hidden, n_features + 1) if n_hidden else None,
    )


def test_a_linear_probe_is_a_dot_product_and_a_bias() -> None:
    hidden = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    probe = linear_probe(torch.tensor([2.0, 1.0]), -1.0)
    assert probe_scores(probe, project(hidden, probe.template), None).tolist() == [3.0, -2.0]


def test_heads_that_ask_for_nothing_take_the_mean() -> None:
    values = torch.tensor([[[0.0, 1.0], [0.0, 3.0], [0.0, 99.0]]])
    present = torch.tensor([[True, True, False]])
    assert pool_message(values, present, 1).tolist() == [[2.0]]


def test_a_head_turns_to_the_token_that_answers_its_query() -> None:
    projected = torch.tensor([[[0.0, 50.0, 1.0], [50.0, 0.0, 7.0], [0.0, 0.0, 5.0]]])
    found = pool_message(projected, torch.ones(1, 3, dtype=torch.bool), 2)
    assert found.tolist() == [[pytest.approx(7.0), pytest.approx(1.0)]]


@given(st.integers(0, 100), st.integers(1, 6), st.integers(0, 5))
def test_padding_of_any_kind_and_width_changes_nothing(seed: int, n: int, more: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(1, n, N_HEADS + N_VALUES, generator=generator)
    wide = torch.cat([projected, torch.full((1, more, N_HEADS + N_VALUES), torch.nan)], 1)
    present = torch.arange(n + more).unsqueeze(0) < n
    alone = pool_message(projected, torch.ones(1, n, dtype=torch.bool), N_HEADS)
    torch.testing.assert_close(pool_message(wide, present, N_HEADS), alone)


@given(st.integers(0, 100))
def test_scores_are_the_formula_written_out(seed: int) -> None:
    probe = random_probe(seed)
    assert probe.message is not None
    assert probe.hidden is not None
    generator = torch.Generator().manual_seed(seed + 1)
    message = torch.randn(5, D_MODEL, generator=generator)
    template = torch.randn(3, D_MODEL, generator=generator)
    query, value = probe.message[:N_HEADS], probe.message[N_HEADS:]
    heads = [((message @ q).softmax(0) @ message) @ value.T for q in query]
    features = torch.cat([*heads, template.mean(0) @ probe.template.T, torch.ones(1)])
    hidden = torch.nn.functional.gelu(probe.hidden @ features)
    expected = probe.out @ torch.cat([hidden, torch.ones(1)])
    pooled = pool_message(
        project(message, probe.message).unsqueeze(0), torch.ones(1, 5, dtype=torch.bool), N_HEADS
    )
    read = project(template, probe.template).mean(0, keepdim=True)
    torch.testing.assert_close(probe_scores(probe, read, pooled), expected.unsqueeze(0))


def test_a_token_that_is_not_finite_makes_the_score_so() -> None:
    probe = random_probe()
    assert probe.message is not None
    message = torch.zeros(1, 2, N_HEADS + N_VALUES)
    message[0, 1] = torch.nan
    pooled = pool_message(message, torch.ones(1, 2, dtype=torch.bool), N_HEADS)
    assert bool(probe_scores(probe, torch.zeros(1, 2), pooled).isnan().all())


@pytest.mark.parametrize("n_hidden", [0, 4])
def test_a_probe_that_fits_together_has_no_fault(n_hidden: int) -> None:
    assert random_probe(n_hidden=n_hidden).fault(D_MODEL) is None
    assert linear_probe(torch.ones(D_MODEL)).fault(D_MODEL) is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"template": torch.zeros(D_MODEL)}, "probe.template: .8,., expected"),
        ({"template": torch.zeros(2, 9)}, "probe.template: .2, 9., expected"),
        ({"message": None}, "probe.message: absent, expected one for 2 heads"),
        ({"message": torch.zeros(2, D_MODEL)}, "probe.message: .2, 8., expected"),
        ({"message": torch.zeros(5, 9)}, "probe.message: .5, 9., expected"),
        ({"n_heads": 0}, "probe.message: .5, 8., expected"),
        ({"hidden": torch.zeros(4, 8)}, "probe.hidden: .4, 8., expected .n_hidden, 9."),
        ({"hidden": None}, "probe.out: .5,., expected .9,."),
        ({"out": torch.zeros(4)}, "probe.out: .4,., expected .5,."),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], fault: str) -> None:
    found = replace(random_probe(), **change).fault(D_MODEL)  # type: ignore[arg-type]
    assert found is not None
    assert re.search(fault, found)
