"""What a chat template puts around an instruction. Tokenizers are read by their public shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from guard.errors import UnsupportedModelError

__all__ = [
    "Chat",
    "chat_ids",
    "check_template",
    "common_start",
    "distinct_instructions",
    "instruction_suffix",
    "message_opening",
    "turns",
    "whole_chat_ids",
]

Chat: TypeAlias = Sequence[Mapping[str, str]]
"""Messages, each with its `role` and its `content`; the last is the user's."""


def check_template(tokenizer: Any, model_id: str) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        UnsupportedModelError: says what to do.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedModelError(
            f"{model_id}: the tokenizer has no chat template, so there is no place at which a"
            " response begins; calibrate the chat (instruct) variant, or set"
            " tokenizer.chat_template and save it with the model"
        )


def chat_ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Token ids of a chat, generation prompt included.

    Args:
        tokenizer: with a chat template.
        texts: the messages, the user's and the assistant's in turn.
    """
    return _ids(tokenizer, turns(*texts))


def turns(*texts: str) -> list[dict[str, str]]:
    """Messages with these texts, the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def whole_chat_ids(tokenizer: Any, chat: Chat, refusal: type[Exception]) -> list[int] | None:
    """Token ids of a chat, generation prompt included, if the model gets to read all of it.

    Args:
        tokenizer: with a chat template.
        chat: system prompt, if any, and turns.
        refusal: what a template raises that takes no such chat: jinja2's `TemplateError`.

    Returns:
        None where the template raises (Gemma 2 has no system role), or leaves out all that stands
        before the last message, which some do without a word.
    """
    try:
        ids = _ids(tokenizer, chat)
    except refusal:
        return None
    return None if len(chat) > 1 and ids == _ids(tokenizer, chat[-1:]) else ids


def _ids(tokenizer: Any, chat: Chat) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        [dict(message) for message in chat], add_generation_prompt=True, return_dict=False
    )
    return list(ids)


def distinct_instructions(tokenizer: Any) -> list[str]:
    """Short texts that end, and begin, in different tokens, in any vocabulary."""
    plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    some = plain[:: max(1, len(plain) // 8)][:8]
    words = (tokenizer.decode([token_id]).strip() for token_id in some)
    return ["A", "7", "…", *(word for word in words if word)]


def instruction_suffix(
    template: Callable[[str], Sequence[int]], instructions: Sequence[str]
) -> list[int]:
    """Return the token ids that follow every instruction in a chat template.

    Args:
        template: from a user message to token ids, generation prompt included.
        instructions: user messages of which at least two are different tokens.

    Raises:
        UnsupportedModelError: nothing follows the instruction, or the instructions are all the same
            to this tokenizer.
    """
    samples = [template(text) for text in instructions]
    if len({tuple(sample) for sample in samples}) < 2:
        raise UnsupportedModelError(
            "the chat template gives the same tokens for every instruction, so where an instruction"
            " ends cannot be told; is this the model's own tokenizer?"
        )
    suffix = common_start([sample[::-1] for sample in samples])[::-1]
    if not suffix:
        raise UnsupportedModelError(
            "the chat template puts nothing after the instruction, so there is no post-instruction"
            " token to read a refusal direction at"
        )
    return suffix


def message_opening(
    tokenizer: Any, instructions: Sequence[str], refusal: type[Exception]
) -> list[int]:
    """Return the token ids that a chat template puts right before every user message.

    They are what the beginning of a chat and that of its second turn end with alike, so that a
    message can be found behind any system prompt and any history.

    Args:
        tokenizer: with a chat template.
        instructions: user messages of which at least two are different tokens.
        refusal: what a template raises that takes no such conversation: jinja2's `TemplateError`,
            which the guard does not depend on.

    Returns:
        Nothing where the template takes no second turn or shares nothing with it.
    """
    first = common_start([chat_ids(tokenizer, [text]) for text in instructions])
    try:
        later = common_start([chat_ids(tokenizer, ["A", "B", text]) for text in instructions])
    except refusal:
        return []
    return common_start([first[::-1], later[::-1]])[::-1]


def common_start(samples: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest beginning that all of them share."""
    shared: list[int] = []
    for tokens in zip(*samples, strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return shared
