"""Real vLLM under calibration: it gives what transformers gives, and nobody else notices."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from calibration.config import CalibrationConfig
from calibration.endpoint_subject import EndpointSubject
from calibration.transformers_subject import TransformersSubject, load_subject
from cli.vllm_calibrate import PrivateServer, private_server
from guard.artifact import CarrierArtifact, load_artifact
from guard.endpoint import PATH
from guard.errors import EndpointError, InputError
from guard.gate import GateReading
from guard.policy import Policy
from guard.session import GuardSession
from tests.serve.test_vllm_server import ENGINE, NAMED, metric, running, wait_for
from tests.serve.vllm_driver import texts
from tests.serve.vllm_setup import vllm_env

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

KEY = "of-the-operator"
N_EACH = 3


@pytest.fixture(scope="module")
def subject(vllm_model_dir: Path) -> TransformersSubject:
    return load_subject(CalibrationConfig(model=str(vllm_model_dir)))


@pytest.fixture(scope="module")
def bare(vllm_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    """A server without a guard, as `trimtab calibrate --engine vllm` starts it."""
    env = {**vllm_env(tmp_path_factory.mktemp("bare")), "TRIMTAB_GUARD": "not this one"}
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with private_server(str(vllm_model_dir), [*ENGINE, *NAMED], env) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(
    vllm_model_dir: Path, vllm_guard: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A guarded server that can be calibrated; its URL."""
    command = ["vllm.entrypoints.cli.main", "serve", str(vllm_model_dir)]
    env = {"TRIMTAB_GUARD": str(vllm_guard), "TRIMTAB_ADMIN_KEY": KEY}
    with running(tmp_path_factory.mktemp("guarded"), command, ENGINE, **env) as url:
        yield url


def ask(url: str, text: str, n: int = 24) -> str:
    """A client's request; the response."""
    body = {"model": "qwen", "messages": [{"role": "user", "content": text}], "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": n}, timeout=120)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def assert_same_model(url: str, key: str, subject: TransformersSubject) -> None:
    """Hidden states, logits, shadow passes and openings of responses, up to bfloat16 rounding."""
    prompts = texts(N_EACH)
    remote = EndpointSubject(url, key, subject.identity.model_id, prompts)
    assert remote.identity == subject.identity
    assert remote.suffix_ids == subject.suffix_ids
    encoded = [subject.encode(text) for text in prompts]
    assert [remote.encode(text) for text in prompts] == encoded

    layers, kept = range(subject.identity.n_layers), len(subject.suffix_ids) + 1
    own, far = subject.prefill(encoded, layers), remote.prefill(encoded, layers)
    for layer in layers:
        wanted = own.resid_pre[layer][:, -kept:].float()
        gap = (far.resid_pre[layer].float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(gap.max()) < 0.05, layer
        assert float(gap.mean()) < 0.02, layer
    unit = float(own.logits.float().std())
    assert float((far.logits.float() - own.logits.float()).abs().max()) < 0.2 * unit

    rows = [*range(len(prompts)), 0, 0]
    direction = torch.randn(subject.identity.d_model, generator=torch.manual_seed(0))
    for layer in (6, 14):
        size = float(own.last_hidden(layer).float().norm(dim=-1).mean())
        push = direction / direction.norm() * 0.5 * size
        moved = []
        for model, step in ((subject, own), (remote, far)):
            steered = step.last_hidden(layer)[rows].float() + push
            logits = model.shadow(step, rows, layer, steered)  # type: ignore[attr-defined]
            moved.append(logits - step.logits[rows].float())
        assert float(moved[0].std()) > 0.1 * unit, "the direction does nothing: no comparison"
        alike = torch.nn.functional.cosine_similarity(moved[0], moved[1], dim=-1)
        assert float(alike.min()) > 0.98, layer
        assert float((moved[0] - moved[1]).abs().max()) < 0.3 * float(moved[0].abs().max())

    mine, other = subject.respond(encoded, 6), remote.respond(encoded, 6)
    assert sum(a == b for a, b in zip(mine, other, strict=True)) >= len(prompts) - 2
    assert all(remote.decode(ids) == subject.decode(ids) for ids in other)


def test_a_server_without_a_guard_gives_what_transformers_gives(
    bare: PrivateServer, subject: TransformersSubject
) -> None:
    assert_same_model(bare.url, bare.key, subject)


def test_it_says_that_it_is_not_guarded_and_serves(bare: PrivateServer) -> None:
    assert ask(bare.url, "Hello")
    assert metric(bare.url, "trimtab_guard_armed") == 0
    assert metric(bare.url, "trimtab_requests_total") == 0


def test_steered_responses_are_made_over_it(
    bare: PrivateServer, subject: TransformersSubject, vllm_guard: Path
) -> None:
    guard = load_artifact(vllm_guard)
    prompts = [subject.encode(text) for text in texts(2)]
    remote = EndpointSubject(bare.url, bare.key)
    responses, spent = [], []
    for model in (subject, remote):
        sessions = [_raised(guard) for _ in prompts]
        responses.append(model.respond(prompts, 8, sessions))
        spent.append([session.record().kl_nats for session in sessions])
    assert all(nats <= 4.0 for nats in spent[1])
    assert max(spent[1]) > 0.1
    alike = [a == b for a, b in zip(*responses, strict=True)]
    assert sum(alike) >= len(prompts) // 2
    for same, a, b in zip(alike, *spent, strict=True):
        assert not same or b == pytest.approx(a, rel=0.3, abs=0.1)


def _raised(guard: CarrierArtifact) -> GuardSession:
    session = GuardSession(guard, Policy(shadow_tokens=4))
    session.open(GateReading(guard.thresholds.raise_above + 1, 0.0))
    return session


def test_a_wrong_key_opens_nothing(bare: PrivateServer) -> None:
    with pytest.raises(InputError, match="expected the server's TRIMTAB_ADMIN_KEY"):
        EndpointSubject(bare.url, bare.key[:-1])
    assert httpx.post(f"{bare.url}{PATH}/capture", content=b"{}").status_code == 401


def test_a_guarded_server_gives_the_base_model_and_goes_on_guarding(
    guarded: str, subject: TransformersSubject
) -> None:
    """What is steered for clients is read unsteered, and clients get what they get without it."""
    prompts = texts(N_EACH)
    before = [ask(guarded, text) for text in prompts]
    wait_for(guarded, len(prompts))
    assert metric(guarded, "trimtab_shadow_passes_total") > 0
    booked = metric(guarded, "trimtab_requests_total")
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, guarded, text) for text in prompts * 3]
        assert_same_model(guarded, KEY, subject)
        during = [future.result() for future in asked]
    # Batches differ, and with them the rounding: most responses are the same to the letter.
    assert sum(a == b for a, b in zip(before * 3, during, strict=True)) >= 2 * len(prompts)
    wait_for(guarded, int(booked) + len(during))
    assert metric(guarded, "trimtab_requests_total") == booked + len(during)
    assert metric(guarded, "trimtab_errors_total") == 0
    assert metric(guarded, "trimtab_guard_armed") == 1
    assert [ask(guarded, text) for text in prompts] == before


def test_a_private_server_that_cannot_start_says_why(vllm_model_dir: Path, tmp_path: Path) -> None:
    options = [*ENGINE, "--enable-lora"]
    with (
        pytest.raises(EndpointError, match="drop --enable-lora"),
        private_server(str(vllm_model_dir), options, vllm_env(tmp_path)),
    ):
        pytest.fail("it started")
