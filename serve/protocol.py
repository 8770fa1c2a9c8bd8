"""OpenAI's wire format: requests as they are validated, responses as they are sent.

A field is either honoured, or it cannot change the output and is ignored, or it is refused by name:
a client never gets an answer that silently lacks what it asked for. Types are strict, so `"n": "2"`
is an error. Nothing here knows HTTP or the engine's inside.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from guard.session import Record
from serve.engine import ChatMessage, FinishReason, SamplingOptions, TokenLogprob, TokenStep

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "MAX_CHOICES",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatCompletionRequest",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessageOut",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionRequest",
    "ErrorBody",
    "ErrorDetail",
    "ModelCard",
    "ModelList",
    "TrimtabInfo",
    "Usage",
    "chat_logprobs",
    "completion_logprobs",
    "fault_of",
]

DEFAULT_MAX_TOKENS = 256
"""Response tokens when a request names no limit, or fewer where the context is nearly full."""

MAX_CHOICES = 64
"""Most choices of one completions request: prompts times n."""

_INT64 = 2**63
_LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI sends this number


# ---------------------------------------------------------------------------- field types
def _only(*neutral: object) -> AfterValidator:
    """Accept values that ask for nothing; refuse all others, since they would change the output."""

    def check(value: object) -> object:
        if any(value == n and type(value) is type(n) for n in neutral):
            return value
        raise PydanticCustomError("unsupported", "this server does not support it")

    return AfterValidator(check)


Ignored = Annotated[Any, Field(default=None)]
"""A field of OpenAI's API that cannot change the output."""

_NoList = Annotated[Any, _only(None, [])]
_NoObject = Annotated[Any, _only(None, {})]
_Null = Annotated[Any, _only(None)]
_Zero = Annotated[Any, _only(None, 0, 0.0)]


def _joined_parts(value: object) -> object:
    """Join content parts of type text; every other kind of part is refused."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "unsupported_part", "part {i} is not of type 'text', the only one served", {"i": i}
            )
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError(
                "bad_part", "part {i} must be {{'type': 'text', 'text': string}}", {"i": i}
            )
        texts.append(part["text"])
    return "".join(texts)


def _stop_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompt_list(value: object) -> list[str | tuple[int, ...]]:
    """Read a string, a list of strings, one list of token ids, or a list of such lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_token_ids(value):
            return [tuple(value)]
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(isinstance(item, list) and item and _are_token_ids(item) for item in value):
            return [tuple(item) for item in value]
    raise PydanticCustomError(
        "prompt",
        "expected a string, a list of strings, a list of token ids, or a list of such lists",
    )


def _are_token_ids(values: Sequence[object]) -> bool:
    return all(type(v) is int and 0 <= v < 2**31 for v in values)


_Stop = Annotated[str, Field(min_length=1)]
_StopList = Annotated[list[_Stop], Field(max_length=4), BeforeValidator(_stop_list)]
_Prompts = Annotated[list[str | tuple[int, ...]], PlainValidator(_prompt_list)]


class _Wire(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # an error's text may end in a log, where no user text belongs
    )


# ---------------------------------------------------------------------------- requests
class StreamOptions(_Wire):
    """What a stream carries besides its tokens."""

    include_usage: bool | None = Field(default=None, description="End with a chunk of usage.")
    include_obfuscation: Ignored


class _GenerationBody(_Wire):
    """What chat completions and completions share."""

    model: str = Field(max_length=256, description="The served model's name, see /v1/models.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Most response tokens; default 256, or what still fits."
    )
    temperature: float | None = Field(
        default=None, ge=0.0, le=2.0, description="0 is greedy; default 1."
    )
    top_p: float | None = Field(default=None, gt=0.0, le=1.0, description="Default 1.")
    top_k: int | None = Field(
        default=None, ge=-1, description="Not OpenAI's, but common; 0 and -1 mean all tokens."
    )
    n: int | None = Field(default=None, ge=1, le=16, description="Choices per prompt; default 1.")
    seed: int | None = Field(
        default=None, ge=-_INT64, lt=_INT64, description="Choice i is sampled with seed + i."
    )
    stop: _StopList | None = Field(default=None, description="Up to four strings.")
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream.")
    trimtab_policy: str | None = Field(
        default=None,
        max_length=64,
        description="Not OpenAI's: a stricter policy, by the name under which it is published.",
    )

    user: Ignored
    metadata: Ignored

    logit_bias: _NoObject = None
    presence_penalty: _Zero = None
    frequency_penalty: _Zero = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options is only allowed when stream is true"
            )
        return self

    @property
    def include_usage(self) -> bool:
        """True if a stream is to end with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _options(
        self, index: int, max_tokens: int | None, room: int, logprobs: int | None
    ) -> SamplingOptions:
        seed = self.seed
        if seed is not None and index:
            seed = (seed + index + _INT64) % (2 * _INT64) - _INT64  # stays a signed 64-bit number
        return SamplingOptions(
            # With no room at all the engine's ContextOverflowError says so.
            max_tokens=max_tokens or max(1, min(DEFAULT_MAX_TOKENS, room)),
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=max(0, self.top_k or 0),
            seed=seed,
            stop=tuple(self.stop or ()),
            logprobs=logprobs,
        )


class ChatMessageIn(_Wire):
    """One message of a conversation; `developer` is read as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    name: Ignored
    # What the official client's own messages carry when they are sent back.
    refusal: _Null = None
    annotations: _NoList = None
    audio: _Null = None
    function_call: _Null = None
    tool_calls: _NoList = None


