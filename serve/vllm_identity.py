"""Which model did vLLM load? The same hashes as `guard.identity`, without a second model in memory.

vLLM fuses and reorders weights, so its modules cannot be compared with a calibration. Its source
can: the checkpoint's own tensors are sampled straight from the safetensors files, under the names
and shapes that transformers gives them. Where a checkpoint does not spell them out one to one
(weights that transformers renames, fuses or unpacks), transformers loads the model once, on the
CPU, which is slow and needs its memory, but is the same computation.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from guard.artifact import ModelIdentity
from guard.errors import UnsupportedModelError
from guard.identity import model_identity, sample_of, weights_of

__all__ = ["checkpoint_identity"]


def checkpoint_identity(config: Any) -> ModelIdentity:
    """Return what binds a guard to the model that this configuration loads.

    Args:
        config: a `vllm.config.ModelConfig`.

    Raises:
        UnsupportedModelError: the checkpoint or the tokenizer cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    remote = config.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.tokenizer, revision=config.tokenizer_revision, trust_remote_code=remote
        )
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(
                config.hf_config, dtype=config.dtype, trust_remote_code=remote
            )
        folder = _folder(config.model, config.revision)
        found = model_identity(shell, tokenizer, config.model, config.revision, weights=False)
        # The shell has no quantised weights, so it does not say how transformers names them.
        digest = _weights_sha256(shell, folder) if found.quantization is None else None
        if digest is None:
            whole = AutoModelForCausalLM.from_pretrained(
                config.model, revision=config.revision, dtype="auto", trust_remote_code=remote
            )
            return model_identity(whole, tokenizer, config.model, config.revision)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as err:
        raise UnsupportedModelError(
            f"{config.model}: cannot tell which model this is: {err}"
        ) from err
    return found.model_copy(update={"weights_sha256": digest})


def _folder(model: str, revision: str | None) -> Path:
    """The folder of a checkpoint that vLLM has loaded, or is about to, from the same place."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors"]))


def _weights_sha256(shell: nn.Module, folder: Path) -> str | None:
    """Hash the checkpoint's samples; None if it does not hold every weight under its own name."""
    where: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            where.update(dict.fromkeys(tensors.keys(), file))
    wanted = sorted((name, tuple(weight.shape)) for name, weight in weights_of(shell))
    if not wanted or any(name not in where for name, _ in wanted):
        return None
    digest = hashlib.sha256()
    for name, shape in wanted:
        with safe_open(where[name], "pt") as tensors:
            if tuple(tensors.get_slice(name).get_shape()) != shape:
                return None
            digest.update(sample_of(name, tensors.get_tensor(name)))
    return digest.hexdigest()
