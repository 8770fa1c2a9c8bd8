"""A model's identity: the same however it is loaded, and what differs is in the right field."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from guard.artifact import ModelIdentity
from guard.errors import UnsupportedModelError
from guard.identity import _config_facts, _tokenizer_facts, model_identity


def _differing(first: ModelIdentity, second: ModelIdentity) -> set[str]:
    return {
        name for name in ModelIdentity.model_fields if getattr(first, name) != getattr(second, name)
    }


@pytest.fixture(scope="module")
def identity(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> ModelIdentity:
    return model_identity(tiny_model, tiny_tokenizer, "tiny", None)


def test_the_same_model_loaded_again_is_the_same(
    tiny_refuser_dir: Path, identity: ModelIdentity
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_refuser_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_refuser_dir)
    assert _differing(identity, model_identity(model, tokenizer, "tiny")) == set()


def test_another_dtype_differs_in_the_dtype_alone(
    tiny_refuser_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, identity: ModelIdentity
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_refuser_dir, dtype=torch.bfloat16)
    other = model_identity(model, tiny_tokenizer, "tiny")
    assert _differing(identity, other) == {"dtype"}
    assert other.dtype == "bfloat16"


def test_another_name_is_told_but_is_no_other_model(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, identity: ModelIdentity
) -> None:
    other = model_identity(tiny_model, tiny_tokenizer, "elsewhere", "main")
    assert _differing(identity, other) == {"model_id", "revision"}


def test_every_changed_weight_changes_the_weights_hash(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, identity: ModelIdentity
) -> None:
    model = copy.deepcopy(tiny_model)
    for name, weight in model.named_parameters():
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.5)
        changed = model_identity(model, tiny_tokenizer, "tiny")
        assert _differing(identity, changed) == {"weights_sha256"}, name
        with torch.no_grad():
            weight.copy_(before)
    assert model_identity(model, tiny_tokenizer, "tiny") == identity


def test_another_config_changes_the_config_hash(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, identity: ModelIdentity
) -> None:
    model = copy.deepcopy(tiny_model)
    model.config.rms_norm_eps *= 2
    assert _differing(identity, model_identity(model, tiny_tokenizer, "tiny")) == {"config_sha256"}


def test_another_token_changes_the_tokenizer_hash(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, identity: ModelIdentity
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["unheard-of"])
    other = model_identity(tiny_model, tokenizer, "tiny")
    assert _differing(identity, other) == {"tokenizer_sha256"}


def test_another_template_changes_the_template_hash(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, identity: ModelIdentity
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template += " "
    other = model_identity(tiny_model, tokenizer, "tiny")
    assert _differing(identity, other) == {"chat_template_sha256"}


def test_weights_that_are_not_in_memory_cannot_be_identified(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = copy.deepcopy(tiny_model).to("meta")
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        model_identity(model, tiny_tokenizer, "tiny")


def _config(**fields: Any) -> SimpleNamespace:
    common = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return SimpleNamespace(**common, **fields)


def test_older_and_newer_config_layouts_say_the_same() -> None:
    older = _config(rope_theta=1e6, rope_scaling=None)
    newer = _config(
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        layer_types=["full_attention"] * 2,
        num_key_value_heads=4,
        head_dim=16,
    )
    assert _config_facts(older) == _config_facts(newer)
    scaled = _config(rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0})
    scaled_newer = _config(
        rope_parameters={"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}
    )
    assert _config_facts(scaled) == _config_facts(scaled_newer)
    assert _config_facts(scaled) != _config_facts(older)


def test_sliding_layers_count() -> None:
    full = _config(layer_types=["full_attention"] * 2)
    mixed = _config(layer_types=["full_attention", "sliding_attention"])
    assert _config_facts(full) != _config_facts(mixed)


def test_merges_count_in_either_spelling() -> None:
    def tokenizer(merges: str) -> Any:
        text = f'{{"model": {{"merges": {merges}}}}}'
        return SimpleNamespace(
            get_vocab=lambda: {"a": 0}, backend_tokenizer=SimpleNamespace(to_str=lambda: text)
        )

    assert _tokenizer_facts(tokenizer('["a b"]')) == _tokenizer_facts(tokenizer('[["a", "b"]]'))
    assert _tokenizer_facts(tokenizer('["a b"]')) != _tokenizer_facts(tokenizer("[]"))


def test_the_quantisation_method_is_told(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, identity: ModelIdentity
) -> None:
    model = copy.deepcopy(tiny_model)
    model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    other = model_identity(model, tiny_tokenizer, "tiny")
    assert _differing(identity, other) == {"quantization"}
    assert other.quantization == "awq"
