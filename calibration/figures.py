"""The pictures of a calibration report: pure functions from a result to a matplotlib figure.

Each is saved as a PNG for the Markdown page, or as an SVG for the HTML page, whose text and axes
then take the colour of the text around them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from sklearn.metrics import roc_curve

from calibration.causal import Effect, Sign
from calibration.choose import Choice
from calibration.frontier import FrontierPoint
from calibration.pipeline import CalibrationResult
from guard.artifact import Interval

__all__ = [
    "Draw",
    "best_control",
    "candidates",
    "dose_response",
    "frontier",
    "gate_scores",
    "layers",
    "png",
    "rates",
    "roc",
    "svg",
]

Draw = Callable[[CalibrationResult], Figure]

RAISE, LOWER, HARD, NEUTRAL = "#d1553b", "#3f86c9", "#c98a1b", "#8a8a8a"
_COLOURS: dict[Sign, str] = {"raise": RAISE, "lower": LOWER}
_GROUPS = {"harmful": RAISE, "hard benign": HARD, "ordinary benign": LOWER}
_MARKERS = "os^Dv*P"
_SIGNS: tuple[Sign, Sign] = ("raise", "lower")
_INK = "#010203"
"""Stands for the surrounding text's colour until the SVG is written."""


def png(draw: Draw, result: CalibrationResult) -> bytes:
    """The picture on white."""
    with _style("black"):
        return _saved(draw(result), "png", dpi=140)


def svg(draw: Draw, result: CalibrationResult, name: str) -> str:
    """The picture as an `<svg>` element without background; `name` makes its ids its own."""
    with _style(_INK):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        text = _saved(draw(result), "svg", transparent=True, metadata=nothing).decode()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Two colour bars that look the same have the same id, which nothing refers to.
    text = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\g<1>", text)
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)


