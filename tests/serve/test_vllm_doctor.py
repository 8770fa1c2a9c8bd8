"""`trimtab doctor --engine vllm` in front of real vLLM: a proof, and a failure that says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from guard.artifact import CarrierArtifact, save_artifact
from tests.serve.vllm_setup import ROOT, vllm_env

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def doctor(model: Path, guard: Path, folder: Path) -> tuple[int, dict[str, Any]]:
    """Its exit code, and check → detail of what passed or fix of what did not."""
    env = vllm_env(folder)
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]
    options = ["--engine", "vllm", "--guard", str(guard), "--json", "--", "--enforce-eager"]
    options += ["--max-model-len", "1024", "--max-num-seqs", "16"]
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "doctor", str(model), *options],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, Any] = json.loads(done.stdout)  # and nothing else, whatever vLLM says
    return done.returncode, {check["name"]: check for check in found["checks"]}


def test_it_shows_what_is_armed_and_proves_it_with_two_requests(
    vllm_model_dir: Path, vllm_guard: Path, tmp_path: Path
) -> None:
    code, checks = doctor(vllm_model_dir, vllm_guard, tmp_path)
    assert [check for check in checks.values() if not check["ok"]] == []
    assert code == 0
    armed = checks["rank 0 armed"]["detail"]
    assert "mode enforce, V1 runner, reads layers 10, 12, 20, 21" in armed
    assert {"shadow pass, raise carrier", "shadow pass, lower carrier"} <= set(checks)
    assert " of 4 nats" in checks["a raised request"]["detail"]
    assert checks["a passed request"]["detail"] == "0 nats, 0 shadow passes"


def test_it_fails_with_the_cause_where_vllm_does_not_start(
    tiny_guard: CarrierArtifact, vllm_model_dir: Path, tmp_path: Path
) -> None:
    guard = tmp_path / "tiny.safetensors"
    save_artifact(tiny_guard, guard)
    code, checks = doctor(vllm_model_dir, guard, tmp_path)
    assert code == 1
    assert not checks["vllm engine"]["ok"]
    assert "calibrated on tiny-refuser" in checks["vllm engine"]["detail"]
    assert "a raised request" not in checks
