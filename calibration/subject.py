"""What a calibration needs of a model, whether it runs in this process or elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from guard.artifact import ModelIdentity
from guard.session import GuardSession
from guard.shadow import BaseStep
from guard.template import Chat

__all__ = ["GradientSubject", "Subject"]


class Subject(Protocol):
    """A chat model under calibration."""

    @property
    def identity(self) -> ModelIdentity:
        """What the guard will be bound to."""

    @property
    def suffix_ids(self) -> list[int]:
        """Template tokens between the instruction and the response (post-instruction tokens)."""

    @property
    def message_width(self) -> int:
        """How many tokens of a message, the last, the gate reads; 0: none."""

    @property
    def message_opening_ids(self) -> list[int]:
        """Template tokens that stand right before every user message, whatever precedes them."""

    @property
    def n_opening(self) -> int:
        """How many of them, the last, are no template's but the answer's opening."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a single-turn chat with this user message, template included.

        Raises:
            PromptSetError: the prompt does not fit the model's context.
        """

    def encode_chats(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Token ids of chats with a system prompt or earlier turns, template included.

        Raises:
            PromptSetError: one does not fit the model's context, or the chat template takes no such
                chat.
        """

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response."""

    def prefill(
        self, prompts: Sequence[Sequence[int]], capture: Sequence[int], n_last: int | None = None
    ) -> BaseStep:
        """Run prompts once, left-padded; `capture` names the layers whose resid_pre is kept.

        It is kept of at least the last `n_last` tokens; if none are named, from the last of the
        instruction on: count from the end.
        """

    def states(
        self, prompts: Sequence[Sequence[int]], capture: Sequence[int], n_last: int
    ) -> dict[int, Tensor]:
        """resid_pre of the layers that `capture` names, of at least the last `n_last` tokens.

        Rows are padded on the left, where a prompt is shorter than others or than `n_last`.
        """

    def shadow(self, step: BaseStep, rows: Sequence[int], layer: int, steered: Tensor) -> Tensor:
        """Steered logits of some rows of a step, (len(rows), vocab) float32."""

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sessions: Sequence[GuardSession | None] | None = None,
    ) -> list[list[int]]:
        """Greedy responses; sessions that are open steer theirs."""


@runtime_checkable
class GradientSubject(Subject, Protocol):
    """A subject whose weights are at hand, so that gradients pass through its shadow pass."""

    def shadow_with_gradient(
        self, step: BaseStep, rows: Sequence[int], layer: int, steered: Tensor
    ) -> Tensor:
        """Steered logits, (len(rows), vocab) float32, differentiable in `steered`."""
