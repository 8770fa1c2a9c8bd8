"""Which vLLM configurations can be guarded exactly; every other is refused before it starts.

An option that would make the budget or the gate inexact is an error that names the option, never
a warning: the guard serves what it can prove, or nothing.
"""

from __future__ import annotations

import os
from typing import Any

from guard.errors import PolicyError, UnsupportedModelError
from guard.policy import Policy

__all__ = ["SALT", "check_calibrated", "check_config", "check_policy", "salt_config"]

SALT = "trimtab"
"""Key in `VllmConfig.additional_config`; it is part of the compile cache's hash."""

_LOAD_FORMATS = ("auto", "hf", "safetensors")


def check_policy(policy: Policy) -> None:
    """Refuse a policy that vLLM cannot follow exactly.

    Raises:
        PolicyError: names the key to change.
    """
    if policy.steer_from != "response":
        raise PolicyError(
            f"steer_from: {policy.steer_from} is not possible in vLLM, where steering begins at a"
            " response's first token: set steer_from: response in the policy, or serve with"
            " `trimtab serve --engine transformers`"
        )


def check_config(config: Any) -> None:
    """Refuse a configuration in which the guard would not be exact.

    Args:
        config: a `vllm.config.VllmConfig`.

    Raises:
        UnsupportedModelError: names every option to change.
    """
    faults = [text for wrong, text in _rules(config) if wrong]
    if faults:
        raise UnsupportedModelError(
            "trimtab cannot guard this vLLM configuration exactly, so it does not start: "
            + "; ".join(faults)
            + ". Without TRIMTAB_GUARD and TRIMTAB_ADMIN_KEY vLLM serves it unguarded"
        )


def check_calibrated(config: Any) -> None:
    """Refuse a configuration that cannot be calibrated while it serves.

    Raises:
        UnsupportedModelError: names the option to change.
    """
    check_config(config)
    if config.lora_config is not None:
        raise UnsupportedModelError(
            "with TRIMTAB_ADMIN_KEY set, drop --enable-lora: a calibration reads the base model,"
            " and a guard made without the adapters works with them; set the key on a server that"
            " has none"
        )


def _rules(config: Any) -> list[tuple[bool, str]]:
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    scheduler = config.scheduler_config
    load_format = getattr(config.load_config.load_format, "value", config.load_config.load_format)
    return [
        (
            os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
            "unset VLLM_USE_RUST_FRONTEND: requests would not pass the guard's admission, nor be"
            " counted",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "set --pipeline-parallel-size 1: the gate and the carriers lie on several stages",
        ),
        (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "set --decode-context-parallel-size 1 and --prefill-context-parallel-size 1:"
            " no rank holds a request's whole KV cache",
        ),
        (
            parallel.data_parallel_size > 1,
            "set --data-parallel-size 1 and put several servers behind a load balancer:"
            " the records of other engines cannot be read",
        ),
        (
            bool(getattr(parallel, "enable_dbo", False)),
            "drop --enable-dbo: a step is split in two",
        ),
        (
            config.speculative_config is not None,
            "drop --speculative-config: drafts are accepted against unsteered distributions",
        ),
        (
            model.runner_type != "generate",
            "use --runner generate: a pooling model writes no response",
        ),
        (
            bool(model.is_hybrid) or bool(model.is_attention_free),
            "choose a --model that has attention in every layer: recurrent state (hybrid or"
            " attention-free models) would be written by the shadow pass",
        ),
        (
            bool(getattr(model, "is_encoder_decoder", False)),
            "choose a decoder-only --model",
        ),
        (
            bool(model.is_multimodal_model) or bool(model.uses_mrope),
            "choose a text-only --model: positions of images are not steered",
        ),
        (
            bool(model.enable_prompt_embeds),
            "drop --enable-prompt-embeds: a prompt without token ids has no gate position",
        ),
        (
            config.lora_config is not None
            and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower()
            not in ("", "0", "false"),
            "unset VLLM_ALLOW_RUNTIME_LORA_UPDATING: a client could load weights of its own",
        ),
        (
            config.lora_config is not None
            and scheduler.max_num_batched_tokens < 2 * scheduler.max_num_seqs,
            "with --enable-lora set --max-num-batched-tokens to twice --max-num-seqs or more:"
            " a shadow pass has two rows per request",
        ),
        (
            config.kv_transfer_config is not None,
            "drop --kv-transfer-config: KV from elsewhere comes without its gate score",
        ),
        (
            bool(cache.kv_sharing_fast_prefill),
            "drop --kv-sharing-fast-prefill: it skips layers that the gate reads",
        ),
        (
            getattr(config, "weight_transfer_config", None) is not None,
            "drop --weight-transfer-config: a guard is made for weights that do not change",
        ),
        (
            model.quantization is not None
            and getattr(model.hf_config, "quantization_config", None) is None,
            "drop --quantization, or quantise the checkpoint and calibrate a guard for it: weights"
            " that are quantised as they are loaded are not those of the calibration",
        ),
        (
            load_format not in _LOAD_FORMATS,
            f"use --load-format {' or '.join(_LOAD_FORMATS)}: weights from elsewhere cannot be"
            " identified",
        ),
    ]


def salt_config(config: Any, salt: str) -> None:
    """Mark a configuration as guarded, so that it never shares compiled code with another.

    Raises:
        UnsupportedModelError: `--additional-config` is not a mapping.
    """
    extra = config.additional_config
    if not isinstance(extra, dict):
        raise UnsupportedModelError(
            "trimtab needs --additional-config to be a JSON object, to keep the compile caches of"
            f" guarded and unguarded runs apart; it is a {type(extra).__name__}"
        )
    config.additional_config = {**extra, SALT: salt}
