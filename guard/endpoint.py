"""What a calibration and the server of its model say to each other: one type for both ends.

    GET  /trimtab/calibration/model                          → Subject facts
    POST /trimtab/calibration/encode    EncodeRequest        → EncodeReply
    POST /trimtab/calibration/decode    DecodeRequest        → TextsReply
    POST /trimtab/calibration/respond   RespondRequest       → TokensReply
    POST /trimtab/calibration/capture   CaptureRequest       → tensors "logits", "layers.N"
    POST /trimtab/calibration/shadow    ShadowRequest        → tensor "difference"
                                        + "null", "steered"

Every request carries the key, as a bearer token, and every POST the digest of the facts that it was
made for, in `MODEL_HEADER`: a server that has come to serve another model answers 409. Tensors
travel as safetensors, the request beside them in its metadata; there is no pickle anywhere.
Faults are answered with {"error": text}.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from guard.artifact import ModelIdentity
from guard.errors import RequestError

__all__ = [
    "MAX_PROMPTS",
    "MAX_ROWS",
    "MAX_TEXTS",
    "MODEL_HEADER",
    "PATH",
    "CaptureRequest",
    "ChatMessage",
    "DecodeRequest",
    "EncodeReply",
    "EncodeRequest",
    "ModelFacts",
    "RespondRequest",
    "ShadowRequest",
    "TextsReply",
    "TokensReply",
    "pack",
    "unpack",
]

PATH = "/trimtab/calibration"
MODEL_HEADER = "x-trimtab-model"
MAX_TEXTS = 256
MAX_PROMPTS = 32
MAX_ROWS = 64
_KEY = "trimtab"

_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Prompts = Annotated[list[_TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelFacts(_Message):
    """What a calibration needs to know of the model, once."""

    model: ModelIdentity
    suffix_ids: list[int] = Field(description="template tokens behind the instruction")
    opening_ids: list[int] = Field(description="template tokens right before every user message")
    end_ids: list[int] = Field(description="tokens that end a response")
    max_tokens: int = Field(description="prompt and response together")

    @property
    def digest(self) -> str:
        """SHA-256 of these facts."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class ChatMessage(_Message):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class EncodeRequest(_Message):
    """Chats to put into the chat template, each ending with the user's last message."""

    chats: list[Annotated[list[ChatMessage], Field(min_length=1)]] = Field(max_length=MAX_TEXTS)


class EncodeReply(_Message):
    """One list of token ids for each chat; null: the chat template takes no such chat."""

    tokens: list[list[int] | None]


class DecodeRequest(_Message):
    """Responses to turn into text, special tokens left out."""

    tokens: list[list[int]] = Field(max_length=MAX_TEXTS)


class TokensReply(_Message):
    """One list of token ids for each prompt."""

    tokens: list[list[int]]


class TextsReply(_Message):
    """One text for each list of token ids."""

    texts: list[str]


class RespondRequest(_Message):
    """Prompts to answer greedily, each with its own number of tokens at most."""

    prompts: _Prompts
    max_tokens: list[Annotated[int, Field(ge=1)]]

    @model_validator(mode="after")
    def _one_for_each(self) -> Self:
        if len(self.max_tokens) != len(self.prompts):
            raise ValueError("max_tokens: one for each prompt")
        return self


class CaptureRequest(_Message):
    """Hidden states to read: resid_pre of `layers` at the last `n_last` tokens, and logits."""

    prompts: _Prompts
    layers: list[Annotated[int, Field(ge=0)]]
    n_last: int = Field(ge=1, le=640)

    @model_validator(mode="after")
    def _long_enough(self) -> Self:
        if min(map(len, self.prompts)) < self.n_last:
            raise ValueError(f"a prompt is shorter than the {self.n_last} tokens to read")
        return self


class ShadowRequest(_Message):
    """Shadow passes of the prompts' last tokens, entered at `layer`.

    With it come two tensors in the model's type: "null" (n_prompts, d_model), what enters the null
    row of each prompt, and "steered" (n_rows, d_model), of the prompts that `rows` names.
    """

    prompts: _Prompts
    layer: int = Field(ge=0)
    rows: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=MAX_ROWS)

    @model_validator(mode="after")
    def _matching(self) -> Self:
        if set(self.rows) != set(range(len(self.prompts))):
            raise ValueError("rows: each has a prompt, and each prompt a row")
        return self


def pack(tensors: dict[str, Tensor], message: BaseModel | None = None) -> bytes:
    """Tensors, and the message that they belong to, as one body."""
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return save_tensors(whole, {_KEY: message.model_dump_json()} if message else None)


_M = TypeVar("_M", bound=BaseModel)


def unpack(body: bytes, kind: type[_M]) -> tuple[_M, dict[str, Tensor]]:
    """Take apart what `pack` made of a message and its tensors.

    Raises:
        RequestError: it is not that.
    """
    try:
        tensors = load_tensors(body)
        n_header = int.from_bytes(body[:8], "little")
        header = _Header.model_validate_json(body[8 : 8 + n_header])
        return kind.model_validate_json(header.metadata.get(_KEY, "")), tensors
    except (SafetensorError, ValidationError, ValueError) as err:
        raise RequestError(f"not safetensors with a {kind.__name__} in them: {err}") from err


class _Header(BaseModel):
    """The part of a safetensors header that safetensors itself reads from files only."""

    metadata: dict[str, str] = Field(default_factory=dict, alias="__metadata__")
