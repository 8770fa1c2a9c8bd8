"""Run every prompt once, keep what the rest of the calibration needs, and survive Ctrl-C.

Finished batches are files in the work folder, under a fingerprint of model, prompts and settings.
A second run with the same fingerprint reads them; one with another makes its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from calibration.gate_fit import Labelled, Messages
from calibration.progress import Progress
from calibration.prompts import Prompt
from calibration.subject import Subject
from guard.artifact import write_atomically
from guard.errors import InputError
from guard.gate import message_positions

__all__ = ["WorkFolder", "capture", "fingerprint", "listen"]

_PREFIX = "trimtab-"


class WorkFolder:
    """Finished pieces of a calibration on disk.

    They lie in a folder of their own below the one given, named after the fingerprint, so nothing
    else that lies there is ever read or deleted. Each piece begins with the SHA-256 of the rest.

    Args:
        folder: where; made if missing.
        fingerprint: of everything that the pieces depend on, in hex digits.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._outer, self._folder = folder, folder / f"{_PREFIX}{fingerprint[:16]}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise InputError(
                f"{folder}: cannot keep captured activations here: {err.strerror or err};"
                " choose another folder with --work-dir"
            ) from err

    def load(self, name: str, wanted: set[str]) -> dict[str, Tensor] | None:
        """A finished piece with these tensors; None if it is not there or was damaged."""
        try:
            data = self._path(name).read_bytes()
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                return None
            tensors = load_tensors(data[32:])
        except (OSError, SafetensorError):
            return None
        return tensors if set(tensors) == wanted else None

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep a piece, whole or not at all."""
        data = save_tensors({key: t.contiguous() for key, t in tensors.items()})
        write_atomically(self._path(name), hashlib.sha256(data).digest() + data, mode=0o600)

    def remove(self) -> None:
        """Delete the pieces, and the outer folder if it holds nothing else: they are used up."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._outer.rmdir()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.piece"


def fingerprint(*parts: object) -> str:
    """SHA-256 of a list of plain values."""
    return hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()


def capture(
    subject: Subject,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    message_layers: Sequence[int],
    batch_size: int,
    work: WorkFolder,
    name: str,
    progress: Progress,
    encoded: Sequence[list[int]] | None = None,
) -> Labelled:
    """Prefill prompts once and keep resid_pre.

    Args:
        subject: the model.
        prompts: n prompts.
        layers: of which the ends of the prompts are kept: the message's last token and all
            post-instruction tokens.
        message_layers: of which the last `subject.message_width` tokens of the message are kept;
            none where that is 0.
        batch_size: prompts a pass.
        work: where finished batches are kept.
        name: of this group of prompts in the work folder.
        progress: told of each finished prompt.
        encoded: n chats to run in the place of the prompts' own texts.

    Returns:
        The prompts with hidden states in the model's type.
    """
    message_layers = message_layers if subject.message_width else ()
    encoded = [subject.encode(p.text) for p in prompts] if encoded is None else encoded
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    pieces: list[dict[str, Tensor]] = []
    for number, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        piece = work.load(f"{name}-{number:04d}", {"ends", "messages", "lengths"})
        if piece is None or len(piece["ends"]) != len(rows):
            piece = _capture_batch(subject, [encoded[i] for i in rows], layers, message_layers)
            work.save(f"{name}-{number:04d}", piece)
        pieces.append(piece)
        progress.advance(len(rows))
    back = torch.tensor(order).argsort()
    ends = torch.cat([piece["ends"] for piece in pieces])[back]
    if not message_layers:
        return Labelled(prompts, list(layers), ends)
    lengths = torch.cat([piece["lengths"] for piece in pieces])
    # Tokens lie in the order of the batches; each prompt's are moved to its place.
    starts = (lengths.cumsum(0) - lengths)[back].tolist()
    lengths = lengths[back]
    places = torch.cat(
        [torch.arange(at, at + n) for at, n in zip(starts, lengths.tolist(), strict=True)]
    )
    hidden = {
        layer: torch.cat([piece["messages"][at] for piece in pieces])[places]
        for at, layer in enumerate(message_layers)
    }
    return Labelled(prompts, list(layers), ends, Messages(hidden, lengths))


def listen(
    subject: Subject,
    prompts: Sequence[Prompt],
    max_tokens: int,
    batch_size: int,
    work: WorkFolder,
    name: str,
    progress: Progress,
) -> list[list[int]]:
    """Return the base model's greedy responses as token ids, in the order of the prompts."""
    encoded = [subject.encode(p.text) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    for number, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        piece = work.load(f"{name}-{number:04d}", {"tokens"})
        if piece is None or len(piece["tokens"]) != len(rows):
            made = subject.respond([encoded[i] for i in rows], max_tokens)
            padded = torch.tensor([r + [-1] * (max_tokens - len(r)) for r in made])
            piece = {"tokens": padded}
            work.save(f"{name}-{number:04d}", piece)
        for i, tokens in zip(rows, piece["tokens"].tolist(), strict=True):
            responses[i] = [t for t in tokens if t >= 0]
        progress.advance(len(rows))
    return responses


def _capture_batch(
    subject: Subject,
    prompts: list[list[int]],
    layers: Sequence[int],
    message_layers: Sequence[int],
) -> dict[str, Tensor]:
    """Keep `ends` (n, len(layers), 1 + n_suffix, d_model) and `messages` (layers, tokens, d)."""
    n_suffix = len(subject.suffix_ids)
    places = [
        [
            place - len(ids)
            for place in message_positions(
                ids, subject.suffix_ids, subject.message_opening_ids, max(1, subject.message_width)
            )
        ]
        for ids in prompts
    ]
    # No more than the batch's longest message: a wide window costs short prompts nothing.
    first = min(p[0 if message_layers else -1] for p in places)
    n_last = max(-first, 1 + n_suffix)
    states = subject.states(prompts, sorted({*layers, *message_layers}), n_last)
    rows, last = torch.arange(len(prompts)), torch.tensor([p[-1] for p in places])
    ends = []
    for layer in layers:
        hidden = states[layer].cpu()
        suffix = hidden[:, hidden.shape[1] - n_suffix :]
        ends.append(torch.cat([hidden[rows, last].unsqueeze(1), suffix], 1))
    lengths = torch.tensor([len(p) for p in places])
    owner = torch.arange(len(prompts)).repeat_interleave(lengths)
    at = torch.tensor([place for p in places for place in p])
    messages = [states[layer].cpu()[owner, at] for layer in message_layers]
    return {
        "ends": torch.stack(ends, 1),
        "messages": torch.stack(messages) if messages else torch.empty(0),
        "lengths": lengths,
    }
