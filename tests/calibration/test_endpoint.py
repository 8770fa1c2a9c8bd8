"""A calibration over HTTP: the real routes, the tiny refuser behind them, and what can go wrong."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from jinja2 import TemplateError
from torch import Tensor
from transformers import DynamicCache

from calibration.config import CalibrationConfig
from calibration.endpoint_subject import EndpointSubject
from calibration.pipeline import calibrate
from calibration.transformers_subject import TransformersSubject, load_subject
from cli.main import main
from guard.artifact import CarrierArtifact, load_artifact
from guard.endpoint import (
    MAX_TEXTS,
    MODEL_HEADER,
    PATH,
    CaptureRequest,
    ModelFacts,
    RespondRequest,
    ShadowRequest,
    pack,
)
from guard.errors import EndpointError, InputError, ModelMismatchError, PromptSetError
from guard.gate import GateReading
from guard.policy import Policy
from guard.session import GuardSession
from guard.template import Chat, turns, whole_chat_ids
from serve.calibration_routes import calibration_router
from serve.guarded_batch import left_pad
from serve.server import bind_socket
from serve.vllm_desk import job_of, request_name
from tests.tiny_refuser import (
    hard_benign_prompts,
    hard_harmful_prompts,
    harmful_prompts,
    harmless_prompts,
)

KEY = "schlüssel"


class SubjectBackend:
    """A transformers model as the backend of the routes.

    Attributes:
        facts: of the model that is served.
        n_captured: prompts whose hidden states of all layers were read.
        break_after: so many of them, then every connection is cut, once.
        connections: of the server.
    """

    def __init__(self, subject: TransformersSubject) -> None:
        self._subject = subject
        self.facts = ModelFacts(
            model=subject.identity,
            suffix_ids=subject.suffix_ids,
            opening_ids=subject.message_opening_ids,
            end_ids=sorted(subject._eos),
            max_tokens=256,
        )
        self.n_captured = 0
        self.break_after: int | None = None
        self.connections: set[asyncio.Protocol] = set()

    async def encode(self, chats: Sequence[Chat]) -> list[list[int] | None]:
        """Token ids of chats."""
        tokenizer = self._subject.tokenizer
        return [whole_chat_ids(tokenizer, chat, TemplateError) for chat in chats]

    async def decode(self, tokens: list[list[int]]) -> list[str]:
        """Texts of responses."""
        return [self._subject.decode(ids) for ids in tokens]

    async def respond(self, request: RespondRequest) -> list[list[int]]:
        """Greedy responses."""
        made = self._subject.respond(request.prompts, max(request.max_tokens))
        return [ids[:n] for ids, n in zip(made, request.max_tokens, strict=True)]

    async def capture(self, request: CaptureRequest) -> dict[str, Tensor]:
        """Logits and hidden states."""
        if len(request.layers) == self.facts.model.n_layers:
            self.n_captured += len(request.prompts)
        if self.break_after is not None and self.n_captured >= self.break_after:
            self.break_after = None
            for connection in list(self.connections):
                connection.transport.abort()  # type: ignore[attr-defined]
        # Whole prompts: the subject's own passes leave out the prefix that all of them share.
        ids, mask = left_pad(request.prompts, torch.device("cpu"))
        runner = self._subject.runner
        cache = DynamicCache(config=runner.model.config)
        step = runner.base(ids, mask, cache, request.layers)
        ends = {
            f"layers.{layer}": hidden[:, -request.n_last :]
            for layer, hidden in step.resid_pre.items()
        }
        return {"logits": step.logits, **ends}

    async def shadow(self, request: ShadowRequest, null: Tensor, steered: Tensor) -> Tensor:
        """Steered − null logits."""
        step = self._subject.prefill(request.prompts, [request.layer])
        torch.testing.assert_close(null, step.last_hidden(request.layer), atol=1e-3, rtol=1e-3)
        logits = self._subject.shadow(step, request.rows, request.layer, steered)
        return logits - step.logits[request.rows]


@contextmanager
def serving(app: FastAPI, backend: SubjectBackend | None = None) -> Iterator[str]:
    """Serve an app from a thread; its URL."""
    with bind_socket("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        if backend is not None:
            backend.connections = server.server_state.connections
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                thread.join(0.02)
                assert thread.is_alive()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def subject(tiny_refuser_dir: Path) -> TransformersSubject:
    torch.set_num_threads(1)
    return load_subject(CalibrationConfig(model=str(tiny_refuser_dir)))


@pytest.fixture
def backend(subject: TransformersSubject) -> SubjectBackend:
    return SubjectBackend(subject)


@pytest.fixture
def url(backend: SubjectBackend) -> Iterator[str]:
    app = FastAPI()
    app.include_router(calibration_router(KEY, lambda _: backend))
    with serving(app, backend) as url:
        yield url


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The tiny model's prompts, and few of everything else."""
    folder = tmp_path_factory.mktemp("prompts")

    def write(name: str, texts: list[str]) -> Path:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return {
        "harmful": (write("harmful", harmful_prompts() + hard_harmful_prompts()),),
        "benign": (write("benign", harmless_prompts()),),
        "hard_benign": (write("hard_benign", hard_benign_prompts()),),
        "n_controls": 20,
        "test_prompts": 12,
        "policy_prompts": 8,
        "refine_steps": 0,
    }


