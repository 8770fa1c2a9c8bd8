"""Where the probe reads: the token before the instruction suffix."""

from guard.gate import gate_position, gate_positions


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
