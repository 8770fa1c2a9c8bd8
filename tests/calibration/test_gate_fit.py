"""The gate's fit: the scaler is folded in exactly, and thresholds keep what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from calibration.gate_fit import (
    Labelled,
    Probe,
    Read,
    _balanced,
    _unscaled,
    fit_probe,
    fit_thresholds,
    gate_measurements,
    template_window,
)
from calibration.prompts import Label, Prompt, Stratum
from guard.errors import InputError

N_LAYERS, D_MODEL = 4, 16
MESSAGE_LAYER, TEMPLATE_LAYER, WINDOW = 2, 1, (2, 3)
# A probe that reads one number, so that a prompt's hidden state is its score.
IDENTITY = Probe(Read(0, (0,), torch.ones(1)), Read(0, (0,), torch.zeros(1)), 0.0, 1.0)


def prompts(label: Label, stratum: Stratum, n: int) -> list[Prompt]:
    return [
        Prompt(f"{label}-{stratum}-{i}", "t", label, stratum, "c", None, "en") for i in range(n)
    ]


def scored(harmful: Tensor, ordinary: Tensor, hard: Tensor) -> Labelled:
    """Prompts whose scores under `IDENTITY` are the given numbers."""
    everything = [
        *prompts("harmful", "ordinary", len(harmful)),
        *prompts("benign", "ordinary", len(ordinary)),
        *prompts("benign", "hard", len(hard)),
    ]
    return Labelled(everything, torch.cat([harmful, ordinary, hard]).reshape(-1, 1, 1, 1))


def planted(n: int, seed: int) -> Labelled:
    """3 n prompts; half of harm shows in the message, half behind it, each at its own layer."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3 * n, N_LAYERS, 5, D_MODEL, generator=generator)
    hidden[:n:2, MESSAGE_LAYER, 0, 5] += 5.0
    hidden[1:n:2, TEMPLATE_LAYER, WINDOW, 7] += 5.0
    everything = [
        *prompts("harmful", "ordinary", n),
        *prompts("benign", "ordinary", n),
        *prompts("benign", "hard", n),
    ]
    return Labelled(everything, hidden)


@pytest.mark.parametrize(
    ("n_suffix", "window"), [(1, (1,)), (2, (1,)), (3, (2,)), (4, (2, 3)), (5, (2, 3))]
)
def test_the_window_leaves_two_template_tokens_behind_it_where_there_are_so_many(
    n_suffix: int, window: tuple[int, ...]
) -> None:
    assert template_window(n_suffix) == window


def test_the_probe_finds_both_layers_and_the_coordinates_that_carry_harm() -> None:
    probe = fit_probe(planted(80, 0), planted(60, 1), range(N_LAYERS), WINDOW, seed=0)
    assert (probe.message.layer, probe.message.window) == (MESSAGE_LAYER, (0,))
    assert (probe.template.layer, probe.template.window) == (TEMPLATE_LAYER, WINDOW)
    assert int(probe.message.weight.argmax()) == 5
    assert int(probe.template.weight.argmax()) == 7
    assert probe.validation_auroc > 0.95
    unseen = planted(60, 2)
    scores = probe.scores(unseen)
    assert float(scores[unseen.mask("harmful")].min()) > float(
        scores[unseen.mask("benign")].median()
    )


def test_a_probe_needs_at_least_one_layer() -> None:
    with pytest.raises(InputError):
        fit_probe(planted(10, 0), planted(10, 1), [], WINDOW, seed=0)


@settings(max_examples=20)
@given(st.integers(0, 200), st.floats(0.01, 100.0), st.floats(-50.0, 50.0))
def test_folding_the_scaler_into_the_weights_is_exact(
    seed: int, spread: float, offset: float
) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(offset, spread, (60, 8))
    labels = features[:, 0] > offset + 0.2 * spread * rng.normal(size=60)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1)).fit(features, labels)
    weight, bias = _unscaled(model)
    folded = torch.tensor(features).float() @ weight + bias
    expected = torch.tensor(model.decision_function(features)).float()
    size = float((torch.tensor(features).float().abs() @ weight.abs()).max()) + abs(bias)
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-5 * size + 1e-6)


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 50))
def test_each_side_weighs_half_and_strata_share_the_benign_half(
    harmful: int, ordinary: int, hard: int
) -> None:
    if ordinary + hard == 0:
        return
    data = scored(torch.zeros(harmful), torch.zeros(ordinary), torch.zeros(hard))
    weights = torch.tensor(_balanced(data))
    total = len(data.prompts)
    assert float(weights[data.mask("harmful")].sum()) == pytest.approx(total / 2, rel=1e-4)
    assert float(weights[data.mask("benign")].sum()) == pytest.approx(total / 2, rel=1e-4)
    if ordinary and hard:
        assert float(weights[data.mask("benign", "hard")].sum()) == pytest.approx(
            total / 4, rel=1e-4
        )


