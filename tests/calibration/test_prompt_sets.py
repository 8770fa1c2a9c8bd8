"""The calibration prompts teach harm, not style.

A probe trained on harmful and benign prompts that differ in length or in their opening words learns
those instead of harm. These tests read the four prompt files as they are shipped and hold them to
their format, to their size, and to having no such shortcut.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

KEYS = {"id", "text", "label", "stratum", "category", "pair_id", "language"}
LANGUAGES = {"en", "de", "fr", "es", "it", "pt"}
LABELS_AND_STRATA = {
    "harmful": {("harmful", "ordinary"), ("harmful", "hard")},
    "hard_benign_pairs": {("benign", "hard")},
    "ordinary_benign": {("benign", "ordinary")},
    "hard_benign": {("benign", "hard")},
}
"""What the lines of each file may say of themselves."""

FILE_NAMES = sorted(LABELS_AND_STRATA)
UNPAIRED_FILE_NAMES = ["hard_benign", "ordinary_benign"]
NEAR_DUPLICATE_JACCARD = 0.8
SHORTCUT_AUROC = 0.65


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file."""

    id: str
    text: str
    label: str
    stratum: str
    category: str
    pair_id: str | None
    language: str

    @property
    def group(self) -> str:
        """The pair the prompt belongs to, or itself."""
        return self.pair_id or self.id

    @property
    def words(self) -> list[str]:
        """The lower-cased words of the text, in order."""
        return re.findall(r"\w+", self.text.lower())


def raw_lines(file_name: str) -> list[dict[str, object]]:
    """The parsed lines of one prompt file, unchecked."""
    resource = files("calibration") / "prompt_sets" / f"{file_name}.jsonl"
    content = resource.read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def optional_text(value: object) -> str | None:
    """A JSON string or null."""
    return None if value is None else str(value)


def read_prompts(file_name: str) -> list[Prompt]:
    """The prompts of one file."""
    return [
        Prompt(
            id=str(line["id"]),
            text=str(line["text"]),
            label=str(line["label"]),
            stratum=str(line["stratum"]),
            category=str(line["category"]),
            pair_id=optional_text(line["pair_id"]),
            language=str(line["language"]),
        )
        for line in raw_lines(file_name)
    ]


def near_duplicates(prompts: Sequence[Prompt]) -> Iterator[tuple[float, Prompt, Prompt]]:
    """Pairs of prompts, of different groups, with Jaccard = |a ∩ b| / |a ∪ b| over the limit.

    Jaccard is at most the ratio of the two sizes, so with the word sets sorted by size each one is
    compared only with those a little larger than itself.
    """
    by_size = sorted(((set(prompt.words), prompt) for prompt in prompts), key=lambda e: len(e[0]))
    for position, (words, prompt) in enumerate(by_size):
        for other_words, other in by_size[position + 1 :]:
            if len(words) <= NEAR_DUPLICATE_JACCARD * len(other_words):
                break
            n_shared = len(words & other_words)
            jaccard = n_shared / (len(words) + len(other_words) - n_shared)
            if jaccard > NEAR_DUPLICATE_JACCARD and prompt.group != other.group:
                yield jaccard, prompt, other


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [prompt for file_name in FILE_NAMES for prompt in read_prompts(file_name)]


@pytest.fixture(scope="module")
def is_harmful(prompts: list[Prompt]) -> np.ndarray:
    return np.array([prompt.label == "harmful" for prompt in prompts])


@pytest.mark.parametrize("file_name", FILE_NAMES)
def test_every_line_has_exactly_the_seven_keys(file_name: str) -> None:
    lines = raw_lines(file_name)
    assert lines
    assert [line for line in lines if set(line) != KEYS] == []


@pytest.mark.parametrize("file_name", FILE_NAMES)
def test_every_line_has_a_label_and_stratum_of_its_file(file_name: str) -> None:
    found = {(prompt.label, prompt.stratum) for prompt in read_prompts(file_name)}
    assert found
    assert found <= LABELS_AND_STRATA[file_name]


@pytest.mark.parametrize("file_name", FILE_NAMES)
def test_every_value_is_a_plain_well_formed_string(file_name: str) -> None:
    for line in raw_lines(file_name):
        assert all(isinstance(line[key], str) for key in KEYS - {"pair_id"}), line
        assert line["pair_id"] is None or isinstance(line["pair_id"], str), line
        assert line["pair_id"] != "", line
        assert line["language"] in LANGUAGES, line
        assert re.fullmatch(r"[a-z]+(-[a-z]+)?-\d{3,4}", str(line["id"])), line
        assert re.fullmatch(r"[a-z][a-z0-9_]*", str(line["category"])), line


