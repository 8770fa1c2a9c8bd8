"""The guard beside simpler defences, end to end on the tiny refuser, and the comparison's maths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.frontier import added_everywhere, main, randomised
from benchmarks.frontier_points import Reply, Trial, attainable, difference
from calibration.transformers_subject import TransformersSubject
from guard.artifact import CarrierArtifact, save_artifact
from guard.refusal import Verdict
from guard.shadow import ShadowModel
from guard.steering import Carrier
from tests.tiny_refuser import (
    PLANTED_LAYER,
    chat_ids,
    hard_benign_prompts,
    hard_harmful_prompts,
    harmless_prompts,
)

N = 12


@pytest.fixture(scope="module")
def ran(
    tiny_refuser_dir: Path,
    tiny_guard: CarrierArtifact,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """Result, completions and picture of a run at two budgets, greedy and sampled."""
    folder = tmp_path_factory.mktemp("frontier")
    save_artifact(tiny_guard, folder / "guard.safetensors")
    files = {
        "--harmful": hard_harmful_prompts(),
        "--hard-benign": hard_benign_prompts(),
        "--ordinary": harmless_prompts(),
    }
    options = []
    for option, texts in files.items():
        path = folder / f"{option[2:]}.txt"
        path.write_text("\n".join(texts))
        options += [option, str(path)]
    options += ["--guard", str(folder / "guard.safetensors"), "--n", str(N), "--max-tokens", "8"]
    options += ["--budgets", "0.01", "4", "--strengths", "-1", "1"]
    options += ["--json", str(folder / "out.json"), "--completions", str(folder / "out.jsonl")]
    assert main([str(tiny_refuser_dir), *options]) == 0
    lines = (folder / "out.jsonl").read_text().splitlines()
    result = json.loads((folder / "out.json").read_text())
    return result, [json.loads(line) for line in lines], folder / "out.png"


def of(points: list[dict[str, Any]], temperature: float) -> list[dict[str, Any]]:
    return [p for p in points if p["temperature"] == temperature]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_guard_refuses_more_harm_and_less_that_is_benign_as_its_budget_grows(
    ran: tuple[dict[str, Any], list[dict[str, Any]], Path], temperature: float
) -> None:
    base = of(ran[0]["baselines"]["base"], temperature)[0]
    small, large = of(ran[0]["guard"], temperature)
    harmful = [p["harmful"]["refused"]["value"] for p in (base, small, large)]
    assert harmful[0] <= harmful[1] < harmful[2]
    hard = [p["hard_benign"]["refused"]["value"] for p in (base, large)]
    assert hard[1] < hard[0]
    assert 0 < small["harmful"]["kl_nats"]["value"] <= 0.01
    assert large["harmful"]["kl_nats"]["value"] <= 4.0
    assert large["harmful"]["refused"]["n"] == N


def test_static_addition_moves_refusals_of_harmful_and_benign_prompts_together(
    ran: tuple[dict[str, Any], list[dict[str, Any]], Path],
) -> None:
    away, toward = of(ran[0]["baselines"]["static_addition"], 0.0)
    for key in ("harmful", "hard_benign", "ordinary"):
        assert away[key]["refused"]["value"] < toward[key]["refused"]["value"]
        assert toward[key]["flagged"]["value"] == 1.0


def test_a_random_carrier_goes_through_the_guards_gate_and_budget(
    ran: tuple[dict[str, Any], list[dict[str, Any]], Path],
) -> None:
    for guard, random in zip(ran[0]["guard"], ran[0]["baselines"]["random_carrier"], strict=True):
        assert random["settings"] == guard["settings"]
        assert random["harmful"]["flagged"] == guard["harmful"]["flagged"]
        spent = random["harmful"]["kl_nats"]["value"]
        assert 0 < spent <= random["settings"]["raise_budget_nats"]


def test_random_carriers_keep_layer_norm_and_rank(tiny_guard: CarrierArtifact) -> None:
    plane = torch.linalg.qr(tiny_guard.raise_carrier.basis.T @ torch.ones(1, 2) + torch.eye(64, 2))
    affine = Carrier(1, "affine", plane.Q.T.contiguous(), torch.tensor([3.0, -1.0]))
    assert tiny_guard.lower_carrier is not None
    found = randomised(replace(tiny_guard, lower_carrier=affine), seed=3)
    own, random = tiny_guard.raise_carrier, found.raise_carrier
    assert random.layer == own.layer
    assert torch.allclose(random.basis.norm(), own.basis.norm())
    assert torch.cosine_similarity(random.basis, own.basis).abs() < 0.6
    lower = found.lower_carrier
    assert lower is not None
    assert torch.allclose(lower.basis @ lower.basis.T, torch.eye(2), atol=1e-5)
    assert torch.equal(lower.target, affine.target)
    assert not torch.allclose(lower.basis, affine.basis, atol=0.1)


def test_every_defence_is_compared_at_equal_over_refusal_with_an_interval(
    ran: tuple[dict[str, Any], list[dict[str, Any]], Path],
) -> None:
    result = ran[0]
    families = {"random_carrier", "static_addition", "cast", "system_prompt"}
    assert set(result["baselines"]) == families | {"base"}
    keys = {
        (d["guard"], d["temperature"], d["baseline"], d["at_equal_refusals_of"])
        for d in result["differences"]
    }
    assert len(keys) == len(result["differences"]) == 2 * 2 * len(families) * 2
    for found in result["differences"]:
        gain = found["harmful_refused_difference"]
        assert gain["low"] <= gain["value"] <= gain["high"]
        assert gain["n"] == N
    assert {"hardware", "seed", "date", "guard_id"} <= set(result)


def test_every_response_can_be_read_and_unflagged_ones_are_the_base_models(
    ran: tuple[dict[str, Any], list[dict[str, Any]], Path],
) -> None:
    result, lines, picture = ran
    points = result["guard"] + [p for some in result["baselines"].values() for p in some]
    assert len(lines) == len(points) * 3 * N
    base = {
        (line["temperature"], line["prompt"]): line["response"]
        for line in lines
        if line["family"] == "base"
    }
    passed = [line for line in lines if line["family"] == "guard" and not line["flagged"]]
    assert passed
    for line in passed:
        assert line["response"] == base[line["temperature"], line["prompt"]]
        assert line["kl_nats"] == 0
    with Image.open(picture) as opened:
        assert opened.size[0] >= 800


def test_sampling_depends_on_the_rows_seed_alone(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    subject = TransformersSubject(tiny_model, tiny_tokenizer, "tiny")
    prompts = [subject.encode(text) for text in hard_benign_prompts()[:24]]
    together = subject.respond(prompts, 4, temperature=1.0, seeds=range(24))
    alone = [subject.respond([p], 4, temperature=1.0, seeds=[i])[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert subject.respond(prompts, 4, temperature=1.0, seeds=range(50, 74)) != together


def test_sampled_first_tokens_are_distributed_as_the_model_says(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    subject = TransformersSubject(tiny_model, tiny_tokenizer, "tiny")
    prompt, draws = subject.encode(hard_benign_prompts()[0]), 2000
    wanted = subject.prefill([prompt], []).logits[0].div(0.7).softmax(-1)
    made = subject.respond([prompt] * draws, 1, temperature=0.7, seeds=range(draws))
    counts = torch.bincount(torch.tensor([t[0] for t in made]), minlength=len(wanted))
    assert 0.5 * (counts / draws - wanted).abs().sum() < 0.05


def test_a_carrier_is_added_at_every_token_and_is_gone_afterwards(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_guard: CarrierArtifact,
) -> None:
    ids = chat_ids(tiny_tokenizer, harmless_prompts()[:2])
    layers = ShadowModel(tiny_model).layers

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            output = tiny_model(ids, output_hidden_states=True)
        states: torch.Tensor = output.hidden_states[PLANTED_LAYER + 1]
        return states

    before = hidden()
    shifted = replace(tiny_guard.raise_carrier, layer=PLANTED_LAYER)
    with added_everywhere(layers, shifted, 0.5):
        during = hidden()
    assert ((during - before).norm(dim=-1) > 0.1).all()
    assert torch.equal(hidden(), before)


shares = st.floats(0.0, 1.0)


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=6), shares, shares)
def test_what_a_defence_attains_rises_with_the_over_refusal_allowed(
    points: list[tuple[float, float]], x: float, more: float
) -> None:
    xs, ys = (np.array([[p[i]] for p in points]) for i in (0, 1))
    low, high = sorted((x, more))
    at_low, at_high = (float(attainable(np.array([v]), xs, ys)[0]) for v in (low, high))
    assert at_low <= at_high + 1e-9
    assert min(p[1] for p in points) <= at_low
    assert at_high <= max(p[1] for p in points) + 1e-9


def test_between_two_settings_a_defence_attains_the_chord() -> None:
    xs, ys = np.array([[0.0], [0.5], [1.0]]), np.array([[0.0], [0.1], [1.0]])
    assert attainable(np.array([0.25]), xs, ys) == pytest.approx(0.25)
    assert attainable(np.array([2.0]), xs, ys) == pytest.approx(1.0)
    assert attainable(np.array([-1.0]), xs + 0.2, ys) == pytest.approx(0.0)


def test_the_difference_is_taken_at_the_guards_own_over_refusal() -> None:
    def trial(family: str, harmful: int, hard: int) -> Trial:
        def replies(refused: int) -> list[Reply]:
            verdicts = [Verdict.REFUSED] * refused + [Verdict.COMPLIED] * (100 - refused)
            return [Reply("", verdict) for verdict in verdicts]

        sets = {"harmful": replies(harmful), "hard_benign": replies(hard)}
        return Trial(family, "", {}, 0.0, sets)

    curve = [trial("base", 20, 10), trial("static_addition", 80, 70)]
    found = difference(trial("guard", 90, 40), curve, "hard_benign", seed=0)
    gain = found["harmful_refused_difference"]
    assert gain["value"] == pytest.approx(0.9 - 0.5)
    assert 0.2 < gain["low"] < 0.4 < gain["high"] < 0.6
    assert found["baseline"] == "static_addition"
    assert found["baseline_reaches"]
    below = difference(trial("guard", 90, 5), curve, "hard_benign", seed=0)
    assert below["harmful_refused_difference"]["value"] == pytest.approx(0.9 - 0.2)
    assert not below["baseline_reaches"]
