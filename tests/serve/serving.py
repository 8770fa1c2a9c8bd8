"""The tiny refuser behind the real server, for tests that speak HTTP to it."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn
from prometheus_client import CollectorRegistry
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from guard.artifact import CarrierArtifact
from guard.policy import Policy
from serve.engine import Engine
from serve.metrics import GuardMetrics
from serve.server import bind_socket, create_app
from serve.transformers_engine import TransformersEngine

__all__ = ["MODEL", "Served", "Tiny", "build_engine", "serving", "wait_until"]

MODEL = "tiny/refuser"


@dataclass(frozen=True)
class Tiny:
    """The tiny refuser and its guard."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    artifact: CarrierArtifact


def build_engine(
    tiny: Tiny, policy: Policy, metrics: GuardMetrics, *, model: str = MODEL, **limits: int
) -> Engine:
    """Make the engine under test; `limits` are max_batch and max_queue."""
    return TransformersEngine(
        tiny.model,
        tiny.tokenizer,
        tiny.artifact,
        policy,
        model_name=model,
        on_record=metrics.observe,
        on_gate=metrics.observe_gate,
        on_unguarded=metrics.count_unguarded,
        **limits,
    )


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    model: str
    engine: Engine
    metrics: GuardMetrics
    loop: asyncio.AbstractEventLoop

    def stop_engine(self) -> None:
        """Stop the engine under the running server."""
        asyncio.run_coroutine_threadsafe(self.engine.stop(), self.loop).result(timeout=30)

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """The official client, without retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def post(self, path: str, **request: Any) -> httpx.Response:
        """Raw HTTP below /v1."""
        return httpx.post(f"{self.url}/v1/{path}", timeout=60, **request)

    def sample(self, name: str, **labels: str) -> float:
        """One number of /metrics."""
        wanted = {"model": self.model, **labels}
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            found = re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line)
            if found and dict(re.findall(r'(\w+)="([^"]*)"', found[1])) == wanted:
                return float(found[2])
        raise AssertionError(f"no sample {name} {wanted}")

    def responses(self, verdict: str) -> float:
        """Responses with this verdict, over all zones."""
        zones = ("pass", "raise", "lower", "none")
        return sum(
            self.sample("trimtab_responses_total", zone=zone, verdict=verdict) for zone in zones
        )


@contextmanager
def serving(
    tiny: Tiny,
    policy: Policy | None = None,
    api_key: str | None = None,
    *,
    model: str = MODEL,
    **limits: int,
) -> Iterator[Served]:
    """A server on a free port of this machine; stopped at the end."""
    policy = policy or Policy()
    off = policy.mode == "off"
    metrics = GuardMetrics(
        CollectorRegistry(),
        model=model,
        mode=policy.mode,
        artifact_id=None if off else tiny.artifact.artifact_id,
        format_version=None if off else 1,
    )
    metrics.set_budgets(policy)
    engine = build_engine(tiny, policy, metrics, model=model, **limits)
    app = create_app(engine, metrics=metrics, api_key=api_key, max_body_bytes=100_000)
    sock = bind_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=loop.run_until_complete, args=[server.serve(sockets=[sock])], daemon=True
    )
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield Served(f"http://127.0.0.1:{sock.getsockname()[1]}", model, engine, metrics, loop)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
        sock.close()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def wait_until(true: Any, seconds: float = 20.0) -> None:
    """Return once `true()` is; fail if it is not in time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
