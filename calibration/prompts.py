"""Prompts to calibrate on: the shipped sets, a user's files, and the public sets as published.

A file's rows become `Prompt`s by the names of their columns (`TEXT_COLUMNS` and below), so
AdvBench, HarmBench, JailbreakBench, StrongREJECT, XSTest, OR-Bench and OKTest load as they are.
Errors name the file, the line, what was expected and what stood there.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import fsum
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from guard.errors import InputError, PromptSetError

__all__ = [
    "LEAST_PROMPTS",
    "LONGEST_PROMPT",
    "MOST_PROMPTS",
    "Label",
    "Prompt",
    "Splits",
    "Stratum",
    "calibration_splits",
    "check_two_sided",
    "datasets_sha256",
    "load_prompts",
    "shipped_prompts",
    "split_prompts",
    "splits_behind",
    "spread",
    "thinned",
]

Label = Literal["harmful", "benign"]
Stratum = Literal["ordinary", "hard"]

LONGEST_PROMPT = 20_000
"""Characters; one longer prompt would slow down or overflow the batch that it is in."""
_HELD = (0.15, 0.2, 0.2)
_MOST_HELD = (400, 500, 500)
"""Shares, and most prompts, of validation, calibration and test: enough for narrow intervals."""
MOST_PROMPTS = 5000
"""That a calibration uses unless it is asked for more: a prompt costs most of a forward pass."""
LEAST_PROMPTS = 32
"""Harmful, and benign, prompts below which nothing can be calibrated."""

TEXT_COLUMNS = ("text", "prompt", "forbidden_prompt", "goal", "Goal", "Behavior")
"""Where a row's text stands; the first column that the row has counts."""
CATEGORY_COLUMNS = ("category", "Category", "type", "SemanticCategory")
LABELS: Mapping[str, Label] = {
    "harmful": "harmful",
    "benign": "benign",
    "unsafe": "harmful",
    "safe": "benign",
}
"""Values of a `label` column; XSTest says safe and unsafe."""
STRATA: Mapping[str, Stratum] = {"ordinary": "ordinary", "hard": "hard"}

_OWN_COLUMNS = {"id", "text", "label", "stratum", "category", "pair_id", "language"}
_SHIPPED = ("harmful", "hard_benign_pairs", "ordinary_benign", "hard_benign")
_MOST_BYTES = 64 * 2**20
_Row = tuple[int, Mapping[str, Any]]
_Value = TypeVar("_Value", bound=str)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a calibration set.

    Attributes:
        id: unique in its file.
        text: what a user would send, without surrounding space.
        label: what it is.
        stratum: "hard" for what looks like the other label.
        category: kind of harm, or of benign request.
        pair_id: shared by two prompts that differ only in harm; None: not paired.
        language: ISO 639 code, "und" where the file does not say.
    """

    id: str
    text: str
    label: Label
    stratum: Stratum
    category: str
    pair_id: str | None
    language: str


@dataclass(frozen=True)
class Splits:
    """Prompts by use: fit, choose, set thresholds, report. No group stands in two of them."""

    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    calibration: tuple[Prompt, ...]
    test: tuple[Prompt, ...]


def load_prompts(path: Path, *, label: Label | None, stratum: Stratum = "ordinary") -> list[Prompt]:
    """Read a prompt file: .jsonl (an object a line), .csv or .tsv (with a header), else plain text.

    Where rows have a label or a stratum of their own, theirs decides.

    Args:
        path: the file, UTF-8.
        label: of rows that have none, and then only rows of this label are returned: XSTest with
            "harmful" gives its unsafe prompts. None: every row must have its own; all are returned.
        stratum: of rows that have none.

    Raises:
        PromptSetError: names file and line; unreadable, empty, no column of text, a blank or
            over-long text, an unknown label, a text with two labels, no row of the asked label.
    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise PromptSetError(f"{path}: {size} bytes, a prompt file has at most {_MOST_BYTES}")
        data = path.read_bytes()
    except OSError as err:
        raise PromptSetError(f"{path}: cannot read the prompts: {err.strerror or err}") from err
    prompts = _parse(str(path), data, path.suffix.lower(), label, stratum)
    wanted = [prompt for prompt in prompts if label in (None, prompt.label)]
    if not wanted:
        raise PromptSetError(
            f"{path}: expected {label} prompts, but all {len(prompts)} rows are labelled otherwise"
        )
    return wanted


