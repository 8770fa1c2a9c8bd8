"""Guarded vLLM over HTTP, as `vllm serve` and as `trimtab serve`: armed, counted, killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI
from prometheus_client.mmap_dict import MmapedDict

from calibration.endpoint_subject import EndpointSubject
from guard.endpoint import PATH
from guard.errors import InputError
from tests.serve.vllm_driver import texts
from tests.serve.vllm_setup import ROOT, vllm_env

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


POLICY = """
raise_budget_nats: 0.25
policies:
  strict: {raise_budget_nats: 8.0, lower: off}
"""
ENGINE = ["--enforce-eager", "--max-num-seqs", "8", "--max-model-len", "1024"]
NAMED = ["--served-model-name", "qwen"]


@contextlib.contextmanager
def running(folder: Path, command: list[str], options: list[str], **extra: str) -> Iterator[str]:
    """Run a server; its URL. No 200 of /health may come before it is armed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**vllm_env(folder), **extra}
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", *command, *NAMED, "--port", str(port), *options],
        cwd=ROOT,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(480):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    assert metric(url, "trimtab_guard_armed") == 1
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        else:
            pytest.fail((folder / "log").read_text()[-4000:])
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


@pytest.fixture(scope="module")
def server(
    vllm_model_dir: Path, vllm_guard: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A plain `vllm serve` with two environment variables; its URL."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "policy.yaml").write_text(POLICY)
    with running(
        folder,
        ["vllm.entrypoints.cli.main", "serve", str(vllm_model_dir)],
        ENGINE,
        TRIMTAB_GUARD=str(vllm_guard),
        TRIMTAB_POLICY=str(folder / "policy.yaml"),
    ) as url:
        yield url


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels."""
    total = 0.0
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")) and all(
            f'{key}="{value}"' in line for key, value in labels.items()
        ):
            total += float(line.rsplit(" ", 1)[1])
    return total


def wait_for(url: str, n: int) -> None:
    """Until the metrics have booked n responses."""
    for _ in range(80):
        if metric(url, "trimtab_requests_total") >= n:
            return
        time.sleep(0.25)
    pytest.fail(f"{metric(url, 'trimtab_requests_total')} of {n} responses were booked")


def test_without_an_admin_key_there_are_no_routes_to_calibrate_by(server: str) -> None:
    assert httpx.get(f"{server}{PATH}/model").status_code == 404
    with pytest.raises(InputError, match="no calibration routes there"):
        EndpointSubject(server, "any")


def test_clients_are_served_and_every_response_is_counted(server: str) -> None:
    assert metric(server, "trimtab_guard_armed") == 1
    before = metric(server, "trimtab_requests_total")
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    prompts = texts(3)
    for text in prompts:
        reply = client.chat.completions.create(
            model="qwen",
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=12,
        )
        assert reply.choices[0].message.content
    stream = client.chat.completions.create(
        model="qwen",
        messages=[{"role": "user", "content": prompts[0]}],
        max_tokens=8,
        n=2,
        stream=True,
    )
    assert {chunk.choices[0].index for chunk in stream if chunk.choices} == {0, 1}
    wait_for(server, int(before) + len(prompts) + 2)
    zones = {z: metric(server, "trimtab_requests_total", zone=z) for z in ("raise", "lower")}
    assert min(zones.values()) > 0
    assert metric(server, "trimtab_kl_nats_count") >= len(prompts)
    assert metric(server, "trimtab_shadow_passes_total") > 0
    judged = sum(
        metric(server, "trimtab_responses_total", verdict=verdict)
        for verdict in ("refused", "partial", "complied", "unclear")
    )
    assert judged >= len(prompts)


def test_a_client_that_goes_away_is_counted_and_forgotten(server: str) -> None:
    before = metric(server, "trimtab_errors_total", kind="client_disconnect")
    body = {
        "model": "qwen",
        "messages": [{"role": "user", "content": "Count to a thousand."}],
        "max_tokens": 600,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{server}/v1/chat/completions", json=body, timeout=60) as reply:
        next(reply.iter_lines())
    for _ in range(80):
        if metric(server, "trimtab_errors_total", kind="client_disconnect") > before:
            return
        time.sleep(0.25)
    pytest.fail("the abort was not counted")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("trimtab-strength", -4.0, "a request can only name a published policy"),
        ("TRIMTAB", "off", "a request can only name a published policy"),
        ("Trimtab_Policy", "strict", "a request can only name a published policy"),
        ("trimtab_policy", "loose", "no such policy; this server publishes strict"),
        ("trimtab_policy", "", "no such policy"),
        ("trimtab_policy", -4.0, "must be a string"),
        ("trimtab_policy", ["strict"], "must be a string"),
    ],
)
def test_a_request_can_name_a_published_policy_and_nothing_else(
    server: str, field: str, value: Any, named: str
) -> None:
    before = metric(server, "trimtab_errors_total", kind="bad_request")
    body = {
        "model": "qwen",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 2,
        "vllm_xargs": {field: value},
    }
    reply = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert named in reply.text
    assert metric(server, "trimtab_errors_total", kind="bad_request") == before + 1


def test_a_stricter_policy_raises_further_and_lowers_nothing(server: str) -> None:
    client = OpenAI(base_url=f"{server}/v1", api_key="none")

    def ask(extra: dict[str, Any]) -> dict[str, float]:
        names = {
            "raised": ("trimtab_requests_total", {"zone": "raise"}),
            "lowered": ("trimtab_requests_total", {"zone": "lower"}),
            "nats": ("trimtab_kl_nats_sum", {"zone": "raise"}),
        }
        before = {key: metric(server, name, **labels) for key, (name, labels) in names.items()}
        n = metric(server, "trimtab_requests_total")
        for text in texts(6):
            client.chat.completions.create(
                model="qwen",
                messages=[{"role": "user", "content": text}],
                temperature=0,
                max_tokens=12,
                extra_body=extra,
            )
        wait_for(server, int(n) + len(texts(6)))
        after = {key: metric(server, name, **labels) for key, (name, labels) in names.items()}
        return {key: after[key] - before[key] for key in names}

    default, strict = ask({}), ask({"vllm_xargs": {"trimtab_policy": "strict"}})
    assert default["raised"] == strict["raised"] > 0
    assert default["lowered"] > strict["lowered"] == 0
    assert default["nats"] <= 0.25 * default["raised"] + 1e-4
    assert strict["nats"] > 2 * default["nats"]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("responses", {"input": "Hello", "max_output_tokens": 4}),
        ("messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}),
        ("completions", {"prompt": "Hello", "max_tokens": 4}),
    ],
)
def test_every_endpoint_that_generates_is_guarded_and_counted(
    server: str, path: str, prompt: dict[str, Any]
) -> None:
    before = int(metric(server, "trimtab_requests_total"))
    body = {"model": "qwen", **prompt}
    reply = httpx.post(f"{server}/v1/{path}", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    wait_for(server, before + 1)
    assert metric(server, "trimtab_requests_total", zone="none") == 0
    refused = {**body, "vllm_xargs": {"trimtab_policy": "loose"}}
    assert httpx.post(f"{server}/v1/{path}", json=refused, timeout=60).status_code == 400


def test_beam_search_would_multiply_the_budget_and_is_refused(server: str) -> None:
    body = {
        "model": "qwen",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 2,
        "use_beam_search": True,
        "n": 2,
    }
    reply = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert "beam search cannot be guarded" in reply.text


def test_vllms_own_benchmark_runs_against_it_unchanged(
    server: str, vllm_model_dir: Path, tmp_path: Path
) -> None:
    size = ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "8"]
    size += ["--num-prompts", "6"]
    where = ["--base-url", server, "--model", "qwen", "--tokenizer", str(vllm_model_dir)]
    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", *where, *size],
        env=vllm_env(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Successful requests:                     6" in done.stdout


def test_after_the_engine_is_killed_nothing_is_served(server: str) -> None:
    """The last test of this server."""
    port = int(server.rsplit(":", 1)[1])
    cores = [
        child
        for process in psutil.process_iter(["cmdline"])
        if "--port" in (process.info["cmdline"] or []) and str(port) in process.info["cmdline"]
        for child in process.children(recursive=True)
        if "EngineCore" in " ".join(child.cmdline())
    ]
    assert cores
    for core in cores:
        os.kill(core.pid, signal.SIGKILL)
    for _ in range(60):
        try:
            if httpx.get(f"{server}/health", timeout=5).status_code == 503:
                break
        except httpx.TransportError:
            break
        time.sleep(0.25)
    else:
        pytest.fail("/health still says 200")
    body = {"model": "qwen", "prompt": "Hello", "max_tokens": 2}
    with contextlib.suppress(httpx.TransportError):  # vLLM goes when its engine dies
        assert httpx.post(f"{server}/v1/completions", json=body, timeout=30).status_code >= 500


def booked(file: Path) -> float:
    """Responses that one process has counted in its own file."""
    samples = MmapedDict.read_all_values_from_file(str(file))
    return float(sum(value for key, value, *_ in samples if "trimtab_requests_total" in key))


def test_several_api_servers_share_one_set_of_metrics(
    vllm_model_dir: Path, vllm_guard: Path, tmp_path: Path
) -> None:
    command = ["cli.main", "serve", str(vllm_model_dir), "--engine", "vllm"]
    shared = tmp_path / "metrics"
    shared.mkdir()
    with running(
        tmp_path,
        [*command, "--guard", str(vllm_guard)],
        ["--", *ENGINE, "--api-server-count", "2"],
        PROMETHEUS_MULTIPROC_DIR=str(shared),  # vLLM would take a folder of its own
    ) as url:
        prompts = texts(4)
        for text in prompts:  # a connection each, so that the kernel spreads them
            body = {
                "model": "qwen",
                "messages": [{"role": "user", "content": text}],
                "temperature": 0,
                "max_tokens": 4,
            }
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            assert reply.status_code == 200, reply.text
        wait_for(url, len(prompts))
        for _ in range(6):  # whichever server answers
            assert metric(url, "trimtab_requests_total") == len(prompts)
            assert metric(url, "trimtab_gate_score_count") == len(prompts)
            assert metric(url, "trimtab_guard_armed") == 1
            assert metric(url, "trimtab_guard_info") == 1
            assert httpx.get(f"{url}/health", timeout=5).status_code == 200
        served = [booked(file) for file in shared.glob("counter_*.db")]
        assert sum(n > 0 for n in served) == 2
        assert sum(served) == len(prompts)
