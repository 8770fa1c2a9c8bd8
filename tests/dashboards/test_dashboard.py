"""What can be said of the dashboard and the rules without Grafana or Prometheus."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from guard.policy import Policy
from serve.metrics import GuardMetrics
from tests.dashboards.shipped import (
    DASHBOARD,
    PROMETHEUS,
    README,
    alerts,
    dashboard,
    panels,
    queries,
    rules,
)


def exported() -> dict[str, set[str]]:
    """Labels by series name, for every series that a server shows."""
    metrics = GuardMetrics(
        CollectorRegistry(), model="m", mode="enforce", artifact_id="a", format_version=1
    )
    metrics.set_budgets(Policy())
    labels: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def selectors(expr: str) -> list[tuple[str, set[str]]]:
    """Every `metric{label="..."}` of an expression: its name and the labels it asks for."""
    return [
        (name, set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', matchers)))
        for name, matchers in re.findall(r"\b(trimtab_\w+)(?:\{([^}]*)\})?", expr)
    ]


def grouped(expr: str) -> set[str]:
    """The labels by which an expression groups or joins."""
    inside = re.findall(r"\b(?:by|on|ignoring)\s*\(([^)]*)\)", expr)
    return {label.strip() for group in inside for label in group.split(",")}


def raw_exprs() -> dict[str, str]:
    named = {f"panel {q.panel} {q.ref}": q.expr for q in queries()}
    # A recorded series has a colon before `trimtab_`, and is no metric of ours.
    for rule in rules():
        name = rule.get("alert") or rule["record"]
        named[f"rule {name}"] = re.sub(r"\bmodel:trimtab_\w+:share1h", "recorded", rule["expr"])
    return named


# ------------------------------------------------------------------ the dashboard's form
def test_it_is_an_importable_dashboard_with_a_stable_uid() -> None:
    model = dashboard()
    assert (model["uid"], model["title"], model["id"]) == ("trimtab", "trimtab", None)
    assert model["schemaVersion"] == 38  # Grafana 10.0; later ones migrate it upwards
    (source,) = model["__inputs"]
    assert (source["name"], source["type"], source["pluginId"]) == (
        "DS_PROMETHEUS",
        "datasource",
        "prometheus",
    )
    required = {(r["type"], r["id"]) for r in model["__requires"]}
    used = {("panel", panel["type"]) for panel in panels()}
    assert required == used | {("grafana", "grafana"), ("datasource", "prometheus")}


def test_its_file_is_as_python_writes_it() -> None:
    # One form, so that an export that changes one panel changes few lines.
    text = json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"
    assert DASHBOARD.read_text("utf-8") == text


def test_every_data_source_is_the_one_chosen_at_import() -> None:
    def sources(node: Any) -> list[Any]:
        if isinstance(node, list):
            return [found for child in node for found in sources(child)]
        if not isinstance(node, dict):
            return []
        own = [node["datasource"]] if "datasource" in node else []
        return own + [found for child in node.values() for found in sources(child)]

    model = dashboard()
    ours = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    assert all(source == ours for source in sources([model["panels"], model["templating"]]))
    for panel in panels():
        assert panel["datasource"] == ours
        assert all(target["datasource"] == ours for target in panel["targets"])


def test_panels_have_ids_titles_and_descriptions_of_their_own() -> None:
    everything = dashboard()["panels"]
    ids = [panel["id"] for panel in everything]
    titles = [panel["title"] for panel in everything]
    assert len(set(ids)) == len(ids)
    assert len(set(titles)) == len(titles)
    for panel in panels():
        assert len(panel["description"]) > 40, panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0, panel["title"]


def test_the_grid_has_no_overlaps_and_no_holes() -> None:
    boxes = [(panel["title"], panel["gridPos"]) for panel in dashboard()["panels"]]
    for title, box in boxes:
        assert 0 <= box["x"] < box["x"] + box["w"] <= 24, title
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"{one} overlaps {other}"
    height = max(box["y"] + box["h"] for _, box in boxes)
    assert sum(box["w"] * box["h"] for _, box in boxes) == 24 * height


def test_the_model_variable_filters_every_query() -> None:
    (variable,) = dashboard()["templating"]["list"]
    assert (variable["name"], variable["multi"], variable["includeAll"]) == ("model", True, True)
    assert variable["query"]["query"] == "label_values(trimtab_guard_armed, model)"
    for query in queries():
        for name, labels in selectors(query.expr):
            assert "model" in labels, f"{query.panel}: {name}"
        assert 'model=~"$model"' in query.expr


def test_rates_follow_the_zoom() -> None:
    for query in queries():
        assert set(re.findall(r"\[([^\]]*)\]", query.expr)) <= {"$__rate_interval"}, query.panel


def test_suspected_over_and_under_refusal_stand_beside_each_other() -> None:
    by_title = {panel["title"]: panel for panel in panels()}
    over, under = by_title["Suspected over-refusal"], by_title["Suspected under-refusal"]
    assert over["gridPos"]["y"] == under["gridPos"]["y"]
    assert over["gridPos"]["x"] + over["gridPos"]["w"] == under["gridPos"]["x"]
    assert over["fieldConfig"]["defaults"]["max"] == under["fieldConfig"]["defaults"]["max"] == 1
    for panel in (over, under):
        assert "Only labels" in panel["description"]


# ------------------------------------------------------------------ what it asks for
@pytest.mark.parametrize("where", sorted(raw_exprs()))
def test_every_query_names_metrics_and_labels_that_are_exported(where: str) -> None:
    known, expr = exported(), raw_exprs()[where]
    names = {name for name, _ in selectors(expr)}
    for name, labels in selectors(expr):
        assert name in known, name
        assert labels <= known[name], name
    # `up` and the target's own labels are Prometheus'.
    target = {"job", "instance"}
    assert grouped(expr) <= {label for name in names for label in known[name]} | target | {"model"}


def test_every_metric_has_a_panel() -> None:
    shown = {name for query in queries() for name, _ in selectors(query.expr)}
    families = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in exported()
        if not name.endswith("_created")
    }
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == families


# ------------------------------------------------------------------ rules and pages
def test_every_alert_waits_and_says_what_to_do_next() -> None:
    for alert in alerts():
        assert re.fullmatch(r"\d+[mh]", alert["for"]), alert["alert"]
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"]["summary"]
        assert "Next" in alert["annotations"]["description"], alert["alert"]


def test_each_alert_is_seen_to_fire_in_the_unit_tests_of_the_rules() -> None:
    fired = {
        re.search(r'alertname="(\w+)"', sample["labels"])[1]  # type: ignore[index]
        for path in PROMETHEUS.glob("*.test.yml")
        for test in yaml.safe_load(path.read_text("utf-8"))["tests"]
        for check in test["promql_expr_test"]
        if check["expr"].startswith("ALERTS")
        for sample in check["exp_samples"]
    }
    assert fired == {alert["alert"] for alert in alerts()}


def test_the_page_speaks_of_every_panel_and_of_every_alert() -> None:
    page = README.read_text("utf-8")
    for panel in panels():
        assert f"| {panel['title']} |" in page, panel["title"]
    for alert in alerts():
        assert f"`{alert['alert']}`" in page, alert["alert"]


def test_the_scrape_configuration_uses_the_job_that_the_rules_name() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    named = {name for alert in alerts() for name in re.findall(r'job="(\w+)"', alert["expr"])}
    assert named == {job["job_name"]}
    assert job["metrics_path"] == "/metrics"
