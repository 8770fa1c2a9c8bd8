"""Tiny models of many architectures, random weights, built from their configs in milliseconds.

Weights are drawn wide (`initializer_range` 0.3): with the usual 0.02 attention hardly matters at
this size, and a shadow pass that reads the wrong keys would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

__all__ = ["BUILDERS", "N_LAYERS", "TINY", "VOCAB", "WINDOW", "build"]

VOCAB = 160
N_LAYERS = 4
WINDOW = 6
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
_GEMMA = {**TINY, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
_GEMMA3 = {**_GEMMA, "layer_types": _ALTERNATING}
_MOE = {"num_local_experts": N_LAYERS, "num_experts_per_tok": 2}  # as many experts as layers


def _gemma3_with_vision() -> PreTrainedModel:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=N_LAYERS,  # as many as the language model has
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**_GEMMA3),
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=VOCAB - 3,
        eoi_token_index=VOCAB - 2,
        image_token_index=VOCAB - 1,
    )
    return Gemma3ForConditionalGeneration(config)


def _qwen2_5_with_vision() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config={**TINY, "rope_parameters": rope},
        vision_config={
            "depth": N_LAYERS,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=WINDOW)),
    "Qwen 2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **TINY, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=N_LAYERS // 2
        )
    ),
    "Qwen 3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=16)),
    "Gemma 2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GEMMA)),
    "Gemma 3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GEMMA3)),
    "Gemma 3 with vision": _gemma3_with_vision,
    "Qwen 2.5 with vision": _qwen2_5_with_vision,
    "Phi-3": lambda: Phi3ForCausalLM(Phi3Config(**TINY, sliding_window=WINDOW)),
    "OLMo 2": lambda: Olmo2ForCausalLM(Olmo2Config(**TINY)),
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TINY, **_MOE, sliding_window=WINDOW)),
    "GPT-OSS": lambda: GptOssForCausalLM(
        GptOssConfig(
            **TINY,
            **_MOE,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=_ALTERNATING,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
}


def build(name: str) -> PreTrainedModel:
    """The model of that name in eval mode, float32; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS[name]().eval()
