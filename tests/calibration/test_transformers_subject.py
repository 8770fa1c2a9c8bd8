"""Chats of any shape in this process: what the model is given, and what is read of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from calibration.capture import WorkFolder, capture
from calibration.progress import Silent
from calibration.prompts import Prompt
from calibration.transformers_subject import TransformersSubject
from guard.errors import PromptSetError
from guard.gate import message_positions
from guard.template import Chat, turns
from tests.tiny_refuser import CHAT_TEMPLATE

LAYERS = range(4)
LAST = "ask poison car"
CHATS: list[Chat] = [
    turns(LAST),
    turns("ask paint boat", "sure here is boat for you", LAST),
    [{"role": "system", "content": "please measure for you"}, *turns(LAST)],
    [
        {"role": "system", "content": "cannot"},
        *turns("ask steal lamp", "i cannot help with that", "ask wash tent", "sure", LAST),
    ],
]
NO_SYSTEM = CHAT_TEMPLATE.replace("in ('user', 'system')", "== 'user'")
DEAF_TO_SYSTEM = NO_SYSTEM.replace("{% else %}", "{% elif message.role != 'system' %}")
ONE_TURN = CHAT_TEMPLATE.replace(
    "{% for", "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}{% for", 1
)


def subject_with(
    model: PreTrainedModel, folder: Path, template: str, message_width: int = 64
) -> TransformersSubject:
    """The tiny refuser under another chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return TransformersSubject(model, tokenizer, "tiny", message_width=message_width)


@pytest.fixture(scope="module")
def subject(tiny_model: PreTrainedModel, tiny_refuser_dir: Path) -> TransformersSubject:
    return subject_with(tiny_model, tiny_refuser_dir, CHAT_TEMPLATE)


def words(subject: TransformersSubject, ids: list[int]) -> str:
    return " ".join(subject.tokenizer.convert_ids_to_tokens(ids))


def whole_states(folder: Path, ids: list[int]) -> tuple[torch.Tensor, ...]:
    """Hidden states of one prompt from a plain forward pass without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return tuple(states[0] for states in output.hidden_states)


def test_a_chat_of_one_message_is_encoded_as_its_text_is(subject: TransformersSubject) -> None:
    assert subject.encode_chats([turns(LAST)]) == [subject.encode(LAST)]


def test_system_prompts_and_earlier_turns_stand_in_the_prompt(subject: TransformersSubject) -> None:
    prompts = [words(subject, ids) for ids in subject.encode_chats(CHATS)]
    assert prompts[1:3] == [
        "<bos> <user> ask paint boat <eot> <assistant> sure here is boat for you <eos>"
        f" <user> {LAST} <eot> <assistant>",
        f"<bos> <system> please measure for you <eot> <user> {LAST} <eot> <assistant>",
    ]


def test_the_message_read_is_the_last_users_whatever_stands_before_it(
    subject: TransformersSubject,
) -> None:
    for ids in subject.encode_chats(CHATS):
        for width, wanted in ((64, LAST), (2, "poison car")):
            places = message_positions(ids, subject.suffix_ids, subject.message_opening_ids, width)
            assert words(subject, [ids[place] for place in places]) == wanted


@pytest.mark.parametrize("rows", [[0, 1], [2], [1, 3], [0, 1, 2, 3]])
def test_chats_that_do_not_share_the_cached_prefix_are_run_whole(
    subject: TransformersSubject, tiny_refuser_dir: Path, rows: list[int]
) -> None:
    prompts = [subject.encode_chats(CHATS)[row] for row in rows]
    n_last = 64 + len(subject.suffix_ids)
    states = subject.states(prompts, LAYERS, n_last)
    step = subject.prefill(prompts, LAYERS)
    for row, ids in enumerate(prompts):
        alone = whole_states(tiny_refuser_dir, ids)
        n = len(ids) - len(["<bos>", "<user>"])  # which may stand in the cache
        for layer in LAYERS:
            for found in (states[layer], step.resid_pre[layer]):
                torch.testing.assert_close(found[row, -n:], alone[layer][-n:], atol=1e-4, rtol=1e-4)


def test_captured_chats_are_the_hidden_states_of_their_last_messages(
    subject: TransformersSubject, tiny_refuser_dir: Path, tmp_path: Path
) -> None:
    encoded = subject.encode_chats(CHATS)
    prompts = [
        Prompt(str(i), "ask wash car", "harmful", "ordinary", "none", None, "en")
        for i in range(len(encoded))
    ]
    work = WorkFolder(tmp_path, "chats")
    data = capture(subject, prompts, [2], [1], 3, work, "chats", Silent(), encoded)
    assert data.messages is not None
    assert data.messages.lengths.tolist() == [len(LAST.split())] * len(encoded)
    n_behind = len(subject.suffix_ids)
    messages = data.messages.hidden[1].split(len(LAST.split()))
    for row, ids in enumerate(encoded):
        alone = whole_states(tiny_refuser_dir, ids)
        last = alone[1][-n_behind - len(LAST.split()) : -n_behind]
        torch.testing.assert_close(messages[row], last, atol=1e-4, rtol=1e-4)
        ends = alone[2][-n_behind - 1 :]
        torch.testing.assert_close(data.hidden[row, 0], ends, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("template", [NO_SYSTEM, DEAF_TO_SYSTEM])
def test_a_template_without_a_system_role_takes_turns_and_no_system_prompt(
    tiny_model: PreTrainedModel, tiny_refuser_dir: Path, template: str
) -> None:
    """Whether it raises or leaves the system prompt out without a word."""
    subject = subject_with(tiny_model, tiny_refuser_dir, template)
    assert len(subject.encode_chats(CHATS[:2])) == 2
    with pytest.raises(PromptSetError, match="the chat template takes no such chat"):
        subject.encode_chats(CHATS[:3])


def test_a_chat_that_does_not_fit_the_context_is_named(subject: TransformersSubject) -> None:
    long = turns(" ".join(["ask"] * 200), "sure", LAST)
    with pytest.raises(PromptSetError, match=f"prompt '{LAST}'….* do not fit the model's 256"):
        subject.encode_chats([long])


@pytest.mark.parametrize("beside", [[], ["ask paint boat please " * 20]])
def test_a_message_whose_opening_is_unknown_is_read_from_whole_prompts(
    tiny_model: PreTrainedModel, tiny_refuser_dir: Path, tmp_path: Path, beside: list[str]
) -> None:
    """A template of one turn shows no opening, so the template's own tokens are read, too."""
    subject = subject_with(tiny_model, tiny_refuser_dir, ONE_TURN)
    assert subject.message_opening_ids == []
    texts = [LAST, *beside]
    prompts = [Prompt(text, text, "harmful", "ordinary", "none", None, "en") for text in texts]
    work = WorkFolder(tmp_path, "one-turn")
    data = capture(subject, prompts, [2], [1], len(texts), work, "one", Silent())
    ids = subject.encode(LAST)
    wanted = whole_states(tiny_refuser_dir, ids)[1][: -len(subject.suffix_ids)]
    assert data.messages is not None
    found = data.messages.hidden[1][: int(data.messages.lengths[0])]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
