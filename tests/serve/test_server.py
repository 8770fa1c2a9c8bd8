"""The server as clients see it: the official client and raw HTTP against a real tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from guard.artifact import CarrierArtifact
from guard.errors import InputError, ModelMismatchError
from guard.policy import Policy
from serve.engine import Engine
from serve.metrics import GuardMetrics
from serve.server import bind_socket, create_app, run_server
from tests.serve.serving import MODEL, Served, Tiny, build_engine, serving, wait_until
from tests.tiny_refuser import hard_harmful_prompts

PROMPT = "ask paint car"
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
TRIMTAB_FIELDS = {
    "zone",
    "gate_score",
    "kl_nats",
    "budget_nats",
    "steered_tokens",
    "verdict",
    "mode",
}


@pytest.fixture(scope="session")
def tiny(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_guard: CarrierArtifact,
) -> Tiny:
    return Tiny(tiny_model, tiny_tokenizer, tiny_guard)


@contextmanager
def slow(tiny: Tiny, seconds: float) -> Iterator[None]:
    """Make every forward pass of the model take longer."""
    layer = tiny.model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def served(tiny: Tiny) -> Iterator[Served]:
    with serving(tiny) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as made:
        yield made


# ------------------------------------------------------------------ chat completions
def test_a_chat_completion_has_text_finish_reason_and_usage(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == MODEL
    assert abs(reply.created - time.time()) < 60
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == "sure here is car for you"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 7
    assert reply.usage.total_tokens == 7 + reply.usage.completion_tokens


def test_a_stream_says_the_same_as_a_plain_answer(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    assert len({c.id for c in chunks}) == 1
    assert len(chunks) > 4  # it came in pieces


def test_a_stream_carries_no_usage_unless_asked(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    assert all(c.usage is None and c.choices for c in stream)


def test_the_event_stream_ends_with_done(served: Served) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "max_tokens": 2}
    reply = served.post("chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_n_answers_share_one_prompt_and_one_usage(client: openai.OpenAI) -> None:
    def ask() -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=3, seed=5, temperature=2, max_tokens=5
        )

    first, second = ask(), ask()
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert first.choices == second.choices  # the seed decides
    assert first.usage.prompt_tokens == 7
    assert 3 <= first.usage.completion_tokens <= 15


def test_choice_i_is_what_seed_plus_i_gives_alone(client: openai.OpenAI) -> None:
    def texts(n: int, seed: int) -> list[str | None]:
        reply = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=n, seed=seed, temperature=2, max_tokens=5
        )
        return [c.message.content for c in reply.choices]

    assert texts(3, 40) == [texts(1, 40 + i)[0] for i in range(3)]


def test_a_stream_of_n_answers_interleaves_their_chunks(client: openai.OpenAI) -> None:
    made: dict[int, str] = {0: "", 1: "", 2: ""}
    ends: list[int] = []
    for chunk in client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=3, temperature=0, stream=True
    ):
        choice = chunk.choices[0]
        made[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends.append(choice.index)
    assert set(made.values()) == {"sure here is car for you"}
    assert sorted(ends) == [0, 1, 2]


def test_logprobs_name_the_sampled_token_and_its_alternatives(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert reply.usage is not None
    assert len(logprobs.content) == reply.usage.completion_tokens
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert entry.logprob <= 0
        assert bytes(entry.bytes or []).decode() == entry.token


def test_a_stream_carries_logprobs_token_by_token(client: openai.OpenAI) -> None:
    def ask(stream: bool) -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, logprobs=True, stream=stream
        )

    plain = ask(False).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in ask(True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [e.token for e in streamed] == [e.token for e in plain]
    assert all(e.top_logprobs == [] for e in streamed)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, stop=["car"]
    )
    assert reply.choices[0].message.content is not None
    assert reply.choices[0].message.content.strip() == "sure here is"
    assert reply.choices[0].finish_reason == "stop"


def test_max_tokens_ends_the_answer_for_its_length(client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        reply = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, **limit
        )
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 2


# ------------------------------------------------------------------ completions and models
def test_a_completion_continues_a_raw_prompt(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt="<bos> <user> ask paint car <eot> <assistant>", temperature=0
    )
    assert reply.object == "text_completion"
    assert reply.choices[0].text.strip() == "sure here is car for you"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 7


def test_several_prompts_in_text_or_tokens_give_choices_in_order(client: openai.OpenAI) -> None:
    texts = [f"<bos> <user> ask paint {noun} <eot> <assistant>" for noun in ("car", "boat")]
    reply = client.completions.create(model=MODEL, prompt=texts, n=2, temperature=0)
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    words = [" ".join(c.text.split()) for c in reply.choices]
    assert words == ["sure here is car for you"] * 2 + ["sure here is boat for you"] * 2


def test_token_ids_are_a_prompt_as_good_as_text(client: openai.OpenAI, tiny: Tiny) -> None:
    text = "<bos> <user> ask paint car <eot> <assistant>"
    ids = list(tiny.tokenizer(text, add_special_tokens=False)["input_ids"])
    first, second = (
        client.completions.create(model=MODEL, prompt=prompt, temperature=0)
        for prompt in (text, ids)
    )
    assert first.choices[0].text == second.choices[0].text


def test_a_completion_stream_with_logprobs_counts_offsets(client: openai.OpenAI) -> None:
    prompt = "<bos> <user> ask paint car <eot> <assistant>"
    stream = client.completions.create(
        model=MODEL, prompt=prompt, temperature=0, logprobs=2, stream=True
    )
    shown = [c.choices[0].logprobs for c in stream if c.choices[0].logprobs]
    tokens = [token for entry in shown for token in entry.tokens or []]
    offsets = [offset for entry in shown for offset in entry.text_offset or []]
    assert offsets == [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    assert all(len(top) == 2 for entry in shown for top in entry.top_logprobs or [])


def test_the_served_model_is_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


# ------------------------------------------------------------------ refused requests
def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert MODEL in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("fields", [{"n": 0}, {"temperature": -1}, {"tools": [{"type": "f"}]}])
def test_a_bad_field_is_a_400_that_names_it(client: openai.OpenAI, fields: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, **fields)
    assert caught.value.param == next(iter(fields))
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("body", [b'{"model": ', b'{"model": "\xff"}', b"\xff\xfe", b"", b"[]"])
def test_malformed_bodies_are_a_400(served: Served, body: bytes) -> None:
    for path in ("chat/completions", "completions"):
        reply = served.post(path, content=body)
        assert reply.status_code == 400
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_over_the_limit_is_a_413(served: Served) -> None:
    for content in (b" " * 200_000, iter([b" " * 60_000] * 4)):  # with and without a length
        reply = served.post("chat/completions", content=content)
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_a_400(client: openai.OpenAI, stream: bool) -> None:
    long: list[Any] = [{"role": "user", "content": "car " * 400}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=long, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100_000)


def test_an_empty_prompt_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="")


def test_a_token_id_outside_the_vocabulary_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[5, 10_000_000])
    client.completions.create(model=MODEL, prompt=[5], max_tokens=1)  # and nothing broke


def test_unknown_paths_and_methods_answer_in_the_same_format(served: Served) -> None:
    for reply, status in (
        (httpx.get(f"{served.url}/v1/embeddings"), 404),
        (httpx.get(f"{served.url}/v1/chat/completions"), 405),
    ):
        assert reply.status_code == status
        assert reply.json()["error"]["message"]


# ------------------------------------------------------------------ keys
def test_without_the_key_only_probes_and_metrics_answer(tiny: Tiny) -> None:
    with serving(tiny, api_key="clé-secrète") as served:
        for given in ("wrong", "clé-secrètè"):
            headers = {"Authorization": f"Bearer {given}".encode()}
            for path in ("models", f"models/{MODEL}"):
                reply = httpx.get(f"{served.url}/v1/{path}", headers=headers)
                assert reply.status_code == 401
                assert reply.json()["error"]["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer"
        with served.client("wrong") as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        assert served.post("chat/completions", content=b"{").status_code == 401
        right = {"Authorization": "Bearer clé-secrète".encode()}
        assert httpx.get(f"{served.url}/v1/models", headers=right).status_code == 200
        for path in ("health", "ready", "metrics"):
            assert httpx.get(f"{served.url}/{path}").status_code == 200
        assert served.sample("trimtab_errors_total", kind="unauthorized") == 7


def test_an_empty_key_is_an_error_not_an_open_door(served: Served) -> None:
    with pytest.raises(InputError, match="empty"):
        create_app(served.engine, metrics=served.metrics, api_key=" ")


# ------------------------------------------------------------------ load and disconnects
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_429_that_says_when_to_come_back(tiny: Tiny, stream: bool) -> None:
    def ask(client: openai.OpenAI) -> int | None:
        try:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
        except openai.RateLimitError as err:
            return int(err.response.headers["retry-after"])
        return None

    with (
        slow(tiny, 0.1),
        serving(tiny, max_batch=1, max_queue=1) as served,
        served.client() as client,
        ThreadPoolExecutor(8) as pool,
    ):
        waits = list(pool.map(ask, [client] * 8))
        refused = [wait for wait in waits if wait is not None]
        assert 0 < len(refused) < 8
        assert min(refused) >= 1
        assert served.sample("trimtab_errors_total", kind="queue_full") == len(refused)
        assert ask(client) is None  # and then it serves again


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_that_do_not_all_fit_the_queue_are_refused_as_one(
    tiny: Tiny, stream: bool
) -> None:
    with (
        slow(tiny, 0.05),
        serving(tiny, max_batch=1, max_queue=1) as served,
        served.client() as client,
    ):
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=MODEL, messages=MESSAGES, n=4, stream=stream)
        reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
        assert reply.choices[0].finish_reason == "length"
        assert served.sample("trimtab_errors_total", kind="queue_full") == 1
        assert served.sample("trimtab_errors_total", kind="client_disconnect") == 0


def test_hanging_up_in_mid_stream_stops_the_work_and_keeps_the_record(tiny: Tiny) -> None:
    with (
        slow(tiny, 0.2),
        serving(tiny) as served,
        served.client() as client,
    ):
        stream = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, stream=True
        )
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        wait_until(lambda: served.responses("none") == 1)
        assert served.responses("complied") == 0
        assert served.sample("trimtab_errors_total", kind="client_disconnect") == 1
        assert served.sample("trimtab_request_duration_seconds_count") == 1
        reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
        assert reply.choices[0].finish_reason == "length"


def test_hanging_up_on_a_plain_request_stops_the_work(tiny: Tiny) -> None:
    with slow(tiny, 0.4), serving(tiny) as served:
        body = {"model": MODEL, "messages": MESSAGES, "temperature": 0}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=1.0)
        wait_until(lambda: served.responses("none") == 1)
        assert served.responses("complied") == 0
        wait_until(lambda: served.sample("trimtab_errors_total", kind="client_disconnect") == 1)


# ------------------------------------------------------------------ failing closed
@contextmanager
def broken(tiny: Tiny, after: int = 0) -> Iterator[None]:
    """Make the model's last layer give NaN, from its forward pass number `after` on."""
    passes = 0

    def spoil(_module: Any, _args: Any, output: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes <= after:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        spoiled = hidden * float("nan")
        return (spoiled, *output[1:]) if isinstance(output, tuple) else spoiled

    handle = tiny.model.model.layers[-1].register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("stream", [False, True])
def test_nan_in_the_model_is_a_500_and_no_text(tiny: Tiny, stream: bool) -> None:
    with serving(tiny) as served, served.client() as client:
        with broken(tiny), pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
        assert caught.value.code == "guard_numerics"
        assert served.sample("trimtab_errors_total", kind="numerics") == 1
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_nan_in_mid_stream_ends_it_with_an_error_event(tiny: Tiny) -> None:
    with serving(tiny) as served:
        body = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "stream": True}
        with broken(tiny, after=3):
            reply = served.post("chat/completions", json=body)
        assert reply.status_code == 200
        events = [e.removeprefix("data: ") for e in reply.text.split("\n\n") if e]
        assert json.loads(events[-1])["error"]["code"] == "guard_numerics"
        assert all("error" not in json.loads(event) for event in events[:-1])
        assert served.sample("trimtab_errors_total", kind="numerics") == 1
        assert served.sample("trimtab_errors_total", kind="client_disconnect") == 0