def shipped_prompts() -> list[Prompt]:
    """The prompt sets that come with trimtab: harmful, ordinary benign and hard benign."""
    folder = files("calibration") / "prompt_sets"
    return [
        prompt
        for name in _SHIPPED
        for prompt in _parse(
            f"{name}.jsonl", (folder / f"{name}.jsonl").read_bytes(), ".jsonl", None, "ordinary"
        )
    ]


def check_two_sided(prompts: Sequence[Prompt]) -> None:
    """Refuse sets from which no contrast can be learned.

    Raises:
        PromptSetError: fewer than `LEAST_PROMPTS` harmful or benign prompts, or a text that is
            labelled both.
    """
    counts = Counter(prompt.label for prompt in prompts)
    sides: tuple[Label, ...] = ("harmful", "benign")
    for label in sides:
        if counts[label] < LEAST_PROMPTS:
            raise PromptSetError(
                f"got {counts[label]} {label} prompts, at least {LEAST_PROMPTS} are needed; give"
                f" more with --{label} FILE, or leave the option out to use the shipped ones"
            )
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        other = first.setdefault(_normalised(prompt.text), prompt)
        if other.label != prompt.label:
            raise PromptSetError(
                f"prompts {other.id} and {prompt.id} have the same text, but one is {other.label}"
                f" and the other {prompt.label}: {_shown(prompt.text)}"
            )


def datasets_sha256(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of prompts as used, whatever their order, ids and the files they came from."""
    lines = sorted(
        json.dumps([prompt.text, prompt.label, prompt.stratum, prompt.category, prompt.pair_id])
        for prompt in prompts
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def thinned(prompts: Sequence[Prompt], most: int, seed: int) -> list[Prompt]:
    """At most about `most` prompts (0: all), drawn evenly from all kinds; groups go whole."""
    if most == 0 or len(prompts) <= most:
        return list(prompts)
    share = most / len(prompts)
    return list(split_prompts(prompts, seed, (share, 1.0 - share, 0.0, 0.0)).train)


def calibration_splits(prompts: Sequence[Prompt], most: int, seed: int) -> Splits:
    """The four splits as a calibration with these settings uses them.

    Args:
        prompts: all of them.
        most: that are used, as for `thinned`.
        seed: of what is used and where it goes.
    """
    prompts = thinned(prompts, most, seed)
    held = [min(share, most / len(prompts)) for share, most in zip(_HELD, _MOST_HELD, strict=True)]
    return split_prompts(prompts, seed, (round(1.0 - sum(held), 9), held[0], held[1], held[2]))


def splits_behind(
    datasets: Mapping[str, str], prompts: Sequence[Prompt], seed: int, most: int = 0
) -> Splits | None:
    """The splits that a guard was calibrated on; None if they are not of these prompts.

    Args:
        datasets: split → `datasets_sha256`, as in the guard's manifest.
        prompts: all that there were.
        seed: of the calibration.
        most: prompts that were used at most, if that was no default.
    """
    for limit in {MOST_PROMPTS, 0, most}:
        splits = calibration_splits(prompts, limit, seed)
        if all(datasets_sha256(getattr(splits, name)) == sha for name, sha in datasets.items()):
            return splits
    return None


def split_prompts(
    prompts: Sequence[Prompt],
    seed: int,
    shares: tuple[float, float, float, float] = (0.45, 0.15, 0.2, 0.2),
) -> Splits:
    """Divide prompts into train, validation, calibration and test.

    Groups go whole: the two prompts of a pair, and texts equal up to case and spacing. They are
    dealt in an order drawn from the seed, each to the part that is furthest behind its share of
    that (label, stratum) and of that (label, stratum, category). The order of `prompts` does not
    matter.

    Args:
        prompts: with unique texts or not.
        seed: of the order.
        shares: of the four parts, ≥ 0, with sum 1.

    Raises:
        InputError: shares that are negative or do not add up.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise InputError(f"shares of the four parts must be ≥ 0 with sum 1, got {shares}")
    dealt: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * len(shares))
    part_of: dict[int, int] = {}
    for group in sorted(_groups(prompts), key=lambda group: _draw(seed, prompts, group)):
        levels = [level for i in group for level in _levels(prompts[i])]
        behind = [
            fsum(share * (sum(dealt[level]) + 1) - dealt[level][part] for level in levels)
            for part, share in enumerate(shares)
        ]
        chosen = behind.index(max(behind))
        for level in levels:
            dealt[level][chosen] += 1
        part_of.update(dict.fromkeys(group, chosen))
    parts = [
        tuple(prompt for i, prompt in enumerate(prompts) if part_of[i] == part)
        for part in range(len(shares))
    ]
    return Splits(*parts)


