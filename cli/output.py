"""What a command shows: tables and JSON on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

__all__ = ["RichProgress", "note", "print_json", "print_tables", "table"]

_PIPE_WIDTH = 120
_PLAIN_LINE_EVERY_SECONDS = 10.0


def print_json(value: Mapping[str, object]) -> None:
    """Write one JSON object and a newline to stdout; NaN and infinity are bugs, not JSON."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of plain text, brackets included; columns without a name have no header."""
    made = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def print_tables(*tables: Table) -> None:
    """Print tables on stdout, wide enough to be read when it is a pipe."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    for made in tables:
        console.print(made)


def note(text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class _Count(ProgressColumn):
    """How far a stage is: `12/400`, or sizes where the stage counts bytes."""

    def render(self, task: Task) -> Text:
        """The count of one stage, on one line."""
        known, is_bytes = task.fields["known_total"], task.fields["is_bytes"]
        return Text("" if known is None else _count(task.completed, known, is_bytes))


def _count(done: float, total: float | None, is_bytes: bool) -> str:
    if total is None:
        return _amount(done, is_bytes)
    return f"{_amount(done, is_bytes)}/{_amount(total, is_bytes)}"


def _amount(n: float, is_bytes: bool) -> str:
    return decimal(int(n)) if is_bytes else str(int(n))


class RichProgress:
    """Stages of a long command, shown on stderr; a context manager.

    On a terminal each stage is a bar. Elsewhere each stage is a plain line when it begins, one when
    it ends, and one every ten seconds between, so that a log stays short.

    Args:
        console: where to draw; stderr if left out.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console(stderr=True)
        self._bars: Progress | None = None
        self._name = ""
        self._total: int | None = None
        self._is_bytes = False
        self._done = 0
        self._began = self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                _Count(table_column=Column(no_wrap=True)),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_stage(finished=error is None)
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def stage(
        self, name: str, total: int | None, *, unit: Literal["steps", "bytes"] = "steps"
    ) -> None:
        """Begin a stage, and with that end the one before; total None: not known."""
        self._end_stage(finished=True)
        self._name, self._total, self._done = name, total, 0
        self._is_bytes = unit == "bytes"
        self._began = self._last_line = time.monotonic()
        if self._bars is not None:
            self._bars.add_task(
                escape(name), total=total, known_total=total, is_bytes=self._is_bytes
            )
        else:
            of = f" ({_count(0, total, self._is_bytes)})" if total is not None else ""
            self._line(f"{name}{of}")

    def advance(self, n: int = 1) -> None:
        """Count `n` more steps of the running stage as done."""
        self._done += n
        if self._bars is not None:
            if self._bars.task_ids:
                self._bars.advance(self._bars.task_ids[-1], n)
            return
        now = time.monotonic()
        if now - self._last_line >= _PLAIN_LINE_EVERY_SECONDS:
            self._last_line = now
            self._line(f"{self._name}: {_count(self._done, self._total, self._is_bytes)}")

    def note(self, text: str) -> None:
        """Show a line that stays."""
        self._line(text)

    def _end_stage(self, finished: bool) -> None:
        if not self._name:
            return
        if self._bars is None and finished:
            self._line(f"{self._name}: {time.monotonic() - self._began:.1f} s")
        if self._bars is not None and self._bars.task_ids:
            last = self._bars.task_ids[-1]
            if finished:  # an unknown total is known now: the bar fills and its clock stops
                total = self._total if self._total is not None else max(self._done, 1)
                self._bars.update(last, total=total, completed=total)
            self._bars.stop_task(last)
        self._name = ""

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True, highlight=False)
