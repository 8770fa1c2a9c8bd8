"""The front end of a guarded vLLM: nothing before every rank is armed, then metrics.

A response's text is known here, its record in the worker. They are joined by request id: ids of
ended responses are sent to the workers a few times a second, and the records come back. The text is
judged here and thrown away.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Any

from guard.artifact import CarrierArtifact
from guard.errors import NotArmedError, RequestError
from guard.gate import Zone
from guard.policy import POLICY_FIELD, Policy
from guard.refusal import judge
from guard.session import Record
from serve.metrics import ErrorKind, GuardMetrics
from serve.vllm_patch import check_statuses, wrap

__all__ = ["Front", "check_request", "install", "metrics_of", "read_record", "served_name"]

_log = logging.getLogger("trimtab.vllm")

_DRAIN_SECONDS = 0.25


@dataclass(frozen=True)
class _Ended:
    """A response that ended.

    Attributes:
        text: None if it was aborted, or is wanted as tokens only.
        seconds: how long it took.
        aborted: it did not come to its end.
    """

    text: str | None
    seconds: float | None
    aborted: bool


def read_record(fields: dict[str, Any]) -> Record:
    """A worker's record, out of JSON."""
    zone = fields["zone"]
    return Record(**{**fields, "zone": Zone(zone) if zone is not None else None})


class Front:
    """The guard's side of one `AsyncLLM`.

    Args:
        engine: the `AsyncLLM`.
        artifact: the guard file.
        policy: the operator's.

    Attributes:
        metrics: the guard's.
        spared: says which requests are not counted: those of a calibration.
    """

    def __init__(self, engine: Any, artifact: CarrierArtifact, policy: Policy) -> None:
        self.spared: Callable[[str], bool] = lambda _: False
        self._engine, self._artifact, self._policy = engine, artifact, policy
        self._ended: dict[str, _Ended] = {}
        self._armed = False
        self._arming: asyncio.Lock | None = None
        self._task: asyncio.Task[None] | None = None
        self.metrics = metrics_of(
            served_name(engine.vllm_config),
            policy.mode,
            artifact.artifact_id,
            artifact.manifest.format_version,
        )
        self.metrics.set_budgets(policy)
        self.metrics.set_armed(False)

    async def ensure_armed(self) -> None:
        """Return once every rank has said that it is armed.

        Raises:
            NotArmedError: one is not.
        """
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        if self._armed:
            return
        if self._arming is None:
            self._arming = asyncio.Lock()
        async with self._arming:
            statuses = await self._engine.collective_rpc("trimtab_status")
            n_ranks = self._engine.vllm_config.parallel_config.world_size
            check_statuses(statuses, self._artifact.artifact_id, self._policy, n_ranks)
            self._armed = True
            self.metrics.set_armed(True)

    async def admit(self, prompt: Any, params: Any) -> None:
        """Return if a request may be served.

        Raises:
            VLLMValidationError: it cannot be guarded, or asks for what it must not; 400.
            NotArmedError: the guard is not armed.
        """
        try:
            check_request(self._policy, prompt, params)
        except RequestError as error:
            self.metrics.count_error(ErrorKind.BAD_REQUEST)
            raise _client_fault(error) from error
        try:
            await self.ensure_armed()
        except NotArmedError:
            self.metrics.count_error(ErrorKind.NOT_ARMED)
            raise

    def end(
        self, request_id: str, text: str | None, seconds: float | None, *, aborted: bool = False
    ) -> None:
        """A response ended; without a text it gets no verdict."""
        if not self.spared(request_id):
            self._ended[request_id] = _Ended(text, seconds, aborted)

    def close(self) -> None:
        """Stop draining."""
        if self._task is not None:
            self._task.cancel()

    async def _work(self) -> None:
        await self.ensure_armed()
        try:
            while not self._engine.errored:
                await asyncio.sleep(_DRAIN_SECONDS)
                if self._ended:
                    await self._drain()
        finally:  # a dead engine fails the drain: the gauge must not go on saying "armed"
            self._armed = False
            self.metrics.set_armed(False)

    async def _drain(self) -> None:
        ended, self._ended = self._ended, {}
        replies = await self._engine.collective_rpc("trimtab_drain", args=(list(ended),))
        records = json.loads(replies[0])  # every rank has the same
        for request_id, response in ended.items():
            self._book(records.get(request_id), response)

    def _book(self, found: dict[str, Any] | None, response: _Ended) -> None:
        if response.seconds is not None:
            self.metrics.observe_request(response.seconds)
        if response.aborted:
            self.metrics.count_error(ErrorKind.CLIENT_DISCONNECT)
        if found is None:  # aborted before it had its first token: there was nothing to guard
            self.metrics.observe(None)
            return
        record = read_record(found["record"])
        if response.text is not None and not found["failed"]:
            record = replace(record, verdict=judge(response.text))
        self.metrics.observe(record)
        self.metrics.observe_gate(found["gate_seconds"])
        if found["failed"]:
            self.metrics.count_error(ErrorKind.NUMERICS)
        if found["unguarded"]:
            self.metrics.count_unguarded()


