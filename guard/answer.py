"""Where the answer of a reasoning model begins: behind the marker that closes its thinking.

    <think> … thinking … </think> ⏎ ⏎ The answer begins here.
                                  └─┴─┴── tokens before which an answer may begin: `due`

Whether the model or the chat template opened the thinking block does not matter, only its end does.
"""

from __future__ import annotations

from typing import Any

from guard.errors import PolicyError

__all__ = ["MARKERS", "AnswerStart", "find_marker"]

MARKERS = (
    "</think>",
    "</thought>",
    "</seed:think>",
    "[/THINK]",
    "<|END_THINKING|>",
    "<|channel|>final<|message|>",
)
"""What ends the thinking of models in use: DeepSeek, Qwen, Seed, Magistral, Command A, GPT-OSS."""


class AnswerStart:
    """Watches one response for the start of its answer. It depends on text alone.

    Args:
        marker: what closes the thinking block; whitespace after it belongs to neither.
        prompt: its text, special tokens included. If it ends with the marker, as under a template
            with an empty thinking block, the response is the answer.

    Attributes:
        due: the next token may be the answer's first: the marker stands, and since then there is
            only whitespace.
        begun: it was not, for the answer has begun.
    """

    def __init__(self, marker: str, prompt: str) -> None:
        self._marker = marker
        self.due = self._marked = prompt.rstrip().endswith(marker.rstrip())
        self.begun = False
        self._before = marker if self._marked else ""

    def see(self, response: str) -> None:
        """Take the whole text of the response until now, special tokens included."""
        _, found, answer = (self._before + response).partition(self._marker)
        # The token that brings the marker is never the answer's, even if text follows in it.
        self.due = bool(found) and (not self._marked or not answer.strip())
        self._marked = bool(found)
        self.begun = self._marked and not self.due


def find_marker(tokenizer: Any) -> str:
    """Return the marker that a model's chat template or vocabulary names.

    Raises:
        PolicyError: none of `MARKERS`, or several; the policy has to name it.
    """
    template, tokens = str(tokenizer.chat_template), tokenizer.get_added_vocab()
    found = [marker for marker in MARKERS if marker in template or marker in tokens]
    if len(found) != 1:
        raise PolicyError(
            "steer_from: answer needs the text that ends this model's thinking, and its chat"
            f" template and vocabulary name {' and '.join(found) or 'none that is known'}: set"
            " answer_marker in the policy"
        )
    return found[0]