# --- the same calibration -------------------------------------------------------------------------


def test_a_calibration_over_http_finds_the_same_guard(
    tiny_refuser_dir: Path, settings: dict[str, object], url: str, tmp_path: Path
) -> None:
    here = CalibrationConfig(model=str(tiny_refuser_dir), out=tmp_path / "here", **settings)  # type: ignore[arg-type]
    there = CalibrationConfig(
        endpoint=url,
        admin_key=KEY,  # type: ignore[arg-type]
        model_name=str(tiny_refuser_dir),
        out=tmp_path / "there",
        **settings,  # type: ignore[arg-type]
    )
    calibrate(here)
    calibrate(there)
    mine, other = load_artifact(here.out), load_artifact(there.out)
    assert other.manifest.model == mine.manifest.model
    for a, b in (
        (mine.manifest.raise_carrier, other.manifest.raise_carrier),
        (mine.manifest.lower_carrier, other.manifest.lower_carrier),
    ):
        assert a is not None
        assert b is not None
        assert (a.layer, a.position) == (b.layer, b.position)
        assert b.norm_share == pytest.approx(a.norm_share, rel=1e-4)
    for first, second in ((mine.raise_carrier.basis, other.raise_carrier.basis),):
        torch.testing.assert_close(second, first, atol=1e-4, rtol=1e-3)
    assert other.manifest.gate.layer == mine.manifest.gate.layer
    assert other.thresholds.raise_above == pytest.approx(mine.thresholds.raise_above, abs=1e-3)
    assert torch.equal(other.refusal_token_ids, mine.refusal_token_ids)
    assert other.manifest.gate.measurements.keys() == mine.manifest.gate.measurements.keys()
    assert "auroc_disguised_second_turn" in other.manifest.gate.measurements
    assert not there.work_folder.exists()


def test_hidden_states_logits_and_shadow_passes_are_those_of_the_model(
    subject: TransformersSubject, url: str
) -> None:
    """Prompts of several lengths, more of them and more rows than go into one request."""
    texts = [*harmful_prompts()[:20], *hard_harmful_prompts()[:20]]
    remote = EndpointSubject(url, KEY, texts=texts)
    prompts = [subject.encode(text) for text in texts]
    assert [remote.encode(text) for text in texts] == prompts
    assert remote.suffix_ids == subject.suffix_ids
    own, far = subject.prefill(prompts, range(4)), remote.prefill(prompts, range(4))
    kept = len(subject.suffix_ids) + 1
    torch.testing.assert_close(far.logits, own.logits, atol=1e-4, rtol=1e-4)
    for layer in range(4):
        wanted = own.resid_pre[layer][:, -kept:]
        torch.testing.assert_close(far.resid_pre[layer], wanted, atol=1e-4, rtol=1e-4)
    rows = [*range(40), *range(0, 40, 2), *reversed(range(40))]
    steered = own.last_hidden(2)[rows] + torch.linspace(-1, 1, len(rows)).unsqueeze(1)
    torch.testing.assert_close(
        remote.shadow(far, rows, 2, steered),
        subject.shadow(own, rows, 2, steered),
        atol=1e-3,
        rtol=1e-4,
    )


