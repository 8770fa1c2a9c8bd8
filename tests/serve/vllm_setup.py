"""Environment of the tests that start vLLM."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def vllm_env(cache: Path) -> dict[str, str]:
    """For vLLM on a CPU, offline, in one process, with a compile cache of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRIMTAB_", "VLLM_"))}
    return {
        **kept,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_INT4_W4A8": "0",  # 8-bit activations round too coarsely for the canary
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm-cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