class ChatCompletionRequest(_GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessageIn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="The newer name of max_tokens."
    )
    logprobs: bool | None = Field(default=None, description="Report each token's log-probability.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Alternatives per token; needs logprobs."
    )

    store: Ignored
    service_tier: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored
    prompt_cache_retention: Ignored
    parallel_tool_calls: Ignored
    prediction: Ignored

    tools: _NoList = None
    tool_choice: Annotated[Any, _only(None, "none", "auto")] = None
    functions: _NoList = None
    function_call: Annotated[Any, _only(None, "none", "auto")] = None
    response_format: Annotated[Any, _only(None, {"type": "text"})] = None
    modalities: Annotated[Any, _only(None, ["text"])] = None
    audio: _Null = None
    reasoning_effort: Annotated[Any, _only(None, "none")] = None
    verbosity: Annotated[Any, _only(None, "medium")] = None
    web_search_options: _Null = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "max_tokens", "max_tokens and max_completion_tokens are one setting; send only one"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        return self

    def conversation(self) -> list[ChatMessage]:
        """The messages as engines take them."""
        return [
            ChatMessage("system" if m.role == "developer" else m.role, m.content)
            for m in self.messages
        ]

    def options(self, index: int, room: int) -> SamplingOptions:
        """Return how choice `index` is sampled, with `room` tokens of context left."""
        wanted = (self.top_logprobs or 0) if self.logprobs else None
        limit = self.max_completion_tokens or self.max_tokens
        return self._options(index, limit, room, wanted)


class CompletionRequest(_GenerationBody):
    """Body of POST /v1/completions."""

    prompt: _Prompts
    logprobs: int | None = Field(default=None, ge=0, le=5, description="Alternatives per token.")

    best_of: Annotated[Any, _only(None, 1)] = None
    echo: Annotated[Any, _only(None, False)] = None
    suffix: Annotated[Any, _only(None, "")] = None

    @model_validator(mode="after")
    def _few_enough_choices(self) -> Self:
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            raise PydanticCustomError(
                "choices",
                "prompts times n is {got}, at most {most} are served at once",
                {"got": len(self.prompt) * (self.n or 1), "most": MAX_CHOICES},
            )
        return self

    def options(self, index: int, room: int) -> SamplingOptions:
        """Return how choice `index` of a prompt is sampled, with `room` tokens left."""
        return self._options(index, self.max_tokens, room, self.logprobs)


# ---------------------------------------------------------------------------- errors
class ErrorDetail(_Wire):
    """What went wrong, for people (`message`) and for programs (the rest)."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(_Wire):
    """OpenAI's error object."""

    error: ErrorDetail


def fault_of(err: ValidationError) -> tuple[str, str | None]:
    """Return the message and the name of the first field at fault."""
    details = err.errors(include_url=False, include_input=False)
    # Later faults are often echoes of the first, so three are enough to act on.
    message = "; ".join(dict.fromkeys(_sentence(d) for d in details[:3]))
    return message, _path(details[0]["loc"])


def _sentence(detail: ErrorDetails) -> str:
    path, message = _path(detail["loc"]), detail["msg"]
    match detail["type"]:
        case "json_invalid":
            return f"The body is not valid JSON in UTF-8: {message.removeprefix('Invalid JSON: ')}"
        case "model_type" if path is None:
            return "The body must be a JSON object"
        case "extra_forbidden":
            return f"Unknown field '{path}'"
        case "missing":
            return f"Missing field '{path}'"
        case "unsupported":
            return f"Unsupported field '{path}': {message}"
    lowered = message[:1].lower() + message[1:]
    return f"Invalid value for '{path}': {lowered}" if path else message


