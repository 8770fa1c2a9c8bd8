"""The gate's fit: attention finds what tells, and thresholds keep what they promise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.gate_fit import (
    Labelled,
    Messages,
    Scored,
    ThresholdFit,
    _folded,
    _Inputs,
    _Net,
    _scale,
    balanced,
    by_category,
    fit_probe,
    fit_thresholds,
    gate_measurements,
    joined,
    template_window,
)
from calibration.prompts import Label, Prompt, Stratum
from guard.errors import InputError
from guard.probe import pool_message, probe_scores, project

N_LAYERS, D_MODEL = 4, 16
MESSAGE_LAYER, TEMPLATE_LAYER, WINDOW = 2, 1, (1, 2)


def prompts(label: Label, stratum: Stratum, n: int) -> list[Prompt]:
    return [
        Prompt(f"{label}-{stratum}-{i}", "t", label, stratum, "c", None, "en") for i in range(n)
    ]


def scored(harmful: Tensor, ordinary: Tensor, hard: Tensor) -> Scored:
    """Prompts with these scores."""
    everything = [
        *prompts("harmful", "ordinary", len(harmful)),
        *prompts("benign", "ordinary", len(ordinary)),
        *prompts("benign", "hard", len(hard)),
    ]
    return Scored(everything, torch.cat([harmful, ordinary, hard]))


def planted(n: int, seed: int) -> Labelled:
    """3 n prompts; half of harm shows in one token of the message, half in the template behind it.

    Messages are of many lengths, and every message has a token that looks the same but for its
    direction, so that a mean over tokens hardly tells.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randn(3 * n, N_LAYERS, 4, D_MODEL, generator=generator)
    lengths = torch.randint(2, 9, (3 * n,), generator=generator)
    tokens = torch.randn(int(lengths.sum()), D_MODEL, generator=generator)
    starts = lengths.cumsum(0) - lengths
    tokens[starts, 3] += 6.0  # what the attention can find
    tokens[starts[:n:2], 5] += 6.0
    ends[1:n:2, TEMPLATE_LAYER, WINDOW, 7] += 4.0
    noise = torch.randn(tokens.shape, generator=generator)
    everything = [
        *prompts("harmful", "ordinary", n),
        *prompts("benign", "ordinary", n),
        *prompts("benign", "hard", n),
    ]
    messages = Messages({MESSAGE_LAYER: tokens, 0: noise}, lengths)
    return Labelled(everything, range(N_LAYERS), ends, messages)


@pytest.mark.parametrize(
    ("n_suffix", "window"), [(1, (0,)), (2, (0,)), (3, (1,)), (4, (1, 2)), (5, (1, 2))]
)
def test_the_window_leaves_two_template_tokens_behind_it_where_there_are_so_many(
    n_suffix: int, window: tuple[int, ...]
) -> None:
    assert template_window(n_suffix) == window


def test_the_probe_finds_both_layers_and_what_tells_harm_there() -> None:
    probe = fit_probe(planted(150, 0), planted(80, 1), range(N_LAYERS), WINDOW, seed=0)
    assert probe.message_layer == MESSAGE_LAYER
    assert (probe.template_layer, probe.window) == (TEMPLATE_LAYER, WINDOW)
    assert probe.validation_auroc > 0.95
    unseen = planted(80, 2)
    scores = probe.scores(unseen)
    harmful, benign = scores[unseen.mask("harmful")], scores[unseen.mask("benign")]
    assert float((harmful[:, None] > benign[None]).float().mean()) > 0.95


def test_attention_beats_the_mean_where_one_token_tells() -> None:
    train, validation = planted(150, 0), planted(80, 1)
    mean = [
        replace(data, messages=Messages({MESSAGE_LAYER: data.message(MESSAGE_LAYER)}, ones))
        for data in (train, validation)
        for ones in [torch.ones(len(data.prompts), dtype=torch.int64)]
    ]
    attending = fit_probe(train, validation, range(N_LAYERS), WINDOW, seed=0)
    averaging = fit_probe(*mean, range(N_LAYERS), WINDOW, seed=0)
    assert attending.validation_auroc > averaging.validation_auroc


def test_a_probe_without_messages_reads_the_template_alone() -> None:
    train, validation = (replace(planted(60, seed), messages=None) for seed in (0, 1))
    probe = fit_probe(train, validation, range(N_LAYERS), WINDOW, seed=0)
    assert probe.message_layer is None
    assert probe.probe.message is None
    assert probe.template_layer == TEMPLATE_LAYER
    assert 0.6 < probe.validation_auroc < 0.9  # the other half of harm does not show there


def test_a_probe_that_reads_messages_asks_for_them() -> None:
    probe = fit_probe(planted(40, 0), planted(40, 1), range(N_LAYERS), WINDOW, seed=0)
    with pytest.raises(InputError, match="come without theirs"):
        probe.scores(replace(planted(40, 2), messages=None))