def test_chats_are_encoded_and_read_as_in_process(subject: TransformersSubject, url: str) -> None:
    """More of them than go into one request; other system prompts and earlier turns among them."""
    remote = EndpointSubject(url, KEY)
    chats = [
        chat
        for text in hard_harmful_prompts()
        for chat in (
            turns(text),
            turns("ask paint boat", "sure", text),
            [{"role": "system", "content": "please measure"}, *turns(text)],
        )
    ]
    assert len(chats) > MAX_TEXTS
    prompts = subject.encode_chats(chats)
    assert remote.encode_chats(chats) == prompts
    some, n_last = prompts[:6], 3 + len(subject.suffix_ids)
    own, far = subject.states(some, [1, 2], n_last), remote.states(some, [1, 2], n_last)
    for layer in (1, 2):
        wanted = own[layer][:, -n_last:]
        torch.testing.assert_close(far[layer][:, -n_last:], wanted, atol=1e-4, rtol=1e-4)


def test_a_chat_that_the_servers_template_does_not_take_is_refused_and_breaks_nothing(
    subject: TransformersSubject, url: str
) -> None:
    remote = EndpointSubject(url, KEY)
    chats = [turns("ask steal car"), [{"role": "system", "content": "please"}, *turns("ask")]]
    plain = subject.tokenizer.chat_template
    try:
        subject.tokenizer.chat_template = plain.replace("in ('user', 'system')", "== 'user'")
        with pytest.raises(PromptSetError, match="the chat template takes no such chat"):
            remote.encode_chats(chats)
        assert remote.encode_chats(chats[:1]) == [subject.encode("ask steal car")]
    finally:
        subject.tokenizer.chat_template = plain


def test_states_of_whole_messages_come_for_prompts_of_any_length(
    subject: TransformersSubject, url: str
) -> None:
    texts = [*harmful_prompts()[:5], " ".join(["ask paint house"] * 30), "ask steal car"]
    remote = EndpointSubject(url, KEY, texts=texts)
    assert remote.message_opening_ids == subject.message_opening_ids
    prompts = [subject.encode(text) for text in texts]
    n_last = 64 + len(subject.suffix_ids)
    assert min(map(len, prompts)) < n_last < max(map(len, prompts))
    own, far = subject.states(prompts, [1, 2], n_last), remote.states(prompts, [1, 2], n_last)
    for layer in (1, 2):
        for row, ids in enumerate(prompts):
            n = min(n_last, len(ids) - len(subject._prefix))  # which stands in the cache
            torch.testing.assert_close(
                far[layer][row, -n:], own[layer][row, -n:], atol=1e-4, rtol=1e-4
            )


