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

from calibration.progress import Progress
from calibration.prompts import Prompt
from calibration.subject import Subject
from guard.artifact import write_atomically
from guard.errors import InputError
from guard.gate import message_positions

__all__ = ["WorkFolder", "capture_hidden", "fingerprint", "listen"]

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


def capture_hidden(
    subject: Subject,
    prompts: Sequence[Prompt],
    n_layers: int,
    n_suffix: int,
    batch_size: int,
    work: WorkFolder,
    name: str,
    progress: Progress,
) -> Tensor:
    """Prefill prompts once and keep resid_pre of every layer.

    Args:
        subject: the model.
        prompts: n prompts.
        n_layers: decoder layers of the model.
        n_suffix: how many last (post-instruction) positions to keep; 0 for none.
        batch_size: prompts a pass.
        work: where finished batches are kept.
        name: of this group of prompts in the work folder.
        progress: told of each finished prompt.

    Returns:
        (n, n_layers, 2 + n_suffix, d_model) in the model's type: the mean over the last
        `subject.message_width` tokens of the message (at least one), its last token, and the
        post-instruction tokens.
    """
    encoded = [subject.encode(p.text) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    hidden: list[Tensor] = []
    for number, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        piece = work.load(f"{name}-{number:04d}", {"hidden"})
        if piece is None or len(piece["hidden"]) != len(rows):
            kept = _capture_batch(subject, [encoded[i] for i in rows], n_layers, n_suffix)
            work.save(f"{name}-{number:04d}", piece := {"hidden": kept})
        hidden.append(piece["hidden"])
        progress.advance(len(rows))
    return torch.cat(hidden)[torch.tensor(order).argsort()]


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
    subject: Subject, prompts: list[list[int]], n_layers: int, n_suffix: int
) -> Tensor:
    step = subject.prefill(prompts, range(n_layers))
    pool = torch.zeros(step.input_ids.shape)
    last = []
    for row, ids in enumerate(prompts):
        places = message_positions(
            ids, subject.suffix_ids, subject.message_opening_ids, max(1, subject.message_width)
        )
        pool[row, [place - len(ids) for place in places]] = 1.0 / len(places)
        last.append(places[-1] - len(ids))
    rows = torch.arange(len(prompts))
    kept = []
    for layer in range(n_layers):
        hidden = step.resid_pre[layer].cpu()
        mean = torch.bmm(pool.unsqueeze(1), hidden.float().nan_to_num(0.0)).to(hidden.dtype)
        ends = hidden[:, hidden.shape[1] - n_suffix :]
        kept.append(torch.cat([mean, hidden[rows, last].unsqueeze(1), ends], 1))
    return torch.stack(kept, 1)