def test_a_fit_is_the_same_for_a_seed_and_leaves_torchs_own_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (
        fit_probe(planted(40, 0), planted(40, 1), range(N_LAYERS), WINDOW, seed=3) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.probe.tensors.items():
        assert torch.equal(tensor, second.probe.tensors[name])


def test_folding_the_standardisation_into_the_weights_is_exact() -> None:
    data = planted(40, 0)
    inputs = _Inputs.of(data, TEMPLATE_LAYER, WINDOW, MESSAGE_LAYER, "cpu")
    inputs = _Inputs(5.0 + 3.0 * inputs.template, 2.0 * inputs.message - 7.0, inputs.owner)
    torch.manual_seed(0)
    net = _Net(D_MODEL, True)
    torch.nn.init.normal_(net.query)
    template, message = _scale(inputs.template), _scale(inputs.message)
    expected = net(inputs.standard(template, message), 0.0)
    probe = _folded(dict(net.named_parameters()), template, message)
    lengths = data.messages.lengths
    projected = project(inputs.message, probe.message).split(lengths.tolist())
    width = int(lengths.max())
    rows = torch.stack([torch.nn.functional.pad(p, (0, 0, 0, width - len(p))) for p in projected])
    pooled = pool_message(rows, torch.arange(width) < lengths.unsqueeze(1), probe.n_heads)
    found = probe_scores(probe, project(inputs.template, probe.template), pooled)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_logits_mean_what_they_say() -> None:
    """Of unseen prompts with a score near s, about σ(s) are harmful, at equal weights."""
    probe = fit_probe(planted(200, 0), planted(200, 1), range(N_LAYERS), WINDOW, seed=0)
    unseen = planted(400, 2)
    chance = probe.scores(unseen).sigmoid()
    weights = torch.tensor(balanced(unseen))
    for low, high in ((0.0, 0.5), (0.5, 1.0)):
        inside = (chance >= low) & (chance < high)
        w = weights[inside]
        said = float((w * chance[inside]).sum() / w.sum())
        true = float((w * unseen.harmful[inside]).sum() / w.sum())
        assert said == pytest.approx(true, abs=0.06)


def test_logits_stay_within_reason_where_validation_is_told_apart_without_a_mistake() -> None:
    train, validation = planted(80, 0), planted(60, 1)
    for data in (train, validation):
        for place in WINDOW:
            data.hidden[data.harmful, TEMPLATE_LAYER, place] += 60.0
    probe = fit_probe(train, validation, range(N_LAYERS), WINDOW, seed=0)
    scores, harmful = probe.scores(validation), validation.harmful
    assert float(scores[harmful].min()) > float(scores[~harmful].max())
    assert 1.0 < float(scores.abs().max()) < 15.0


def test_joined_prompts_score_as_they_do_apart() -> None:
    one, other = planted(60, seed=0), planted(40, seed=1)
    some = replace(other, layers=[1, 3], hidden=other.hidden[:, [1, 3]])
    both = joined(one, some)
    assert both.prompts == [*one.prompts, *other.prompts]
    assert list(both.layers) == [1, 3]
    probe = fit_probe(one, other, range(N_LAYERS), WINDOW, seed=0)
    assert probe.template_layer == TEMPLATE_LAYER
    apart = torch.cat([probe.scores(one), probe.scores(some)])
    assert torch.allclose(probe.scores(both), apart, atol=1e-5)
    assert apart.std() > 0.1


def test_joined_prompts_have_messages_only_if_both_have() -> None:
    one = planted(3, seed=0)
    assert joined(one, replace(one, messages=None)).messages is None


def test_a_probe_needs_at_least_one_layer() -> None:
    with pytest.raises(InputError):
        fit_probe(planted(10, 0), planted(10, 1), [], WINDOW, seed=0)


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 50))
def test_each_side_weighs_half_and_strata_share_the_benign_half(
    harmful: int, ordinary: int, hard: int
) -> None:
    if ordinary + hard == 0:
        return
    data = scored(torch.zeros(harmful), torch.zeros(ordinary), torch.zeros(hard))
    weights = torch.tensor(balanced(data))
    total = len(data.prompts)
    assert float(weights[data.mask("harmful")].sum()) == pytest.approx(total / 2, rel=1e-4)
    assert float(weights[data.mask("benign")].sum()) == pytest.approx(total / 2, rel=1e-4)
    if ordinary and hard:
        assert float(weights[data.mask("benign", "hard")].sum()) == pytest.approx(
            total / 4, rel=1e-4
        )


