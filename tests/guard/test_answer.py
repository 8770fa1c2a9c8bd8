"""The answer begins behind the marker, whatever the thinking and the template look like."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.answer import MARKERS, AnswerStart, find_marker
from guard.errors import PolicyError

THINK = "</think>"


def watched(tokens: list[str], prompt: str = "user: hi assistant:", marker: str = THINK) -> str:
    """One letter for what is known before each token: t thinking, d due, b begun."""
    answer = AnswerStart(marker, prompt)
    states, text = "", ""
    for token in tokens:
        assert not (answer.due and answer.begun)
        states += "d" if answer.due else "b" if answer.begun else "t"
        text += token
        answer.see(text)
    return states


@pytest.mark.parametrize(
    ("tokens", "states"),
    [
        (["<think>", "hm", THINK, "Sure", ",", "x"], "tttdbb"),
        (["hm", THINK, "\n\n", "Sure", "\n", "x"], "ttddbb"),  # opened by the template
        (["hm", "</", "think", ">", "Sure", "x"], "ttttdb"),  # no token of its own
        (["hm", "</", "think", ">\n", "\n", "Sure", "x"], "ttttddb"),
        (["hm", "</think>Sure", ",", "x"], "ttdb"),  # the marker's token is never the answer's
        ([THINK, "Sure", THINK, "\n", "x"], "tdbbb"),  # only the first one counts
        (["hm", "think", "more"], "ttt"),
    ],
)
def test_the_answer_is_due_behind_the_marker_and_through_whitespace(
    tokens: list[str], states: str
) -> None:
    assert watched(tokens) == states


@pytest.mark.parametrize("prompt", [THINK, "<think>\n\n</think>\n\n", "a </think> b </think> "])
def test_a_prompt_that_ends_with_the_marker_begins_the_answer(prompt: str) -> None:
    assert watched(["\n", "Sure", "x", THINK, "x"], prompt) == "ddbbb"


@pytest.mark.parametrize("prompt", ["", "user: </think> assistant:", "</think>a", "<think>"])
def test_a_marker_that_the_user_wrote_begins_nothing(prompt: str) -> None:
    assert watched(["a", "b"], prompt) == "tt"


@given(
    before=st.text(alphabet="ab<>/", max_size=12),
    blank=st.text(alphabet=" \n", max_size=4),
    after=st.text(alphabet="ab ", max_size=6),
)
def test_where_it_begins_does_not_depend_on_how_the_text_is_cut(
    before: str, blank: str, after: str
) -> None:
    text = f"{before}{THINK}{blank}x{after}"
    begins = text.index(THINK) + len(THINK) + len(blank)
    states = watched(list(text))
    assert states.rindex("d") == begins
    assert "d" not in states[: text.index(THINK) + len(THINK)]
    assert set(states[begins + 1 :]) <= {"b"}


@dataclass
class Named:
    """What a tokenizer shows of itself."""

    chat_template: str | list[dict[str, str]]
    added: dict[str, int] = field(default_factory=dict)

    def get_added_vocab(self) -> dict[str, int]:
        """Token text → id."""
        return self.added


@pytest.mark.parametrize("marker", MARKERS)
def test_the_marker_is_found_in_the_template_or_the_vocabulary(marker: str) -> None:
    assert find_marker(Named("{{ x }}" + marker)) == marker
    assert find_marker(Named([{"name": "default", "template": marker}])) == marker
    assert find_marker(Named("{{ x }}", {marker: 7, "<pad>": 0})) == marker


@pytest.mark.parametrize(
    ("template", "named"),
    [("{{ x }}", "none that is known"), ("</think> [/THINK]", r"</think> and \[/THINK\]")],
)
def test_a_marker_that_cannot_be_told_is_asked_for(template: str, named: str) -> None:
    with pytest.raises(PolicyError, match=f"{named}: set answer_marker in the policy"):
        find_marker(Named(template))