def test_every_text_is_one_trimmed_line_of_4_to_45_words(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        assert prompt.text == " ".join(prompt.text.split()), prompt
        assert 4 <= len(prompt.text.split()) <= 45, prompt


def test_english_is_written_in_ascii_and_all_punctuation_is_ascii(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        beyond_ascii = {character for character in prompt.text if not character.isascii()}
        assert prompt.language != "en" or not beyond_ascii, prompt
        assert all(character.isalpha() for character in beyond_ascii), prompt


@pytest.mark.parametrize(
    "file_names",
    [["harmful"], ["ordinary_benign"], ["hard_benign_pairs", "hard_benign"]],
    ids=["harmful", "ordinary benign", "hard benign"],
)
def test_each_kind_of_prompt_comes_200_times_in_at_least_ten_categories(
    file_names: list[str],
) -> None:
    prompts = [prompt for file_name in file_names for prompt in read_prompts(file_name)]
    assert len(prompts) >= 200
    assert len({prompt.category for prompt in prompts}) >= 10


def test_at_least_120_pairs_are_complete_and_none_is_broken(prompts: list[Prompt]) -> None:
    labels_by_pair: defaultdict[str, list[str]] = defaultdict(list)
    for prompt in prompts:
        if prompt.pair_id is not None:
            labels_by_pair[prompt.pair_id].append(prompt.label)
    broken = {p: labels for p, labels in labels_by_pair.items() if len(labels) != 2}
    one_sided = {p: labels for p, labels in labels_by_pair.items() if len(set(labels)) != 2}
    assert broken == {}
    assert one_sided == {}
    assert len(labels_by_pair) >= 120


def test_the_paired_file_is_paired_throughout_and_the_others_not_at_all() -> None:
    assert [p for p in read_prompts("hard_benign_pairs") if p.pair_id is None] == []
    for file_name in UNPAIRED_FILE_NAMES:
        assert [p for p in read_prompts(file_name) if p.pair_id is not None] == []


def test_no_id_occurs_twice(prompts: list[Prompt]) -> None:
    counts = Counter(prompt.id for prompt in prompts)
    assert [prompt_id for prompt_id, count in counts.items() if count > 1] == []


def test_no_text_occurs_twice_even_with_other_case_or_spacing(prompts: list[Prompt]) -> None:
    counts = Counter(" ".join(prompt.text.casefold().split()) for prompt in prompts)
    assert [text for text, count in counts.items() if count > 1] == []


def test_no_two_pairs_hold_nearly_the_same_text(prompts: list[Prompt]) -> None:
    assert list(near_duplicates(prompts)) == []


def test_the_search_for_near_duplicates_agrees_with_comparing_everything() -> None:
    texts = [
        "how do i boil an egg",
        "how do i boil an egg now",
        "how do i boil an old egg now please",
        "egg an boil i do how",
        "write a song",
    ]
    prompts = [
        Prompt(f"t-{n:04d}", text, "benign", "ordinary", "test", None, "en")
        for n, text in enumerate(texts)
    ]
    expected = {
        frozenset({a.id, b.id})
        for a, b in combinations(prompts, 2)
        if len({*a.words} & {*b.words}) / len({*a.words} | {*b.words}) > NEAR_DUPLICATE_JACCARD
    }
    assert {frozenset({a.id, b.id}) for _, a, b in near_duplicates(prompts)} == expected
    assert len(expected) == 3


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_the_label_cannot_be_told_from_the_length(
    prompts: list[Prompt], is_harmful: np.ndarray, unit: str
) -> None:
    lengths = [len(p.text.split() if unit == "words" else p.text) for p in prompts]
    auroc = roc_auc_score(is_harmful, lengths)
    print(f"AUROC of the length in {unit}: {auroc:.3f}")  # noqa: T201
    assert 1 - SHORTCUT_AUROC <= auroc <= SHORTCUT_AUROC


def test_the_label_cannot_be_told_from_the_opening_words(
    prompts: list[Prompt], is_harmful: np.ndarray
) -> None:
    openings = [" ".join(prompt.words[:3]) for prompt in prompts]
    scores = cross_val_predict(
        make_pipeline(CountVectorizer(analyzer=str.split), LogisticRegression(max_iter=1000)),
        openings,
        is_harmful,
        groups=[prompt.group for prompt in prompts],
        cv=StratifiedGroupKFold(n_splits=5, shuffle=True, random_state=0),
        method="decision_function",
    )
    auroc = roc_auc_score(is_harmful, scores)
    print(f"AUROC of the first three words: {auroc:.3f}")  # noqa: T201
    assert auroc < SHORTCUT_AUROC
