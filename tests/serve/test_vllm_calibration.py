"""Real vLLM under calibration: it gives what transformers gives, and nobody else notices.

The tiny refuser in float32, with heads wide enough for vLLM's CPU attention: so what is the same is
the same up to float32 rounding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from calibration.config import CalibrationConfig
from calibration.endpoint_subject import EndpointSubject
from calibration.pipeline import calibrate
from calibration.transformers_subject import TransformersSubject, load_subject
from cli.main import main
from cli.vllm_calibrate import PrivateServer, private_server
from guard.artifact import CarrierArtifact, load_artifact
from guard.endpoint import PATH
from guard.errors import InputError
from guard.gate import GateReading
from guard.policy import Policy
from guard.session import GuardSession
from guard.template import turns
from tests.serve.test_vllm_server import NAMED, metric, running, wait_for
from tests.serve.vllm_setup import vllm_env
from tests.tiny_refuser import (
    build_tiny_refuser,
    hard_benign_prompts,
    hard_harmful_prompts,
    harmful_prompts,
    harmless_prompts,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

KEY = "of-the-operator"
OPTIONS = ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "8", "--max-model-len", "256"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-heads")
    build_tiny_refuser(folder, n_heads=2)
    return folder


@pytest.fixture(scope="module")
def subject(model_dir: Path) -> TransformersSubject:
    torch.set_num_threads(1)
    return load_subject(CalibrationConfig(model=str(model_dir)))


@pytest.fixture(scope="module")
def bare(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    """A server without a guard, as `trimtab calibrate --engine vllm` starts it."""
    env = {**vllm_env(tmp_path_factory.mktemp("bare")), "TRIMTAB_GUARD": "not this one"}
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with private_server(str(model_dir), [*OPTIONS, *NAMED], env) as server:
        yield server


@dataclass(frozen=True)
class Calibrated:
    """Two guards of one model: made in this process, and over the server."""

    here: CarrierArtifact
    there: CarrierArtifact
    file: Path


@pytest.fixture(scope="module")
def calibrated(
    model_dir: Path, bare: PrivateServer, tmp_path_factory: pytest.TempPathFactory
) -> Calibrated:
    folder = tmp_path_factory.mktemp("guards")

    def write(name: str, texts: list[str]) -> tuple[Path]:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return (path,)

    common = {
        "harmful": write("harmful", harmful_prompts() + hard_harmful_prompts()),
        "benign": write("benign", harmless_prompts()),
        "hard_benign": write("hard_benign", hard_benign_prompts()),
        "n_controls": 20,
        "test_prompts": 12,
        "policy_prompts": 8,
        # What an endpoint cannot give:
        "refine_steps": 0,
    }
    here = {"model": str(model_dir), "out": folder / "here"}
    there = {
        "endpoint": bare.url,
        "admin_key": bare.key,
        "model_name": str(model_dir),
        "out": folder / "there",
    }
    for settings in (here, there):
        calibrate(CalibrationConfig.model_validate({**common, **settings}))
    made = [load_artifact(folder / name) for name in ("here", "there")]
    return Calibrated(made[0], made[1], folder / "there")


@pytest.fixture(scope="module")
def guarded(
    model_dir: Path, calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server behind the guard made over HTTP, which can be calibrated again; its URL."""
    command = ["vllm.entrypoints.cli.main", "serve", str(model_dir)]
    env = {"TRIMTAB_GUARD": str(calibrated.file), "TRIMTAB_ADMIN_KEY": KEY}
    options = [*OPTIONS, "--enable-scale-out"]
    with running(tmp_path_factory.mktemp("guarded"), command, options, **env) as url:
        yield url


def prompts() -> list[str]:
    """Some that pass, some that are raised, some that are lowered."""
    kinds = (harmless_prompts(), hard_harmful_prompts(), hard_benign_prompts())
    return [text for kind in kinds for text in kind[:4]]


