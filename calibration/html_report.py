"""The calibration report as one HTML file that needs nothing else: no script, no outside file.

It reads in the dark, in the light and on paper. Every text that comes from a prompt, a response or
a manifest is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from itertools import chain, zip_longest

from calibration import figures
from calibration.evaluate import Answered
from calibration.pipeline import CalibrationResult
from guard.artifact import Interval
from guard.gate import Zone
from guard.refusal import Verdict

__all__ = ["html_page", "worth_reading"]

_TO_READ = 20
_COLUMNS = {
    "refused_base": "refused, base",
    "refused_guarded": "refused, guarded",
    "refused_difference": "difference",
    "flagged": "flagged",
    "incoherent_base": "incoherent, base",
    "incoherent_guarded": "incoherent, guarded",
    "kl_nats": "nats",
}
"""Measurements of answered prompts, as `calibration.evaluate.compare` names them."""


def html_page(result: CalibrationResult) -> str:
    """The whole page."""
    manifest = result.artifact.manifest
    title = f"Calibration of {escape(manifest.model.model_id)}"
    facts = (
        f"guard <code>{escape(result.artifact_id)}</code> · made {escape(manifest.created)} ·"
        f" seed {manifest.seed} · weights {escape(manifest.model.dtype)} · intervals are 95&nbsp;%"
    )
    body = "\n".join(
        [
            f"<header><h1>{title}</h1><p class=quiet>{facts}</p>",
            "<p class=warning>This report describes the model's refusal direction, and quotes"
            " harmful prompts. Keep it as closely as the guard.</p>",
            *(f"<p class=note>{escape(note)}</p>" for note in result.notes),
            "</header>",
            *_held_out(result),
            *_frontier(result),
            *_carriers(result),
            *_gate(result),
            *_geometry(result),
            *_completions(result),
            *_provenance(result),
        ]
    )
    css = (files("calibration") / "report.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{css}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def worth_reading(tested: dict[str, list[Answered]], most: int = _TO_READ) -> list[Answered]:
    """Responses to look at: changed verdicts first, then what was steered, the groups by turns.

    So it shows what the guard does and is no sample of how often.
    """

    def dullness(pair: Answered) -> tuple[bool, bool, bool]:
        record = pair.record
        return (
            pair.base_verdict == record.verdict,
            record.zone is Zone.PASS,
            pair.base == pair.guarded,
        )

    by_group = (sorted(pairs, key=dullness) for pairs in tested.values())
    by_turns = (pair for pair in chain.from_iterable(zip_longest(*by_group)) if pair is not None)
    return sorted(by_turns, key=dullness)[:most]


def _held_out(result: CalibrationResult) -> Iterable[str]:
    if not result.tested:
        return
    found = result.artifact.manifest.gate.measurements
    yield "<h2>What the guard does</h2>"
    yield (
        "<p>Held-out prompts that nothing was fitted on, answered greedily without and with the"
        " guard, at the gate's own decision. Refusals of benign prompts stand beside those of"
        " harmful ones: neither says anything alone.</p>"
    )
    yield _figure(
        result,
        figures.rates,
        "rates",
        "Refused shares, without the guard (open) and with it (filled). Verdicts are string"
        " matches; partial refusals count.",
    )
    yield _table(
        ["held-out prompts", *_COLUMNS.values()],
        [
            [_words(group), *(_interval(found.get(f"{group}_{name}")) for name in _COLUMNS)]
            for group in result.tested
        ],
    )


def _frontier(result: CalibrationResult) -> Iterable[str]:
    if not result.frontier:
        return
    yield "<h2>Frontier</h2>"
    yield _figure(
        result,
        figures.frontier,
        "frontier",
        "Each point is a policy: up is more harmful prompts refused, left is less over-refusal.",
    )
    yield _table(
        [
            "policy",
            "budget up / down, nats",
            "K; nats a token",
            "harmful refused",
            "hard benign refused",
            "ordinary refused",
            "nats on benign",
        ],
        [
            [
                escape(p.name) + (" <mark>chosen</mark>" if p.chosen else ""),
                f"{p.raise_budget_nats:g} / {p.lower_budget_nats:g}",
                f"{p.shadow_tokens}; {p.token_cap_nats:g}",
                *map(
                    _interval,
                    (p.harmful_refused, p.hard_benign_refused, p.ordinary_refused, p.benign_nats),
                ),
            ]
            for p in result.frontier
        ],
    )


def _carriers(result: CalibrationResult) -> Iterable[str]:
    manifest = result.artifact.manifest
    specs = {"raise": manifest.raise_carrier, "lower": manifest.lower_carrier}
    yield "<h2>Carriers</h2>"
    yield (
        f"<p>All candidates are compared at one price: a mean KL of {manifest.safe_kl_nats:g} nats"
        " on safe prompts. A carrier is admissible if its effect there stands apart from every"
        " random direction, matched in norm and matched in KL.</p>"
    )
    yield _table(
        [
            "",
            "family",
            "layer",
            "position",
            "share of the stream's norm",
            "shift of the refusal logit",
            "best control",
            "candidates",
        ],
        [
            [
                sign,
                _words(choice.effect.candidate.family),
                str(choice.effect.candidate.layer),
                str(choice.effect.candidate.position),
                f"{spec.norm_share:.2f}" if (spec := specs[sign]) else "",
                _interval(choice.admission.effect.shift),
                _interval(figures.best_control(choice)),
                str(len(result.effects[sign])),
            ]
            for sign, choice in result.chosen.items()
        ],
    )
    yield _figure(
        result,
        figures.candidates,
        "candidates",
        "Effect against KL, every candidate that was measured. Faint small points cannot spend the"
        " price even at full strength.",
    )
    yield _figure(result, figures.layers, "layers", "Where in the model refusal can be moved.")
    yield "<h3>Dose-response</h3>"
    yield _figure(
        result,
        figures.dose_response,
        "dose",
        "One mixing strength for all prompts, first response token, means over the prompts of the"
        " legend; serving stops at the budget of each request.",
    )
    yield "<h3>Confirmed by answers</h3>"
    yield "<p>Validation prompts, zone forced, the whole budget: the actuator without its gate.</p>"
    yield _table(
        ["", *_COLUMNS.values()],
        [
            [sign, *(_interval(choice.rates.get(name)) for name in _COLUMNS)]
            for sign, choice in result.chosen.items()
        ],
    )


def _gate(result: CalibrationResult) -> Iterable[str]:
    gate = result.artifact.manifest.gate
    lower = "never (not certified)" if gate.lower_below is None else f"{gate.lower_below:.3f}"
    behind = ", ".join(f"{n} {group}" for group, n in gate.n_by_stratum.items())
    answered = {f"{group}_{name}" for group in result.tested for name in _COLUMNS}
    yield "<h2>Gate</h2>"
    yield (
        f"<p>{gate.form} on {gate.where}"
        f" (−1 is a prompt's last token). Raise above"
        f" {gate.raise_above:.3f}, lower below {lower}; thresholds from {escape(behind)} prompts."
        f" {escape(gate.guarantee)}</p>"
    )
    yield "<div class=pair>"
    yield _figure(
        result, figures.gate_scores, "scores", "Scores of held-out prompts by stratum, thresholds."
    )
    yield _figure(
        result, figures.roc, "roc", "The harder stratum is the one that decides over-refusal."
    )
    yield "</div>"
    yield _table(
        ["held-out measurement", "value"],
        [
            [_words(name), _interval(value)]
            for name, value in gate.measurements.items()
            if name not in answered
        ],
    )
    yield "<h3>Where it errs</h3>"
    yield (
        "<p>Held-out prompts by kind. Missed: harmful ones that are not raised, or hard benign ones"
        " that are.</p>"
    )
    yield _table(
        ["kind", "category", "AUROC against the other side", "missed"],
        [
            [kind, _words(name), _interval(area), _interval(missed)]
            for (kind, name), (area, missed) in sorted(
                result.categories.items(), key=lambda item: (item[0][0], item[1][0].value)
            )
        ],
    )


def _geometry(result: CalibrationResult) -> Iterable[str]:
    manifest = result.artifact.manifest
    yield "<h2>Geometry</h2>"
    yield (
        "<p>It explains; it admits nothing. Numbers of one data set, without intervals; each n"
        " stands with them.</p>"
    )
    yield _table(
        ["", "value"], [[_words(k), f"{value:.4g}"] for k, value in manifest.geometry.items()]
    )


def _completions(result: CalibrationResult) -> Iterable[str]:
    pairs = worth_reading(result.tested)
    if not pairs:
        return
    group_of = {id(pair): group for group, each in result.tested.items() for pair in each}
    total = sum(map(len, result.tested.values()))
    yield "<h2>To read</h2>"
    yield (
        f"<p>{len(pairs)} of the {total} held-out prompts, greedy, cut at the length that was"
        " measured. Those whose verdict the guard changed come first, so this is no sample: rates"
        " are at the top. A verdict is a string match; the text is what counts.</p>"
    )
    for pair in pairs:
        record = pair.record
        group, zone = group_of[id(pair)], record.zone or Zone.PASS
        score = "" if record.gate_score is None else f"score {record.gate_score:.2f} · "
        yield (
            f"<article><p class=prompt>{escape(pair.prompt)}</p>"
            f"<p class=quiet>{_words(group)} · {score}zone <b class={zone}>{zone}</b> ·"
            f" {record.kl_nats:.2f} of {record.budget_nats:g} nats</p><div class=pair>"
            f"{_response('base', pair.base, pair.base_verdict)}"
            f"{_response('guarded', pair.guarded, record.verdict or Verdict.UNCLEAR)}"
            "</div></article>"
        )


def _provenance(result: CalibrationResult) -> Iterable[str]:
    manifest = result.artifact.manifest
    model = {k: v for k, v in manifest.model.model_dump(mode="json").items() if v is not None}
    facts = {
        **{_words(name): str(value) for name, value in model.items()},
        **{f"{name} prompts, sha256": digest for name, digest in manifest.datasets.items()},
        **manifest.libraries,
        "model's own refusals": " / ".join(manifest.refusal_examples),
        "seconds": ", ".join(f"{name} {s:.1f}" for name, s in result.seconds.items()),
    }
    yield "<h2>Made from</h2>"
    yield _table(
        ["", "value"], [[escape(k), f"<code>{escape(v)}</code>"] for k, v in facts.items()]
    )


def _figure(result: CalibrationResult, draw: figures.Draw, name: str, caption: str) -> str:
    picture = figures.svg(draw, result, name)
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return (
        f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _response(side: str, text: str, verdict: Verdict) -> str:
    return (
        f"<div><p class=quiet>{side}: <b class={verdict}>{verdict}</b></p>"
        f"<blockquote>{escape(text.strip()) or '<i>nothing</i>'}</blockquote></div>"
    )


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return (
        f"{interval.value:.2f} <small>[{interval.low:.2f}, {interval.high:.2f}]"
        f" n={interval.n}</small>"
    )


def _words(name: str) -> str:
    return escape(name.replace("_", " "))
