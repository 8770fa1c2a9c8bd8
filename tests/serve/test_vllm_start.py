"""A vLLM that cannot be guarded does not start: options, files, models, swallowed errors."""

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


def drive(scenario: str, model: Path, folder: Path, options: object = None, **env: str) -> Any:
    """Run a scenario of `vllm_driver` and return what it wrote."""
    out = folder / "out.json"
    command = [sys.executable, "-m", "tests.serve.vllm_driver", scenario, str(model), str(out)]
    process = subprocess.run(
        [*command, json.dumps(options or {})],
        cwd=ROOT,
        env={**vllm_env(folder), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    return json.loads(out.read_text())


def test_options_that_are_not_exact_are_refused_by_name(
    vllm_model_dir: Path, vllm_guard: Path, tmp_path: Path
) -> None:
    seen = drive("refused", vllm_model_dir, tmp_path, TRIMTAB_GUARD=str(vllm_guard))
    assert seen.pop("fine").startswith("started, salt guard ")
    for option, error in seen.items():
        assert error.startswith("UnsupportedModelError"), (option, error)
        assert option in error


def test_what_cannot_be_calibrated_is_refused_by_name(vllm_model_dir: Path, tmp_path: Path) -> None:
    more = {"more": {"--enable-lora": {"enable_lora": True}}}
    seen = drive("refused", vllm_model_dir, tmp_path, more, TRIMTAB_ADMIN_KEY="of-the-operator")
    assert seen.pop("fine") == "started, salt None"  # nothing of ours in the compiled model
    for option, error in seen.items():
        assert error.startswith("UnsupportedModelError"), (option, error)
        assert option in error


def test_without_the_variables_the_plugin_changes_nothing(
    vllm_model_dir: Path, tmp_path: Path
) -> None:
    seen = drive("refused", vllm_model_dir, tmp_path)
    assert seen["fine"] == "started, salt None"
    assert seen["--enable-prompt-embeds"] == "started, salt None"


def test_a_guard_of_another_model_starts_nothing(
    tiny_guard: CarrierArtifact, vllm_model_dir: Path, tmp_path: Path
) -> None:
    guard_file = tmp_path / "tiny.safetensors"
    save_artifact(tiny_guard, guard_file)
    seen = drive("start", vllm_model_dir, tmp_path, TRIMTAB_GUARD=str(guard_file))
    assert "calibrated on tiny-refuser" in seen[0]


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_an_error_that_is_swallowed_still_lets_nothing_start(
    vllm_model_dir: Path, vllm_guard: Path, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "guard.safetensors"
    if damage == "flipped":
        data = bytearray(vllm_guard.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    # vLLM loads plugins once: the second engine of the process does not even ask again.
    seen = drive("start", vllm_model_dir, tmp_path, {"times": 2}, TRIMTAB_GUARD=str(file))
    assert seen[0].startswith("ArtifactError")
    assert seen[1].startswith("NotArmedError: trimtab could not be installed")


def test_a_policy_without_a_guard_starts_nothing(vllm_model_dir: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("mode: enforce\n")
    seen = drive("start", vllm_model_dir, tmp_path, TRIMTAB_POLICY=str(policy))
    assert "TRIMTAB_GUARD is needed" in seen[0]


def test_a_policy_that_steers_from_the_answer_starts_nothing(
    vllm_model_dir: Path, vllm_guard: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("steer_from: answer\nanswer_marker: </think>\n")
    env = {"TRIMTAB_GUARD": str(vllm_guard), "TRIMTAB_POLICY": str(policy)}
    seen = drive("start", vllm_model_dir, tmp_path, **env)
    assert seen[0].startswith("PolicyError: steer_from: answer is not possible in vLLM")
