"""The shipped dashboard, rules and scrape configuration, as tests read them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "DASHBOARD",
    "PROMETHEUS",
    "README",
    "Query",
    "alerts",
    "dashboard",
    "panels",
    "queries",
    "rules",
]

_FOLDER = Path(__file__).parents[2] / "dashboards"
DASHBOARD = _FOLDER / "grafana" / "trimtab.json"
PROMETHEUS = _FOLDER / "prometheus"
README = _FOLDER / "README.md"


@dataclass(frozen=True)
class Query:
    """One query of a panel."""

    panel: str
    ref: str
    expr: str
    instant: bool

    def filled(self, *, model: str, rate_interval: str) -> str:
        """The query with Grafana's variables filled in."""
        return self.expr.replace("$model", model).replace("$__rate_interval", rate_interval)


def dashboard() -> dict[str, Any]:
    """The dashboard's JSON model."""
    model: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    return model


def panels() -> list[dict[str, Any]]:
    """Its panels, without row headings."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    """Every query of every panel."""
    return [
        Query(panel["title"], target["refId"], target["expr"], target.get("instant", False))
        for panel in panels()
        for target in panel["targets"]
    ]


def rules() -> list[dict[str, Any]]:
    """Every rule of the rule file, recording and alerting."""
    groups = yaml.safe_load((PROMETHEUS / "trimtab.rules.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    """The alerting ones."""
    return [rule for rule in rules() if "alert" in rule]
