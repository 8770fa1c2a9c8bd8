"""`trimtab calibrate --engine vllm`: start vLLM for the calibration alone, then read it there.

For models that transformers cannot run as they are deployed: tensor parallelism, quantised kernels.
The server listens on the loopback address, under a key that nobody else has, and ends with the
command. What reads it is the same as for `--endpoint`.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from re import findall

from cli.vllm_serve import vllm_command, vllm_environment
from guard.errors import EndpointError, InputError

__all__ = ["PrivateServer", "private_server"]

_LOG_LINES = 15
_END_SECONDS = 30


@dataclass(frozen=True)
class PrivateServer:
    """A vLLM server of this command's own.

    Attributes:
        url: where it answers.
        key: its TRIMTAB_ADMIN_KEY.
    """

    url: str
    key: str


@contextmanager
def private_server(
    model: str, options: Sequence[str], env: Mapping[str, str]
) -> Iterator[PrivateServer]:
    """Run `vllm serve` without a guard, to be calibrated; it is ended on the way out.

    Args:
        model: folder or hub id.
        options: of `vllm serve`.
        env: the environment to start it in.

    Raises:
        InputError: vLLM is not installed, or an option that would go round the guard.
        NotArmedError: vLLM would not load the plugin.
        EndpointError: it did not start.
    """
    if find_spec("vllm") is None:
        raise InputError("--engine vllm needs vLLM here: `pip install trimtab[vllm]`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = PrivateServer(f"http://127.0.0.1:{port}", secrets.token_urlsafe(32))
    environment = {**vllm_environment(env, None, None), "TRIMTAB_ADMIN_KEY": server.key}
    command = vllm_command(model, {"--host": "127.0.0.1", "--port": port}, options)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            command, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_ready(process, port)
            yield server
        except EndpointError as err:
            log.seek(0)
            text = log.read()
            sys.stderr.write("\n".join(text.splitlines()[-_LOG_LINES:]) + "\n")
            if process.poll() is None:
                raise
            ours = findall(r"guard\.errors\.\w+: (.*)", text)
            why = ours[-1] if ours else "see the log above"
            raise EndpointError(f"vLLM ended with exit code {process.returncode}: {why}") from err
        finally:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Return once it listens, which vLLM does when its model is loaded."""
    import httpx

    while process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise EndpointError("vLLM did not start")
