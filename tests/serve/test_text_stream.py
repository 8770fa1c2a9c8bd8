"""Streamed text: whole characters, nothing of a stop string, and the full decode in the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from serve.text_stream import TextStream


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level tokenizer without merges: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZER = _byte_tokenizer()


def _ids(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text)["input_ids"]
    return ids


def _stream(ids: list[int], *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stop)
    pieces = [stream.push(token_id) for token_id in ids]
    return [*pieces, stream.flush()], stream


@given(st.text())
def test_pieces_join_to_the_text(text: str) -> None:
    pieces, stream = _stream(_ids(text))
    assert "".join(pieces) == text == stream.text


@given(st.lists(st.integers(0, 255), max_size=30))
def test_pieces_of_any_bytes_join_to_the_plain_decode(ids: list[int]) -> None:
    pieces, _ = _stream(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_of_four_tokens_is_sent_whole() -> None:
    assert len(_ids("a🙂b")) == 6
    assert _stream(_ids("a🙂b"))[0] == ["a", "", "", "", "🙂", "b", ""]


def test_bytes_that_never_become_a_character_are_sent_at_the_end() -> None:
    assert _stream(_ids("a🙂")[:3])[0] == ["a", "", "", "\ufffd"]


def test_a_stop_string_across_tokens_is_held_back_and_cut_off() -> None:
    pieces, stream = _stream(_ids("one END two"), "END")
    assert "".join(pieces) == stream.text == "one "
    assert stream.stopped
    assert pieces[:5] == ["o", "n", "e", " ", ""]


def test_text_that_only_began_like_a_stop_string_is_sent_after_all() -> None:
    assert _stream(_ids("an ENormous"), "END")[0] == [*"an ", "", "", "ENo", *"rmous", ""]
    assert "".join(_stream(_ids("the EN"), "END")[0]) == "the EN"


def test_the_first_of_several_stop_strings_counts() -> None:
    pieces, _ = _stream(_ids("a, b; c"), "; ", ", ")
    assert "".join(pieces) == "a"


def test_an_empty_stop_string_stops_nothing() -> None:
    assert "".join(_stream(_ids("abc"), "")[0]) == "abc"


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_is_ever_sent(text: str, stop: list[str]) -> None:
    pieces, stream = _stream(_ids(text), *stop)
    sent = "".join(pieces)
    assert text.startswith(sent)
    assert not any(word in sent for word in stop)
    assert stream.stopped == any(word in text for word in stop)


@pytest.mark.parametrize("n", [1, 3])
def test_tokens_after_a_stop_string_are_ignored(n: int) -> None:
    assert "".join(_stream(_ids("a." + "b" * n), ".")[0]) == "a"
