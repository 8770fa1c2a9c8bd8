"""The HTTP server: OpenAI's chat completions, completions and models over a guarded engine.

    body ─► validate ─► encode ─► n generations ─► one JSON answer, or server-sent events

A request that cannot be guarded is answered with an error, never with unguarded text. Nothing that
a user wrote is logged or counted. `/health`, `/ready` and `/metrics` need no key.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import logging
import socket
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from guard.errors import (
    BudgetError,
    ContextOverflowError,
    GuardError,
    InputError,
    NotArmedError,
    NumericsError,
    QueueFullError,
    RequestError,
)
from serve.engine import Engine, EngineInfo, GenerationRequest, SamplingOptions, TokenStep
from serve.metrics import ErrorKind, GuardMetrics
from serve.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatDelta,
    ChatMessageOut,
    Completion,
    CompletionChoice,
    CompletionRequest,
    ErrorBody,
    ErrorDetail,
    ModelCard,
    ModelList,
    TrimtabInfo,
    Usage,
    chat_logprobs,
    completion_logprobs,
    fault_of,
)

__all__ = ["MAX_BODY_BYTES", "bind_socket", "create_app", "run_server"]

MAX_BODY_BYTES = 4 * 2**20
"""Largest request body; many times any context."""

_GRACE_SECONDS = 10
_BACKLOG = 2048
_log = logging.getLogger("trimtab.serve")
_T = TypeVar("_T")
_Body = TypeVar("_Body", bound=BaseModel)


# ---------------------------------------------------------------------------- errors
@dataclass(frozen=True)
class _Fault:
    """How an error is answered and counted."""

    status: int
    kind: ErrorKind
    type: str
    code: str | None = None
    message: str | None = None  # None: the error's own, which is written for clients


class _HttpError(Exception):
    """A request that HTTP itself, not the guard, has reason to refuse."""

    def __init__(
        self,
        fault: _Fault,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.fault, self.param, self.headers = fault, param, headers


_INVALID = "invalid_request_error"
_BAD_REQUEST = _Fault(400, ErrorKind.BAD_REQUEST, _INVALID)
_UNAUTHORIZED = _Fault(401, ErrorKind.UNAUTHORIZED, _INVALID, "invalid_api_key")
_NO_MODEL = _Fault(404, ErrorKind.NOT_FOUND, _INVALID, "model_not_found")
_TOO_LARGE = _Fault(413, ErrorKind.TOO_LARGE, _INVALID, "request_too_large")
_INTERNAL = _Fault(
    500, ErrorKind.INTERNAL, "server_error", "internal_error", "The server failed; it is our fault."
)

# First match wins, so subclasses come before their bases.
_FAULTS: tuple[tuple[type[GuardError], _Fault], ...] = (
    (
        ContextOverflowError,
        _Fault(400, ErrorKind.CONTEXT_OVERFLOW, _INVALID, "context_length_exceeded"),
    ),
    (RequestError, _BAD_REQUEST),
    (
        QueueFullError,
        _Fault(429, ErrorKind.QUEUE_FULL, "rate_limit_error", "rate_limit_exceeded"),
    ),
    (
        NumericsError,
        _Fault(
            500,
            ErrorKind.NUMERICS,
            "server_error",
            "guard_numerics",
            "The guard could not compute this response, so it is not served.",
        ),
    ),
    (
        BudgetError,
        _Fault(
            500,
            ErrorKind.BUDGET,
            "server_error",
            "guard_budget",
            "The response would have passed its KL budget, so it is not served.",
        ),
    ),
    (
        NotArmedError,
        _Fault(
            503,
            ErrorKind.NOT_ARMED,
            "server_error",
            "guard_not_armed",
            "The guard is not armed, so nothing is served.",
        ),
    ),
    (GuardError, _INTERNAL),
)


def _fault_for(err: GuardError) -> _Fault:
    return next(fault for kind, fault in _FAULTS if isinstance(err, kind))


def _error_body(fault: _Fault, message: str, param: str | None = None) -> ErrorBody:
    text = fault.message or message
    return ErrorBody(error=ErrorDetail(message=text, type=fault.type, param=param, code=fault.code))


def _report(metrics: GuardMetrics, err: GuardError) -> ErrorBody:
    """Count an error of ours, log it if it is our fault, and return its body."""
    fault = _fault_for(err)
    metrics.count_error(fault.kind)
    if fault.status >= 500:
        _log.error("a request failed (%s): %s", type(err).__name__, err)
    return _error_body(fault, str(err), getattr(err, "param", None))


# ---------------------------------------------------------------------------- generations
class _Exchange:
    """The generations of one HTTP request, running together, merged in order of arrival.

    Each runs in a task of its own, so that a stream that is cut anywhere, even before its first
    byte, stops the work by `close`, which cannot wait and cannot fail.
    """

    def __init__(
        self, engine: Engine, metrics: GuardMetrics, requests: Sequence[GenerationRequest]
    ) -> None:
        self._engine, self._metrics = engine, metrics
        self._began = time.perf_counter()
        self._closed = False
        self._returned: deque[tuple[int, TokenStep]] = deque()
        self._arrivals: asyncio.Queue[tuple[int, TokenStep | None]] = asyncio.Queue()
        self._unfinished = set(range(len(requests)))
        self._begun: set[int] = set()
        self._open = len(requests)
        self._tasks = [
            asyncio.create_task(self._run(i, request)) for i, request in enumerate(requests)
        ]
        for i, task in enumerate(self._tasks):
            task.add_done_callback(partial(self._ended, i))

    async def _run(self, index: int, request: GenerationRequest) -> None:
        steps = self._engine.generate(request)
        unrecorded = self._engine.info.mode == "off"  # such an engine makes no records
        try:
            async for step in steps:
                if unrecorded:
                    self._metrics.observe(None)
                    unrecorded = False
                self._begun.add(index)
                self._arrivals.put_nowait((index, step))
        finally:
            if isinstance(steps, AsyncGenerator):
                await steps.aclose()

    def _ended(self, index: int, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # read here, since after `close` nobody else will
        self._arrivals.put_nowait((index, None))

    async def next(self) -> tuple[int, TokenStep] | None:
        """Return the next step and the choice it belongs to; None after the last.

        Raises:
            GuardError: the engine's, or its response has no end.
        """
        if self._returned:
            return self._returned.popleft()
        while self._open:
            index, step = await self._arrivals.get()
            if step is not None:
                if step.finish_reason is not None:
                    self._unfinished.discard(index)
                return index, step
            self._open -= 1
            self._tasks[index].result()  # raises what the engine raised
            if index in self._unfinished:
                raise GuardError("the engine ended a response without a finish reason")
        return None

    async def begin(self) -> None:
        """Wait for the first step, so that a refused request still gets its HTTP status.

        Raises:
            GuardError: the engine refused one of the generations.
        """
        first = await self.next()
        for index, task in enumerate(self._tasks):
            # A full queue refuses some choices at once, not all. One that has begun and failed
            # since fails in its turn, however late this is looked at.
            if task.done() and index not in self._begun:
                task.result()
        if first is not None:
            self._returned.append(first)

    def close(self) -> bool:
        """Stop whatever still runs; return True if something did. Safe to call twice."""
        if self._closed:
            return False
        self._closed = True
        self._metrics.observe_request(time.perf_counter() - self._began)
        running = [task for task in self._tasks if not task.done()]
        for task in running:
            task.cancel()
        return bool(running)


class _EventStream(StreamingResponse):
    """Server-sent events whose work stops with the connection, whenever it ends."""

    def __init__(
        self, events: AsyncIterator[str], exchange: _Exchange, metrics: GuardMetrics
    ) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},  # proxies, pass it on
        )
        self._exchange, self._metrics = exchange, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # The events' own `finally` does not run if their first was never asked for.
            if self._exchange.close():
                self._metrics.count_error(ErrorKind.CLIENT_DISCONNECT)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the work's result; stop it as soon as the client hangs up.

    Raises:
        ClientDisconnect: the client hung up first.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(hung_up())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        gone.cancel()


# ---------------------------------------------------------------------------- dialects
@dataclass
class _Answer:
    """One choice while it grows."""

    steps: list[TokenStep] = field(default_factory=list)
    token_chars: int = 0  # characters of all tokens so far, for text offsets

    def add(self, step: TokenStep) -> None:
        self.steps.append(step)
        self.token_chars += len(step.logprob.token) if step.logprob else 0

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def n_tokens(self) -> int:
        return sum(step.token_id >= 0 for step in self.steps)


@dataclass(frozen=True)
class _Head:
    """What all parts of a response say."""

    id: str
    created: int
    info: EngineInfo

    def fields(self) -> dict[str, Any]:
        # The artifact's id would tell a client which guard to study, so it follows the switch.
        fingerprint = self.info.artifact_id if self.info.debug_fields else None
        return {
            "id": self.id,
            "created": self.created,
            "model": self.info.model_name,
            "system_fingerprint": fingerprint,
        }

    def trimtab(self, step: TokenStep) -> TrimtabInfo | None:
        if step.record is None or not self.info.debug_fields:
            return None
        return TrimtabInfo.of(step.record, self.info.mode)


class _Dialect(Protocol):
    """How one endpoint words what the engine says."""

    def whole(self, head: _Head, answers: Sequence[_Answer], usage: Usage) -> BaseModel: ...
    def opening(self, head: _Head, index: int) -> BaseModel | None: ...
    def chunk(self, head: _Head, index: int, step: TokenStep, answer: _Answer) -> BaseModel: ...
    def closing(self, head: _Head, usage: Usage) -> BaseModel: ...


class _Chat:
    id_prefix = "chatcmpl"

    def whole(self, head: _Head, answers: Sequence[_Answer], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=i,
                message=ChatMessageOut(content=answer.text),
                logprobs=chat_logprobs(answer.steps),
                finish_reason=answer.steps[-1].finish_reason or "stop",
                trimtab=head.trimtab(answer.steps[-1]),
            )
            for i, answer in enumerate(answers)
        ]
        alone = choices[0].trimtab if len(choices) == 1 else None
        return ChatCompletion(**head.fields(), choices=choices, usage=usage, trimtab=alone)

    def opening(self, head: _Head, index: int) -> ChatChunk:
        delta = ChatDelta(role="assistant", content="")
        return ChatChunk(**head.fields(), choices=[ChatChunkChoice(index=index, delta=delta)])

    def chunk(self, head: _Head, index: int, step: TokenStep, _answer: _Answer) -> ChatChunk:
        shown = head.trimtab(step)
        choice = ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=step.text or None),
            logprobs=chat_logprobs([step]),
            finish_reason=step.finish_reason,
            trimtab=shown,
        )
        return ChatChunk(**head.fields(), choices=[choice], trimtab=shown)

    def closing(self, head: _Head, usage: Usage) -> ChatChunk:
        return ChatChunk(**head.fields(), choices=[], usage=usage)


class _Text:
    id_prefix = "cmpl"

    def whole(self, head: _Head, answers: Sequence[_Answer], usage: Usage) -> Completion:
        choices = [
            CompletionChoice(
                index=i,
                text=answer.text,
                logprobs=completion_logprobs(answer.steps, 0),
                finish_reason=answer.steps[-1].finish_reason,
                trimtab=head.trimtab(answer.steps[-1]),
            )
            for i, answer in enumerate(answers)
        ]
        alone = choices[0].trimtab if len(choices) == 1 else None
        return Completion(**head.fields(), choices=choices, usage=usage, trimtab=alone)

    def opening(self, _head: _Head, _index: int) -> None:
        return None

    def chunk(self, head: _Head, index: int, step: TokenStep, answer: _Answer) -> Completion:
        shown = head.trimtab(step)
        choice = CompletionChoice(
            index=index,
            text=step.text,
            logprobs=completion_logprobs([step], answer.token_chars),
            finish_reason=step.finish_reason,
            trimtab=shown,
        )
        return Completion(**head.fields(), choices=[choice], trimtab=shown)

    def closing(self, head: _Head, usage: Usage) -> Completion:
        return Completion(**head.fields(), choices=[], usage=usage)


def _usage(prompt_tokens: int, answers: Sequence[_Answer]) -> Usage:
    made = sum(answer.n_tokens for answer in answers)
    return Usage(
        prompt_tokens=prompt_tokens, completion_tokens=made, total_tokens=prompt_tokens + made
    )


# ---------------------------------------------------------------------------- the service
@dataclass(frozen=True)
class _Job:
    """A validated request, ready for the engine."""

    head: _Head
    dialect: _Dialect
    requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    stream: bool
    include_usage: bool


class _Service:
    """The endpoints' behaviour, over one engine."""

    def __init__(self, engine: Engine, metrics: GuardMetrics, max_body_bytes: int) -> None:
        self._engine, self._metrics = engine, metrics
        self._max_body_bytes = max_body_bytes
        self._encoding = asyncio.Lock()

    # ---- endpoints
    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await self._parsed(request, ChatCompletionRequest)
        prompt = await self._encoded(lambda: self._engine.encode_chat(body.conversation()))
        return await self._answer(request, self._job(_Chat(), body, [prompt], body.options))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await self._parsed(request, CompletionRequest)
        prompts = [
            await self._encoded(partial(self._engine.encode_text, prompt))
            if isinstance(prompt, str)
            else prompt
            for prompt in body.prompt
        ]
        return await self._answer(request, self._job(_Text(), body, prompts, body.options))

    def card(self) -> ModelCard:
        """The served model."""
        info = self._engine.info
        return ModelCard(id=info.model_name, max_model_len=info.max_model_len)

    # ---- from body to job
    async def _parsed(self, request: Request, schema: type[_Body]) -> _Body:
        try:
            body = schema.model_validate_json(await self._body(request))
        except ValidationError as err:
            message, param = fault_of(err)
            raise _HttpError(_BAD_REQUEST, message, param) from None
        self.check_model(getattr(body, "model", ""))
        # Checked per request, so that a guard that fails later stops the service at once.
        if not self._engine.armed:
            raise NotArmedError("the engine is not armed")
        return body

    async def _body(self, request: Request) -> bytes:
        too_large = _HttpError(
            _TOO_LARGE,
            f"The body is larger than {self._max_body_bytes} bytes",
            headers={"Connection": "close"},
        )
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise too_large
        return bytes(body)

    def check_model(self, name: str) -> None:
        """Raise _HttpError 404 unless `name` is the served model."""
        served = self._engine.info.model_name
        if name != served:
            message = f"The model '{name}' does not exist; this server serves '{served}'"
            raise _HttpError(_NO_MODEL, message, "model")

    async def _encoded(self, encode: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        # Megabytes of prompt take the tokenizer a second, in which others must not stand still;
        # one at a time, since tokenizers are not promised to be thread-safe.
        async with self._encoding:
            return await asyncio.to_thread(encode)

    def _job(
        self,
        dialect: _Chat | _Text,
        body: ChatCompletionRequest | CompletionRequest,
        prompts: Sequence[tuple[int, ...]],
        options: Callable[[int, int], SamplingOptions],
    ) -> _Job:
        if not all(prompts):
            raise RequestError("the prompt is empty", "prompt")
        info = self._engine.info
        head = _Head(f"{dialect.id_prefix}-{uuid.uuid4().hex}", int(time.time()), info)
        requests = [
            (prompt, options(i, info.max_model_len - len(prompt)))
            for prompt in prompts
            for i in range(body.n or 1)
        ]
        return _Job(
            head=head,
            dialect=dialect,
            requests=tuple(
                GenerationRequest(f"{head.id}-{i}", prompt, sampling, body.trimtab_policy)
                for i, (prompt, sampling) in enumerate(requests)
            ),
            prompt_tokens=sum(map(len, prompts)),
            stream=bool(body.stream),
            include_usage=body.include_usage,
        )

    # ---- from job to response
    async def _answer(self, request: Request, job: _Job) -> Response:
        exchange = _Exchange(self._engine, self._metrics, job.requests)
        streaming = False
        try:
            if not job.stream:
                whole = await _unless_gone(request, self._whole(job, exchange))
                return _json(whole)
            await _unless_gone(request, exchange.begin())
            streaming = True
            return _EventStream(self._events(job, exchange), exchange, self._metrics)
        finally:
            if not streaming:
                exchange.close()

    async def _whole(self, job: _Job, exchange: _Exchange) -> BaseModel:
        answers = [_Answer() for _ in job.requests]
        while (arrival := await exchange.next()) is not None:
            index, step = arrival
            answers[index].add(step)
        return job.dialect.whole(job.head, answers, _usage(job.prompt_tokens, answers))

    async def _events(self, job: _Job, exchange: _Exchange) -> AsyncIterator[str]:
        answers = [_Answer() for _ in job.requests]
        try:
            for index in range(len(answers)):
                opening = job.dialect.opening(job.head, index)
                if opening is not None:
                    yield _event(opening)
            while (arrival := await exchange.next()) is not None:
                index, step = arrival
                if step.text or step.logprob or step.finish_reason:
                    yield _event(job.dialect.chunk(job.head, index, step, answers[index]))
                answers[index].add(step)
        except GuardError as err:
            exchange.close()
            yield _event(_report(self._metrics, err))
            return
        if job.include_usage:
            yield _event(job.dialect.closing(job.head, _usage(job.prompt_tokens, answers)))
        yield "data: [DONE]\n\n"


def _event(part: BaseModel) -> str:
    return f"data: {part.model_dump_json()}\n\n"


def _json(
    body: BaseModel, status_code: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(body.model_dump_json(), status_code, headers, media_type="application/json")


def create_app(
    engine: Engine,
    *,
    metrics: GuardMetrics,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """Return the application over an engine; it starts the engine unless that is armed already.

    Args:
        engine: serves the model; stopped when the application shuts down.
        metrics: where errors and latencies are counted, and what `/metrics` shows.
        api_key: clients must send it as a bearer token to `/v1`; None lets everyone in.
        max_body_bytes: larger bodies are answered with status 413.

    Raises:
        InputError: the key is empty.
    """
    if api_key is not None and not api_key.strip():
        raise InputError("the API key is empty; give a real one, or leave the option out")
    service = _Service(engine, metrics, max_body_bytes)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if not engine.armed:
            await engine.start()
        try:
            yield
        finally:
            await engine.stop()

    async def check_key(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Bytes, and in constant time: headers are Latin-1, keys may be any text.
        same = hmac.compare_digest(given.strip().encode("latin-1"), api_key.strip().encode())
        if scheme.lower() != "bearer" or not same:
            message = "Missing or wrong API key; send it as 'Authorization: Bearer <key>'"
            raise _HttpError(_UNAUTHORIZED, message, headers={"WWW-Authenticate": "Bearer"})

    # No generated docs pages: they load scripts from elsewhere.
    app = FastAPI(
        title="trimtab", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    v1.add_api_route("/chat/completions", service.chat, methods=["POST"])
    v1.add_api_route("/completions", service.completions, methods=["POST"])

    @v1.get("/models")
    async def models() -> Response:
        return _json(ModelList(data=[service.card()]))

    @v1.get("/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return _json(service.card())

    @app.get("/health")
    async def health() -> Response:
        # The lifespan does not let requests in before the engine ran, so unarmed means it ended.
        return _state(engine.armed, "ok", "the engine is not running")

    @app.get("/ready")
    async def ready() -> Response:
        return _state(engine.armed, "ready", "the guard is not armed")

    @app.get("/metrics")
    async def scrape() -> Response:
        metrics.set_armed(engine.armed)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.include_router(v1)
    _answer_errors(app, metrics)
    return app


def _state(good: bool, yes: str, no: str) -> Response:
    return JSONResponse({"status": yes if good else no}, 200 if good else 503)


def _answer_errors(app: FastAPI, metrics: GuardMetrics) -> None:
    """Answer every error in OpenAI's format and count it."""

    @app.exception_handler(GuardError)
    async def ours(_request: Request, err: GuardError) -> Response:
        headers = None
        if isinstance(err, QueueFullError):
            headers = {"Retry-After": str(max(1, err.retry_after_seconds))}
        return _json(_report(metrics, err), _fault_for(err).status, headers)

    @app.exception_handler(_HttpError)
    async def refused(_request: Request, err: _HttpError) -> Response:
        metrics.count_error(err.fault.kind)
        return _json(_error_body(err.fault, str(err), err.param), err.fault.status, err.headers)

    @app.exception_handler(HTTPException)
    async def routing(_request: Request, err: HTTPException) -> Response:
        kind = ErrorKind.NOT_FOUND if err.status_code == 404 else ErrorKind.BAD_REQUEST
        metrics.count_error(kind)
        fault = _Fault(err.status_code, kind, _INVALID)
        return _json(_error_body(fault, err.detail), err.status_code, dict(err.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(_request: Request, _err: ClientDisconnect) -> Response:
        metrics.count_error(ErrorKind.CLIENT_DISCONNECT)
        return Response(status_code=499)  # nobody reads it

    # Starlette answers with this and then raises the error again, so that it is logged.
    @app.exception_handler(Exception)
    async def unforeseen(_request: Request, _err: Exception) -> Response:
        metrics.count_error(ErrorKind.INTERNAL)
        return _json(_error_body(_INTERNAL, ""), _INTERNAL.status)


# ---------------------------------------------------------------------------- running it
def bind_socket(host: str, port: int) -> socket.socket:
    """Reserve an address, before a model is loaded for it in vain; port 0 takes a free one.

    Raises:
        InputError: the port is taken or not allowed, or the host is not one of this machine.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port {port}: expected 0 to 65535")
    try:
        # A literal or a name of this machine; the first address wins, as with other servers.
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as err:
        raise InputError(
            f"host {host!r}: cannot be resolved; use 127.0.0.1 for this machine only,"
            " or 0.0.0.0 for all its addresses"
        ) from err
    sock = socket.socket(family, kind, proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # restart without a minute's wait
    try:
        sock.bind(address)
    except OSError as err:
        sock.close()
        raise _cannot_listen(host, port, err) from err
    return sock


def _cannot_listen(host: str, port: int, err: OSError) -> InputError:
    reasons = {
        errno.EADDRINUSE: "is in use; choose another with --port, or a free one with --port 0",
        errno.EACCES: "is not allowed to this user; choose one above 1023 with --port",
        errno.EADDRNOTAVAIL: "cannot be used: this machine has no such address; see --host",
    }
    reason = reasons.get(err.errno or 0, f"cannot be used: {err.strerror}")
    return InputError(f"port {port} on {host} {reason}")


def run_server(
    engine: Engine,
    metrics: GuardMetrics,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    *,
    sock: socket.socket | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Start the engine and serve until SIGINT or SIGTERM; then end running requests and stop it.

    Args:
        engine: serves the model.
        metrics: see `create_app`.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        api_key: see `create_app`.
        sock: from `bind_socket`, instead of host and port.
        on_ready: called with the server's URL once it answers.

    Raises:
        InputError: the port is in use, or the key is empty.
        NotArmedError: the guard cannot guard this model here; nothing was served.
    """
    app = create_app(engine, metrics=metrics, api_key=api_key)
    listener = sock or bind_socket(host, port)
    # Logs go to stderr and name no request: paths and bodies belong to users.
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )

    async def serve() -> None:
        # Before uvicorn, which would bury a NotArmedError in its log.
        await engine.start()
        try:
            listener.listen(_BACKLOG)
        except OSError as err:  # another server took the port while the model was loading
            await engine.stop()
            name = listener.getsockname()
            raise _cannot_listen(name[0], name[1], err) from err
        if on_ready is not None:
            on_ready(_url(listener))
        await uvicorn.Server(config).serve(sockets=[listener])

    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        _log.info("stopped by the keyboard")
    finally:
        listener.close()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