def ask(url: str, text: str) -> str:
    """A client's request; the response."""
    body = {"model": "qwen", "messages": [{"role": "user", "content": text}], "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 10}, timeout=120)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def assert_same_model(url: str, key: str, subject: TransformersSubject) -> None:
    """Hidden states, logits, shadow passes and responses."""
    texts = prompts()
    remote = EndpointSubject(url, key, subject.identity.model_id, texts)
    assert remote.identity == subject.identity
    assert remote.suffix_ids == subject.suffix_ids
    encoded = [subject.encode(text) for text in texts]
    assert [remote.encode(text) for text in texts] == encoded
    chats = [
        [{"role": "system", "content": "please measure"}, *turns(texts[0])],
        turns(texts[1], "sure", texts[2]),
    ]
    encoded += subject.encode_chats(chats)
    assert remote.encode_chats(chats) == encoded[len(texts) :]

    layers, kept = range(subject.identity.n_layers), len(subject.suffix_ids) + 1
    own, far = subject.prefill(encoded, layers), remote.prefill(encoded, layers)
    torch.testing.assert_close(far.logits, own.logits, atol=1e-3, rtol=1e-4)
    for layer in layers:
        wanted = own.resid_pre[layer][:, -kept:]
        torch.testing.assert_close(far.resid_pre[layer], wanted, atol=1e-3, rtol=1e-4)

    rows = [*range(len(encoded)), 0, 0, 3, *reversed(range(len(encoded)))]
    for layer in layers:
        noise = torch.randn(len(rows), subject.identity.d_model, generator=torch.manual_seed(layer))
        steered = own.last_hidden(layer)[rows] + noise
        mine = subject.shadow(own, rows, layer, steered)
        assert float((mine - own.logits[rows]).abs().amax(dim=-1).min()) > 0.05
        other = remote.shadow(far, rows, layer, steered)
        torch.testing.assert_close(other, mine, atol=2e-3, rtol=1e-3)

    responses = remote.respond(encoded, 10)
    assert responses == subject.respond(encoded, 10)
    assert [remote.decode(ids) for ids in responses] == [subject.decode(ids) for ids in responses]


def test_a_server_without_a_guard_gives_what_transformers_gives(
    bare: PrivateServer, subject: TransformersSubject
) -> None:
    assert_same_model(bare.url, bare.key, subject)


def test_steered_responses_are_made_over_it(
    bare: PrivateServer, subject: TransformersSubject, calibrated: Calibrated
) -> None:
    remote = EndpointSubject(bare.url, bare.key)
    encoded = [subject.encode(text) for text in hard_harmful_prompts()[:6]]
    plain = subject.respond(encoded, 10)
    made, spent = [], []
    for model in (subject, remote):
        sessions = [GuardSession(calibrated.here, Policy()) for _ in encoded]
        for session in sessions:
            session.open(GateReading(calibrated.here.thresholds.raise_above + 1, 0.0))
        made.append(model.respond(encoded, 10, sessions))
        spent.append(torch.tensor([session.record().kl_nats for session in sessions]))
    assert made[1] == made[0]
    assert all(steered != base for steered, base in zip(made[1], plain, strict=True))
    torch.testing.assert_close(spent[1], spent[0], atol=1e-3, rtol=1e-3)
    assert float(spent[1].max()) <= Policy().raise_budget_nats


def test_a_whole_calibration_over_it_finds_the_same_guard(calibrated: Calibrated) -> None:
    mine, other = calibrated.here, calibrated.there
    assert other.manifest.model == mine.manifest.model
    assert other.manifest.datasets == mine.manifest.datasets
    chosen = [(mine.manifest.raise_carrier, other.manifest.raise_carrier)]
    assert mine.manifest.lower_carrier is not None
    assert other.manifest.lower_carrier is not None
    chosen.append((mine.manifest.lower_carrier, other.manifest.lower_carrier))
    for a, b in chosen:
        assert (b.layer, b.position, b.family) == (a.layer, a.position, a.family)
        assert b.norm_share == pytest.approx(a.norm_share, rel=1e-3)
    gate, same = mine.manifest.gate, other.manifest.gate
    assert (same.layer, same.instruction_suffix_ids) == (gate.layer, gate.instruction_suffix_ids)
    assert same.raise_above == pytest.approx(gate.raise_above, abs=1e-3)
    torch.testing.assert_close(other.raise_carrier.basis, mine.raise_carrier.basis)
    assert torch.equal(other.refusal_token_ids, mine.refusal_token_ids)
    assert same.measurements.keys() == gate.measurements.keys()
    for name, value in same.measurements.items():
        assert value.value == pytest.approx(gate.measurements[name].value, abs=1e-2), name


def test_it_says_that_it_is_not_guarded_and_serves(bare: PrivateServer) -> None:
    assert ask(bare.url, harmless_prompts()[0])
    assert metric(bare.url, "trimtab_guard_armed") == 0
    assert metric(bare.url, "trimtab_requests_total") == 0


def test_a_wrong_key_opens_nothing(bare: PrivateServer) -> None:
    with pytest.raises(InputError, match="expected the server's TRIMTAB_ADMIN_KEY"):
        EndpointSubject(bare.url, bare.key[:-1])
    assert httpx.post(f"{bare.url}{PATH}/capture", content=b"{}").status_code == 401


def test_a_guarded_server_gives_the_base_model_and_goes_on_guarding(
    guarded: str, subject: TransformersSubject
) -> None:
    """What is steered for clients is read unsteered, and clients get what they get without it."""
    texts = prompts()
    base = [subject.decode(ids) for ids in subject.respond([subject.encode(t) for t in texts], 10)]
    before = [ask(guarded, text) for text in texts]
    assert sum(a.strip() != b.strip() for a, b in zip(before, base, strict=True)) >= 4
    wait_for(guarded, len(texts))
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, guarded, text) for text in texts * 4]
        assert_same_model(guarded, KEY, subject)
        during = [future.result() for future in asked]
    assert during == before * 4
    wait_for(guarded, 5 * len(texts))
    assert metric(guarded, "trimtab_requests_total") == 5 * len(texts)
    assert metric(guarded, "trimtab_requests_total", zone="raise") > 0
    assert metric(guarded, "trimtab_errors_total") == 0
    assert metric(guarded, "trimtab_guard_armed") == 1


