"""The metrics start at zero, count what records say, and are documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from guard.gate import Zone
from guard.policy import Policy
from guard.refusal import Verdict
from guard.session import Record
from serve.metrics import ErrorKind, GuardMetrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"

RAISED = Record(
    zone=Zone.RAISE,
    gate_score=5.0,
    refusal_prob=0.01,
    kl_nats=1.9,
    budget_nats=4.0,
    steered_tokens=6,
    shadow_passes=16,
    token_flips=2,
    exhausted=False,
    applied=True,
    gate_says="harmful",
    verdict=Verdict.REFUSED,
)


@pytest.fixture
def metrics() -> GuardMetrics:
    return GuardMetrics(
        CollectorRegistry(), model="tiny", mode="enforce", artifact_id="abc123", format_version=1
    )


def value(metrics: GuardMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model": "tiny", **labels})


def families(metrics: GuardMetrics) -> dict[str, str]:
    """Exposed name and type of every metric; counters carry their _total."""
    return {
        f"{m.name}_total" if m.type == "counter" else m.name: m.type
        for m in metrics.registry.collect()
    }


def test_the_registered_metrics_are_exactly_these(metrics: GuardMetrics) -> None:
    assert families(metrics) == {
        "trimtab_requests_total": "counter",
        "trimtab_responses_total": "counter",
        "trimtab_suspected_over_refusals_total": "counter",
        "trimtab_suspected_under_refusals_total": "counter",
        "trimtab_judged_responses_total": "counter",
        "trimtab_kl_nats": "histogram",
        "trimtab_kl_budget_nats": "gauge",
        "trimtab_kl_budget_exhausted_total": "counter",
        "trimtab_token_flips_total": "counter",
        "trimtab_shadow_passes_total": "counter",
        "trimtab_gate_score": "histogram",
        "trimtab_guard_armed": "gauge",
        "trimtab_guard_info": "gauge",
        "trimtab_errors_total": "counter",
        "trimtab_request_duration_seconds": "histogram",
        "trimtab_gate_duration_seconds": "histogram",
    }


def test_the_documentation_defines_each_metric_with_its_type_and_labels(
    metrics: GuardMetrics,
) -> None:
    headings = dict(
        re.findall(
            r"^### `(trimtab_\w+(?:\{[\w,]*\})?)` · (\w+)$", DOCS.read_text("utf-8"), re.MULTILINE
        )
    )
    documented = {h.partition("{")[0]: kind for h, kind in headings.items()}
    assert documented == families(metrics)
    labels = {h.partition("{")[0]: set(filter(None, h[:-1].partition("{")[2].split(",")))
              for h in headings}  # fmt: skip
    for family in metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        seen = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels[name] == seen, name


def test_the_documentation_lists_every_error_kind() -> None:
    table = set(re.findall(r"^\| `(\w+)` \| \d", DOCS.read_text("utf-8"), re.MULTILINE))
    assert table == {kind.value for kind in ErrorKind}


def test_every_known_series_exists_and_is_zero_from_the_start(metrics: GuardMetrics) -> None:
    for zone in ("pass", "raise", "lower", "none"):
        assert value(metrics, "trimtab_requests_total", mode="enforce", zone=zone) == 0
        for verdict in ("refused", "partial", "complied", "unclear", "none"):
            assert value(metrics, "trimtab_responses_total", zone=zone, verdict=verdict) == 0
    for zone in ("pass", "raise", "lower"):
        assert value(metrics, "trimtab_kl_nats_count", zone=zone) == 0
    for kind in ErrorKind:
        assert value(metrics, "trimtab_errors_total", kind=kind.value) == 0
    for name in (
        "suspected_over_refusals_total",
        "suspected_under_refusals_total",
        "kl_budget_exhausted_total",
        "token_flips_total",
        "shadow_passes_total",
        "gate_score_count",
        "guard_armed",
        "request_duration_seconds_count",
        "gate_duration_seconds_count",
    ):
        assert value(metrics, f"trimtab_{name}") == 0, name
    for zone in ("raise", "lower"):
        assert value(metrics, "trimtab_kl_budget_nats", zone=zone) == 0
    for side in ("harmful", "benign", "uncertain"):
        assert value(metrics, "trimtab_judged_responses_total", gate=side) == 0
    assert value(metrics, "trimtab_guard_info", artifact="abc123", format_version="1") == 1


def test_a_record_moves_every_metric_it_speaks_of(metrics: GuardMetrics) -> None:
    metrics.observe(RAISED)
    assert value(metrics, "trimtab_requests_total", mode="enforce", zone="raise") == 1
    assert value(metrics, "trimtab_responses_total", zone="raise", verdict="refused") == 1
    assert value(metrics, "trimtab_kl_nats_sum", zone="raise") == pytest.approx(1.9)
    assert value(metrics, "trimtab_kl_nats_bucket", zone="raise", le="1.0") == 0
    assert value(metrics, "trimtab_kl_nats_bucket", zone="raise", le="2.0") == 1
    assert value(metrics, "trimtab_token_flips_total") == 2
    assert value(metrics, "trimtab_shadow_passes_total") == 16
    assert value(metrics, "trimtab_gate_score_bucket", le="4.0") == 0
    assert value(metrics, "trimtab_gate_score_bucket", le="6.0") == 1
    assert value(metrics, "trimtab_kl_budget_exhausted_total") == 0
    assert value(metrics, "trimtab_suspected_over_refusals_total") == 0


def test_kl_buckets_run_from_a_ten_thousandth_to_ten_nats(metrics: GuardMetrics) -> None:
    samples = next(m for m in metrics.registry.collect() if m.name == "trimtab_kl_nats").samples
    bounds = sorted({float(s.labels["le"]) for s in samples if s.name.endswith("_bucket")})
    assert (bounds[0], bounds[-2], bounds[-1]) == (1e-4, 10.0, float("inf"))
    ratios = [b / a for a, b in pairwise(bounds[:-1])]
    assert all(1.2 < ratio < 2.6 for ratio in ratios)
    # Else a quantile of responses that used up their budget would be drawn above it.
    assert {Policy().raise_budget_nats, Policy().lower_budget_nats} <= set(bounds)


def test_a_refusal_is_suspected_only_where_the_gate_says_benign(metrics: GuardMetrics) -> None:
    metrics.observe(replace(RAISED, zone=Zone.PASS, gate_says="benign"))
    metrics.observe(replace(RAISED, zone=Zone.PASS, gate_says="uncertain"))
    metrics.observe(replace(RAISED, verdict=Verdict.COMPLIED))
    assert value(metrics, "trimtab_suspected_over_refusals_total") == 1
    assert value(metrics, "trimtab_suspected_under_refusals_total") == 1


def test_judged_responses_are_what_suspected_refusals_are_a_share_of(metrics: GuardMetrics) -> None:
    for says in ("harmful", "benign", "benign", "uncertain"):
        metrics.observe(replace(RAISED, gate_says=says))
    metrics.observe(replace(RAISED, verdict=None))
    metrics.observe(None)
    for side, n in (("harmful", 1), ("benign", 2), ("uncertain", 1)):
        assert value(metrics, "trimtab_judged_responses_total", gate=side) == n
    assert value(metrics, "trimtab_suspected_over_refusals_total") == 2


def test_the_budgets_of_the_policy_stand_beside_what_is_spent(metrics: GuardMetrics) -> None:
    metrics.set_budgets(Policy(mode="off"))
    assert value(metrics, "trimtab_kl_budget_nats", zone="raise") == 0
    metrics.set_budgets(Policy(raise_budget_nats=2.5, lower_budget_nats=0.5))
    assert value(metrics, "trimtab_kl_budget_nats", zone="raise") == 2.5
    assert value(metrics, "trimtab_kl_budget_nats", zone="lower") == 0.5
    published = {"strict": {"raise_budget_nats": 8.0, "lower_budget_nats": 0.0}}
    metrics.set_budgets(Policy.model_validate({"policies": published}))
    assert value(metrics, "trimtab_kl_budget_nats", zone="raise") == 8.0
    assert value(metrics, "trimtab_kl_budget_nats", zone="lower") == 1.0


def test_several_processes_show_one_armed_guard_only_if_each_is(tmp_path: Path) -> None:
    # As several API servers of one vLLM do: prometheus_client's multi-process mode.
    program = """if True:
        import sys
        from prometheus_client import CollectorRegistry
        from guard.policy import Policy
        from serve.metrics import GuardMetrics
        metrics = GuardMetrics(
            CollectorRegistry(), model="tiny", mode="enforce", artifact_id="abc", format_version=1
        )
        metrics.set_budgets(Policy())
        metrics.set_armed(sys.argv[1] == "armed")
        metrics.observe(None)
    """
    seen = []
    for state in ("armed", "armed", "unarmed"):
        subprocess.run(
            [sys.executable, "-c", program, state],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            cwd=DOCS.parents[1],
            check=True,
        )
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(tmp_path))
        seen.append(registry.get_sample_value("trimtab_guard_armed", {"model": "tiny"}))
    assert seen == [1, 1, 0]
    labels = {"artifact": "abc", "model": "tiny", "format_version": "1"}
    assert registry.get_sample_value("trimtab_guard_info", labels) == 1
    budget = {"model": "tiny", "zone": "raise"}
    assert registry.get_sample_value("trimtab_kl_budget_nats", budget) == 4
    ended = {"model": "tiny", "mode": "enforce", "zone": "none"}
    assert registry.get_sample_value("trimtab_requests_total", ended) == 3


def test_an_aborted_response_is_counted_with_what_it_spent(metrics: GuardMetrics) -> None:
    metrics.observe(replace(RAISED, verdict=None, exhausted=True))
    assert value(metrics, "trimtab_responses_total", zone="raise", verdict="none") == 1
    assert value(metrics, "trimtab_kl_nats_sum", zone="raise") == pytest.approx(1.9)
    assert value(metrics, "trimtab_kl_budget_exhausted_total") == 1


def test_a_request_that_never_reached_its_gate_has_zone_none(metrics: GuardMetrics) -> None:
    metrics.observe(replace(RAISED, zone=None, gate_score=None, kl_nats=0.0, verdict=None))
    assert value(metrics, "trimtab_requests_total", mode="enforce", zone="none") == 1
    assert value(metrics, "trimtab_gate_score_count") == 0


def test_a_response_without_a_record_is_counted_as_unguarded() -> None:
    metrics = GuardMetrics(CollectorRegistry(), model="tiny", mode="off")
    metrics.observe(None)
    assert value(metrics, "trimtab_requests_total", mode="off", zone="none") == 1
    assert value(metrics, "trimtab_responses_total", zone="none", verdict="none") == 1
    assert b"trimtab_guard_info{" not in generate_latest(metrics.registry)


def test_nan_never_enters_a_histogram(metrics: GuardMetrics) -> None:
    metrics.observe(replace(RAISED, kl_nats=float("nan"), gate_score=float("nan")))
    assert value(metrics, "trimtab_kl_nats_sum", zone="raise") == 0
    assert value(metrics, "trimtab_gate_score_count") == 0
    assert value(metrics, "trimtab_requests_total", mode="enforce", zone="raise") == 1


def test_armed_times_and_errors_are_booked(metrics: GuardMetrics) -> None:
    metrics.set_armed(True)
    metrics.observe_gate(0.002)
    metrics.observe_request(3.0)
    metrics.count_error(ErrorKind.QUEUE_FULL)
    assert value(metrics, "trimtab_guard_armed") == 1
    assert value(metrics, "trimtab_gate_duration_seconds_sum") == pytest.approx(0.002)
    assert value(metrics, "trimtab_request_duration_seconds_bucket", le="5.0") == 1
    assert value(metrics, "trimtab_errors_total", kind="queue_full") == 1
    metrics.set_armed(False)
    assert value(metrics, "trimtab_guard_armed") == 0


def test_two_models_keep_their_own_registries() -> None:
    first, second = (
        GuardMetrics(CollectorRegistry(), model=name, mode="observe") for name in ("tiny", "other")
    )
    first.observe(RAISED)
    assert b'model="tiny"' not in generate_latest(second.registry)