def test_steered_responses_spend_what_they_spend_in_process(
    subject: TransformersSubject, tiny_guard: CarrierArtifact, url: str
) -> None:
    """One session steers for a while, one passes, one is exhausted early; one row has none."""
    policy = Policy(shadow_tokens=3)
    poor = Policy(raise_budget_nats=0.01, token_cap_nats=0.01, lower_budget_nats=0.01)
    high, low = tiny_guard.thresholds.raise_above + 1, tiny_guard.thresholds.raise_above - 1

    def sessions() -> list[GuardSession | None]:
        opened = []
        for rules, score in ((policy, high), (policy, low), (poor, high)):
            opened.append(GuardSession(tiny_guard, rules))
            opened[-1].open(GateReading(score, 0.0))
        return [*opened, None]

    prompts = [subject.encode(text) for text in hard_harmful_prompts()[:4]]
    mine, other = sessions(), sessions()
    remote = EndpointSubject(url, KEY)
    expected = subject.respond(prompts, 10, mine)
    found = remote.respond(prompts, 10, other)
    assert found == expected
    assert found[0] != subject.respond(prompts[:1], 10)[0]
    for a, b in zip(mine[:3], other[:3], strict=True):
        assert a is not None
        assert b is not None
        assert b.record().kl_nats == pytest.approx(a.record().kl_nats, rel=1e-3)
        # What is left of a nearly empty ledger, rounded, may or may not move one token more.
        rounded = {"kl_nats": 0.0, "steered_tokens": 0}
        assert replace(b.record(), **rounded) == replace(a.record(), **rounded)
    assert [remote.decode(ids) for ids in found] == [subject.decode(ids) for ids in found]


# --- what can go wrong ----------------------------------------------------------------------------


def test_a_wrong_key_is_refused_and_the_message_says_which_one_is_meant(url: str) -> None:
    with pytest.raises(InputError, match="expected the server's TRIMTAB_ADMIN_KEY"):
        EndpointSubject(url, KEY + "x")
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "Basic eDp4"}):
        assert httpx.get(f"{url}{PATH}/model", headers=headers).status_code == 401
        assert httpx.post(f"{url}{PATH}/respond", headers=headers).status_code == 401


def test_a_server_without_the_routes_says_how_to_start_one_with_them() -> None:
    with serving(FastAPI()) as url, pytest.raises(InputError, match="TRIMTAB_ADMIN_KEY=… vllm"):
        EndpointSubject(url, KEY)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://[::1"])
def test_what_is_no_url_is_bad_input(url: str) -> None:
    with pytest.raises(InputError, match="give"):
        EndpointSubject(url, KEY)


def test_a_model_that_changes_under_the_calibration_ends_it(
    backend: SubjectBackend, url: str
) -> None:
    remote = EndpointSubject(url, KEY)
    prompts = [remote.encode("ask steal car")]
    remote.prefill(prompts, [0])
    other = backend.facts.model.model_copy(update={"weights_sha256": "0" * 64})
    backend.facts = backend.facts.model_copy(update={"model": other})
    before = backend.n_captured
    with pytest.raises(ModelMismatchError, match="the model changed during the calibration"):
        remote.prefill(prompts, range(4))
    assert backend.n_captured == before


