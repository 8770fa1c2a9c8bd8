"""A wide window costs what the messages hold, not what it could hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibration.capture import WorkFolder, capture
from calibration.gate_fit import Labelled
from calibration.progress import Silent
from calibration.prompts import Prompt
from calibration.transformers_subject import TransformersSubject
from tests.tiny_refuser import harmful_prompts

LAYERS, MESSAGE_LAYERS = [1, 2], [2]
SHORT = harmful_prompts()[:12]
LONG = [" ".join(["ask paint house"] * 30), " ".join(["ask steal car"] * 45)]


class Asked(TransformersSubject):
    """A subject that remembers how many tokens of its prompts were asked for."""

    def __init__(self, folder: Path, width: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        super().__init__(model, tokenizer, "tiny-refuser", message_width=width)
        self.asked: list[int] = []

    def states(
        self, prompts: Sequence[Sequence[int]], capture: Sequence[int], n_last: int
    ) -> dict[int, Tensor]:
        """Remember, then run."""
        self.asked.append(n_last)
        return super().states(prompts, capture, n_last)


def captured(subject: Asked, texts: Sequence[str], folder: Path) -> Labelled:
    prompts = [
        Prompt(f"p-{i}", text, "harmful", "ordinary", "c", None, "en")
        for i, text in enumerate(texts)
    ]
    work = WorkFolder(folder, f"width-{subject.message_width}")
    return capture(subject, prompts, LAYERS, MESSAGE_LAYERS, 4, work, "some", Silent())


def test_no_more_tokens_are_asked_for_than_the_longest_message_of_a_batch_has(
    tiny_refuser_dir: Path, tmp_path: Path
) -> None:
    subject = Asked(tiny_refuser_dir, 512)
    captured(subject, [*SHORT, *LONG], tmp_path)
    behind = len(subject.suffix_ids)
    lengths = sorted(len(text.split()) for text in [*SHORT, *LONG])
    wanted = [behind + max(lengths[i : i + 4]) for i in range(0, len(lengths), 4)]
    assert subject.asked == wanted
    assert max(subject.asked[:-1]) < 16  # of 512


@pytest.mark.parametrize("width", [64, 100])
def test_a_window_keeps_the_last_tokens_of_a_message_and_all_of_a_shorter_one(
    tiny_refuser_dir: Path, tmp_path: Path, width: int
) -> None:
    texts = [*SHORT, *LONG]
    wide, narrow = (
        captured(Asked(tiny_refuser_dir, size), texts, tmp_path) for size in (512, width)
    )
    assert wide.messages is not None
    assert narrow.messages is not None
    n_words = [len(text.split()) for text in texts]
    assert wide.messages.lengths.tolist() == n_words
    assert narrow.messages.lengths.tolist() == [min(width, n) for n in n_words]
    assert torch.equal(wide.hidden, narrow.hidden)
    kept = narrow.messages.hidden[2].split(narrow.messages.lengths.tolist())
    for ours, whole in zip(kept, wide.messages.hidden[2].split(n_words), strict=True):
        assert torch.equal(ours, whole[-len(ours) :])
    assert len(wide.messages.hidden[2]) == sum(n_words)  # ragged: no padding is kept
