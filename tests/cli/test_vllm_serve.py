"""The command line and environment that `trimtab serve --engine vllm` gives to vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli.vllm_serve import vllm_command
from guard.errors import InputError


def test_options_of_both_sides_reach_vllm_in_order() -> None:
    command = vllm_command(
        "model", {"--port": 8001, "--trust-remote-code": True, "--revision": None}, ["--seed", "1"]
    )
    assert command[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]
    assert command[4:] == ["model", "--port", "8001", "--trust-remote-code", "--seed", "1"]


@pytest.mark.parametrize(
    "argument", ["--chat-template", "--chat_template=x.jinja", "--trust-request-chat-template"]
)
def test_options_that_move_the_gate_are_refused(argument: str) -> None:
    with pytest.raises(InputError, match="cannot be used with a guard"):
        vllm_command("model", {}, [argument])


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--", "--seed", "1"], "options after -- need --engine vllm"),
        (["--engine", "vllm", "--max-queue", "3"], "--max-queue is not an option"),
        (["--engine", "vllm", "--device", "cpu"], "--device is not an option"),
        (["--engine", "vllm", "--layers-path", "x"], "--layers-path is not an option"),
    ],
)
def test_options_of_the_other_engine_are_errors(
    tmp_path: Path, arguments: list[str], fault: str
) -> None:
    guard = tmp_path / "guard.safetensors"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cli.main",
            "serve",
            str(tmp_path),
            "--guard",
            str(guard),
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert fault in done.stderr