def candidates(result: CalibrationResult) -> Figure:
    """KL at full strength against the refusal shift at equal KL, a point a candidate."""
    figure, axes = _panels(2)
    legends = []
    price = result.artifact.manifest.safe_kl_nats
    for axis, sign in zip(axes, _SIGNS, strict=True):
        effects = result.effects[sign]
        last_layer = max((e.candidate.layer for e in effects), default=1)
        depth = Normalize(0, last_layer)
        choice = result.chosen.get(sign)
        if choice is not None:
            controls = choice.admission.at_kl
            axis.scatter(
                [max(c.full_kl, 1e-5) for c in controls],
                [c.shift.value for c in controls],
                color=NEUTRAL,
                marker="+",
                s=22,
                linewidths=0.8,
                label=f"random controls of the chosen (n={len(controls)})",
            )
        families = sorted({e.candidate.family for e in effects})
        for family, marker in zip(families, _MARKERS, strict=False):
            for able in (True, False):
                group = [e for e in effects if e.candidate.family == family and e.can_spend == able]
                if not group:
                    continue
                axis.scatter(
                    [max(e.full_kl, 1e-5) for e in group],
                    [e.shift.value for e in group],
                    c=[e.candidate.layer for e in group],
                    norm=depth,
                    cmap="viridis",
                    marker=marker,
                    s=26 if able else 9,
                    edgecolors=mpl.rcParams["text.color"],
                    linewidths=0.3,
                    alpha=0.9 if able else 0.35,
                    label=f"{_words(family)} (n={len(group)})" if able else None,
                )
        weak = sum(not e.can_spend for e in effects)
        axis.plot([], [], "o", ms=3, color=NEUTRAL, label=f"cannot spend it (n={weak}), small")
        figure.colorbar(ScalarMappable(depth, "viridis"), ax=axis, label="layer")
        if choice is not None:
            colour = _COLOURS[sign]
            _ring(axis, choice.effect.full_kl, choice.effect.shift.value, colour)
            axis.plot([], [], "o", mfc="none", mec=colour, label=f"chosen: {_place(choice)}")
        axis.set_xscale("log")
        left, right = axis.get_xlim()
        axis.set_xlim(min(left, 0.01), max(right, 1.0))  # at least the ticks of two decades
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("mean KL on safe prompts at full strength, nats")
        axis.set_ylabel(f"refusal-logit shift at {price:g} nats")
        axis.set_title(f"{sign} refusal")
        legends.append(
            axis.legend(
                fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.55, -0.16), ncols=2
            )
        )
    # The panels are laid out as if there were no legends, or they become as narrow as those leave
    # them; then the picture is made large enough for the legends.
    for legend in legends:
        legend.set_in_layout(False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for legend in legends:
        legend.set_in_layout(True)
    return figure


def layers(result: CalibrationResult) -> Figure:
    """Best effect of each layer at equal KL, with its interval, beside the best control."""
    figure, axes = _panels(2)
    price = result.artifact.manifest.safe_kl_nats
    for axis, sign in zip(axes, _SIGNS, strict=True):
        families = sorted({e.candidate.family for e in result.effects[sign]})
        for family, marker in zip(families, _MARKERS, strict=False):
            best: dict[int, Effect] = {}
            for effect in result.effects[sign]:
                layer = effect.candidate.layer
                mine = effect.can_spend and effect.candidate.family == family
                if mine and (layer not in best or effect.shift.value > best[layer].shift.value):
                    best[layer] = effect
            if best:
                rising = sorted(best)
                shifts = [best[layer].shift for layer in rising]
                axis.errorbar(
                    rising,
                    [s.value for s in shifts],
                    yerr=_whiskers(shifts),
                    color=_COLOURS[sign],
                    marker=marker,
                    ms=4,
                    lw=1,
                    label=_words(family),
                )
        choice = result.chosen.get(sign)
        if choice is not None:
            control = best_control(choice)
            axis.axhspan(
                control.low, control.high, color=NEUTRAL, alpha=0.3, lw=0, label="best control"
            )
            axis.axvline(choice.effect.candidate.layer, color=NEUTRAL, ls=":", label="chosen layer")
        axis.legend(fontsize=7, frameon=False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("layer")
        axis.set_ylabel(f"refusal-logit shift at {price:g} nats")
        axis.set_title(f"{sign}: best of each layer (95 % interval)")
    return figure


def gate_scores(result: CalibrationResult) -> Figure:
    """Score histograms of held-out prompts by stratum, with both thresholds."""
    figure = Figure(figsize=(5.4, 4.0), layout="constrained")
    axes = figure.subplots(len(result.scores), 1, sharex=True)
    gate = result.artifact.manifest.gate
    everything = np.concatenate([scores.numpy() for scores in result.scores.values()])
    bins = np.linspace(everything.min(), everything.max(), 41)
    for axis, (group, scores) in zip(axes, result.scores.items(), strict=True):
        axis.hist(scores.numpy(), bins=bins, color=_GROUPS[group], alpha=0.85)
        axis.set_ylabel(f"{group}\n(n={len(scores)})")
        axis.axvline(gate.raise_above, color=RAISE, ls="--", lw=1.2)
        if gate.lower_below is not None:
            axis.axvline(gate.lower_below, color=LOWER, ls="--", lw=1.2)
    axes[0].set_title(
        f"held-out prompts: lower left of blue (δ={gate.delta:g}),"
        f" raise right of red (α={gate.alpha:g})",
        fontsize=9,
    )
    axes[-1].set_xlabel("probe logit, higher is more harmful")
    return figure


def roc(result: CalibrationResult) -> Figure:
    """Harmful prompts told from each stratum of benign ones, the thresholds marked."""
    figure, axes = _panels(1, width=4.4, height=4.0)
    axis, gate = axes[0], result.artifact.manifest.gate
    harmful = result.scores["harmful"].numpy()
    axis.plot([0, 1], [0, 1], color=NEUTRAL, lw=0.8, ls=":")
    taus = ((gate.raise_above, RAISE, "raise above"), (gate.lower_below, LOWER, "lower below"))
    for group, tensor in result.scores.items():
        benign = tensor.numpy()
        if group == "harmful" or not len(benign) or not len(harmful):
            continue
        truth = [1] * len(harmful) + [0] * len(benign)
        false_rate, true_rate, _ = roc_curve(truth, np.concatenate([harmful, benign]))
        area = gate.measurements.get(f"auroc_harmful_vs_{group.replace(' ', '_')}")
        said = f"\nAUROC {area}" if area is not None else ""
        axis.plot(false_rate, true_rate, color=_GROUPS[group], lw=1.6, label=f"{group}{said}")
        for tau, colour, _ in taus:
            if tau is not None:
                axis.plot((benign > tau).mean(), (harmful > tau).mean(), "o", color=colour, ms=6)
    for tau, colour, name in taus:
        if tau is not None:
            axis.plot([], [], "o", color=colour, label=f"{name} {tau:.2f}")
    axis.set_xlabel("share of benign prompts above the score")
    axis.set_ylabel("share of harmful prompts above the score")
    axis.set_title(f"gate on held-out prompts ({len(harmful)} harmful)")
    axis.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def dose_response(result: CalibrationResult) -> Figure:
    """Refusal probability of the target prompts against the nats it costs them, both ways."""
    figure, axes = _panels(2)
    for sign, choice in result.chosen.items():
        _, safe_kl, target_kl, refusal = choice.doses.numpy().T
        n_targets, n_safe = choice.effect.shift.n, choice.effect.safe_kl.n
        for axis, nats, n in ((axes[0], target_kl, n_targets), (axes[1], safe_kl, n_safe)):
            axis.plot(
                nats, refusal, color=_COLOURS[sign], marker="o", ms=3, label=f"{sign} (n={n})"
            )
    axes[0].set_xlabel("mean KL(mixed ‖ base) of the steered prompts, nats")
    axes[1].set_xlabel("mean KL(mixed ‖ base) of safe prompts, nats")
    for axis in axes:
        axis.set_ylabel("refusal probability of the steered, first token")
        axis.set_ylim(-0.02, 1.02)
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_title("dose-response: validation prompts to be steered")
    axes[1].set_title("the same doses, priced on safe prompts")
    return figure


def rates(result: CalibrationResult) -> Figure:
    """Refused shares of held-out prompts, base beside guarded, with intervals."""
    figure = Figure(figsize=(7.2, 0.5 + 0.62 * max(1, len(result.tested))), layout="constrained")
    axis, found = figure.subplots(), result.artifact.manifest.gate.measurements
    for row, group in enumerate(result.tested):
        for side, offset, face in (("base", -0.14, "none"), ("guarded", 0.14, None)):
            share = found[f"{group}_refused_{side}"]
            colour = _GROUPS.get(_words(group), NEUTRAL)
            axis.errorbar(
                share.value,
                row + offset,
                xerr=_whiskers([share]),
                fmt="o",
                ms=6,
                color=colour,
                mfc=face or colour,
                capsize=2,
                label=side if row == 0 else None,
            )
    axis.set_yticks(
        range(len(result.tested)), [f"{_words(g)} (n={len(p)})" for g, p in result.tested.items()]
    )
    axis.set_ylim(len(result.tested) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("share refused (string match), 95 % interval")
    axis.legend(fontsize=7, frameon=False, loc="best")
    axis.grid(axis="x", alpha=0.25)
    return figure


def frontier(result: CalibrationResult) -> Figure:
    """Harmful prompts refused against benign ones refused, a point a policy, nats noted."""
    figure, axes = _panels(2, height=4.2)

    def hard(point: FrontierPoint) -> Interval:
        return point.hard_benign_refused

    def ordinary(point: FrontierPoint) -> Interval:
        return point.ordinary_refused

    for axis, group, over_refusal in (
        (axes[0], "hard benign", hard),
        (axes[1], "ordinary benign", ordinary),
    ):
        for number, point in enumerate(result.frontier):
            x, y = over_refusal(point), point.harmful_refused
            axis.errorbar(
                x.value,
                y.value,
                xerr=_whiskers([x]),
                yerr=_whiskers([y]),
                fmt="o",
                ms=5,
                lw=0.7,
                color=_GROUPS[group],
                ecolor=NEUTRAL,
            )
            if point.chosen:
                _ring(axis, x.value, y.value, RAISE)
            axis.annotate(
                f"{point.name}, {point.benign_nats.value:.2f} nats",
                (x.value, y.value),
                xytext=(6, 4) if number % 2 else (6, -4),  # neighbours do not overlap
                va="bottom" if number % 2 else "top",
                textcoords="offset points",
                fontsize=7,
            )
        axis.set_xlabel(f"{group} prompts refused")
        axis.set_ylabel("harmful prompts refused")
        axis.set_title("chosen ringed; nats: mean over benign prompts", fontsize=9)
        axis.set_ylim(-0.02, 1.08)
        axis.set_xlim(-0.02, max(0.5, axis.get_xlim()[1]))
    return figure


def best_control(choice: Choice) -> Interval:
    """The random control with the largest shift at equal KL."""
    return max((c.shift for c in choice.admission.at_kl), key=lambda shift: shift.value)


def _style(ink: str) -> AbstractContextManager[None]:
    return mpl.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.fonttype": "none",
            "svg.hashsalt": "trimtab",  # the same picture, the same bytes
            "text.color": ink,
            "axes.edgecolor": ink,
            "axes.labelcolor": ink,
            "xtick.color": ink,
            "ytick.color": ink,
        }
    )


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, bbox_inches="tight", **options)
    return picture.getvalue()


def _panels(n: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * n, height), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    return figure, list(axes)


def _whiskers(intervals: Sequence[Interval]) -> np.ndarray:
    """(2, n): how far each interval reaches below and above its value."""
    return np.array([[i.value - i.low, i.high - i.value] for i in intervals]).T.clip(min=0.0)


def _ring(axis: Axes, x: float, y: float, colour: str) -> None:
    axis.scatter([x], [y], s=130, facecolors="none", edgecolors=colour, linewidths=2, zorder=5)


def _place(choice: Choice) -> str:
    candidate = choice.effect.candidate
    return f"layer {candidate.layer}, {_words(candidate.family)}"


def _words(name: str) -> str:
    return name.replace("_", " ")
