"""The calibration report: one Markdown page and four pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibration.causal import Effect, Sign
from calibration.evaluate import Answered
from calibration.pipeline import CalibrationResult, Choice
from guard.artifact import Interval, write_atomically
from guard.errors import InputError
from guard.refusal import Verdict

__all__ = ["write_report"]

RAISE, LOWER, NEUTRAL, CONTROL = "#b3402a", "#2a6fb3", "#7a7a7a", "#c9c9c9"
_COLOURS: dict[Sign, str] = {"raise": RAISE, "lower": LOWER}
_GROUPS = {"harmful": RAISE, "hard benign": "#d9a13b", "ordinary benign": LOWER}


def write_report(result: CalibrationResult, folder: Path) -> Path:
    """Write report.md and its pictures; return the page's path.

    Raises:
        InputError: the folder cannot be made.
        ArtifactError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"{folder}: cannot write the report: {err.strerror or err}") from err
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        _save(_candidates_figure(result), folder / "candidates.png")
        _save(_layers_figure(result), folder / "layers.png")
        _save(_gate_figure(result), folder / "gate.png")
        _save(_dose_figure(result), folder / "dose_response.png")
    page = folder / "report.md"
    write_atomically(page, _markdown(result).encode())
    return page


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=140, bbox_inches="tight")
    write_atomically(path, picture.getvalue())


def _panels(n: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * n, height), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    return figure, list(axes)


def _candidates_figure(result: CalibrationResult) -> Figure:
    """KL at full strength against the refusal shift at equal KL, a point a candidate."""
    figure, axes = _panels(2)
    price = result.artifact.manifest.safe_kl_nats
    for axis, sign in zip(axes, _signs(), strict=True):
        effects = result.effects[sign]
        able = [e for e in effects if e.can_spend]
        unable = [e for e in effects if not e.can_spend]
        for group, marker, label in ((able, "o", "can spend"), (unable, "x", "cannot spend")):
            points = axis.scatter(
                [max(e.full_kl, 1e-5) for e in group],
                [e.shift.value for e in group],
                c=[e.candidate.layer for e in group],
                vmin=0,
                vmax=max((e.candidate.layer for e in effects), default=1),
                marker=marker,
                cmap="viridis",
                s=22,
                alpha=0.85,
                label=f"{label} {price:g} nats (n={len(group)})",
            )
            if group is able:
                figure.colorbar(points, ax=axis, label="layer")
        choice = result.chosen.get(sign)
        if choice is not None:
            control = _best_control(choice)
            axis.axhline(control.value, color=NEUTRAL, lw=1, ls="--", label="best random control")
            axis.axhspan(control.low, control.high, color=CONTROL, alpha=0.5, lw=0)
            axis.scatter(
                [choice.effect.full_kl],
                [choice.effect.shift.value],
                s=130,
                facecolors="none",
                edgecolors=_COLOURS[sign],
                linewidths=2,
                label=f"chosen: layer {choice.effect.candidate.layer}",
            )
        axis.set_xscale("log")
        axis.set_xlabel("mean KL on safe prompts at full strength, nats")
        axis.set_ylabel(f"refusal-logit shift at {price:g} nats")
        axis.set_title(f"{sign} refusal")
        axis.legend(fontsize=7, frameon=False)
    return figure


def _layers_figure(result: CalibrationResult) -> Figure:
    """Best effect of each layer at equal KL, with its interval, beside the best control."""
    figure, axes = _panels(2)
    price = result.artifact.manifest.safe_kl_nats
    for axis, sign in zip(axes, _signs(), strict=True):
        best: dict[int, Effect] = {}
        for effect in result.effects[sign]:
            layer = effect.candidate.layer
            if effect.can_spend and (
                layer not in best or effect.shift.value > best[layer].shift.value
            ):
                best[layer] = effect
        layers = sorted(best)
        values = np.array([best[k].shift.value for k in layers])
        errors = np.array(
            [[v - best[k].shift.low, best[k].shift.high - v] for k, v in zip(layers, values)]  # noqa: B905
        ).T.clip(min=0.0)
        if layers:
            axis.errorbar(layers, values, yerr=errors, color=_COLOURS[sign], marker="o", ms=4, lw=1)
        choice = result.chosen.get(sign)
        if choice is not None:
            control = _best_control(choice)
            axis.axhspan(control.low, control.high, color=CONTROL, lw=0, label="best control")
            axis.axvline(choice.effect.candidate.layer, color=NEUTRAL, ls=":", label="chosen layer")
            axis.legend(fontsize=7, frameon=False, loc="lower right")
        axis.set_xlabel("layer")
        axis.set_ylabel(f"refusal-logit shift at {price:g} nats")
        axis.set_title(f"{sign}: best position of each layer (95 % interval)")
    return figure