def _path(loc: tuple[int | str, ...]) -> str | None:
    """Write a location as OpenAI does: messages[0].content."""
    path = ""
    for step in loc:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path[:100] or None


# ---------------------------------------------------------------------------- responses
class _Reply(_Wire):
    """A part of a response; fields named in `_absent_if_none` are left out rather than null."""

    _absent_if_none: ClassVar[frozenset[str]] = frozenset({"trimtab"})

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {k: v for k, v in data.items() if v is not None or k not in self._absent_if_none}


class TrimtabInfo(_Wire):
    """What the guard did to one choice; sent only if the operator's `debug_fields` is on."""

    zone: str | None
    gate_score: float | None
    kl_nats: float
    budget_nats: float
    steered_tokens: int
    verdict: str | None
    mode: str

    @classmethod
    def of(cls, record: Record, mode: str) -> TrimtabInfo:
        """Show a record."""
        return cls(
            zone=record.zone and record.zone.value,
            gate_score=record.gate_score,
            kl_nats=record.kl_nats,
            budget_nats=record.budget_nats,
            steered_tokens=record.steered_tokens,
            verdict=record.verdict and record.verdict.value,
            mode=mode,
        )


class Usage(_Wire):
    """Tokens; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(_Wire):
    """A token that could have been sampled."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A sampled token and its most likely alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Wire):
    """Log-probabilities of a chat choice, or of one chunk of it."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatMessageOut(_Wire):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Reply):
    """One answer of a chat completion."""

    index: int
    message: ChatMessageOut
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    trimtab: TrimtabInfo | None = None


class ChatCompletion(_Reply):
    """Response of /v1/chat/completions; `trimtab` is here as well if there is one choice."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    trimtab: TrimtabInfo | None = None


class ChatDelta(_Reply):
    """What a chunk adds to the answer."""

    _absent_if_none: ClassVar[frozenset[str]] = frozenset({"role", "content"})

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Reply):
    """A chunk of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    trimtab: TrimtabInfo | None = None


class ChatChunk(_Reply):
    """One event of a chat stream."""

    _absent_if_none: ClassVar[frozenset[str]] = frozenset({"trimtab", "usage"})

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    trimtab: TrimtabInfo | None = None


class CompletionLogprobs(_Wire):
    """Log-probabilities of a text completion, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Reply):
    """One text, or in a stream a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    trimtab: TrimtabInfo | None = None


class Completion(_Reply):
    """Response of /v1/completions, plain and as the events of a stream."""

    _absent_if_none: ClassVar[frozenset[str]] = frozenset({"trimtab", "usage"})

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    trimtab: TrimtabInfo | None = None


class ModelCard(_Wire):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default_factory=lambda: int(time.time()))
    owned_by: Literal["trimtab"] = "trimtab"
    max_model_len: int


class ModelList(_Wire):
    """Response of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def chat_logprobs(steps: Sequence[TokenStep]) -> ChatLogprobs | None:
    """Return the log-probabilities of some steps, None if none has any."""
    content = [
        ChatLogprob(
            **_top(step.logprob).model_dump(), top_logprobs=[_top(t) for t in step.top_logprobs]
        )
        for step in steps
        if step.logprob is not None
    ]
    return ChatLogprobs(content=content) if content else None


def completion_logprobs(steps: Sequence[TokenStep], offset: int) -> CompletionLogprobs | None:
    """Return the log-probabilities of some steps, None if none has any.

    Args:
        steps: sampled tokens in order.
        offset: length in characters of all tokens before them.
    """
    sampled = [(s.logprob, s.top_logprobs) for s in steps if s.logprob is not None]
    if not sampled:
        return None
    offsets: list[int] = []
    for token, _ in sampled:
        offsets.append(offset)
        offset += len(token.token)
    return CompletionLogprobs(
        tokens=[token.token for token, _ in sampled],
        token_logprobs=[_finite(token.logprob) for token, _ in sampled],
        # The sampled token is always among them, as in OpenAI's own answers.
        top_logprobs=[{t.token: _finite(t.logprob) for t in (*top, tok)} for tok, top in sampled],
        text_offset=offsets,
    )


def _top(token: TokenLogprob) -> TopLogprob:
    # A replacement character stands for part of a character, whose bytes the text no longer has.
    known = "�" not in token.token
    return TopLogprob(
        token=token.token,
        logprob=_finite(token.logprob),
        bytes=list(token.token.encode()) if known else None,
    )


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
