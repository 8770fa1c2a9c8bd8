"""Which model is this? Hashes that are equal for the same model in any dtype or library version.

A guard is bound to a model by `ModelIdentity`. Models and tokenizers are read by their public shape
only; nothing here imports transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guard.artifact import ModelIdentity
from guard.errors import UnsupportedModelError

__all__ = ["model_identity", "sample_of", "weights_of"]

_SAMPLES_PER_TENSOR = 64
_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "sliding_window",
)


def model_identity(
    model: nn.Module,
    tokenizer: Any,
    model_id: str,
    revision: str | None = None,
    *,
    weights: bool = True,
) -> ModelIdentity:
    """Return what binds a guard to a model.

    Args:
        model: a transformers causal language model, loaded.
        tokenizer: its tokenizer.
        model_id: how the user names the model; told in errors, never compared.
        revision: of the hub, if any; likewise.
        weights: False leaves their hash empty, for a caller that hashes them by itself.

    Raises:
        UnsupportedModelError: weights that are not in memory (meta tensors).
    """
    whole: Any = model.config
    config = whole.get_text_config()
    dtype = next(model.parameters()).dtype
    return ModelIdentity(
        model_id=model_id,
        revision=revision,
        architecture=type(model).__name__,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
        quantization=_quantization(whole),
        config_sha256=_sha256_json(_config_facts(config)),
        tokenizer_sha256=_sha256_json(_tokenizer_facts(tokenizer)),
        chat_template_sha256=_sha256_json(getattr(tokenizer, "chat_template", None)),
        weights_sha256=_weights_sha256(model) if weights else "",
    )


def _sha256_json(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _quantization(config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    method = method or getattr(settings, "quant_method", "unknown")
    return str(getattr(method, "value", method))


def _config_facts(config: Any) -> dict[str, object]:
    """What of a config changes the computation, in words that no library version changes."""
    facts = {name: getattr(config, name, None) for name in _CONFIG_FIELDS}
    heads = facts["num_attention_heads"]  # None where there is no attention
    types = getattr(config, "layer_types", None) or []
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or heads
    facts["head_dim"] = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    # Older transformers do not spell out that every layer attends to everything.
    facts["layer_types"] = [] if set(types) <= {"full_attention"} else list(types)
    facts["rope"] = _rope(config)
    return facts


def _rope(config: Any) -> dict[str, object]:
    """Rotary settings: transformers 5 has them in `rope_parameters`, 4 in two fields."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    rope = dict(settings or {})
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None))
    rope.setdefault("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    legacy_type = rope.pop("type", "default")
    if not any(isinstance(value, Mapping) for value in rope.values()):  # else one per layer type
        rope.setdefault("rope_type", legacy_type)
    return {name: value for name, value in rope.items() if value is not None}


def _tokenizer_facts(tokenizer: Any) -> dict[str, object]:
    """The vocabulary with added tokens, and the merges where they can be read."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges: list[Any] = []
    if backend is not None:
        merges = json.loads(backend.to_str())["model"].get("merges") or []
    return {
        "vocab": sorted(tokenizer.get_vocab().items()),
        # Older tokenizers releases write a merge as one string.
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
    }


def _weights_sha256(model: nn.Module) -> str:
    """Hash a fixed sample of every weight, as bfloat16, in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights_of(model)):
        if weight.is_meta:
            raise UnsupportedModelError(
                f"weight {name} is not in memory (offloaded), so the model cannot be identified;"
                " load the whole model on one device"
            )
        digest.update(sample_of(name, weight))
    return digest.hexdigest()


def sample_of(name: str, weight: Tensor) -> bytes:
    """What of one weight enters the hash: its name, its shape and a sample in bfloat16."""
    flat = weight.detach().reshape(-1)
    places = torch.tensor(_places(name, flat.numel()), device=flat.device)
    sample = flat[places].to(torch.bfloat16).cpu().contiguous()
    return f"{name} {tuple(weight.shape)}\n".encode() + sample.view(torch.int16).numpy().tobytes()


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and saved buffers (quantised weights are kept as such)."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _places(name: str, n_elements: int) -> list[int]:
    """Indices that depend on the weight's name alone, so no random generator's version matters."""
    if n_elements <= _SAMPLES_PER_TENSOR:
        return list(range(n_elements))
    seeds = (f"{name}:{i}".encode() for i in range(_SAMPLES_PER_TENSOR))
    return [
        int.from_bytes(hashlib.sha256(seed).digest()[:8], "little") % n_elements for seed in seeds
    ]
