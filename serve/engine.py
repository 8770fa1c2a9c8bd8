"""What an engine is: it takes token ids, streams tokens, and hands back a guard record.

The server knows engines only through this file. `transformers_engine` is the embedded default; vLLM
brings its own server and is guarded by a plugin instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from guard.session import Record

__all__ = [
    "ChatMessage",
    "Engine",
    "EngineInfo",
    "FinishReason",
    "GenerationRequest",
    "SamplingOptions",
    "TokenLogprob",
    "TokenStep",
]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class SamplingOptions:
    """How one response is sampled; every field is already validated.

    Attributes:
        max_tokens: ≥ 1, most response tokens.
        temperature: ≥ 0; 0 is greedy.
        top_p: in (0, 1].
        top_k: ≥ 1, or 0 for all.
        seed: of the request's own random generator; None draws one.
        stop: strings that end the response; they are not part of its text.
        logprobs: how many alternatives to report per token; None: no logprobs at all.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One response to make. `n > 1` is n of these with different seeds.

    Attributes:
        request_id: unique, for logs and the ledger record; holds no user text.
        prompt_ids: token ids, template included.
        options: how to sample.
        policy: the published policy that the client asked for; None is the default.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    options: SamplingOptions = field(default_factory=SamplingOptions)
    policy: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability in the distribution that was sampled from."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class TokenStep:
    """One sampled token of a response.

    Attributes:
        token_id: the token; −1 in a closing step that only flushes text.
        text: text that is safe to send now: a whole number of characters, with nothing held back
            that could still become a stop string. It may be empty.
        logprob: of the sampled token, natural log, at the request's temperature and before
            top-p/top-k, after steering; None unless asked for.
        top_logprobs: the most likely alternatives, best first.
        finish_reason: set on the last step only.
        record: the guard's record with verdict, on the last step only; None if mode is off.
    """

    token_id: int
    text: str
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    record: Record | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What the server says about an engine.

    Attributes:
        model_name: what `/v1/models` lists and requests must name.
        max_model_len: prompt plus response, in tokens.
        artifact_id: of the guard; None when mode is off.
        format_version: of the guard file.
        mode: the policy's mode.
        debug_fields: whether responses carry a `trimtab` object.
    """

    model_name: str
    max_model_len: int
    artifact_id: str | None
    format_version: int | None
    mode: Literal["off", "observe", "enforce"]
    debug_fields: bool


class Engine(Protocol):
    """The contract between the HTTP server and whatever runs the model."""

    @property
    def info(self) -> EngineInfo:
        """Constant facts."""

    @property
    def armed(self) -> bool:
        """True if the guard is proven to work (or mode is off) and the engine is running."""

    def encode_chat(self, messages: list[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation, generation prompt included.

        Raises:
            RequestError: the template does not accept these messages.
        """

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of a raw prompt."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenStep]:
        """Queue a request and stream its tokens.

        Closing the iterator early (a client that went away) stops the work; what was spent until
        then is still recorded in the metrics.

        Raises:
            QueueFullError: too many requests wait; raised before the first step.
            ContextOverflowError: prompt plus max_tokens do not fit.
            RequestError: a policy that is not published, or token ids out of range.
            NumericsError: the guard could not compute, and the policy says fail closed.
        """

    async def start(self) -> None:
        """Arm the guard and start working.

        Raises:
            NotArmedError: the guard cannot guard this model here.
        """

    async def stop(self) -> None:
        """Stop working; running requests end with an error."""
