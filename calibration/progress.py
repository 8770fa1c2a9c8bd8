"""How a calibration tells where it is."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """What the pipeline calls while it works; the command line draws it."""

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage of `total` steps; None where the number is not known."""

    def advance(self, n: int = 1) -> None:
        """Report finished steps."""

    def note(self, text: str) -> None:
        """Say one line."""


class Silent:
    """Says nothing."""

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage."""

    def advance(self, n: int = 1) -> None:
        """Report finished steps."""

    def note(self, text: str) -> None:
        """Say one line."""
