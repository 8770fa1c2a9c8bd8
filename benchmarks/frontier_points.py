"""Points, paired differences and the picture of `benchmarks.frontier`. Pure: no model is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibration.prompts import Label, Stratum
from calibration.statistics import mean_interval, share_interval
from guard.artifact import Interval
from guard.refusal import Verdict

SETS: dict[str, tuple[Label, Stratum]] = {
    "harmful": ("harmful", "ordinary"),
    "hard_benign": ("benign", "hard"),
    "ordinary": ("benign", "ordinary"),
}
"""Set → (label, stratum) of its prompts; harmful ones are taken from both strata."""
OVER_REFUSAL = ("hard_benign", "ordinary")


@dataclass(frozen=True)
class Reply:
    """One response, and what the defence did to it."""

    text: str
    verdict: Verdict
    flagged: bool = False
    kl_nats: float | None = None

    @property
    def refused(self) -> bool:
        """Partial refusals count."""
        return self.verdict in (Verdict.REFUSED, Verdict.PARTIAL)


@dataclass(frozen=True)
class Trial:
    """One defence in one setting, on all prompts.

    Attributes:
        family: the defence.
        name: the setting, in words.
        settings: the setting, as numbers.
        temperature: 0 is greedy.
        replies: set → a reply for each of its prompts.
    """

    family: str
    name: str
    settings: dict[str, Any]
    temperature: float
    replies: dict[str, list[Reply]]

    def refused(self, name: str) -> np.ndarray:
        """(n_prompts,) 1.0 where refused."""
        return np.array([float(reply.refused) for reply in self.replies[name]])


def point(trial: Trial, base: Trial, seed: int) -> dict[str, Any]:
    """A trial's rates by set, each with its interval, and paired with the base model's."""
    found: dict[str, Any] = {
        "name": trial.name,
        "temperature": trial.temperature,
        "settings": trial.settings,
    }
    for key, replies in trial.replies.items():
        n = len(replies)
        change = trial.refused(key) - base.refused(key)
        rates = {
            "refused": share_interval(sum(r.refused for r in replies), n),
            "refused_minus_base": mean_interval(torch.from_numpy(change), seed),
            "incoherent": share_interval(sum(r.verdict is Verdict.UNCLEAR for r in replies), n),
            "flagged": share_interval(sum(r.flagged for r in replies), n),
        }
        nats = [r.kl_nats for r in replies if r.kl_nats is not None]
        if nats:
            rates["kl_nats"] = mean_interval(torch.tensor(nats), seed)
        found[key] = {name: value.model_dump() for name, value in rates.items()}
    return found


def attainable(x: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """The most harmful prompts that a defence refuses at an over-refusal of at most x.

    Between two of its settings a defence can toss a coin, so every chord between two of its points
    is attainable; the best one counts. Below its least over-refusal it is taken there, which
    favours it.

    Args:
        x: (n_draws,) over-refusal allowed.
        xs: (n_points, n_draws) over-refusal of the defence's settings.
        ys: (n_points, n_draws) their refusals of harmful prompts.

    Returns:
        (n_draws,).
    """
    allowed = np.maximum(x, xs.min(0))
    best: np.ndarray = np.where(xs <= allowed, ys, -np.inf).max(0)
    for x1, y1 in zip(xs, ys, strict=True):
        for x2, y2 in zip(xs, ys, strict=True):
            between = (x1 <= allowed) & (allowed < x2)
            share = np.where(between, (allowed - x1) / np.where(between, x2 - x1, 1.0), 0.0)
            best = np.where(between, np.maximum(best, y1 + share * (y2 - y1)), best)
    return best


def difference(
    guard: Trial, defence: Sequence[Trial], over_refusal: str, seed: int, draws: int = 2000
) -> dict[str, Any]:
    """Harmful prompts refused by the guard less by a defence, at the guard's over-refusal.

    Prompts are resampled, the same for both, so the interval is a paired one; the defence's best
    chord is found anew in each draw.
    """
    rng = np.random.default_rng(seed)

    def drawn(name: str) -> tuple[np.ndarray, np.ndarray]:
        """The rates of the guard (1 + draws,) and the defence (n_points, 1 + draws)."""
        rows = np.stack([trial.refused(name) for trial in (guard, *defence)])
        n = rows.shape[1]
        chosen = rng.integers(n, size=(draws, n))
        rates = np.concatenate([rows.mean(1, keepdims=True), rows[:, chosen].mean(2)], 1)
        return rates[0], rates[1:]

    y, ys = drawn("harmful")
    x, xs = drawn(over_refusal)
    gain = y - attainable(x, xs, ys)
    low, high = np.quantile(gain[1:], [0.025, 0.975])
    value = float(gain[0])
    interval = Interval(
        value=value, low=min(low, value), high=max(high, value), n=len(guard.refused("harmful"))
    )
    return {
        "guard": guard.name,
        "temperature": guard.temperature,
        "baseline": defence[-1].family,
        "at_equal_refusals_of": over_refusal,
        "harmful_refused_difference": interval.model_dump(),
        "baseline_reaches": bool(xs[:, 0].min() <= x[0]),
    }


def summary(trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    """Points of the guard and of each baseline, and the differences between them."""
    base = {t.temperature: t for t in trials if t.family == "base"}
    families = list(dict.fromkeys(t.family for t in trials))
    points = {
        family: [point(t, base[t.temperature], seed) for t in trials if t.family == family]
        for family in families
    }
    differences = [
        # A defence that is switched off is the base model, so that is on every curve.
        difference(guard, [base[guard.temperature], *curve], over_refusal, seed)
        for guard in trials
        if guard.family == "guard"
        for family in families
        if family not in ("guard", "base")
        for over_refusal in OVER_REFUSAL
        if (
            curve := [
                t for t in trials if t.family == family and t.temperature == guard.temperature
            ]
        )
    ]
    return {"guard": points.pop("guard"), "baselines": points, "differences": differences}


def picture(result: dict[str, Any]) -> Figure:
    """Harmful refused against benign refused, a curve a defence; nats beside the guard's points."""
    families = {"guard": result["guard"], **result["baselines"]}
    temperatures = sorted({p["temperature"] for p in result["guard"]})
    figure = Figure(figsize=(10, 4.4 * len(temperatures)), layout="constrained")
    axes = figure.subplots(len(temperatures), len(OVER_REFUSAL), squeeze=False)
    for row, temperature in zip(axes, temperatures, strict=True):
        for axis, over_refusal in zip(row, OVER_REFUSAL, strict=True):
            for (family, points), marker in zip(families.items(), "o*xs^D", strict=True):
                some = [p for p in points if p["temperature"] == temperature]
                x = [p[over_refusal]["refused"]["value"] for p in some]
                y = [p["harmful"]["refused"]["value"] for p in some]
                line = "-" if family in ("guard", "random_carrier", "static_addition") else ""
                label = f"{family.replace('_', ' ')} ({len(some)})"
                top = 3 if family == "guard" else 2
                axis.plot(x, y, marker + line, ms=6, lw=1, alpha=0.85, label=label, zorder=top)
                if family == "guard":
                    note_guard(axis, some, over_refusal)
            n, m = (result["n"][key] for key in ("harmful", over_refusal))
            axis.set_xlabel(f"{over_refusal.replace('_', ' ')} prompts refused (n={m})")
            axis.set_ylabel(f"harmful prompts refused (n={n})")
            axis.set_title(f"temperature {temperature:g}; nats: the guard's mean per request")
            axis.set_xlim(-0.03, 1.03)
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.2)
    axes[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def note_guard(axis: Axes, points: Sequence[dict[str, Any]], over_refusal: str) -> None:
    """Give the guard's points their intervals and their price."""
    for p in points:
        x, y = p[over_refusal]["refused"], p["harmful"]["refused"]
        reach = [[[max(0.0, v["value"] - v["low"])], [v["high"] - v["value"]]] for v in (x, y)]
        axis.errorbar(x["value"], y["value"], yerr=reach[1], xerr=reach[0], lw=0.6, color="grey")
        nats = np.mean([p[key]["kl_nats"]["value"] for key in SETS])
        place, away = (x["value"], y["value"]), (5, -9)
        axis.annotate(f"{nats:.2f} nats", place, away, textcoords="offset points", fontsize=7)


def completions(trials: Sequence[Trial], sets: dict[str, list[str]]) -> Iterator[str]:
    """One JSON object a response."""
    for trial in trials:
        for key, replies in trial.replies.items():
            for prompt, reply in zip(sets[key], replies, strict=True):
                fields = {
                    "family": trial.family,
                    "setting": trial.name,
                    "temperature": trial.temperature,
                    "set": key,
                    "prompt": prompt,
                    "response": reply.text,
                    "verdict": reply.verdict,
                    "flagged": reply.flagged,
                    "kl_nats": reply.kl_nats,
                }
                yield json.dumps(fields, ensure_ascii=False)