def test_an_engine_that_is_not_armed_serves_nothing(tiny: Tiny) -> None:
    with serving(tiny) as served:
        assert httpx.get(f"{served.url}/ready").status_code == 200
        assert served.sample("trimtab_guard_armed") == 1
        served.stop_engine()
        assert httpx.get(f"{served.url}/ready").status_code == 503
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert served.sample("trimtab_guard_armed") == 0
        reply = served.post("chat/completions", json={"model": MODEL, "messages": MESSAGES})
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "guard_not_armed"


# ------------------------------------------------------------------ what the guard shows
def test_metrics_move_with_each_response(tiny: Tiny) -> None:
    with serving(tiny) as served, served.client() as client:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, temperature=0)
        list(client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True))
        zones = ("pass", "raise", "lower", "none")
        begun = [served.sample("trimtab_requests_total", mode="enforce", zone=z) for z in zones]
        assert sum(begun) == 3
        assert served.responses("complied") >= 2
        assert served.responses("none") == 0
        assert served.sample("trimtab_gate_score_count") == 3
        assert served.sample("trimtab_gate_duration_seconds_count") >= 1
        assert served.sample("trimtab_request_duration_seconds_count") == 2
        artifact = tiny.artifact.artifact_id
        assert served.sample("trimtab_guard_info", artifact=artifact, format_version="1") == 1