@given(st.lists(st.integers(1, 4), min_size=9, max_size=9))
def test_a_prompt_that_counts_k_times_weighs_as_k_prompts(counts: list[int]) -> None:
    data = scored(torch.zeros(4), torch.zeros(2), torch.zeros(3))
    repeated = Scored(
        [p for p, k in zip(data.prompts, counts, strict=True) for _ in range(k)],
        torch.zeros(sum(counts)),
    )
    owner = torch.arange(9).repeat_interleave(torch.tensor(counts))
    shares = torch.tensor(balanced(repeated)) / len(repeated.prompts)
    expected = torch.zeros(9).index_add(0, owner, shares)
    found = torch.tensor(balanced(data, torch.tensor(counts))) / 9
    torch.testing.assert_close(found, expected)


def test_what_counts_more_is_told_apart_better() -> None:
    """Half of harm shows in the message, half in the template: the half that counts wins."""
    train, validation, unseen = planted(150, 0), planted(80, 1), planted(200, 2)
    shown_in_message = torch.arange(len(train.prompts)) % 2 == 0
    fits = [
        fit_probe(train, validation, range(N_LAYERS), WINDOW, seed=0, counts=counts)
        for counts in (torch.where(shown_in_message, 9.0, 1.0), torch.ones(len(train.prompts)))
    ]
    half = unseen.mask("harmful") & (torch.arange(len(unseen.prompts)) % 2 == 0)
    leaning, level = (probe.scores(unseen).sigmoid()[half].mean() for probe in fits)
    assert float(leaning) > float(level)


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
        fit = fit_thresholds(data, alpha, delta)
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
    fit = fit_thresholds(scored(harmful, ordinary, hard), 0.05, 0.05)
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
        fit_thresholds(data, 0.05, 0.05)


def test_too_few_harmful_prompts_close_the_lower_zone_and_the_note_names_delta() -> None:
    data = scored(torch.zeros(18), torch.zeros(40), torch.zeros(40))
    fit = fit_thresholds(data, 0.05, 0.05)
    assert fit.lower_below is None
    assert "needs at least 19 prompts" in fit.note
    assert "delta 0.05" in fit.note


def test_a_stratum_that_is_missing_takes_no_part() -> None:
    data = scored(torch.full((40,), 9.0), torch.arange(40.0), torch.empty(0))
    fit = fit_thresholds(data, 0.05, 0.05)
    assert fit.raise_above == 38.0  # the ⌈41 · 0.95⌉ = 39th smallest
    assert fit.n_by_stratum["hard benign"] == 0


def test_measurements_count_the_prompts_beyond_the_thresholds() -> None:
    calibration = scored(torch.full((40,), 5.0), torch.zeros(40), torch.arange(40.0))
    fit = fit_thresholds(calibration, 0.05, 0.05)
    assert (fit.raise_above, fit.lower_below) == (38.0, 5.0)
    test = scored(
        torch.tensor([0.0, 50.0, 50.0, 50.0]),
        torch.tensor([0.0, 0.0]),
        torch.tensor([0.0, 40.0]),
    )
    found = gate_measurements(fit, test, seed=0)
    assert (found["harmful_above_raise"].value, found["harmful_above_raise"].n) == (0.75, 4)
    assert found["harmful_below_lower"].value == 0.25
    assert found["hard_benign_above_raise"].value == 0.5
    assert found["ordinary_benign_above_raise"].value == 0.0
    assert found["auroc_harmful_vs_ordinary_benign"].value == pytest.approx(7 / 8)


def test_categories_show_where_the_gate_errs() -> None:
    data = scored(torch.tensor([3.0] * 10 + [-3.0] * 10), torch.zeros(5), torch.tensor([0.0] * 12))
    kinds = ["loud"] * 10 + ["quiet"] * 10 + ["any"] * 17
    everything = [
        replace(prompt, category=kind) for prompt, kind in zip(data.prompts, kinds, strict=True)
    ]
    fit = ThresholdFit(1.0, -1.0, {}, "")
    found = by_category(fit, Scored(everything, data.scores), seed=0)
    assert set(found) == {
        ("harmful", "loud"),
        ("harmful", "quiet"),
        ("hard benign", "any"),
        ("language", "en"),
    }
    area, missed = found["harmful", "loud"]
    assert (area.value, missed.value, missed.n) == (1.0, 0.0, 10)
    area, missed = found["harmful", "quiet"]
    assert (area.value, missed.value) == (0.0, 1.0)
    area, missed = found["hard benign", "any"]
    assert (area.value, missed.value, missed.n) == (0.5, 0.0, 12)
    assert found["language", "en"][1].value == 0.5


def test_harmful_prompts_caught_at_a_share_of_benign_ones_are_counted() -> None:
    test = scored(torch.tensor([0.0, 95.5, 97.0, 200.0]), torch.arange(101.0), torch.empty(0))
    found = gate_measurements(ThresholdFit(150.0, None, {}, ""), test, seed=0)
    assert found["harmful_caught_at_5_percent_of_ordinary_benign"].value == 0.75
    assert found["harmful_caught_at_1_percent_of_ordinary_benign"].value == 0.25