def install(artifact: CarrierArtifact, policy: Policy) -> None:
    """Patch vLLM's front ends in this process."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor

    def init_async(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _refuse_beam_search()
        front = self.trimtab = Front(self, artifact, policy)
        self.output_processor.trimtab = front
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # it is asked for by the first request, then
            return
        front._task = loop.create_task(front._work())

    def add_request(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        async def guarded() -> Any:
            await self.trimtab.admit(*_prompt_and_params(args, kwargs))
            return await original(self, *args, **kwargs)

        return guarded()

    def check_health(original: Callable[..., Any], self: Any) -> Any:
        async def guarded() -> None:
            await original(self)
            try:
                await self.trimtab.ensure_armed()
            except NotArmedError as error:
                _log.error("not armed: %s", error)
                raise EngineDeadError from error  # the server answers 503

        return guarded()

    def shutdown(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        front = self.__dict__.get("trimtab")
        if front is not None:
            front.close()
        return original(self, *args, **kwargs)

    def init_sync(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _refuse_beam_search()
        n_ranks = self.vllm_config.parallel_config.world_size
        statuses = self.collective_rpc("trimtab_status")
        check_statuses(statuses, artifact.artifact_id, policy, n_ranks)

    def add_request_sync(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            check_request(policy, *_prompt_and_params(args, kwargs))
        except RequestError as error:
            raise _client_fault(error) from error
        return original(self, *args, **kwargs)

    def finish(original: Callable[..., Any], self: Any, state: Any) -> Any:
        front = self.__dict__.get("trimtab")
        if front is not None and state.detokenizer is not None:
            # A detokenizer that was told not to detokenize has no text.
            text = getattr(state.detokenizer, "output_text", None)
            front.end(state.request_id, text, _seconds(state))
        return original(self, state)

    def abort(
        original: Callable[..., Any], self: Any, request_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        aborted = original(self, request_ids, *args, **kwargs)
        front = self.__dict__.get("trimtab")
        if front is not None:
            for request_id in aborted:
                front.end(request_id, None, None, aborted=True)
        return aborted

    wrap(AsyncLLM, "__init__", init_async)
    wrap(AsyncLLM, "add_request", add_request)
    wrap(AsyncLLM, "check_health", check_health)
    wrap(AsyncLLM, "shutdown", shutdown)
    wrap(LLMEngine, "__init__", init_sync)
    wrap(LLMEngine, "add_request", add_request_sync)
    wrap(OutputProcessor, "_finish_request", finish)
    wrap(OutputProcessor, "abort_requests", abort)


def _refuse_beam_search() -> None:
    """Let nobody search with beams: every step is a request, each with a fresh budget."""
    from vllm.entrypoints.generate.beam_search import offline, online
    from vllm.exceptions import VLLMValidationError

    def refuse(*_: Any, **__: Any) -> Any:
        raise VLLMValidationError(
            "beam search cannot be guarded: every step of it would have a KL budget of its own",
            parameter="use_beam_search",
        )

    owners = [
        owner
        for module in (offline, online)
        for owner in vars(module).values()
        if isinstance(owner, type) and "beam_search" in vars(owner)
    ]
    if len(owners) < 2:
        raise NotArmedError("this vLLM searches with beams somewhere else; trimtab supports 0.32")
    for owner in owners:
        owner.beam_search = refuse  # type: ignore[attr-defined]


def _prompt_and_params(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Prompt and sampling parameters of a call of `add_request`; a finished request has its own."""
    prompt = kwargs.get("prompt", args[1] if len(args) > 1 else None)
    params = kwargs.get("params", args[2] if len(args) > 2 else None)
    return prompt, getattr(prompt, "params", params)


def check_request(policy: Policy, prompt: Any, params: Any) -> None:
    """Refuse what cannot be guarded, or names more of the guard than a published policy.

    Raises:
        RequestError: the client's fault.
    """
    if isinstance(prompt, AsyncGenerator):
        raise RequestError(
            "a prompt that goes on after the response began cannot be guarded: the gate is read"
            " once, at the end of the prompt",
            "prompt",
        )
    extra = getattr(params, "extra_args", None) or {}
    named = [name for name in extra if name.lower().startswith("trimtab") and name != POLICY_FIELD]
    if named:
        raise RequestError(
            f"vllm_xargs {', '.join(named)}: the guard is the operator's; a request can only name"
            f" a published policy, as {POLICY_FIELD}",
            "vllm_xargs",
        )
    if POLICY_FIELD in extra:
        if not isinstance(extra[POLICY_FIELD], str):
            raise RequestError(f"{POLICY_FIELD} must be a string", POLICY_FIELD)
        policy.published(extra[POLICY_FIELD])


def _client_fault(error: RequestError) -> Exception:
    """What vLLM answers with status 400."""
    from vllm.exceptions import VLLMValidationError

    fault: Exception = VLLMValidationError(str(error), parameter=error.param)
    return fault


def served_name(config: Any) -> str:
    """The name under which a `vllm.config.VllmConfig` serves its model."""
    names = config.model_config.served_model_name
    return names if isinstance(names, str) else str(names[0])


@functools.lru_cache(maxsize=8)
def metrics_of(
    model: str, mode: str, artifact_id: str | None = None, format_version: int | None = None
) -> GuardMetrics:
    """One set per process, which outlives its engines; vLLM's /metrics shows this registry."""
    from prometheus_client import REGISTRY

    return GuardMetrics(
        REGISTRY, model=model, mode=mode, artifact_id=artifact_id, format_version=format_version
    )


def _seconds(state: Any) -> float | None:
    stats = getattr(state, "stats", None)
    return None if stats is None else max(0.0, time.time() - stats.arrival_time)