def _gate_figure(result: CalibrationResult) -> Figure:
    """Score histograms of held-out prompts by stratum, with both thresholds."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
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
        f"gate scores on held-out prompts: lower left of blue (δ={gate.delta:g}),"
        f" raise right of red (α={gate.alpha:g})",
        fontsize=9,
    )
    axes[-1].set_xlabel(
        f"probe logit at layer {gate.layer}, prompt positions {', '.join(map(str, gate.positions))}"
    )
    return figure


def _dose_figure(result: CalibrationResult) -> Figure:
    """Refusal probability of the target prompts against the nats it costs them."""
    figure, axes = _panels(2)
    for sign, choice in result.chosen.items():
        doses = choice.doses.numpy()
        axes[0].plot(doses[:, 2], doses[:, 3], color=_COLOURS[sign], marker="o", ms=3, label=sign)
        axes[1].plot(doses[:, 1], doses[:, 3], color=_COLOURS[sign], marker="o", ms=3, label=sign)
    axes[0].set_xlabel("mean KL(mixed ‖ base) of the steered prompts, nats")
    axes[1].set_xlabel("mean KL(mixed ‖ base) of safe prompts, nats")
    for axis in axes:
        axis.set_ylabel("refusal probability, first token")
        axis.set_ylim(-0.02, 1.02)
        axis.legend(fontsize=7, frameon=False, title="targets")
    axes[0].set_title("dose-response: validation prompts to be steered")
    axes[1].set_title("the same dose on safe prompts")
    return figure


def _best_control(choice: Choice) -> Interval:
    return max((c.shift for c in choice.admission.at_kl), key=lambda shift: shift.value)


def _signs() -> tuple[Sign, Sign]:
    return ("raise", "lower")


def _markdown(result: CalibrationResult) -> str:
    manifest = result.artifact.manifest
    gate = manifest.gate
    lines = [
        f"# Calibration of {manifest.model.model_id}",
        "",
        f"Guard `{result.artifact_id}`, made {manifest.created}, seed {manifest.seed},"
        f" weights {manifest.model.dtype}. Intervals are 95 %.",
        "",
        "This report describes the model's refusal direction. Keep it as closely as the guard.",
        "",
        *[f"> {note}" for note in result.notes],
        "",
        "## Carriers",
        "",
        f"Compared at a mean KL of {manifest.safe_kl_nats:g} nats on safe prompts, each against"
        " random directions of the same norm and of the same KL.",
        "",
        "| | layer | position | share of the stream's norm | shift of the refusal logit |"
        " best control |",
        "|---|---|---|---|---|---|",
    ]
    for sign, choice in result.chosen.items():
        effect = choice.effect
        spec = manifest.raise_carrier if sign == "raise" else manifest.lower_carrier
        share = spec.norm_share if spec is not None else 0.0
        lines.append(
            f"| {sign} | {effect.candidate.layer} | {effect.candidate.position} | {share:.2f} |"
            f" {effect.shift} | {_best_control(choice)} |"
        )
    lines += [
        "",
        "![KL against effect](candidates.png)",
        "![effect by layer](layers.png)",
        "![dose-response](dose_response.png)",
        "",
        "Confirmed on validation prompts, zone forced, full budget:",
        "",
        "| | prompts | refused, base | refused, steered | incoherent, base | steered | nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for sign, choice in result.chosen.items():
        r = choice.rates
        lines.append(
            f"| {sign} | {len(choice.confirmed)} | {_share(r['refused_base'])} |"
            f" {_share(r['refused_guarded'])} | {_share(r['incoherent_base'])} |"
            f" {_share(r['incoherent_guarded'])} | {r['kl_nats']} |"
        )
    lines += [
        "",
        "## Gate",
        "",
        f"Linear probe on layer {gate.layer} at prompt positions"
        f" {', '.join(map(str, gate.positions))} (-1 is the last token)."
        f" Raise above {gate.raise_above:.3f}; lower below"
        f" {'never (not certified)' if gate.lower_below is None else f'{gate.lower_below:.3f}'}."
        f" Calibration prompts: {gate.n_by_stratum}. {gate.guarantee}",
        "",
        "![gate scores](gate.png)",
        "",
        "| held-out measurement | value |",
        "|---|---|",
        *[f"| {name.replace('_', ' ')} | {value} |" for name, value in gate.measurements.items()],
        "",
        "## Refusals learned from the model itself",
        "",
        *[f"- {text!r}" for text in manifest.refusal_examples],
        "",
        "## Geometry",
        "",
        "It explains; it admits nothing.",
        "",
        *[f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in manifest.geometry.items()],
        "",
        "## Held-out prompts, answered without and with the guard",
        "",
        "Greedy. A verdict is a string match: read the texts.",
        "",
    ]
    for group, pairs in result.tested.items():
        lines += [f"### {group.replace('_', ' ')}", "", *_completions(pairs), ""]
    lines += [
        "## Time",
        "",
        *[f"- {name}: {seconds:.1f} s" for name, seconds in result.seconds.items()],
        "",
    ]
    return "\n".join(lines)


def _completions(pairs: Sequence[Answered], most: int = 8) -> list[str]:
    """The pairs that the guard changed first."""
    changed = sorted(pairs, key=lambda p: p.base == p.guarded)[:most]
    lines = ["| prompt | base | guarded | zone | nats |", "|---|---|---|---|---|"]
    for pair in changed:
        record = pair.record
        verdict = record.verdict or Verdict.UNCLEAR
        lines.append(
            f"| {_cell(pair.prompt)} | **{pair.base_verdict}** {_cell(pair.base)} |"
            f" **{verdict}** {_cell(pair.guarded)} | {record.zone} |"
            f" {record.kl_nats:.2f} of {record.budget_nats:g} |"
        )
    return lines


def _cell(text: str, most: int = 160) -> str:
    flat = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def _share(interval: Interval) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}] (n={interval.n})"
