"""From token ids to text that is safe to send: whole characters, and no piece of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one response, as it grows token by token.

    The whole response is decoded at every token: what a tokenizer writes for a token depends on
    the tokens before it, and only the whole is sure to add up to what a plain decode gives.

    Args:
        tokenizer: with `decode(ids, skip_special_tokens=…)`.
        stop: strings that end the response; they are cut off.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [word for word in stop if word]
        self._ids: list[int] = []
        self._decoded = ""
        self._sent = 0
        self._end: int | None = None

    @property
    def text(self) -> str:
        """All text so far, up to a stop string; what is held back included."""
        return self._decoded[: self._end]

    @property
    def stopped(self) -> bool:
        """True once a stop string was written."""
        return self._end is not None

    def push(self, token_id: int) -> str:
        """Take one more token; return the text that can be sent now, often one token's worth."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        self._decoded = self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self._end = self._first_stop()
        return self._send(self._safe_length())

    def flush(self) -> str:
        """Return what was held back; the response is over."""
        return self._send(len(self.text))

    def _send(self, end: int) -> str:
        piece = self._decoded[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _first_stop(self) -> int | None:
        places = (self._decoded.find(word) for word in self._stop)
        return min((place for place in places if place >= 0), default=None)

    def _safe_length(self) -> int:
        """How many characters can no longer change, nor turn into a stop string."""
        if self._end is not None:
            return self._end
        whole = self._decoded.rstrip(_INCOMPLETE)  # bytes that do not make a character yet
        held = max((_overlap(whole, word) for word in self._stop), default=0)
        return len(whole) - held


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that `word` begins with, the whole word excluded."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
