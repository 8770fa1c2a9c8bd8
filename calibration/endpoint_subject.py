"""A model that a server runs, as the subject of a calibration: the deployed weights themselves.

The server (vLLM with the plugin and TRIMTAB_ADMIN_KEY) gives hidden states, logits, shadow logits
and plain greedy responses. Whatever steers happens here: a guarded response is made token by token
with the same `guarded_logits` that every engine uses, so the server needs no route that steers.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import httpx
import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from guard.artifact import ModelIdentity
from guard.endpoint import (
    MAX_PROMPTS,
    MAX_ROWS,
    MAX_TEXTS,
    MODEL_HEADER,
    PATH,
    CaptureRequest,
    ChatMessage,
    DecodeRequest,
    EncodeReply,
    EncodeRequest,
    ModelFacts,
    RespondRequest,
    ShadowRequest,
    TextsReply,
    TokensReply,
    pack,
)
from guard.errors import (
    EndpointError,
    InputError,
    ModelMismatchError,
    NumericsError,
    PromptSetError,
)
from guard.session import GuardSession
from guard.shadow import BaseStep
from guard.step import guarded_logits, layers_wanted
from guard.template import Chat, turns

__all__ = ["EndpointSubject"]

_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 600.0
_RESPONSE_TOKENS = 64  # room that every prompt must leave
_M = TypeVar("_M", bound=BaseModel)
_T = TypeVar("_T")


class EndpointSubject:
    """Implements `Subject` over HTTP; a request for each batch of prompts.

    Args:
        url: of the server, without a path.
        key: its TRIMTAB_ADMIN_KEY.
        model_id: how the guard calls the model; default: as the server does.
        texts: user messages that `encode` will be asked for; they are sent together.
        message_width: tokens of a message, the last, that the gate reads; 0: none.

    Raises:
        InputError: there is no such server, it cannot be calibrated, or the key is wrong.
        EndpointError: the connection broke.
        PromptSetError: a text does not fit the model's context.
    """

    def __init__(
        self,
        url: str,
        key: str,
        model_id: str | None = None,
        texts: Sequence[str] = (),
        message_width: int = 512,
    ) -> None:
        self._message_width = message_width
        self._url = url.rstrip("/").removesuffix("/v1")
        try:
            self._http = httpx.Client(
                base_url=self._url + PATH,
                headers={b"authorization": f"Bearer {key.strip()}".encode()},
                timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
                transport=httpx.HTTPTransport(retries=2),  # of connecting only
            )
        except (ValueError, httpx.InvalidURL) as err:
            raise InputError(
                f"{url}: not a URL ({err}); give one such as http://127.0.0.1:8000"
            ) from err
        weakref.finalize(self, self._http.close)
        self._facts = self._read(ModelFacts, self._send("GET", "/model"))
        self._http.headers[MODEL_HEADER] = self._facts.digest
        named = {"model_id": model_id} if model_id else {}
        self._identity = self._facts.model.model_copy(update=named)
        self._texts: dict[tuple[int, ...], str] = {}
        self._encoded: dict[str, list[int]] = {}
        self._encode_all(texts)

    @property
    def identity(self) -> ModelIdentity:
        """What the guard will be bound to."""
        return self._identity

    @property
    def suffix_ids(self) -> list[int]:
        """Template tokens between the instruction and the response."""
        return self._facts.suffix_ids

    @property
    def message_width(self) -> int:
        """Tokens of a message, the last, that the gate reads."""
        return self._message_width

    @property
    def message_opening_ids(self) -> list[int]:
        """Template tokens that stand right before every user message."""
        return self._facts.opening_ids

    @property
    def n_opening(self) -> int:
        """0: the server's own template is used as it is."""
        return 0

    def encode(self, text: str) -> list[int]:
        """Token ids of a single-turn chat, template included.

        Raises:
            PromptSetError: the prompt does not fit the server's context.
            EndpointError: the connection broke.
        """
        if text not in self._encoded:
            self._encode_all([text])
        return self._encoded[text]

    def encode_chats(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Token ids of chats with a system prompt or earlier turns, template included.

        Raises:
            PromptSetError: one does not fit the server's context, or the chat template takes no
                such chat.
            EndpointError: the connection broke.
        """
        found: list[list[int]] = []
        for part in _chunks(chats, MAX_TEXTS):
            messages = [[ChatMessage.model_validate(message) for message in chat] for chat in part]
            reply = self._post(EncodeReply, "/encode", EncodeRequest(chats=messages))
            for chat, ids in zip(part, reply.tokens, strict=True):
                if ids is None:
                    raise PromptSetError("the chat template takes no such chat")
                text = chat[-1]["content"]
                if len(ids) + _RESPONSE_TOKENS > self._facts.max_tokens:
                    raise PromptSetError(
                        f"prompt {text[:40]!r}…: {len(ids)} tokens do not fit the server's"
                        f" {self._facts.max_tokens} with {_RESPONSE_TOKENS} to answer; shorten it,"
                        " or start the server with a larger --max-model-len"
                    )
                found.append(ids)
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response, without special tokens."""
        return self._decode_all([list(token_ids)])[0]

    def prefill(
        self, prompts: Sequence[Sequence[int]], capture: Sequence[int], n_last: int | None = None
    ) -> BaseStep:
        """Run prompts once; the hidden states of their ends are kept.

        Returns:
            A step that holds the last `n_last` tokens of each prompt, or len(suffix_ids) + 1: from
            the last of the instruction on. Its cache is the prompts, which the server has to be
            told again.
        """
        if n_last is None:
            return self._capture(prompts, capture, len(self.suffix_ids) + 1)
        return self._capture_each(prompts, capture, n_last)

    def states(
        self, prompts: Sequence[Sequence[int]], capture: Sequence[int], n_last: int
    ) -> dict[int, Tensor]:
        """Layer → (n_rows, width, d_model): hidden states of the prompts' last `n_last` tokens."""
        return self._capture_each(prompts, capture, n_last).resid_pre

    def shadow(self, step: BaseStep, rows: Sequence[int], layer: int, steered: Tensor) -> Tensor:
        """Steered logits of some rows of a step, (len(rows), vocab) float32.

        Raises:
            NumericsError: they hold NaN or +inf.
            EndpointError: the connection broke.
        """
        null = step.last_hidden(layer)
        shifted = torch.empty(len(rows), step.logits.shape[-1])
        # Rows of one prompt after those of another, so that each prompt is run once.
        order = sorted(range(len(rows)), key=lambda i: rows[i])
        for part in _groups(order, rows):
            prompts = list(dict.fromkeys(rows[i] for i in part))
            request = ShadowRequest(
                prompts=[list(step.cache[row]) for row in prompts],
                layer=layer,
                rows=[prompts.index(rows[i]) for i in part],
            )
            tensors = {"null": null[prompts], "steered": steered[part].to(null.dtype)}
            found = self._tensors("/shadow", pack(tensors, request), {"difference"})
            shifted[part] = found["difference"].float() + step.logits[[rows[i] for i in part]]
        if not bool(torch.isfinite(shifted.amax(dim=-1)).all()):
            raise NumericsError(f"the shadow pass from layer {layer} gave NaN or infinite logits")
        return shifted

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sessions: Sequence[GuardSession | None] | None = None,
    ) -> list[list[int]]:
        """Greedy responses, the end-of-turn token left out; open sessions steer theirs.

        Tokens with a shadow pass are chosen here, one request for each position; the rest of every
        response, like all of an unguarded one, is the server's own greedy continuation.
        """
        guards: list[GuardSession | None] = list(sessions or [None] * len(prompts))
        responses: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for position in range(max_tokens):
            due = [
                row
                for row, guard in enumerate(guards)
                if guard is not None and not ended[row] and guard.wants_shadow(position)
            ]
            if not due:
                break
            active = [guards[row] for row in due]
            step = self._capture(
                [[*prompts[row], *responses[row]] for row in due],
                layers_wanted(active, position),
                1,
            )
            logits = guarded_logits(self, step, active, position, [0.0] * len(due))
            for row, token in zip(due, logits.argmax(-1).tolist(), strict=True):
                ended[row] = token in self._facts.end_ids
                if not ended[row]:
                    responses[row].append(token)
        short = [len(response) < max_tokens for response in responses]
        rest = [row for row in range(len(prompts)) if short[row] and not ended[row]]
        for part in _chunks(rest, MAX_PROMPTS):
            request = RespondRequest(
                prompts=[[*prompts[row], *responses[row]] for row in part],
                max_tokens=[max_tokens - len(responses[row]) for row in part],
            )
            reply = self._post(TokensReply, "/respond", request)
            for row, tokens in zip(part, reply.tokens, strict=True):
                responses[row] += tokens
        self._decode_all(responses)
        return responses

    def _capture(
        self, prompts: Sequence[Sequence[int]], layers: Sequence[int], n_last: int
    ) -> BaseStep:
        names = {f"layers.{layer}": layer for layer in layers}
        parts = []
        for part in _chunks(list(prompts), MAX_PROMPTS):
            request = CaptureRequest(
                prompts=[list(ids) for ids in part], layers=list(layers), n_last=n_last
            )
            body = request.model_dump_json().encode()
            parts.append(self._tensors("/capture", body, {"logits", *names}))
        logits = torch.cat([part["logits"] for part in parts])
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise NumericsError("the base pass gave NaN or infinite logits")
        lengths = torch.tensor([[len(ids)] for ids in prompts])
        return BaseStep(
            logits,
            {layer: torch.cat([part[name] for part in parts]) for name, layer in names.items()},
            torch.tensor([list(ids[-n_last:]) for ids in prompts]),
            torch.ones(len(prompts), n_last, dtype=torch.int64),
            lengths + torch.arange(-n_last, 0),
            [tuple(ids) for ids in prompts],
        )

    def _capture_each(
        self, prompts: Sequence[Sequence[int]], layers: Sequence[int], n_last: int
    ) -> BaseStep:
        """Read as many tokens as each prompt has, and pad with NaN on the left.

        Prompts of one length go together, since a request reads as many tokens of each.
        """
        wanted = [min(n_last, len(ids)) for ids in prompts]
        width = max(wanted)
        groups = [[i for i, count in enumerate(wanted) if count == n] for n in sorted(set(wanted))]
        steps = [
            self._capture([prompts[i] for i in rows], layers, wanted[rows[0]]) for rows in groups
        ]
        back = torch.tensor([i for rows in groups for i in rows]).argsort()

        def whole(parts: Sequence[Tensor], blank: float) -> Tensor:
            """Parts one below another, as wide as the widest, in the order of the prompts."""
            shapes = [(len(part), width - part.shape[1], *part.shape[2:]) for part in parts]
            rows = [
                torch.cat([part.new_full(shape, blank), part], 1)
                for part, shape in zip(parts, shapes, strict=True)
            ]
            return torch.cat(rows)[back]

        return BaseStep(
            torch.cat([step.logits for step in steps])[back],
            {n: whole([step.resid_pre[n] for step in steps], torch.nan) for n in layers},
            whole([step.input_ids for step in steps], 0),
            whole([step.attention_mask for step in steps], 0),
            whole([step.position_ids for step in steps], 0),
            [tuple(ids) for ids in prompts],
        )

    def _encode_all(self, texts: Sequence[str]) -> None:
        unique = list(dict.fromkeys(texts))
        encoded = self.encode_chats([turns(text) for text in unique])
        self._encoded |= dict(zip(unique, encoded, strict=True))

    def _decode_all(self, responses: Sequence[list[int]]) -> list[str]:
        unknown = [ids for ids in responses if tuple(ids) not in self._texts]
        for part in _chunks(unknown, MAX_TEXTS):
            reply = self._post(TextsReply, "/decode", DecodeRequest(tokens=part))
            for ids, text in zip(part, reply.texts, strict=True):
                self._texts[tuple(ids)] = text
        return [self._texts[tuple(ids)] for ids in responses]

    def _post(self, kind: type[_M], path: str, message: BaseModel) -> _M:
        return self._read(kind, self._send("POST", path, message.model_dump_json().encode()))

    def _tensors(self, path: str, body: bytes, expected: set[str]) -> dict[str, Tensor]:
        data = self._send("POST", path, body)
        try:
            found = load_tensors(data)
        except SafetensorError as err:
            raise self._strange(path, str(err)) from err
        if set(found) != expected:
            raise self._strange(path, f"expected tensors {sorted(expected)}, got {sorted(found)}")
        return found

    def _read(self, kind: type[_M], data: bytes) -> _M:
        try:
            return kind.model_validate_json(data)
        except ValidationError as err:
            raise self._strange(f"as {kind.__name__}", str(err)) from err

    def _send(self, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            reply = self._http.request(method, path, content=body)
        except httpx.UnsupportedProtocol as err:
            raise InputError(
                f"{self._url}: {err}; give a URL such as http://127.0.0.1:8000"
            ) from err
        except httpx.TransportError as err:
            raise EndpointError(
                f"{self._url}: the connection broke ({type(err).__name__}: {err}); finished batches"
                " are kept: run the same command again to go on from there"
            ) from err
        if reply.status_code == 200:
            return reply.content
        why = _reason(reply)
        if reply.status_code == 401:
            raise InputError(
                f"{self._url}: the admin key is wrong (HTTP 401: {why}); expected the server's"
                " TRIMTAB_ADMIN_KEY; give it in the variable of that name, or with --admin-key"
            )
        if reply.status_code in (404, 405):
            raise InputError(
                f"{self._url}: no calibration routes there (HTTP {reply.status_code}); expected"
                " vLLM with trimtab installed beside it and the key set: start it with"
                " `TRIMTAB_ADMIN_KEY=… vllm serve MODEL`"
            )
        if reply.status_code == 409:
            raise ModelMismatchError(
                f"{self._url}: the model changed during the calibration ({why}); run the same"
                " command again: it begins anew, with the model that is served now"
            )
        raise EndpointError(
            f"{self._url}{PATH}{path}: HTTP {reply.status_code}: {why}; finished batches are kept:"
            " see the server's log, then run the same command again"
        )

    def _strange(self, what: str, why: str) -> EndpointError:
        return EndpointError(
            f"{self._url}: cannot read its answer {what}: {why}; is the server's trimtab of this"
            " version?"
        )


def _reason(reply: httpx.Response) -> str:
    """What a server says about a fault, in the forms of ours and of OpenAI's API."""
    try:
        body: Any = reply.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return reply.text[:300]
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:1000]


def _chunks(items: Sequence[_T], size: int) -> Iterator[list[_T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _groups(order: Sequence[int], rows: Sequence[int]) -> Iterator[list[int]]:
    """Split `order`, which goes prompt by prompt, where a request would become too large."""
    part: list[int] = []
    prompts: set[int] = set()
    for i in order:
        if part and (len(part) == MAX_ROWS or len(prompts | {rows[i]}) > MAX_PROMPTS):
            yield part
            part, prompts = [], set()
        part.append(i)
        prompts.add(rows[i])
    if part:
        yield part
