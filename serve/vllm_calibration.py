"""A vLLM server that can be calibrated: the front end's side of `calibration_routes`.

With a guard it goes on serving behind it, and the calibration reads the base model beside it.
Without one nothing is steered: the log and `trimtab_guard_armed 0` say so.

Live traffic comes first. One job runs at a time, of a few prompts while others are being served,
at the lowest priority; and after each batch the calibration rests for as long as it worked.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request
from jinja2 import TemplateError
from safetensors.torch import load as load_tensors
from torch import Tensor

from guard.endpoint import CaptureRequest, ModelFacts, RespondRequest, ShadowRequest, pack
from guard.errors import EndpointError, NotArmedError, UnsupportedModelError
from guard.template import (
    Chat,
    chat_ids,
    check_template,
    distinct_instructions,
    instruction_suffix,
    message_opening,
    whole_chat_ids,
)
from serve.calibration_routes import calibration_router
from serve.vllm_desk import WorkerDesk, job_of, request_name
from serve.vllm_front import metrics_of, served_name
from serve.vllm_identity import checkpoint_identity
from serve.vllm_limits import check_calibrated
from serve.vllm_patch import wrap

__all__ = ["VllmBackend", "install"]

_log = logging.getLogger("trimtab.vllm")

_AT_ONCE_WHILE_BUSY = 4
_LAST = 2**31 - 1  # priority, where vLLM schedules by it
_LONGEST_REST_SECONDS = 5.0
_BUILDERS = (
    "vllm.entrypoints.launchers.api_server.entry",  # 0.32
    "vllm.entrypoints.openai.api_server",  # 0.26
)


class VllmBackend:
    """An `AsyncLLM` as the backend of the calibration's routes.

    Args:
        engine: the `AsyncLLM`.
        facts: of its model.
        tokenizer: the checkpoint's own.
    """

    def __init__(self, engine: Any, facts: ModelFacts, tokenizer: Any) -> None:
        self._engine, self._facts, self._tokenizer = engine, facts, tokenizer
        self._jobs: deque[str] = deque(maxlen=64)

    @property
    def facts(self) -> ModelFacts:
        """The model that is served."""
        return self._facts

    def mine(self, request_id: str) -> bool:
        """True if a request is the calibration's own."""
        named = job_of(request_id)
        return named is not None and named[0] in self._jobs

    async def encode(self, chats: Sequence[Chat]) -> list[list[int] | None]:
        """Token ids of chats; None: the template takes no such chat."""
        return await asyncio.to_thread(
            lambda: [whole_chat_ids(self._tokenizer, chat, TemplateError) for chat in chats]
        )

    async def decode(self, tokens: list[list[int]]) -> list[str]:
        """Texts of responses."""
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]

    async def respond(self, request: RespondRequest) -> list[list[int]]:
        """Greedy responses of the base model."""
        return (await self._run("respond", b"", request.prompts, request.max_tokens))[0]

    async def capture(self, request: CaptureRequest) -> dict[str, Tensor]:
        """Logits and hidden states."""
        prompts = request.prompts
        return (await self._run("capture", pack({}, request), prompts, [1] * len(prompts)))[1]

    async def shadow(self, request: ShadowRequest, null: Tensor, steered: Tensor) -> Tensor:
        """Steered − null logits."""
        body, prompts = pack({"null": null, "steered": steered}, request), request.prompts
        return (await self._run("shadow", body, prompts, [1] * len(prompts)))[1]["difference"]

    async def _run(
        self, kind: str, body: bytes, prompts: Sequence[list[int]], max_tokens: Sequence[int]
    ) -> tuple[list[list[int]], dict[str, Tensor]]:
        """Run a job; what its requests answered, and what the workers read."""
        job = secrets.token_hex(16)
        self._jobs.append(job)
        await self._engine.collective_rpc("trimtab_put", args=(job, kind, body))
        try:
            responses = await self._answers(job, prompts, max_tokens)
        finally:
            replies = await self._engine.collective_rpc("trimtab_take", args=(job,))
        faults = [fault for fault, _ in replies if fault]
        if faults:
            raise EndpointError(f"a worker could not {kind}: {faults[0]}")
        found = replies[0][1]
        return responses, await asyncio.to_thread(load_tensors, found) if found else {}

    async def _answers(
        self, job: str, prompts: Sequence[list[int]], max_tokens: Sequence[int]
    ) -> list[list[int]]:
        responses: list[list[int]] = []
        while len(responses) < len(prompts):
            first, busy, began = len(responses), self._is_busy(), time.monotonic()
            due = range(first, min(len(prompts), first + _AT_ONCE_WHILE_BUSY))
            if not busy:
                due = range(first, len(prompts))
            responses += await asyncio.gather(
                *(self._answer(request_name(job, i), prompts[i], max_tokens[i]) for i in due)
            )
            if busy:
                await asyncio.sleep(min(time.monotonic() - began, _LONGEST_REST_SECONDS))
        return responses

    def _is_busy(self) -> bool:
        """True if anybody else is being served; none of the calibration's own run now."""
        return bool(self._engine.output_processor.has_unfinished_requests())

    async def _answer(self, name: str, prompt: list[int], max_tokens: int) -> list[int]:
        from vllm import SamplingParams

        ends = self._facts.end_ids
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            stop_token_ids=ends,
            detokenize=False,
        )
        tokens: list[int] = []
        outputs = self._engine.generate({"prompt_token_ids": prompt}, params, name, priority=_LAST)
        async for output in outputs:
            tokens = list(output.outputs[0].token_ids)
        return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def _model_facts(config: Any) -> tuple[ModelFacts, Any]:
    """What there is to know of a `vllm.config.ModelConfig`, and its tokenizer.

    Raises:
        UnsupportedModelError: it cannot be read, or has no chat template.
    """
    from transformers import AutoTokenizer

    identity = checkpoint_identity(config)
    tokenizer = AutoTokenizer.from_pretrained(
        config.tokenizer,
        revision=config.tokenizer_revision,
        trust_remote_code=config.trust_remote_code,
    )
    check_template(tokenizer, config.model)
    ends = config.try_get_generation_config().get("eos_token_id")
    ends = config.hf_text_config.eos_token_id if ends is None else ends
    facts = ModelFacts(
        model=identity,
        suffix_ids=instruction_suffix(
            lambda text: chat_ids(tokenizer, [text]), distinct_instructions(tokenizer)
        ),
        opening_ids=message_opening(tokenizer, distinct_instructions(tokenizer), TemplateError),
        end_ids=[ends] if isinstance(ends, int) else list(ends),
        max_tokens=config.max_model_len,
    )
    return facts, tokenizer