def test_metrics_and_answers_hold_no_text_of_the_prompt(tiny: Tiny, capfd: Any) -> None:
    with serving(tiny) as served:
        served.post("chat/completions", json={"model": MODEL, "messages": MESSAGES})
        served.post("chat/completions", json={"model": MODEL, "messages": MESSAGES, "n": 0})
        assert "paint" not in httpx.get(f"{served.url}/metrics").text
    shown = capfd.readouterr()
    assert "paint" not in shown.out + shown.err


def test_nothing_of_the_guard_is_in_responses_by_default(served: Served) -> None:
    body = {"model": MODEL, "messages": MESSAGES}
    plain = served.post("chat/completions", json=body)
    stream = served.post("chat/completions", json={**body, "stream": True})
    text = served.post("completions", json={"model": MODEL, "prompt": "ask"})
    for reply in (plain, stream, text):
        assert "trimtab" not in reply.text
    assert plain.json()["system_fingerprint"] is None


def test_the_operator_can_switch_the_guards_figures_on(tiny: Tiny) -> None:
    with serving(tiny, Policy(debug_fields=True)) as served:
        body = {"model": MODEL, "messages": MESSAGES, "temperature": 0}
        plain = served.post("chat/completions", json=body).json()
        shown = plain["choices"][0]["trimtab"]
        assert set(shown) == TRIMTAB_FIELDS
        assert plain["trimtab"] == shown
        assert plain["system_fingerprint"] == tiny.artifact.artifact_id
        assert 0 <= shown["kl_nats"] <= shown["budget_nats"] + 1e-9
        assert shown["verdict"] == "complied"
        assert shown["mode"] == "enforce"
        several = served.post("chat/completions", json={**body, "n": 2}).json()
        assert "trimtab" not in several
        assert all(set(c["trimtab"]) == TRIMTAB_FIELDS for c in several["choices"])
        stream = served.post("chat/completions", json={**body, "stream": True}).text
        chunks = [json.loads(e.removeprefix("data: ")) for e in stream.split("\n\n")[:-2]]
        assert [i for i, c in enumerate(chunks) if "trimtab" in c] == [len(chunks) - 1]
        assert chunks[-1]["trimtab"] == chunks[-1]["choices"][0]["trimtab"] == shown