def test_a_client_that_takes_tokens_in_place_of_text_is_guarded_and_counted(
    guarded: str, subject: TransformersSubject
) -> None:
    text = hard_harmful_prompts()[0]
    shown = ask(guarded, text)
    wait_for(guarded, 1)
    before = metric(guarded, "trimtab_requests_total", zone="raise")
    body = {
        "model": "qwen",
        "token_ids": subject.encode(text),
        "sampling_params": {"max_tokens": 10, "temperature": 0.0},
    }
    reply = httpx.post(f"{guarded}/inference/v1/generate", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    assert subject.decode(reply.json()["choices"][0]["token_ids"]).split() == shown.split()
    for _ in range(80):
        if metric(guarded, "trimtab_requests_total", zone="raise") > before:
            break
        time.sleep(0.25)
    assert metric(guarded, "trimtab_requests_total", zone="raise") > before
    assert metric(guarded, "trimtab_errors_total") == 0
    assert metric(guarded, "trimtab_guard_armed") == 1


def test_a_vllm_that_cannot_be_calibrated_says_why_and_writes_nothing(
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in vllm_env(tmp_path).items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "guard"
    command = ["calibrate", str(model_dir), "--out", str(out), "--engine", "vllm", "--dtype"]
    assert main([*command, "float32", "--", "--max-model-len", "256", "--enable-lora"]) == 1
    said = capsys.readouterr().err
    assert "vLLM ended with exit code 1" in said
    assert "drop --enable-lora" in said.splitlines()[-1]
    assert not out.exists()
