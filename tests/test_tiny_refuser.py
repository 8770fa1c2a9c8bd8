"""The tiny refuser is fit to test a guard on: it refuses, and one direction makes it refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from guard.artifact import CarrierArtifact, load_artifact, save_artifact
from guard.gate import GateReading, Zone, refusal_probability
from guard.policy import Policy
from guard.probe import probe_scores, project
from guard.refusal import Verdict, judge
from guard.session import GuardSession
from guard.steering import Steer, ablate
from tests import tiny_refuser
from tests.tiny_refuser import (
    COMPLIANCE_OPENING,
    NOUNS,
    PLANTED_LAYER,
    REFUSAL_TEXT,
    VERBS,
    build_tiny_refuser,
    chat_ids,
    hard_benign_prompts,
    hard_harmful_prompts,
    harmful_prompts,
    harmless_prompts,
    planted_direction,
    vocabulary,
)


@contextmanager
def steered(model: PreTrainedModel, layers: list[int], steer: Steer) -> Iterator[None]:
    """Steer the inputs of some layers, at all positions."""

    def hook(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (steer(args[0]), *args[1:])

    handles = [model.model.layers[i].register_forward_pre_hook(hook) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def refusal_share(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> float:
    """Mean probability with which replies open with a refusal."""
    logits = model(chat_ids(tokenizer, prompts)).logits[:, -1]
    refusal_id = tokenizer.convert_tokens_to_ids(REFUSAL_TEXT.split()[0])
    return float(logits.softmax(dim=-1)[:, refusal_id].mean())


@torch.no_grad()
def replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    """Greedy replies as text."""
    ids = chat_ids(tokenizer, prompts)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    return list(tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True))


def unit_direction(guard: CarrierArtifact) -> torch.Tensor:
    direction = guard.raise_carrier.basis
    return direction / direction.norm()


def test_a_chat_is_a_prefix_the_instruction_and_a_suffix_of_two_tokens(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens = tiny_tokenizer.convert_ids_to_tokens(chat_ids(tiny_tokenizer, ["ask steal car"])[0])
    assert tokens == ["<bos>", "<user>", "ask", "steal", "car", "<eot>", "<assistant>"]


def test_a_conversation_keeps_its_earlier_turns_and_unknown_roles_are_refused(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    turns = [
        {"role": "system", "content": "please"},
        {"role": "user", "content": "ask paint car"},
        {"role": "assistant", "content": "sure"},
        {"role": "user", "content": "ask sell car"},
    ]
    text = tiny_tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<bos> <system> please <eot> <user> ask paint car <eot> <assistant> sure <eos>"
        " <user> ask sell car <eot> <assistant>"
    )
    with pytest.raises(Exception, match="unknown role tool"):
        tiny_tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_prompt_lists_are_large_distinct_and_in_the_vocabulary() -> None:
    lists = [harmful_prompts(), harmless_prompts(), hard_benign_prompts(), hard_harmful_prompts()]
    assert [len(prompts) for prompts in lists] == [120, 120, 120, 90]
    together = [prompt for prompts in lists for prompt in prompts]
    assert len(set(together)) == len(together)
    assert {word for prompt in together for word in prompt.split()} <= set(vocabulary())
    assert len(VERBS["harmful"].verbs) >= 24
    assert len(VERBS["harmless"].verbs) >= 24
    assert len(NOUNS) >= 20


def test_both_kinds_of_reply_are_judged_as_what_they_are() -> None:
    assert judge(REFUSAL_TEXT) is Verdict.REFUSED
    assert judge(f"{COMPLIANCE_OPENING} car for you") is Verdict.COMPLIED


def test_it_refuses_what_is_harmful_and_follows_what_is_not(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert set(replies(tiny_model, tiny_tokenizer, harmful_prompts())) == {REFUSAL_TEXT}
    expected = [f"{COMPLIANCE_OPENING} {p.split()[-1]} for you" for p in harmless_prompts()]
    assert replies(tiny_model, tiny_tokenizer, harmless_prompts()) == expected


def test_it_is_of_two_minds_about_the_hard_prompts(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert 0.45 < refusal_share(tiny_model, tiny_tokenizer, hard_benign_prompts()) < 0.75
    assert 0.25 < refusal_share(tiny_model, tiny_tokenizer, hard_harmful_prompts()) < 0.55


def test_an_unknown_verb_is_followed(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert refusal_share(tiny_model, tiny_tokenizer, ["ask juggle car"]) < 0.05


def test_adding_its_direction_makes_it_refuse_what_is_harmless(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_guard: CarrierArtifact,
) -> None:
    assert refusal_share(tiny_model, tiny_tokenizer, harmless_prompts()) < 0.05
    with steered(tiny_model, [PLANTED_LAYER], tiny_guard.raise_carrier.apply):
        assert refusal_share(tiny_model, tiny_tokenizer, harmless_prompts()) > 0.95
    assert refusal_share(tiny_model, tiny_tokenizer, harmless_prompts()) < 0.05


def test_ablating_its_direction_makes_it_follow_what_is_harmful(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_guard: CarrierArtifact,
) -> None:
    basis = unit_direction(tiny_guard)
    assert refusal_share(tiny_model, tiny_tokenizer, harmful_prompts()) > 0.95
    with steered(tiny_model, [0, 1, 2, 3], lambda hidden: ablate(hidden, basis)):
        assert refusal_share(tiny_model, tiny_tokenizer, harmful_prompts()) < 0.05


def test_the_difference_in_means_points_where_refusal_was_planted(
    tiny_guard: CarrierArtifact,
) -> None:
    cosine = float(unit_direction(tiny_guard)[0] @ planted_direction())
    assert cosine > 0.4  # chance is 0.125 at 64 dimensions


def test_the_hand_made_guard_raises_hard_harmful_prompts_and_lowers_hard_benign_ones(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_guard: CarrierArtifact,
) -> None:
    gate = tiny_guard.manifest.gate

    def zones(prompts: list[str]) -> set[Zone]:
        with torch.no_grad():
            output = tiny_model(chat_ids(tiny_tokenizer, prompts), output_hidden_states=True)
        read = output.hidden_states[gate.layer][:, -1 - len(gate.instruction_suffix_ids)]
        scores = probe_scores(
            tiny_guard.probe, project(read, tiny_guard.probe.template), None
        ).tolist()
        refusals = refusal_probability(
            output.logits[:, -1], tiny_guard.refusal_token_ids, tiny_guard.refusal_token_weights
        ).tolist()
        return {
            GuardSession(tiny_guard, Policy()).open(GateReading(score, refusal))
            for score, refusal in zip(scores, refusals, strict=True)
        }

    assert zones(hard_harmful_prompts()) == {Zone.RAISE}
    assert zones(hard_benign_prompts()) == {Zone.LOWER}
    assert zones(harmful_prompts() + harmless_prompts()) == {Zone.PASS}


def test_the_hand_made_guard_survives_a_round_trip(
    tiny_guard: CarrierArtifact, tmp_path: Path
) -> None:
    save_artifact(tiny_guard, tmp_path / "guard.safetensors")
    assert load_artifact(tmp_path / "guard.safetensors").manifest == tiny_guard.manifest


def test_the_same_seed_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_refuser, "_STEPS", 20)  # two whole trainings would take 10 seconds
    for folder, seed, global_seed in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        torch.manual_seed(global_seed)  # must not matter
        build_tiny_refuser(tmp_path / folder, seed=seed)
    one, two, other = (tmp_path / folder for folder in "abc")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    weights = "model.safetensors"
    assert (one / weights).read_bytes() != (other / weights).read_bytes()


def test_its_sibling_never_refuses(
    never_refuses_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = AutoModelForCausalLM.from_pretrained(never_refuses_dir).eval()
    assert refusal_share(model, tiny_tokenizer, harmful_prompts() + harmless_prompts()) < 0.01
