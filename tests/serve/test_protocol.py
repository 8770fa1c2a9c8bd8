"""Requests are honoured, ignored where that is harmless, or refused by the field's name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from serve.engine import ChatMessage, SamplingOptions, TokenLogprob, TokenStep
from serve.protocol import (
    DEFAULT_MAX_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
    chat_logprobs,
    completion_logprobs,
    fault_of,
)

MESSAGES = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatCompletionRequest:
    body = {"model": "tiny", "messages": MESSAGES, **fields}
    return ChatCompletionRequest.model_validate_json(json.dumps(body))


def completion(**fields: Any) -> CompletionRequest:
    body = {"model": "tiny", "prompt": "hello", **fields}
    return CompletionRequest.model_validate_json(json.dumps(body))


def fault(schema: Any, **fields: Any) -> tuple[str, str | None]:
    with pytest.raises(ValidationError) as caught:
        schema(**fields)
    return fault_of(caught.value)


def raw_fault(body: bytes) -> str:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate_json(body)
    return fault_of(caught.value)[0]


def test_a_bare_request_gets_the_documented_defaults() -> None:
    assert chat().options(0, room=10_000) == SamplingOptions(
        max_tokens=DEFAULT_MAX_TOKENS, temperature=1.0, top_p=1.0, top_k=0, seed=None
    )


def test_null_is_the_same_as_absent() -> None:
    fields = ("temperature", "top_p", "n", "seed", "stop", "max_tokens", "stream", "logprobs")
    assert chat(**dict.fromkeys(fields)).options(0, 500) == chat().options(0, 500)


@pytest.mark.parametrize(("room", "expected"), [(10_000, 256), (40, 40), (1, 1), (0, 1), (-9, 1)])
def test_the_default_length_is_what_still_fits(room: int, expected: int) -> None:
    assert chat().options(0, room).max_tokens == expected
    assert chat(max_tokens=900).options(0, room).max_tokens == 900  # the engine says if it fits


def test_all_honoured_fields_reach_the_engine() -> None:
    body = chat(
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        seed=11,
        stop=["a", "b"],
        logprobs=True,
        top_logprobs=3,
    )
    expected = SamplingOptions(7, 0.0, 0.5, 0, 11, ("a", "b"), 3)
    assert body.options(0, 100) == expected
    assert body.options(2, 100).seed == 13
    assert chat(stop="end").options(0, 100).stop == ("end",)
    assert chat(logprobs=True).options(0, 100).logprobs == 0
    assert completion(logprobs=5).options(0, 100).logprobs == 5


def test_derived_seeds_stay_signed_64_bit_numbers() -> None:
    assert chat(seed=2**63 - 1, n=2).options(1, 100).seed == -(2**63)


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body = chat(
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    )
    assert body.conversation() == [ChatMessage("system", "be brief"), ChatMessage("user", "hello")]


def test_an_answer_of_the_official_client_can_be_sent_back() -> None:
    answer = {"role": "assistant", "content": "hi", "refusal": None, "annotations": None,
              "audio": None, "function_call": None, "tool_calls": None}  # fmt: skip
    assert chat(messages=[*MESSAGES, answer]).conversation()[1] == ChatMessage("assistant", "hi")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_a_prompt_is_text_or_tokens_one_or_many(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    "prompt", [[], 3, None, {}, [1, "a"], ["a", 1], [[]], [[1], "a"], [-1], [True], [1.5], [2**40]]
)
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    message, param = fault(completion, prompt=prompt)
    assert param == "prompt"
    assert "list of token ids" in message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -4}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"model": None}, "model"),
        ({"model": "m" * 300}, "model"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_its_field(fields: Any, param: str) -> None:
    message, named = fault(chat, **fields)
    assert named == param
    assert param in message


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        (chat, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (chat, {"tool_choice": "required"}),
        (chat, {"functions": [{"name": "f"}]}),
        (chat, {"logit_bias": {"50256": -100}}),
        (chat, {"response_format": {"type": "json_object"}}),
        (chat, {"presence_penalty": 0.5}),
        (chat, {"frequency_penalty": -0.5}),
        (chat, {"modalities": ["text", "audio"]}),
        (chat, {"reasoning_effort": "high"}),
        (completion, {"best_of": 2}),
        (completion, {"suffix": "end"}),
        (completion, {"echo": True}),
    ],
)
def test_a_field_that_would_change_the_output_is_refused_by_name(schema: Any, fields: Any) -> None:
    message, param = fault(schema, **fields)
    assert param == next(iter(fields))
    assert message == f"Unsupported field '{param}': this server does not support it"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"logit_bias": {}},
        {"response_format": {"type": "text"}},
        {"presence_penalty": 0},
        {"frequency_penalty": 0.0},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_a_field_that_asks_for_nothing_is_accepted(fields: Any) -> None:
    chat(**fields)


def test_an_unknown_field_is_refused_by_name() -> None:
    assert fault(chat, steering_scale=-1) == ("Unknown field 'steering_scale'", "steering_scale")
    assert fault(completion, best=1)[0] == "Unknown field 'best'"


def test_a_missing_field_is_named() -> None:
    assert raw_fault(b'{"model": "tiny"}') == "Missing field 'messages'"


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 2},
        {"max_tokens": 1, "max_completion_tokens": 1},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: Any) -> None:
    assert next(iter(fields)) in fault(chat, **fields)[0]


def test_too_many_choices_at_once_are_refused() -> None:
    assert "is 80, at most 64" in fault(completion, prompt=["a"] * 10, n=8)[0]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny",}',
        b"\xff\xfe{}",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"model": ' + b"[" * 100_000,
        b'{"n": 1' + b"0" * 5000 + b"}",
    ],
)
def test_bytes_that_are_not_json_in_utf8_are_refused(body: bytes) -> None:
    assert raw_fault(body).startswith("The body is not valid JSON in UTF-8: ")


@pytest.mark.parametrize("body", [b"3", b"[]", b'"a"', b"null"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    assert raw_fault(body) == "The body must be a JSON object"


def test_nan_and_infinity_are_no_temperatures() -> None:
    for number in (b"NaN", b"Infinity", b"1e999"):
        body = b'{"model":"t","messages":[{"role":"user","content":"a"}],"temperature":%s}' % number
        assert "temperature" in raw_fault(body)


def step(text: str, logprob: float, *top: tuple[str, float]) -> TokenStep:
    alternatives = tuple(TokenLogprob(i, t, p) for i, (t, p) in enumerate(top))
    return TokenStep(1, text, TokenLogprob(1, text, logprob), alternatives)


def test_chat_logprobs_have_the_bytes_of_their_tokens() -> None:
    shown = chat_logprobs([step("é", -0.5, ("é", -0.5), ("�", float("-inf")))])
    assert shown is not None
    assert shown.model_dump() == {
        "content": [
            {
                "token": "é",
                "logprob": -0.5,
                "bytes": [195, 169],
                "top_logprobs": [
                    {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                    {"token": "�", "logprob": -9999.0, "bytes": None},
                ],
            }
        ],
        "refusal": None,
    }


def test_completion_logprobs_count_offsets_in_characters() -> None:
    steps = [step("ab", -1.0, ("ab", -1.0)), TokenStep(-1, "x"), step(" c", -2.0, (" d", -0.1))]
    shown = completion_logprobs(steps, offset=5)
    assert shown is not None
    assert shown.tokens == ["ab", " c"]
    assert shown.text_offset == [5, 7]
    assert shown.top_logprobs == [{"ab": -1.0}, {" d": -0.1, " c": -2.0}]


def test_no_logprobs_are_none() -> None:
    assert chat_logprobs([TokenStep(1, "a")]) is None
    assert completion_logprobs([TokenStep(1, "a")], 0) is None