def test_an_interrupted_network_keeps_finished_work_and_the_next_run_goes_on(
    backend: SubjectBackend,
    url: str,
    settings: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIMTAB_ADMIN_KEY", KEY)
    out, files = tmp_path / "guard", []
    for name in ("harmful", "benign", "hard_benign"):
        (path,) = settings[name]  # type: ignore[misc]
        files += [f"--{name.replace('_', '-')}", str(path)]
    backend.break_after = 200
    command = ["calibrate", "--endpoint", url, "--out", str(out), *files]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert url in said
    assert "run the same command again to go on from there" in said
    assert not out.exists()
    kept = len(list(tmp_path.glob("guard.work/*/*.piece")))
    assert kept > 3
    first, backend.n_captured = backend.n_captured, 0
    assert main(command) == 0
    assert out.exists()
    whole = CalibrationConfig(endpoint=url, admin_key=KEY, out=tmp_path / "whole", **settings)  # type: ignore[arg-type]
    again, backend.n_captured = backend.n_captured, 0
    calibrate(whole)
    assert 0 < again < backend.n_captured
    assert first + again <= backend.n_captured + 2 * 32  # the batch that broke was read twice


def test_a_server_that_goes_away_is_named(subject: TransformersSubject) -> None:
    backend = SubjectBackend(subject)
    app = FastAPI()
    app.include_router(calibration_router(KEY, lambda _: backend))
    with serving(app, backend) as url:
        remote = EndpointSubject(url, KEY)
    with pytest.raises(EndpointError, match=f"{url}: the connection broke"):
        remote.encode("ask steal car")


def test_requests_that_make_no_sense_are_answered_with_400_and_a_reason(
    backend: SubjectBackend, url: str
) -> None:
    headers = {"authorization": f"Bearer {KEY}".encode(), MODEL_HEADER: backend.facts.digest}
    rows = ShadowRequest(prompts=[[1, 2]], layer=1, rows=[0, 0])
    wide = {"null": torch.zeros(1, 3), "steered": torch.zeros(2, 3)}
    cases: list[tuple[str, bytes, str]] = [
        ("encode", b'{"chats": [[]]}', "at least 1"),
        ("encode", b'{"chats": [[{"role": "tool", "content": "x"}]]}', "role"),
        ("capture", b'{"prompts": [[1, 2]], "layers": [9], "n_last": 1}', "no layer 9"),
        ("capture", b'{"prompts": [[1, 2]], "layers": [1], "n_last": 3}', "shorter than the 3"),
        ("capture", b'{"prompts": [[1, 9999]], "layers": [], "n_last": 1}', "no token 9999"),
        ("capture", b'{"prompts": [[1]], "layers": [], "n_last": 1, "more": 1}', "more"),
        ("respond", b'{"prompts": [[1]], "max_tokens": [400]}', "do not fit the server's 256"),
        ("respond", b'{"prompts": [[1]], "max_tokens": []}', "one for each prompt"),
        ("shadow", b"{}", "not safetensors"),
        ("shadow", pack(wide, rows), "shapes"),
        ("shadow", pack({}, CaptureRequest(prompts=[[1]], layers=[], n_last=1)), "layer"),
    ]
    for path, body, why in cases:
        reply = httpx.post(f"{url}{PATH}/{path}", content=body, headers=headers)
        assert reply.status_code == 400, (path, body)
        assert why in reply.json()["error"]


def test_a_prompt_that_does_not_fit_the_server_is_named(backend: SubjectBackend, url: str) -> None:
    backend.facts = backend.facts.model_copy(update={"max_tokens": 66})
    with pytest.raises(PromptSetError, match=r"'ask steal car'.* do not fit the server's 66"):
        EndpointSubject(url, KEY, texts=["ask steal car"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "give MODEL, or --endpoint"),
        (["model", "--endpoint", "http://x"], "give MODEL, or --endpoint"),
        (["--endpoint", "http://x"], "--endpoint needs the server's TRIMTAB_ADMIN_KEY"),
        (["--endpoint", "http://x", "--dtype", "float32"], "--dtype: not with --endpoint"),
        (["--endpoint", "http://x", "--engine", "vllm"], "--engine vllm: not with --endpoint"),
        (["model", "--engine", "vllm", "--device", "cpu"], "--device is not an option"),
        (["model", "--", "--max-num-seqs", "4"], "options after -- need --engine vllm"),
    ],
)
def test_options_that_do_not_go_together_are_bad_input(
    arguments: list[str],
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRIMTAB_ADMIN_KEY", raising=False)
    assert main(["calibrate", "--out", str(tmp_path / "guard"), *arguments]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.skipif(
    find_spec("vllm") is not None,
    reason="needs .venv, without vLLM",
)
def test_a_calibration_inside_vllm_needs_vllm(
    tiny_refuser_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", str(tiny_refuser_dir), "--out", str(tmp_path / "guard")]
    assert main([*command, "--engine", "vllm", "--", "--max-num-seqs", "4"]) == 2
    assert "pip install trimtab[vllm]" in capsys.readouterr().err


# --- names of requests ----------------------------------------------------------------------------


def test_only_requests_of_a_job_are_the_calibrations_own() -> None:
    assert job_of(request_name("0a1b", 12)) == ("0a1b", 12)
    assert job_of(request_name("0a1b", 12) + "-89abcdef") == ("0a1b", 12)
    for name in ("cmpl-0a1b-12", "trimtab-calibration-", "trimtab-calibration-0a1b", "x"):
        assert job_of(name) is None
