"""vLLM forks its engine behind the plugin; the child must be able to compute. Needs no vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guard.artifact import CarrierArtifact, save_artifact
from guard.probe import Probe
from guard.steering import Carrier
from tests.guard.test_session import make_guard
from tests.serve.vllm_setup import ROOT

D_MODEL = 4096  # of a 7B model: the probe's weights are 65,536 numbers

FORK = """
import os, sys, torch
torch.set_num_threads(2)
{first}
pid = os.fork()
if pid == 0:
    torch.zeros(1 << 22).add_(1.0)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def forked(seconds: float, first: str, *arguments: str) -> int:
    """Exit code of a process that does something, forks, and computes in the child."""
    command = [sys.executable, "-c", FORK.format(first=first), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def large_guard() -> CarrierArtifact:
    """A guard whose tensors are as large as those of a 7B model."""
    small = make_guard()
    torch.manual_seed(0)
    identity = small.manifest.model.model_copy(update={"d_model": D_MODEL})
    return replace(
        small,
        manifest=small.manifest.model_copy(update={"model": identity}),
        raise_carrier=Carrier.additive(1, torch.randn(D_MODEL)),
        lower_carrier=Carrier.additive(1, torch.randn(D_MODEL)),
        probe=Probe(torch.randn(16, D_MODEL), torch.randn(17)),
    )


def test_a_forked_engine_can_compute_after_the_plugin_has_read_the_guard(tmp_path: Path) -> None:
    guard = tmp_path / "guard.safetensors"
    save_artifact(large_guard(), guard)
    first = "from serve.vllm_plugin import _load; _load(sys.argv[1], None)"
    assert forked(60, first, str(guard)) == 0


def test_it_could_not_if_the_plugin_computed_with_threads() -> None:
    """What the test above is about: without it the child waits for threads that it has not."""
    with pytest.raises(subprocess.TimeoutExpired):
        forked(8, "torch.isfinite(torch.randn(16, 4096)).all()")
