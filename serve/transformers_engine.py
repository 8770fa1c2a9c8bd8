"""The embedded engine: a transformers model in this process, guarded, on a worker thread.

    generate() ─► queue ─► worker: GuardedBatch.step() until all rows are done ─► asyncio queues

Batches are static: requests that wait are prefilled together, and new ones wait for the batch to
end. It is meant for CPUs, development and tests; vLLM is the distributed engine.

It fails closed. It serves only after the guard was proven to work on this model, and whatever is
raised unforeseen in the worker ends every request with an error and leaves the engine unarmed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.answer import AnswerStart, find_marker
from guard.artifact import CarrierArtifact, ModelIdentity, load_artifact
from guard.errors import (
    ContextOverflowError,
    GuardError,
    InputError,
    NotArmedError,
    NumericsError,
    QueueFullError,
    RequestError,
    UnsupportedModelError,
)
from guard.identity import model_identity
from guard.policy import Policy
from guard.session import GuardSession, Record
from guard.shadow import ShadowModel
from serve.canary import CanaryReading, run_canary
from serve.engine import ChatMessage, EngineInfo, GenerationRequest, TokenStep
from serve.guarded_batch import GuardedBatch, Observers, Row

__all__ = ["TransformersEngine", "load_engine"]

_log = logging.getLogger("trimtab.serve")

_GATHER_SECONDS = 0.01  # requests that arrive together are batched together
_MAX_PREFILL_TOKENS = 16384  # padded; a batch with one very long prompt stays small
_FIRST_GUESS_SECONDS = 10.0  # per batch, until one was seen
_CANARY = [ChatMessage("user", "Hello, how are you today?")]
_DTYPES = ("auto", "float32", "bfloat16", "float16")


class TransformersEngine:
    """Serves a transformers model inside its KL budget; implements `serve.engine.Engine`.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer, with a chat template.
        artifact: the guard; not needed, and not looked at, if the policy's mode is "off".
        policy: the operator's.
        model_name: what clients call the model.
        model_id: what the operator calls it, for errors; default: `model_name`.
        revision: of the hub, if any.
        layers_path: dotted name of the decoder layers, where they are not found.
        max_batch: most requests that are decoded together.
        max_queue: most requests that wait.
        max_model_len: most tokens of prompt and response; default: what the model can do.
        on_record: takes the record of every request that was queued, once, when it ends. Like all
            callbacks it is called in the worker thread, and what it raises disarms the engine.
        on_gate: takes the seconds that the gate took, once for each request that reached it.
        on_unguarded: called when a request goes on without a guard (`on_failure: open`).
        on_mixture: for auditors, called with request id, position, mixed logits, base logits
            (both (vocab,) float32) and nats for every mixture.

    Attributes:
        observers: the four callbacks; may be replaced until `start`.

    Raises:
        InputError: no artifact though the mode needs one, or a limit out of range.
        PolicyError: steer_from: answer without a marker that the tokenizer tells.
        UnsupportedModelError: no decoder layers, no KV cache or no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        artifact: CarrierArtifact | None,
        policy: Policy,
        *,
        model_name: str,
        model_id: str | None = None,
        revision: str | None = None,
        layers_path: str | None = None,
        max_batch: int = 8,
        max_queue: int = 64,
        max_model_len: int | None = None,
        on_record: Callable[[Record], None] | None = None,
        on_gate: Callable[[float], None] | None = None,
        on_unguarded: Callable[[], None] | None = None,
        on_mixture: Callable[[str, int, Tensor, Tensor, float], None] | None = None,
    ) -> None:
        if artifact is None and policy.mode != "off":
            raise InputError(
                f"mode {policy.mode} needs a guard: make one with `trimtab calibrate`, or set"
                " mode: off in the policy"
            )
        if max_batch < 1 or max_queue < 1:
            raise InputError(f"max_batch {max_batch} and max_queue {max_queue} must be ≥ 1")
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedModelError(
                f"{model_name}: the tokenizer has no chat template, so there is no place at which"
                " a response begins; use the chat (instruct) variant, or set"
                " tokenizer.chat_template and save it with the model"
            )
        self._model = ShadowModel(model, layers_path)
        self._tokenizer = tokenizer
        self._artifact = artifact if policy.mode != "off" else None
        self._policy = policy
        self._marker = None
        if self._artifact is not None and policy.steer_from == "answer":
            self._marker = policy.answer_marker or find_marker(tokenizer)
        self._model_id, self._revision = model_id or model_name, revision
        self._identity: ModelIdentity | None = None
        self._max_batch, self._max_queue = max_batch, max_queue
        self.observers = Observers(on_record, on_gate, on_unguarded, on_mixture)
        self._vocab_size = model.get_input_embeddings().num_embeddings
        self._eos_ids = _eos_ids(model)
        self._info = EngineInfo(
            model_name=model_name,
            max_model_len=_context_length(model, max_model_len),
            artifact_id=self._artifact.artifact_id if self._artifact else None,
            format_version=self._artifact.manifest.format_version if self._artifact else None,
            mode=policy.mode,
            debug_fields=policy.debug_fields,
        )
        self._changed = threading.Condition()  # guards the five fields below
        self._armed = False
        self._stopping = False
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._batch_seconds = _FIRST_GUESS_SECONDS
        self._thread: threading.Thread | None = None

    @property
    def info(self) -> EngineInfo:
        """Constant facts."""
        return self._info

    @property
    def armed(self) -> bool:
        """True if the guard is proven to work (or mode is off) and the engine is running."""
        return self._armed

    def encode_chat(self, messages: list[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation, generation prompt included.

        Raises:
            RequestError: the template does not accept these messages.
        """
        conversation = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError, IndexError, KeyError) as err:
            raise RequestError(
                f"this model's chat template does not accept these messages: {err}", "messages"
            ) from err
        return self._encode(text, add_special_tokens=False)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of a raw prompt."""
        return self._encode(text, add_special_tokens=True)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # Too long a text is answered by `generate`, with an error instead of the warning.
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return tuple(encoded["input_ids"])

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenStep, None]:
        """Queue a request and stream its tokens; closing the stream stops the work.

        Raises:
            NotArmedError: the engine is not running.
            RequestError: an empty prompt, token ids outside the vocabulary, or a policy that is not
                published.
            ContextOverflowError: prompt plus max_tokens do not fit.
            QueueFullError: too many requests wait.
        """
        self._check_request(request)
        policy = self._policy.published(request.policy)
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[TokenStep | GuardError] = asyncio.Queue()

        def deliver(item: TokenStep | GuardError) -> None:
            try:
                loop.call_soon_threadsafe(arrivals.put_nowait, item)
            except RuntimeError:  # the loop is closed, so the client is gone
                row.aborted = True

        row = Row(
            request,
            self._tokenizer,
            self._model.device,
            self._session(request.prompt_ids, policy),
            deliver,
            self.observers.record,
        )
        self._enqueue(row)
        return _TokenStream(row, arrivals)

    def _session(self, prompt_ids: Sequence[int], policy: Policy) -> GuardSession | None:
        if self._artifact is None:
            return None
        answer = None
        if self._marker is not None:
            answer = AnswerStart(self._marker, self._tokenizer.decode(list(prompt_ids)))
        return GuardSession(self._artifact, policy, answer=answer)

    def canary(self) -> list[CanaryReading]:
        """Check that the guard is this model's and works on this setup; return what was seen.

        `start` does this by itself. In mode "off" there is nothing to check.

        Raises:
            ModelMismatchError: the guard was made for another model.
            UnsupportedModelError: this model allows no exact shadow pass.
            NotArmedError: the guard does not work here.
        """
        if self._artifact is None:
            return []
        if self._identity is None:  # some quantised weights are unpacked in the first forward pass
            self._identity = model_identity(
                self._model.model, self._tokenizer, self._model_id, self._revision
            )
        self._artifact.check_model(self._identity)
        return run_canary(self._model, self._artifact, self.encode_chat(_CANARY))

    async def start(self) -> None:
        """Prove that the guard works, then begin to serve.

        Raises:
            ModelMismatchError: the guard was made for another model.
            UnsupportedModelError: this model allows no exact shadow pass.
            NotArmedError: the guard does not work here.
        """
        if self._armed:
            return
        await asyncio.to_thread(self.canary)
        self._stopping, self._armed = False, True
        self._thread = threading.Thread(target=self._work, name="trimtab-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Stop working; running requests end with an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _check_request(self, request: GenerationRequest) -> None:
        prompt, wanted = request.prompt_ids, request.options.max_tokens
        if not prompt:
            raise RequestError("the prompt is empty", "prompt")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise RequestError(f"token ids must lie in 0…{self._vocab_size - 1}", "prompt")
        if len(prompt) + wanted > self._info.max_model_len:
            raise ContextOverflowError(
                f"this model's context is {self._info.max_model_len} tokens; the prompt has"
                f" {len(prompt)} and max_tokens asks for {wanted} more",
                "max_tokens" if len(prompt) < self._info.max_model_len else "messages",
            )

    def _enqueue(self, row: Row) -> None:
        with self._changed:
            if not self._armed or self._stopping:
                raise NotArmedError("the engine is not running, so nothing is served")
            n_waiting = sum(not other.aborted for other in self._waiting)
            if n_waiting >= self._max_queue:
                batches = math.ceil((n_waiting + 1) / self._max_batch)
                seconds = math.ceil(min(600.0, max(1.0, batches * self._batch_seconds)))
                raise QueueFullError(
                    f"{n_waiting} requests wait already; come back in about {seconds} s", seconds
                )
            self._waiting.append(row)
            self._changed.notify_all()

    # ------------------------------------------------------------------ the worker thread
    def _work(self) -> None:
        reason: GuardError = NotArmedError("the engine was stopped")
        try:
            while rows := self._take():
                self._run(rows)
        except GuardError as error:
            _log.exception("the guarded engine stops")
            reason = error
        except Exception:  # noqa: BLE001 - whatever it was, `finally` ends all and serves nothing
            _log.exception("the guarded engine stops")
            reason = NotArmedError("the engine failed and serves nothing until it is restarted")
        finally:
            self._close(reason)

    def _take(self) -> list[Row]:
        """Wait for requests and return those of the next batch; none if the engine stops."""

        def enough() -> bool:
            return self._stopping or len(self._waiting) >= self._max_batch

        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._stopping or self._waiting)
                self._changed.wait_for(enough, timeout=_GATHER_SECONDS)
                if self._stopping:
                    return []
                self._running = self._pop_batch()
                if self._running:  # else all of them had gone
                    return self._running

    def _pop_batch(self) -> list[Row]:
        rows: list[Row] = []
        longest = 0
        while self._waiting and len(rows) < self._max_batch:
            row = self._waiting[0]
            longest = max(longest, len(row.request.prompt_ids))
            if rows and longest * (len(rows) + 1) > _MAX_PREFILL_TOKENS:
                break
            self._waiting.popleft()
            if row.aborted:
                row.leave()
            else:
                rows.append(row)
        return rows

    def _run(self, rows: Sequence[Row]) -> None:
        began = time.monotonic()
        batch = GuardedBatch(self._model, rows, self._eos_ids, self._artifact, self.observers)
        try:
            while not batch.done and not self._stopping:
                batch.step()
        except NumericsError as error:  # of the base model: there is nothing to sample from
            _log.error("the base model failed: %s", error)
            batch.fail(error)
        with self._changed:
            self._batch_seconds += 0.3 * (time.monotonic() - began - self._batch_seconds)

    def _close(self, reason: GuardError) -> None:
        """Disarm, and end every request that has not ended, with an error."""
        with self._changed:
            self._armed = False
            left = [*self._running, *self._waiting]
            self._running = []
            self._waiting.clear()
        for row in left:
            row.fail(reason)


class _TokenStream(AsyncGenerator[TokenStep, None]):
    """The steps of one request; closing, cancelling or dropping it stops the work.

    A generator function would not do: closed before its first step, it would not run at all.
    """

    def __init__(self, row: Row, arrivals: asyncio.Queue[TokenStep | GuardError]) -> None:
        self._row, self._arrivals = row, arrivals
        self._over = False

    async def asend(self, _value: None) -> TokenStep:
        if self._over:
            raise StopAsyncIteration
        try:
            item = await self._arrivals.get()
        except asyncio.CancelledError:
            self._leave()
            raise
        if isinstance(item, GuardError):
            self._over = True
            raise item
        self._over = item.finish_reason is not None
        return item

    async def athrow(self, error: Any, value: Any = None, _trace: Any = None, /) -> TokenStep:
        self._leave()
        raise error if isinstance(error, BaseException) else error(value)

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        self._over = self._row.aborted = True


def load_engine(
    model: str,
    guard: Path | None,
    policy: Policy,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    layers_path: str | None = None,
    served_model_name: str | None = None,
    max_batch: int = 8,
    max_queue: int = 64,
    max_model_len: int | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_gate: Callable[[float], None] | None = None,
    on_unguarded: Callable[[], None] | None = None,
) -> TransformersEngine:
    """Load a model and its guard; `start()` arms it.

    Args:
        model: a local folder or a hub id, as transformers understands it.
        guard: the artifact; may be None if the policy's mode is "off".
        policy: the operator's.
        dtype: auto (as saved), float32, bfloat16 or float16.
        device: a torch device.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model.
        layers_path: dotted name of the decoder layers, where they are not found.
        served_model_name: what clients call the model; default: `model`, its last part for a path.
        max_batch: see `TransformersEngine`, as for all that follow.
        max_queue: most requests that wait.
        max_model_len: most tokens of prompt and response.
        on_record: takes every request's record.
        on_gate: takes the gate's seconds.
        on_unguarded: called for a request that goes on without a guard.

    Raises:
        InputError: no such model, device or dtype; also ArtifactError, for the guard's file, and
            PolicyError, for a policy that does not fit the model.
        UnsupportedModelError: the model cannot be guarded.
    """
    artifact = None
    if guard is not None and policy.mode != "off":
        artifact = load_artifact(guard).with_preset(policy.preset)
    loaded, tokenizer = _load_model(model, dtype, device, revision, trust_remote_code)
    name = served_model_name or (Path(model).name if Path(model).is_dir() else model)
    return TransformersEngine(
        loaded,
        tokenizer,
        artifact,
        policy,
        model_name=name,
        model_id=model,
        revision=revision,
        layers_path=layers_path,
        max_batch=max_batch,
        max_queue=max_queue,
        max_model_len=max_model_len,
        on_record=on_record,
        on_gate=on_gate,
        on_unguarded=on_unguarded,
    )


def _load_model(
    model: str, dtype: str, device: str, revision: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    if dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as err:
        raise InputError(
            f"{model}: cannot load this model: {err}; MODEL is a local folder, a hub id as"
            " transformers understands it, or a name of `trimtab models list`"
        ) from err
    try:
        return loaded.to(torch.device(device)).eval(), tokenizer
    except (RuntimeError, AssertionError) as err:
        raise InputError(f"device {device!r} cannot be used here: {err}") from err


def _eos_ids(model: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def _context_length(model: Any, wanted: int | None) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if wanted is None and limit is None:
        raise InputError("this model does not say how long its context is: give --max-model-len")
    if wanted is not None and not 1 <= wanted <= (limit or wanted):
        raise InputError(f"max_model_len {wanted}: this model takes 1 to {limit} tokens")
    return int(wanted or limit or 0)