# --- thresholds -----------------------------------------------------------------------------------


def test_conformal_thresholds_cover_what_they_promise() -> None:
    """Over many calibrations, fresh prompts pass τ at the promised rate, and not far below it."""
    alpha, delta, n, fresh = 0.1, 0.1, 39, 200
    generator = torch.Generator().manual_seed(0)

    def draw(mean: float, count: int) -> Tensor:
        return torch.randn(count, generator=generator) + mean

    raised, lowered = [], []
    for _ in range(400):
        data = scored(draw(2.0, n), draw(-6.0, n), draw(0.0, n))
        fit = fit_thresholds(IDENTITY, data, alpha, delta)
        assert fit.lower_below is not None
        raised.append(float((draw(0.0, fresh) > fit.raise_above).float().mean()))
        lowered.append(float((draw(2.0, fresh) < fit.lower_below).float().mean()))
    # n + 1 = 40 makes the level exact. Spread of one rate ≈ 0.05, of the mean of 400 ≈ 0.0026.
    assert sum(raised) / 400 == pytest.approx(alpha, abs=0.01)
    assert sum(lowered) / 400 == pytest.approx(delta, abs=0.01)


@settings(max_examples=60)
@given(st.integers(0, 999), st.integers(19, 80), st.integers(19, 80), st.integers(19, 80))
def test_the_raise_threshold_holds_for_the_worst_stratum(
    seed: int, n_harmful: int, n_ordinary: int, n_hard: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.randn(n_ordinary, generator=generator)
    hard = torch.randn(n_hard, generator=generator) + 1.0
    harmful = torch.randn(n_harmful, generator=generator) + 2.0
    fit = fit_thresholds(IDENTITY, scored(harmful, ordinary, hard), 0.05, 0.05)
    for scores in (ordinary, hard):
        above = int((scores > fit.raise_above).sum())
        assert above <= math.floor(0.05 * (len(scores) + 1))
    assert fit.lower_below is not None
    below = int((harmful < fit.lower_below).sum())
    assert below <= math.floor(0.05 * (n_harmful + 1))
    assert fit.lower_below <= fit.raise_above
    assert fit.n_by_stratum == {
        "ordinary benign": n_ordinary,
        "hard benign": n_hard,
        "harmful": n_harmful,
    }


def test_too_few_benign_prompts_for_alpha_say_how_many_would_do() -> None:
    data = scored(torch.zeros(40), torch.zeros(18), torch.zeros(40))
    with pytest.raises(InputError, match=r"alpha 0\.05 needs at least 19 prompts.*got 18"):
        fit_thresholds(IDENTITY, data, 0.05, 0.05)


def test_too_few_harmful_prompts_close_the_lower_zone_and_the_note_names_delta() -> None:
    data = scored(torch.zeros(18), torch.zeros(40), torch.zeros(40))
    fit = fit_thresholds(IDENTITY, data, 0.05, 0.05)
    assert fit.lower_below is None
    assert "needs at least 19 prompts" in fit.note
    assert "delta 0.05" in fit.note


def test_a_stratum_that_is_missing_takes_no_part() -> None:
    data = scored(torch.full((40,), 9.0), torch.arange(40.0), torch.empty(0))
    fit = fit_thresholds(IDENTITY, data, 0.05, 0.05)
    assert fit.raise_above == 38.0  # the ⌈41 · 0.95⌉ = 39th smallest
    assert fit.n_by_stratum["hard benign"] == 0


def test_measurements_count_the_prompts_beyond_the_thresholds() -> None:
    calibration = scored(torch.full((40,), 5.0), torch.zeros(40), torch.arange(40.0))
    fit = fit_thresholds(IDENTITY, calibration, 0.05, 0.05)
    assert (fit.raise_above, fit.lower_below) == (38.0, 5.0)
    test = scored(
        torch.tensor([0.0, 50.0, 50.0, 50.0]),
        torch.tensor([0.0, 0.0]),
        torch.tensor([0.0, 40.0]),
    )
    found = gate_measurements(IDENTITY, fit, test, seed=0)
    assert (found["harmful_above_raise"].value, found["harmful_above_raise"].n) == (0.75, 4)
    assert found["harmful_below_lower"].value == 0.25
    assert found["hard_benign_above_raise"].value == 0.5
    assert found["ordinary_benign_above_raise"].value == 0.0
    assert found["auroc_harmful_vs_ordinary_benign"].value == pytest.approx(7 / 8)