def install(key: str, *, guarded: bool) -> None:
    """Patch vLLM in this process.

    Args:
        key: of the routes.
        guarded: a guard is installed as well.
    """
    _patch_config()
    _patch_worker(guarded=guarded)
    _patch_front(key, guarded=guarded)
    _log.warning(
        "TRIMTAB_ADMIN_KEY is set: whoever has the key can read hidden states and logits%s",
        "" if guarded else "; there is no guard, and nothing is steered",
    )


def _patch_config() -> None:
    from vllm.engine.arg_utils import EngineArgs

    def checked(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        check_calibrated(config)
        return config

    wrap(EngineArgs, "create_engine_config", checked)


def _patch_worker(*, guarded: bool) -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.worker.load_model(*args, **kwargs)
        self.__dict__["trimtab"] = WorkerDesk(self.worker)
        return result

    def trimtab_status(self: Any) -> str:
        return str(self.__dict__["trimtab"].status())

    def trimtab_put(self: Any, job: str, kind: str, body: bytes) -> None:
        self.__dict__["trimtab"].desk.put(job, kind, body)

    def trimtab_take(self: Any, job: str) -> list[Any]:
        fault, body = self.__dict__["trimtab"].desk.take(job)
        return [fault, body if self.worker.rank == 0 else b""]  # every rank has the same

    functions: list[Callable[..., Any]] = [trimtab_put, trimtab_take]
    if not guarded:
        functions += [load_model, trimtab_status]
    for function in functions:
        setattr(WorkerWrapperBase, function.__name__, function)


def _patch_front(key: str, *, guarded: bool) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    def init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        # Before the model is loaded, from the same files.
        facts, tokenizer = _model_facts(config.model_config)
        original(self, *args, **kwargs)
        _patch_app(key)  # here, where the server's modules are loaded anyway
        self.trimtab_calibration = backend = VllmBackend(self, facts, tokenizer)
        if guarded:
            self.trimtab.spared = backend.mine
        else:
            metrics_of(served_name(config), "off").set_armed(False)

    wrap(AsyncLLM, "__init__", init)


def _patch_app(key: str) -> None:
    """Add the routes to the app that vLLM's server is about to build.

    Raises:
        NotArmedError: this vLLM builds it somewhere else.
    """
    for name in _BUILDERS:
        try:
            module: Any = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "build_app"):
            break
    else:
        raise NotArmedError(
            "this vLLM builds its server somewhere else, so it cannot be calibrated; trimtab"
            " supports 0.26 to 0.32; unset TRIMTAB_ADMIN_KEY"
        )
    build_app = module.build_app
    if hasattr(build_app, "trimtab"):
        return

    def with_routes(args: Any, *rest: Any, **kwargs: Any) -> Any:
        if getattr(args, "chat_template", None):
            raise UnsupportedModelError(
                "with TRIMTAB_ADMIN_KEY set, drop --chat-template: a guard is calibrated for the"
                " template that comes with the tokenizer"
            )
        app = build_app(args, *rest, **kwargs)
        app.include_router(calibration_router(key, _backend_of))
        return app

    with_routes.trimtab = True  # type: ignore[attr-defined]
    module.build_app = with_routes


def _backend_of(request: Request) -> VllmBackend:
    backend: VllmBackend = request.app.state.engine_client.trimtab_calibration
    return backend
