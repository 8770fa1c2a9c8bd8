"""The calibration report: a Markdown page with four pictures, and one HTML file with everything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calibration import figures
from calibration.evaluate import Answered
from calibration.figures import best_control
from calibration.html_report import html_page
from calibration.pipeline import CalibrationResult
from guard.artifact import Interval, write_atomically
from guard.errors import InputError
from guard.refusal import Verdict

__all__ = ["write_report"]

_PICTURES: dict[str, figures.Draw] = {
    "candidates.png": figures.candidates,
    "layers.png": figures.layers,
    "gate.png": figures.gate_scores,
    "dose_response.png": figures.dose_response,
}


def write_report(result: CalibrationResult, folder: Path) -> Path:
    """Write report.html, report.md and its pictures; return the path of the latter page.

    Raises:
        InputError: the folder cannot be made.
        ArtifactError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"{folder}: cannot write the report: {err.strerror or err}") from err
    for name, draw in _PICTURES.items():
        write_atomically(folder / name, figures.png(draw, result))
    write_atomically(folder / "report.html", html_page(result).encode())
    page = folder / "report.md"
    write_atomically(page, _markdown(result).encode())
    return page


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
        effect = choice.admission.effect
        spec = manifest.raise_carrier if sign == "raise" else manifest.lower_carrier
        share = spec.norm_share if spec is not None else 0.0
        lines.append(
            f"| {sign} | {effect.candidate.layer} | {effect.candidate.position} | {share:.2f} |"
            f" {effect.shift} | {best_control(choice)} |"
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
        f"{gate.form} on {gate.where}"
        f" (-1 is a prompt's last token). Raise above {gate.raise_above:.3f}; lower below"
        f" {'never (not certified)' if gate.lower_below is None else f'{gate.lower_below:.3f}'}."
        f" Calibration prompts: {gate.n_by_stratum}. {gate.guarantee}",
        "",
        "![gate scores](gate.png)",
        "",
        "| held-out measurement | value |",
        "|---|---|",
        *[f"| {name.replace('_', ' ')} | {value} |" for name, value in gate.measurements.items()],
        "",
        "### Where it errs",
        "",
        "Missed: harmful prompts that are not raised, or hard benign ones that are.",
        "",
        "| kind | category | AUROC against the other side | missed |",
        "|---|---|---|---|",
        *[
            f"| {kind} | {name.replace('_', ' ')} | {area} | {missed} |"
            for (kind, name), (area, missed) in sorted(
                result.categories.items(), key=lambda item: (item[0][0], item[1][0].value)
            )
        ],
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