def test_a_harmful_prompt_that_the_model_would_answer_is_raised_within_its_budget(
    tiny: Tiny,
) -> None:
    with serving(tiny, Policy(debug_fields=True)) as served, served.client() as client:
        spent = 0.0
        for prompt in hard_harmful_prompts()[:8]:
            reply = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": prompt}], temperature=0
            )
            shown = (reply.model_extra or {})["trimtab"]
            assert shown["zone"] in ("raise", "pass")  # pass: the base refuses by itself
            assert shown["kl_nats"] <= shown["budget_nats"] + 1e-9
            assert shown["verdict"] == "refused"
            spent += shown["kl_nats"]
        assert served.sample("trimtab_kl_nats_sum", zone="raise") == pytest.approx(spent)
        assert served.sample("trimtab_requests_total", mode="enforce", zone="raise") > 0
        assert served.sample("trimtab_shadow_passes_total") > 0


PUBLISHED = Policy.model_validate(
    {
        "debug_fields": True,
        "raise_budget_nats": 0.5,
        "policies": {"strict": {"raise_budget_nats": 8.0, "lower": "off"}},
    }
)


def test_a_client_may_ask_for_a_stricter_policy_by_name(tiny: Tiny) -> None:
    with serving(tiny, PUBLISHED, max_batch=8) as served, served.client() as client:

        def ask(prompt: str, name: str | None) -> dict[str, Any]:
            reply = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                extra_body={"trimtab_policy": name},
            )
            shown: dict[str, Any] = (reply.model_extra or {})["trimtab"]
            return shown

        prompts = hard_harmful_prompts()[:8]
        with ThreadPoolExecutor(16) as pool:  # both policies in one batch
            asked = [pool.map(ask, prompts, [name] * 8) for name in (None, "strict")]
            plain, strict = map(list, asked)
        assert [a["zone"] for a in plain] == [b["zone"] for b in strict]
        raised = [(a, b) for a, b in zip(plain, strict, strict=True) if a["zone"] == "raise"]
        assert raised
        assert {(a["budget_nats"], b["budget_nats"]) for a, b in raised} == {(0.5, 8.0)}
        assert all(a["kl_nats"] <= 0.5 + 1e-9 for a, _ in raised)
        assert max(b["kl_nats"] for _, b in raised) > 0.5


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "name", ["loose", "", "STRICT", 7, True, ["strict"], {"raise_budget_nats": 64}, "x" * 65]
)
def test_a_policy_that_is_not_published_is_a_400(
    published: Served, path: str, stream: bool, name: Any
) -> None:
    asked = {"messages": MESSAGES} if path.startswith("chat") else {"prompt": PROMPT}
    before = published.sample("trimtab_errors_total", kind="bad_request")
    body = {"model": MODEL, **asked, "stream": stream, "n": 2, "trimtab_policy": name}
    reply = published.post(path, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "trimtab_policy"
    assert published.sample("trimtab_errors_total", kind="bad_request") == before + 1
    assert published.sample("trimtab_requests_total", mode="enforce", zone="none") == 0


@pytest.mark.parametrize("field", ["raise_budget_nats", "mode", "lower", "carrier", "trimtab"])
def test_a_request_cannot_set_anything_of_a_policy(published: Served, field: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "trimtab_policy": "strict", field: 1}
    reply = published.post("chat/completions", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


@pytest.fixture(scope="module")
def published(tiny: Tiny) -> Iterator[Served]:
    with serving(tiny, PUBLISHED) as server:
        yield server


def test_fail_closed_may_be_asked_for_where_the_default_is_open(tiny: Tiny) -> None:
    policy = Policy.model_validate(
        {"on_failure": "open", "policies": {"closed": {"on_failure": "closed"}}}
    )
    probe = tiny.artifact.probe.map(lambda tensor: tensor.clone())
    sick = replace(tiny, artifact=replace(tiny.artifact, probe=probe))
    with serving(sick, policy) as served:
        sick.artifact.probe.out.fill_(float("nan"))  # after the canary: the gate cannot be read
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2}
        assert served.post("chat/completions", json=body).status_code == 200
        assert served.sample("trimtab_errors_total", kind="unguarded") == 1
        closed = served.post("chat/completions", json={**body, "trimtab_policy": "closed"})
        assert closed.status_code == 500
        assert closed.json()["error"]["code"] == "guard_numerics"


def test_with_mode_off_responses_are_counted_as_unguarded(tiny: Tiny) -> None:
    with serving(tiny, Policy(mode="off", debug_fields=True)) as served:
        body = {"model": MODEL, "messages": MESSAGES, "n": 2}
        reply = served.post("chat/completions", json=body)
        assert "trimtab" not in reply.text
        assert served.sample("trimtab_requests_total", mode="off", zone="none") == 2


# ------------------------------------------------------------------ sockets and the whole run
def unstarted(tiny: Tiny, artifact: CarrierArtifact | None = None) -> tuple[Engine, GuardMetrics]:
    metrics = GuardMetrics(CollectorRegistry(), model=MODEL, mode="enforce")
    parts = replace(tiny, artifact=artifact or tiny.artifact)
    return build_engine(parts, Policy(), metrics), metrics


def test_a_run_serves_from_on_ready_until_ctrl_c_and_stops_its_engine(tiny: Tiny) -> None:
    engine, metrics = unstarted(tiny)
    seen: list[int] = []

    def visit(url: str) -> None:
        try:
            seen.append(httpx.get(f"{url}/ready", timeout=30).status_code)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    visitors: list[threading.Thread] = []

    def on_ready(url: str) -> None:
        visitors.append(threading.Thread(target=visit, args=[url]))
        visitors[0].start()

    run_server(engine, metrics, "127.0.0.1", 0, on_ready=on_ready)
    visitors[0].join(timeout=30)
    assert seen == [200]
    assert not engine.armed


def test_a_guard_of_another_model_is_never_served(tiny: Tiny) -> None:
    manifest = tiny.artifact.manifest
    other = manifest.model.model_copy(update={"config_sha256": "0" * 64})
    artifact = replace(tiny.artifact, manifest=manifest.model_copy(update={"model": other}))
    engine, metrics = unstarted(tiny, artifact)
    urls: list[str] = []
    with pytest.raises(ModelMismatchError):
        run_server(engine, metrics, port=0, on_ready=urls.append)
    assert urls == []
    assert not engine.armed


def test_a_port_in_use_is_an_error_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} on 127.0.0.1 is in use.*--port"):
            bind_socket("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 70_000, "port 70000: expected 0 to 65535"),
        ("127.0.0.1", -1, "port -1"),
        ("no host at all", 0, "cannot be resolved"),
        ("192.0.2.1", 0, "no such address"),
    ],
)
def test_an_address_that_cannot_be_had_is_an_error(host: str, port: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bind_socket(host, port)
