"""Fixtures of the vLLM tests: the embedded model, and a guard made for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.vllm_setup import ROOT, vllm_env


@pytest.fixture(scope="session")
def vllm_model_dir() -> Path:
    """Folder of the embedded model; it is an error, not a skip, if it is not there."""
    folder = os.environ.get("TRIMTAB_TEST_MODEL")
    if folder:
        return Path(folder)
    from cli.models import QWEN_CODER, model_state

    state = model_state(QWEN_CODER)
    if not state.folder.is_dir():
        pytest.fail(f"the embedded model is missing: run `trimtab models fetch {QWEN_CODER.name}`")
    return state.folder


@pytest.fixture(scope="session")
def vllm_guard(vllm_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guard that raises about a third of the prompts and lowers another."""
    folder = tmp_path_factory.mktemp("vllm-guard")
    out = folder / "guard.safetensors"
    command = [sys.executable, "-m", "tests.serve.vllm_driver", "make_guard"]
    subprocess.run(
        [*command, str(vllm_model_dir), str(out)], cwd=ROOT, env=vllm_env(folder), check=True
    )
    return out
