"""Admin routes over which `trimtab calibrate --endpoint` reads a model that is being served.

They exist only where the operator has set a key. Whoever has it can read hidden states and logits
for any prompt, so it is worth as much as the weights. Nothing here steers anything or changes any
state of the server's guard. What a route needs of an engine is a `Backend`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from torch import Tensor

from guard.endpoint import (
    MODEL_HEADER,
    PATH,
    CaptureRequest,
    DecodeRequest,
    EncodeReply,
    EncodeRequest,
    ModelFacts,
    RespondRequest,
    ShadowRequest,
    TextsReply,
    TokensReply,
    pack,
    unpack,
)
from guard.errors import GuardError, InputError, RequestError
from guard.template import Chat

__all__ = ["Backend", "calibration_router"]

_M = TypeVar("_M", bound=BaseModel)


class Backend(Protocol):
    """An engine whose model can be calibrated."""

    @property
    def facts(self) -> ModelFacts:
        """The model that is served now."""

    async def encode(self, chats: Sequence[Chat]) -> list[list[int] | None]:
        """Token ids of chats, template included; None: the template takes no such chat."""

    async def decode(self, tokens: list[list[int]]) -> list[str]:
        """Texts of responses."""

    async def respond(self, request: RespondRequest) -> list[list[int]]:
        """The base model's greedy responses, the token that ends them left out."""

    async def capture(self, request: CaptureRequest) -> dict[str, Tensor]:
        """Logits and hidden states of the base model.

        Returns:
            "logits": (n_prompts, vocab); "layers.N": (n_prompts, n_last, d_model), resid_pre.
        """

    async def shadow(self, request: ShadowRequest, null: Tensor, steered: Tensor) -> Tensor:
        """(n_rows, vocab): steered − null logits of one small batch."""


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def calibration_router(key: str, backend_of: Callable[[Request], Backend]) -> APIRouter:
    """Return the routes, for one key.

    Args:
        key: what clients send as a bearer token; not empty.
        backend_of: finds the engine of a request.
    """
    router = APIRouter(prefix=PATH, include_in_schema=False)
    turn = asyncio.Lock()  # one piece of work at a time: live traffic comes first

    def check_key(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Bytes, and in constant time: headers are Latin-1, keys may be any text.
        same = hmac.compare_digest(given.strip().encode("latin-1"), key.strip().encode())
        if scheme.lower() != "bearer" or not same:
            raise _Refused(401, "missing or wrong key; send TRIMTAB_ADMIN_KEY as a bearer token")

    async def answer(
        request: Request, work: Callable[[Backend, bytes], Awaitable[Response]]
    ) -> Response:
        try:
            check_key(request)
            backend = backend_of(request)
            if request.method == "POST":
                expected, found = request.headers.get(MODEL_HEADER), backend.facts
                if expected != found.digest:
                    raise _Refused(
                        409,
                        f"this server serves {found.model.model_id} (facts {found.digest[:12]}),"
                        f" the request was made for another model (facts {str(expected)[:12]})",
                    )
            body = await request.body()
            async with turn:
                return await work(backend, body)
        except _Refused as error:
            return _fault(error.status, str(error))
        except (RequestError, InputError, ValidationError) as error:
            return _fault(400, str(error))
        except GuardError as error:
            return _fault(500, str(error))

    @router.get("/model")
    async def model(request: Request) -> Response:
        async def work(backend: Backend, _: bytes) -> Response:
            return _json(backend.facts)

        return await answer(request, work)

    @router.post("/encode")
    async def encode(request: Request) -> Response:
        async def work(backend: Backend, body: bytes) -> Response:
            wanted = EncodeRequest.model_validate_json(body)
            chats = [[message.model_dump() for message in chat] for chat in wanted.chats]
            return _json(EncodeReply(tokens=await backend.encode(chats)))

        return await answer(request, work)

    @router.post("/decode")
    async def decode(request: Request) -> Response:
        async def work(backend: Backend, body: bytes) -> Response:
            wanted = DecodeRequest.model_validate_json(body)
            return _json(TextsReply(texts=await backend.decode(wanted.tokens)))

        return await answer(request, work)

    @router.post("/respond")
    async def respond(request: Request) -> Response:
        async def work(backend: Backend, body: bytes) -> Response:
            wanted = RespondRequest.model_validate_json(body)
            _check_room(backend.facts, wanted.prompts, max(wanted.max_tokens))
            return _json(TokensReply(tokens=await backend.respond(wanted)))

        return await answer(request, work)

    @router.post("/capture")
    async def capture(request: Request) -> Response:
        async def work(backend: Backend, body: bytes) -> Response:
            wanted = CaptureRequest.model_validate_json(body)
            _check_room(backend.facts, wanted.prompts, 1)
            _check_layers(backend.facts, wanted.layers)
            return await _tensors(await backend.capture(wanted))

        return await answer(request, work)

    @router.post("/shadow")
    async def shadow(request: Request) -> Response:
        async def work(backend: Backend, body: bytes) -> Response:
            wanted, tensors = unpack(body, ShadowRequest)
            _check_room(backend.facts, wanted.prompts, 1)
            _check_layers(backend.facts, [wanted.layer])
            d_model = backend.facts.model.d_model
            shapes = {
                "null": (len(wanted.prompts), d_model),
                "steered": (len(wanted.rows), d_model),
            }
            if {name: tuple(t.shape) for name, t in tensors.items()} != shapes:
                raise RequestError(f"expected tensors of the shapes {shapes}")
            difference = await backend.shadow(wanted, tensors["null"], tensors["steered"])
            return await _tensors({"difference": difference})

        return await answer(request, work)

    return router


def _check_room(facts: ModelFacts, prompts: list[list[int]], n_more: int) -> None:
    longest = max(map(len, prompts)) + n_more
    if longest > facts.max_tokens:
        raise RequestError(f"{longest} tokens do not fit the server's {facts.max_tokens}")
    highest = max(map(max, prompts))
    if highest >= facts.model.vocab_size:
        raise RequestError(f"no token {highest} in a vocabulary of {facts.model.vocab_size}")


def _check_layers(facts: ModelFacts, layers: list[int]) -> None:
    if max(layers, default=0) >= facts.model.n_layers:
        raise RequestError(f"no layer {max(layers)} in a model of {facts.model.n_layers}")


def _json(message: BaseModel) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")


async def _tensors(tensors: dict[str, Tensor]) -> Response:
    # Tens of megabytes: others are streamed to from this thread.
    body = await asyncio.to_thread(pack, tensors)
    return Response(body, media_type="application/octet-stream")


def _fault(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)
