"""Debian's Prometheus against loaded servers: every panel has data, every alert fires."""

from __future__ import annotations

import copy
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from guard.artifact import CarrierArtifact
from guard.policy import Policy
from tests.dashboards.shipped import PROMETHEUS, Query, alerts, queries
from tests.serve.serving import Served, Tiny, serving, wait_until
from tests.tiny_refuser import (
    hard_benign_prompts,
    hard_harmful_prompts,
    harmful_prompts,
    harmless_prompts,
)

pytestmark = pytest.mark.prometheus

UNPACKED = Path(__file__).parents[2] / "build" / "prometheus" / "usr" / "bin"
ENFORCED, OBSERVED = "tiny/enforced", "tiny/observed"


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`, installed or unpacked by `make prometheus`."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}{os.pathsep}{UNPACKED}")
    if found is None:
        reason = (
            f"{name} is missing: run `make prometheus` where apt-get reaches Debian's packages,"
            " or install Prometheus 2.42 or newer"
        )
        # Where nobody reads the reasons of skipped tests, a missing program is a failure.
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("promtool"), *arguments],
        cwd=PROMETHEUS,
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **params: str | float) -> Any:
        """The data of an answer of its API; an error of the query fails the test."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def points(self, query: Query, model: str) -> list[float]:
        """What Grafana would draw of a panel's query: its finite numbers."""
        filled = query.filled(model=model, rate_interval="10m")
        if query.instant:
            found = self.get("query", query=filled)["result"]
            values = [series["value"][1] for series in found]
        else:
            now = time.time()
            found = self.get("query_range", query=filled, start=now - 5, end=now, step=1)["result"]
            values = [value for series in found for _, value in series["values"]]
        return [number for number in map(float, values) if math.isfinite(number)]

    def firing(self) -> list[dict[str, Any]]:
        """Its alerts that fire."""
        return [a for a in self.get("alerts")["alerts"] if a["state"] == "firing"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextmanager
def running(folder: Path, targets: list[str]) -> Iterator[Prometheus]:
    """Prometheus with the shipped rules and job, in a hurry: it scrapes and judges each second.

    It stands among the job's targets itself, as a server that shows no guard.
    """
    port = free_port()
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    config["global"]["evaluation_interval"] = "1s"
    config["scrape_configs"][0]["static_configs"] = [{"targets": [*targets, f"127.0.0.1:{port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    (rule_file,) = config["rule_files"]
    hurried = yaml.safe_load((PROMETHEUS / rule_file).read_text("utf-8"))
    for group in hurried["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    (folder / rule_file).write_text(yaml.safe_dump(hurried), "utf-8")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    prometheus = Prometheus(f"http://127.0.0.1:{port}")

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text("utf-8")
        try:
            return httpx.get(f"{prometheus.url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, seconds=60)
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(served: Served, prompts: list[str]) -> None:
    for prompt in prompts:
        reply = served.post(
            "chat/completions",
            json={
                "model": served.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": 8,
            },
        )
        assert reply.status_code == 200, reply.text


@contextmanager
def spoiled(model: PreTrainedModel) -> Iterator[None]:
    """Make the model's last layer give NaN."""

    def spoil(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        nan = hidden * float("nan")
        return (nan, *output[1:]) if isinstance(output, tuple) else nan

    handle = model.model.layers[-1].register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Live:
    """Two loaded servers, and the Prometheus that scrapes them and two that are not well."""

    prometheus: Prometheus
    enforced: Served
    observed: Served
    closed: str
    """Address at which nobody answers."""


@pytest.fixture(scope="module")
def live(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_guard: CarrierArtifact,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    program("prometheus")  # before two servers start in vain
    tiny = Tiny(tiny_model, tiny_tokenizer, tiny_guard)
    other = replace(tiny, model=copy.deepcopy(tiny_model))
    with ExitStack() as stack:
        # A budget too small to help, and nothing lowered: so both kinds of mistakes happen.
        small = Policy(raise_budget_nats=0.002, lower="off")
        enforced = stack.enter_context(serving(tiny, small, model=ENFORCED))
        observed = stack.enter_context(serving(other, Policy(mode="observe"), model=OBSERVED))
        closed = stack.enter_context(socket.socket())  # bound, so that nobody else takes the port
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        urls = [served.url.removeprefix("http://") for served in (enforced, observed)]
        prometheus = stack.enter_context(
            running(tmp_path_factory.mktemp("prometheus"), [*urls, address])
        )
        # Counters are seen to rise only if they were seen before they did.
        seen = 'count(trimtab_guard_armed) == 2 and count(up{job="trimtab"}) == 4'
        wait_until(lambda: prometheus.get("query", query=seen)["result"], seconds=30)
        for served in (enforced, observed):
            ask(served, harmless_prompts()[:10] + harmful_prompts()[:10])
            ask(served, hard_benign_prompts()[:40] + hard_harmful_prompts()[:40])
        assert enforced.post("chat/completions", json={"model": "no such"}).status_code == 400
        with spoiled(tiny.model):
            body = {"model": ENFORCED, "messages": [{"role": "user", "content": "ask paint car"}]}
            assert enforced.post("chat/completions", json=body).status_code == 500
        ended = (
            'trimtab_errors_total{kind="numerics"} == 1'
            " and on () (count(sum by (model) (trimtab_judged_responses_total) == 100) == 2)"
        )
        wait_until(lambda: prometheus.get("query", query=ended)["result"], seconds=30)
        yield Live(prometheus, enforced, observed, address)


# ------------------------------------------------------------------ promtool
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    config = promtool("check", "config", "prometheus.yml")
    assert config.returncode == 0, config.stderr
    assert "1 rule files found" in config.stdout
    linted = promtool("check", "rules", "--lint-fatal", "trimtab.rules.yml")
    assert linted.returncode == 0, linted.stderr


@pytest.mark.parametrize("path", sorted(path.name for path in PROMETHEUS.glob("*.test.yml")))
def test_the_unit_tests_of_the_rules_pass(path: str) -> None:
    tested = promtool("test", "rules", path)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_promtool_finds_no_fault_with_the_metrics_page(live: Live) -> None:
    for served in (live.enforced, live.observed):
        page = httpx.get(f"{served.url}/metrics").text
        assert "trimtab_kl_nats_bucket" in page
        checked = promtool("check", "metrics", text=page)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


# ------------------------------------------------------------------ panels
@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.panel}-{query.ref}")
def test_every_query_of_every_panel_returns_numbers(live: Live, query: Query) -> None:
    assert live.prometheus.points(query, model=".*")


@pytest.mark.parametrize(
    ("panel", "of", "among"),
    [
        (
            "Suspected over-refusal",
            ("trimtab_suspected_over_refusals_total", {}),
            ("trimtab_judged_responses_total", {"gate": "benign"}),
        ),
        (
            "Suspected under-refusal",
            ("trimtab_suspected_under_refusals_total", {}),
            ("trimtab_judged_responses_total", {"gate": "harmful"}),
        ),
        (
            "Exhausted budgets",
            ("trimtab_kl_budget_exhausted_total", {}),
            ("trimtab_requests_total", {"mode": "enforce", "zone": "raise"}),
        ),
        (
            "Token flips",
            ("trimtab_token_flips_total", {}),
            ("trimtab_shadow_passes_total", {}),
        ),
    ],
)
def test_a_share_is_what_the_counters_say(
    live: Live, panel: str, of: tuple[str, dict[str, str]], among: tuple[str, dict[str, str]]
) -> None:
    (query,) = [query for query in queries() if query.panel == panel]
    expected = live.enforced.sample(of[0], **of[1]) / live.enforced.sample(among[0], **among[1])
    # The interval covers the whole life of the counters, so nothing is lost at its ends.
    drawn = live.prometheus.points(query, model=ENFORCED)[-1]
    assert drawn == pytest.approx(expected, rel=1e-6)


def test_the_model_variable_offers_the_models_and_parts_them(live: Live) -> None:
    named = live.prometheus.get("label/model/values", **{"match[]": "trimtab_guard_armed"})
    assert named == [ENFORCED, OBSERVED]
    (budget,) = [
        query for query in queries() if query.panel.endswith("budget: raise") and query.ref == "D"
    ]
    assert set(live.prometheus.points(budget, model=ENFORCED)) == {0.002}
    assert set(live.prometheus.points(budget, model=OBSERVED)) == {4.0}


def test_no_quantile_is_drawn_above_its_budget(live: Live) -> None:
    for query in queries():
        if query.panel.startswith("Nats spent") and query.ref != "D":
            budget = {"raise": 4.0, "lower": 1.0}[query.panel.rpartition(": ")[2]]
            drawn = live.prometheus.points(query, model=OBSERVED)
            assert 0 <= max(drawn) <= budget, query


# ------------------------------------------------------------------ alerts
def test_every_alert_fires_for_what_it_is_about_and_reads_well(live: Live) -> None:
    live.observed.stop_engine()
    itself = live.prometheus.url.removeprefix("http://")
    unarmed = live.observed.url.removeprefix("http://")
    expected = {
        ("TrimtabUnreachable", live.closed),
        ("TrimtabGuardMissing", itself),
        ("TrimtabNotArmed", unarmed),
        ("TrimtabOverRefusalUp", ENFORCED),
        ("TrimtabRefusalCollapse", ENFORCED),
        ("TrimtabBudgetsExhausted", ENFORCED),
        ("TrimtabErrors", ENFORCED),
    }

    def firing() -> set[tuple[str, str]]:
        labels = [alert["labels"] for alert in live.prometheus.firing()]
        return {(a["alertname"], a.get("instance") or a["model"]) for a in labels}

    wait_until(lambda: expected <= firing(), seconds=60)
    # The model behind the observed server over-refuses by itself, and nothing helps it there.
    assert firing() == expected | {("TrimtabOverRefusalUp", OBSERVED)}
    assert {name for name, _ in expected} == {alert["alert"] for alert in alerts()}
    for alert in live.prometheus.firing():
        for text in alert["annotations"].values():
            assert not set("<{") & set(text), text  # a template that failed, or was not filled
