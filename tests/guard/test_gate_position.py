"""Where the probe reads: the token before the instruction suffix."""

import pytest

from guard.gate import gate_position, gate_positions, message_positions


def test_probe_reads_the_token_before_the_last_instruction_suffix() -> None:
    assert gate_position([1, 7, 8, 2, 3, 9, 2, 3], [2, 3]) == 5


def test_a_prompt_without_suffix_is_read_at_its_last_token() -> None:
    assert gate_position([1, 7, 8], [2, 3]) == 2
    assert gate_position([1, 7, 8], []) == 2


def test_a_suffix_that_opens_the_prompt_has_no_instruction_before_it() -> None:
    assert gate_position([2, 3, 7], [2, 3]) == 2


def test_pooled_tokens_end_where_a_single_one_would_be_read() -> None:
    prompt = [1, 7, 8, 2, 3, 9, 2, 3]
    assert gate_positions(prompt, [2, 3], 1) == [gate_position(prompt, [2, 3])]
    assert gate_positions(prompt, [2, 3], 3) == [5, 4, 3]
    assert gate_positions([1, 2, 3], [2, 3], 3) == [0, 0, 0]  # never before the prompt


OPENING, SUFFIX = [8, 9], [2, 3]


@pytest.mark.parametrize(
    ("prompt", "width", "places"),
    [
        ([1, 8, 9, 5, 6, 7, 2, 3], 64, [3, 4, 5]),
        ([1, 8, 9, 5, 6, 7, 2, 3], 2, [4, 5]),  # its last tokens
        ([1, 8, 9, 5, 2, 3, 4, 2, 8, 9, 6, 7, 2, 3], 64, [10, 11]),  # the last of two messages
        ([5, 6, 7, 2, 3], 64, [0, 1, 2]),  # no opening
        ([5, 6, 7], 2, [1, 2]),  # a raw completion
        ([1, 8, 9, 2, 3], 64, [0, 1, 2]),  # an empty message
        ([1, 8, 9, 5, 8, 6, 2, 3], 64, [3, 4, 5]),  # half an opening inside
    ],
)
def test_the_message_is_what_stands_between_opening_and_suffix(
    prompt: list[int], width: int, places: list[int]
) -> None:
    assert message_positions(prompt, SUFFIX, OPENING, width) == places
