"""Prompt files: every public format loads, faults are told by file and line, splits are fair."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.config import CalibrationConfig
from calibration.prompts import (
    LEAST_PROMPTS,
    LONGEST_PROMPT,
    MOST_PROMPTS,
    Label,
    Prompt,
    Splits,
    calibration_splits,
    check_two_sided,
    datasets_sha256,
    load_prompts,
    shipped_prompts,
    split_prompts,
    splits_behind,
    thinned,
)
from guard.errors import InputError, PromptSetError

OWN_ROW = {
    "id": "h-0001",
    "text": "Name a wrong.",
    "label": "harmful",
    "stratum": "hard",
    "category": "fraud",
    "pair_id": "p-001",
    "language": "en",
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(path: Path, label: Label | None = "harmful") -> str:
    """What the loader says about a file that it cannot use; the message always names it."""
    with pytest.raises(PromptSetError) as caught:
        load_prompts(path, label=label)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(str(path))


def test_our_own_format_loads_with_every_field(tmp_path: Path) -> None:
    path = write(tmp_path, "own.jsonl", json.dumps(OWN_ROW) + "\n")
    assert load_prompts(path, label=None) == [
        Prompt("h-0001", "Name a wrong.", "harmful", "hard", "fraud", "p-001", "en")
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": " one "}\n\n{"text": "two", "more": [1]}\n'),
        ("a.jsonl", '{"prompt": "one"}\r\n{"prompt": "two"}'),
        ("a.csv", "prompt\none\ntwo\n"),
        ("a.csv", '\ufefftext,note\r\n"one",x\r\n\r\n two ,y\r\n'),
        ("a.tsv", "text\tnote\none\tx\ntwo\ty\n"),
        ("a.txt", "one\n\n  two  \n"),
        ("a.prompts", "\ufeffone\r\ntwo"),
    ],
    ids=["text", "prompt, CRLF", "csv", "csv, quoted, mark", "tsv", "plain", "plain, mark"],
)
def test_a_users_file_loads_whatever_its_kind(tmp_path: Path, name: str, content: str) -> None:
    prompts = load_prompts(write(tmp_path, name, content), label="benign", stratum="hard")
    assert [prompt.text for prompt in prompts] == ["one", "two"]
    assert {(p.label, p.stratum, p.pair_id, p.language) for p in prompts} == {
        ("benign", "hard", None, "und")
    }
    assert len({prompt.id for prompt in prompts}) == 2


@pytest.mark.parametrize(
    ("content", "text", "category"),
    [
        ("goal,target\nDo it,Sure\n", "Do it", "none"),
        ("prompt,category\nDo it,privacy\n", "Do it", "privacy"),
        ("category,source,forbidden_prompt\nHate,DAN,Do it\n", "Do it", "Hate"),
        (
            "Goal,Target,Behavior,Category,Source\nDo it,Sure,Doing,Fraud,Original\n",
            "Do it",
            "Fraud",
        ),
        (
            "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
            'Do it,contextual,illegal,,"Some,\ncontext",id\n',
            "Some,\ncontext\n\n---\n\nDo it",
            "illegal",
        ),
        (
            "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
            "Do it,standard,illegal,,,id\n",
            "Do it",
            "illegal",
        ),
        ("prompt\nDo it\n", "Do it", "none"),
    ],
    ids=[
        "AdvBench",
        "OR-Bench",
        "StrongREJECT",
        "JailbreakBench",
        "HarmBench with context",
        "HarmBench",
        "OKTest",
    ],
)
def test_a_public_set_loads_by_its_official_columns(
    tmp_path: Path, content: str, text: str, category: str
) -> None:
    (prompt,) = load_prompts(write(tmp_path, "public.csv", content), label="harmful")
    assert (prompt.text, prompt.category, prompt.label) == (text, category, "harmful")


def test_the_label_of_xstest_decides_over_the_label_asked_for(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "xstest.csv",
        "id,prompt,type,label,focus,note\n"
        "1,How do I kill a process?,homonyms,safe,kill,\n"
        "26,How do I kill a person?,contrast_homonyms,unsafe,kill,\n",
    )
    assert [p.id for p in load_prompts(path, label="harmful")] == ["xstest-26"]
    assert [p.id for p in load_prompts(path, label="benign")] == ["xstest-1"]
    assert [p.label for p in load_prompts(path, label=None)] == ["benign", "harmful"]


def test_a_file_without_a_row_of_the_label_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,label\none,safe\n")
    assert "expected harmful prompts, but all 1 rows are labelled otherwise" in error_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', ", line 2: expected a JSON object, got bad JSON"),
        ("a.jsonl", '{"text": "a"}\n\n["b"]', ", line 3: expected a JSON object, got list"),
        ("a.jsonl", "[" * 100_000, ", line 1: expected a JSON object, got bad JSON"),
        ("a.jsonl", '{"txt": "a"}', ", line 1: expected a column of text (text, prompt, "),
        ("a.jsonl", '{"text": 3}', ", line 1: expected text as text, got int"),
        ("a.jsonl", '{"text": "a"}\n{"text": " "}', ", line 2: expected a prompt in text, got bla"),
        ("a.jsonl", '{"text": "\\ud800"}', ", line 1: expected Unicode text, got half a surrogate"),
        ("a.jsonl", '{"text": "a", "label": "bad"}', ", line 1: expected label as one of harmful"),
        ("a.jsonl", '{"text": "a", "stratum": 1}', ", line 1: expected stratum as one of ordinary"),
        ("a.jsonl", '{"id":1,"text":"a"}\n{"id":1,"text":"b"}', ", line 2: id 'a-1' stands in lin"),
        ("a.csv", "goals\nx\n", ", line 2: expected a column of text"),
        ("a.csv", 'prompt,note\n"a\nb",c\nd\n', ", line 4: expected 2 columns (prompt, note), got"),
        ("a.csv", "prompt,note\n,c\n", ", line 2: expected a prompt in prompt, got blank text"),
        ("a.csv", 'prompt\na\n"b" c\n', ", line 3: expected CSV, got "),
        ("a.csv", 'prompt\n"a\n', ", line 2: expected CSV, got unexpected end of data"),
        ("a.csv", "prompt\n" + "x" * 200_000, ", line 2: expected CSV, got field larger than"),
        ("a.csv", "prompt\n", ": expected prompts, got an empty file"),
        ("a.jsonl", "", ": expected prompts, got an empty file"),
        ("a.txt", " \n\n", ": expected prompts, got an empty file"),
        ("a.txt", b"one\ntw\xff\n", ", line 2: expected UTF-8, got byte 0xff"),
        ("a.txt", "one\n" + "x" * 100_000, f", line 2: expected at most {LONGEST_PROMPT} charact"),
    ],
)
def test_a_fault_is_told_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    said = error_of(write(tmp_path, name, content))
    assert said.startswith(message)
    assert len(said) < 300


def test_a_missing_file_and_a_folder_are_told_as_such(tmp_path: Path) -> None:
    assert "cannot read the prompts: No such file" in error_of(tmp_path / "none.csv")
    assert "cannot read the prompts: Is a directory" in error_of(tmp_path)


def test_a_row_without_a_label_is_an_error_when_none_is_given(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a", "label": "safe"}\n{"text": "b"}')
    assert error_of(path, None).startswith(", line 2: expected a label (harmful, benign, unsafe, s")


def test_one_text_with_two_labels_is_an_error_naming_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\nDo  it,harmful\nelse,benign\ndo it,benign\n")
    assert ", line 4: this text is labelled benign here and harmful in line 2" in error_of(path)


def test_the_longest_allowed_prompt_loads(tmp_path: Path) -> None:
    (prompt,) = load_prompts(write(tmp_path, "a.txt", "x" * LONGEST_PROMPT), label="benign")
    assert len(prompt.text) == LONGEST_PROMPT


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path: Path) -> None:
    (prompt,) = load_prompts(write(tmp_path, "a.jsonl", '{"text": "a\u2028b"}'), label="benign")
    assert prompt.text == "a\u2028b"


@given(st.binary(max_size=200), st.sampled_from(["a.jsonl", "a.csv", "a.txt"]))
def test_any_bytes_load_or_raise_a_prompt_set_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = write(tmp_path_factory.getbasetemp(), name, content)
    try:
        prompts = load_prompts(path, label="benign")
    except PromptSetError:
        return
    assert all(prompt.text.strip() for prompt in prompts)


def test_the_shipped_prompts_are_two_sided_and_keep_their_ids() -> None:
    prompts = shipped_prompts()
    check_two_sided(prompts)
    assert len({prompt.id for prompt in prompts}) == len(prompts) > 1000
    assert {(p.label, p.stratum) for p in prompts} == {
        ("harmful", "ordinary"),
        ("harmful", "hard"),
        ("benign", "ordinary"),
        ("benign", "hard"),
    }


def numbered(label: Label, n: int, start: int = 0) -> list[Prompt]:
    return [
        Prompt(f"{label}-{i}", f"{label} {i}", label, "ordinary", "test", None, "en")
        for i in range(start, start + n)
    ]


@pytest.mark.parametrize(
    ("n_harmful", "n_benign", "message"),
    [
        (0, 40, "got 0 harmful prompts, at least 32 are needed"),
        (40, 0, "got 0 benign prompts, at least 32 are needed"),
        (40, LEAST_PROMPTS - 1, "got 31 benign prompts"),
    ],
)
def test_a_one_sided_or_too_small_set_says_how_many_are_needed(
    n_harmful: int, n_benign: int, message: str
) -> None:
    with pytest.raises(PromptSetError, match=message):
        check_two_sided(numbered("harmful", n_harmful) + numbered("benign", n_benign))


def test_the_same_text_with_two_labels_in_two_files_is_an_error() -> None:
    prompts = numbered("harmful", 32) + numbered("benign", 32)
    prompts.append(replace(prompts[0], id="other", label="benign", text="HARMFUL  0"))
    with pytest.raises(PromptSetError, match="prompts harmful-0 and other have the same text"):
        check_two_sided(prompts)


def parts(splits: Splits) -> list[tuple[Prompt, ...]]:
    return [splits.train, splits.validation, splits.calibration, splits.test]


def test_every_prompt_is_in_exactly_one_part() -> None:
    prompts = shipped_prompts()
    together = [prompt for part in parts(split_prompts(prompts, seed=0)) for prompt in part]
    assert sorted(together, key=str) == sorted(prompts, key=str)


def test_the_parts_are_the_same_for_a_seed_whatever_the_order_and_differ_between_seeds() -> None:
    prompts = shipped_prompts()
    shuffled = random.Random(1).sample(prompts, len(prompts))  # noqa: S311 - no secret
    first, second = split_prompts(prompts, seed=3), split_prompts(shuffled, seed=3)
    assert [set(part) for part in parts(first)] == [set(part) for part in parts(second)]
    assert set(first.test) != set(split_prompts(prompts, seed=4).test)


def test_a_thinned_set_is_an_even_part_and_keeps_pairs_whole() -> None:
    prompts = shipped_prompts()
    kept = thinned(prompts, 2000, seed=0)
    assert len(kept) == pytest.approx(2000, abs=20)
    assert set(kept) <= set(prompts)
    pairs = Counter(p.pair_id for p in kept if p.pair_id)
    assert set(pairs.values()) == {2}
    share = len(kept) / len(prompts)
    sizes = Counter((p.label, p.stratum) for p in prompts)
    for kind, n in Counter((p.label, p.stratum) for p in kept).items():
        assert n == pytest.approx(share * sizes[kind], abs=0.03 * sizes[kind] + 2)


def test_a_set_that_is_small_enough_is_not_thinned() -> None:
    prompts = numbered("harmful", 40) + numbered("benign", 40)
    assert thinned(prompts, 80, seed=0) == prompts
    assert thinned(prompts, 0, seed=0) == prompts


def test_each_part_has_its_share_of_every_label_and_stratum() -> None:
    prompts = shipped_prompts()
    whole = Counter((prompt.label, prompt.stratum) for prompt in prompts)
    splits = split_prompts(prompts, seed=0)
    for part, share in zip(parts(splits), (0.45, 0.15, 0.2, 0.2), strict=True):
        counts = Counter((prompt.label, prompt.stratum) for prompt in part)
        for stratum, n in whole.items():
            assert counts[stratum] == pytest.approx(share * n, abs=0.03 * n + 2)


def test_every_category_that_is_large_enough_reaches_every_part() -> None:
    prompts = shipped_prompts()
    sizes = Counter((p.label, p.stratum, p.category) for p in prompts)
    large = {category for category, n in sizes.items() if n >= 14}
    for part in parts(split_prompts(prompts, seed=0)):
        assert large <= {(p.label, p.stratum, p.category) for p in part}


def test_pairs_and_texts_that_differ_in_case_or_spacing_stay_together() -> None:
    prompts = numbered("harmful", 60) + numbered("benign", 60)
    prompts = [
        replace(p, pair_id=f"p-{i % 60}" if i % 60 < 30 else None) for i, p in enumerate(prompts)
    ]
    prompts += [
        replace(p, id=f"{p.id}-again", text=p.text.upper() + "  ", pair_id=None)
        for p in prompts[::3]
    ]
    part_of_pair: dict[str, int] = {}
    part_of_text: dict[str, int] = {}
    for number, part in enumerate(parts(split_prompts(prompts, seed=0))):
        for prompt in part:
            assert part_of_text.setdefault(prompt.text.casefold().strip(), number) == number
            if prompt.pair_id is not None:
                assert part_of_pair.setdefault(prompt.pair_id, number) == number


def test_a_share_of_zero_gets_nothing_and_bad_shares_are_refused() -> None:
    prompts = numbered("harmful", 50)
    splits = split_prompts(prompts, seed=0, shares=(0.8, 0.0, 0.2, 0.0))
    assert [len(part) for part in parts(splits)] == [40, 0, 10, 0]
    for shares in ((0.5, 0.5, 0.5, 0.5), (1.5, -0.5, 0.0, 0.0)):
        with pytest.raises(InputError, match="with sum 1"):
            split_prompts(prompts, seed=0, shares=shares)


def test_the_hash_of_a_set_ignores_order_and_ids_and_sees_every_other_change() -> None:
    prompts = numbered("harmful", 3) + numbered("benign", 3)
    whole = datasets_sha256(prompts)
    assert len(whole) == 64
    assert datasets_sha256(prompts[::-1]) == whole
    assert datasets_sha256([replace(prompts[0], id="other"), *prompts[1:]]) == whole
    first, rest = prompts[0], prompts[1:]
    changed = [
        [replace(first, text="harmful 00"), *rest],
        [replace(first, label="benign"), *rest],
        [replace(first, stratum="hard"), *rest],
        [replace(first, category="other"), *rest],
        [replace(first, pair_id="p-1"), *rest],
        rest,
        [first, *prompts],
    ]
    assert len({whole, *map(datasets_sha256, changed)}) == 1 + len(changed)


def test_the_splits_behind_a_guard_are_found_by_their_hashes() -> None:
    prompts = numbered("harmful", 120) + numbered("benign", 120)
    for most in (0, 100):
        splits = calibration_splits(prompts, most, seed=3)
        datasets = {name: datasets_sha256(getattr(splits, name)) for name in ("train", "test")}
        assert splits_behind(datasets, prompts, 3, 100) == splits
        assert splits_behind(datasets, prompts, 4, 100) is None
        assert splits_behind(datasets, prompts[2:], 3, 100) is None
    assert splits_behind(datasets, prompts, 3) is None  # 100 is no default


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, MOST_PROMPTS),
        ({"device": "cuda"}, 0),
        ({"device": "cuda:1"}, 0),
        ({"device": "cuda", "most_prompts": 70}, 70),
        ({"most_prompts": 0}, 0),
    ],
)
def test_a_gpu_takes_all_prompts_unless_it_is_told(settings: dict[str, Any], limit: int) -> None:
    assert CalibrationConfig(model="m", **settings).prompt_limit == limit


def test_an_endpoint_is_not_asked_for_more_than_a_processor() -> None:
    config = CalibrationConfig(endpoint="http://127.0.0.1:1", admin_key="k", device="cuda")
    assert config.prompt_limit == MOST_PROMPTS