def _levels(prompt: Prompt) -> list[tuple[str, ...]]:
    whole = (prompt.label, prompt.stratum)
    return [whole, (*whole, prompt.category)]


def _groups(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Indices of prompts that share a pair or a normalised text, directly or through others."""
    parent = list(range(len(prompts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, prompt in enumerate(prompts):
        keys = [("text", _normalised(prompt.text))]
        keys += [("pair", prompt.pair_id)] if prompt.pair_id is not None else []
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i in range(len(prompts)):
        groups[root(i)].append(i)
    return list(groups.values())


def _draw(seed: int, prompts: Sequence[Prompt], group: Sequence[int]) -> bytes:
    """A group's place in the order: a hash, so that no library's generator matters."""
    texts = sorted(_normalised(prompts[i].text) for i in group)
    return hashlib.sha256(json.dumps([seed, texts]).encode()).digest()


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def _parse(
    name: str, data: bytes, suffix: str, label: Label | None, stratum: Stratum
) -> list[Prompt]:
    """All rows of a file as prompts."""
    content = _decode(name, data)
    if suffix in (".jsonl", ".ndjson", ".json"):
        rows = _json_rows(name, content)
    elif suffix in (".csv", ".tsv"):
        rows = _csv_rows(name, content, "\t" if suffix == ".tsv" else ",")
    else:
        lines = enumerate(content.split("\n"), start=1)
        rows = ((number, {"text": line}) for number, line in lines if line.strip())
    stem = Path(name).stem
    prompts: list[Prompt] = []
    lines_by_id: dict[str, int] = {}
    first: dict[str, tuple[int, Label]] = {}
    for number, row in rows:
        place = f"{name}, line {number}"
        prompt = _prompt(place, row, f"{stem}-{number:05d}", stem, label, stratum)
        earlier = lines_by_id.setdefault(prompt.id, number)
        if earlier != number:
            raise PromptSetError(f"{place}: id {prompt.id!r} stands in line {earlier} already")
        line, other = first.setdefault(_normalised(prompt.text), (number, prompt.label))
        if other != prompt.label:
            raise PromptSetError(
                f"{place}: this text is labelled {prompt.label} here and {other} in line {line}:"
                f" {_shown(prompt.text)}"
            )
        prompts.append(prompt)
    if not prompts:
        raise PromptSetError(f"{name}: expected prompts, got an empty file")
    return prompts


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        # A byte order mark is not counted in err.start; no line can end inside it.
        number = data[: err.start].count(b"\n") + 1
        raise PromptSetError(
            f"{name}, line {number}: expected UTF-8, got byte 0x{err.object[err.start]:02x}"
        ) from err


def _json_rows(name: str, content: str) -> Iterator[_Row]:
    # Not splitlines(): U+2028 and others may stand inside a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            why = err.msg if isinstance(err, json.JSONDecodeError) else str(err)
            raise PromptSetError(
                f"{place}: expected a JSON object, got bad JSON ({why}): {_shown(line)}"
            ) from err
        if not isinstance(row, dict):
            raise PromptSetError(
                f"{place}: expected a JSON object, got {type(row).__name__}: {_shown(line)}"
            )
        yield number, row


def _csv_rows(name: str, content: str, delimiter: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    end = 0
    try:
        for cells in reader:
            number, end = end + 1, reader.line_num  # a cell may hold line breaks
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            if len(cells) != len(header):
                raise PromptSetError(
                    f"{name}, line {number}: expected {len(header)} columns"
                    f" ({', '.join(header)}), got {len(cells)}"
                )
            yield number, dict(zip(header, cells, strict=True))
    except csv.Error as err:
        raise PromptSetError(f"{name}, line {end + 1}: expected CSV, got {err}") from err


def _prompt(
    place: str,
    row: Mapping[str, Any],
    default_id: str,
    stem: str,
    label: Label | None,
    stratum: Stratum,
) -> Prompt:
    """One row as a prompt."""
    column = next((name for name in TEXT_COLUMNS if name in row), None)
    if column is None:
        raise PromptSetError(
            f"{place}: expected a column of text ({', '.join(TEXT_COLUMNS)}),"
            f" got {', '.join(map(str, row)) or 'none'}"
        )
    text = row[column]
    if not isinstance(text, str):
        raise PromptSetError(f"{place}: expected {column} as text, got {type(text).__name__}")
    context = _cell(row, "ContextString")
    if column == "Behavior" and context:
        text = f"{context}\n\n---\n\n{text}"  # as HarmBench shows a contextual behaviour
    text = text.strip()
    _check_text(place, text, column)
    own_id = _cell(row, "id")
    if own_id is not None and not set(row) >= _OWN_COLUMNS:
        own_id = f"{stem}-{own_id}"  # public sets number their rows from 1
    own_label = _one_of(place, row, "label", LABELS)
    if own_label is None and label is None:
        raise PromptSetError(f"{place}: expected a label ({', '.join(LABELS)}), got none")
    return Prompt(
        id=own_id or default_id,
        text=text,
        label=own_label or cast(Label, label),
        stratum=_one_of(place, row, "stratum", STRATA) or stratum,
        category=next(filter(None, (_cell(row, name) for name in CATEGORY_COLUMNS)), "none"),
        pair_id=_cell(row, "pair_id"),
        language=_cell(row, "language") or "und",
    )


def _check_text(place: str, text: str, column: str) -> None:
    if not text:
        raise PromptSetError(f"{place}: expected a prompt in {column}, got blank text")
    if len(text) > LONGEST_PROMPT:
        raise PromptSetError(
            f"{place}: expected at most {LONGEST_PROMPT} characters, got {len(text)}:"
            f" {_shown(text)}"
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptSetError(f"{place}: expected Unicode text, got half a surrogate pair")


def _cell(row: Mapping[str, Any], name: str) -> str | None:
    """A cell as stripped text; None where it is absent, null or blank."""
    value = row.get(name)
    return None if value is None else str(value).strip() or None


def _one_of(
    place: str, row: Mapping[str, Any], name: str, values: Mapping[str, _Value]
) -> _Value | None:
    found = _cell(row, name)
    if found is None:
        return None
    if found.lower() not in values:
        raise PromptSetError(
            f"{place}: expected {name} as one of {', '.join(values)}, got {_shown(found)}"
        )
    return values[found.lower()]


def _shown(text: str) -> str:
    """The beginning of a text, safe to print."""
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def spread(pool: Sequence[Prompt], label: str, stratum: str | None, most: int) -> list[Prompt]:
    """At most so many prompts of a kind, from all over the pool: files are sorted by category."""
    kind = [p for p in pool if p.label == label and stratum in (None, p.stratum)]
    n = min(most, len(kind))
    return [kind[i * len(kind) // n] for i in range(n)]
