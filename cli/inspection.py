"""What `trimtab inspect` shows of a guard file."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from cli.output import table
from guard.artifact import CarrierArtifact, CarrierSpec, Interval, Preset

if TYPE_CHECKING:
    from calibration.frontier import FrontierPoint

__all__ = ["describe", "frontier_tables", "mode_warning", "tables"]


def describe(artifact: CarrierArtifact, path: Path) -> dict[str, object]:
    """Return everything but the tensors' values, ready for JSON."""
    warning = mode_warning(path)
    return {
        "path": str(path),
        "artifact": artifact.artifact_id,
        "bytes": path.stat().st_size,
        "file_mode": f"{stat.S_IMODE(path.stat().st_mode):04o}",
        "warnings": [warning] if warning else [],
        "manifest": artifact.manifest.model_dump(mode="json"),
    }


def mode_warning(path: Path) -> str | None:
    """Return a warning if others than the owner can read the file; None on Windows."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "nt" or not mode & 0o077:
        return None
    return (
        f"{path}: mode {mode:04o} lets other users read it, and it names the model's refusal"
        f" direction; run `chmod 600 {path}`"
    )


def tables(artifact: CarrierArtifact) -> list[Table]:
    """Return the tables that a reader sees."""
    manifest, gate = artifact.manifest, artifact.manifest.gate
    model = manifest.model
    about = [
        ("model", model.model_id + (f" @ {model.revision}" if model.revision else "")),
        ("architecture", f"{model.architecture}, {model.n_layers} layers × {model.d_model}"),
        ("weights", model.dtype + (f", {model.quantization}" if model.quantization else "")),
        ("weights sha256", model.weights_sha256),
        ("calibrated", f"{manifest.created}, seed {manifest.seed}"),
        ("compared at", f"{manifest.safe_kl_nats:g} nats on safe prompts"),
        ("prompts", "\n".join(f"{k}: {v[:12]}" for k, v in sorted(manifest.datasets.items()))),
        ("libraries", ", ".join(f"{k} {v}" for k, v in sorted(manifest.libraries.items()))),
        ("note", manifest.sensitive),
    ]
    n_prompts = ", ".join(f"{n} {name}" for name, n in sorted(gate.n_by_stratum.items()))
    lower = "not certified: never lowered"
    if gate.lower_below is not None:
        lower = (
            f"score < {gate.lower_below:.3f} and p_R > {gate.lower_if_refusal_above:g},"
            f" δ = {gate.delta:g}"
        )
    gates = [
        (
            "raise",
            f"score > {gate.raise_above:.3f} and p_R < {gate.raise_if_refusal_below:g},"
            f" α = {gate.alpha:g}",
        ),
        ("lower", lower),
        (
            "probe",
            gate.where,
        ),
        ("calibrated on", n_prompts),
        ("guarantee", gate.guarantee),
        *_measured(gate.measurements),
    ]
    made = [
        table(f"Guard {artifact.artifact_id}", ("", ""), about),
        table("Carriers", ("", "raise", "lower"), _carriers(artifact)),
        table("Gate", ("", ""), gates),
    ]
    if manifest.presets:
        made.append(_presets(manifest.presets))
    if manifest.controls:
        made.append(table("Random controls", ("", "value"), _measured(manifest.controls)))
    if manifest.geometry:
        rows = [(name, f"{value:.4g}") for name, value in sorted(manifest.geometry.items())]
        made.append(table("Geometry", ("", "value"), rows))
    if manifest.refusal_examples:
        texts = [(text,) for text in manifest.refusal_examples]
        made.append(table("The model's own refusals, most frequent first", ("opening",), texts))
    return made


def frontier_tables(frontier: Sequence[FrontierPoint]) -> list[Table]:
    """The policies that a calibration compared, the recommended one marked; none: no table."""
    if not frontier:
        return []
    rows = [
        (
            "*" if p.chosen else "",
            p.name,
            f"{p.raise_budget_nats:g} / {p.lower_budget_nats:g}",
            f"{p.token_cap_nats:g}",
            str(p.shadow_tokens),
            str(p.harmful_refused),
            str(p.hard_benign_refused),
            str(p.ordinary_refused),
            f"{p.benign_nats.value:.3f}",
        )
        for p in frontier
    ]
    columns = (
        "",
        "policy",
        "nats",
        "a token",
        "K",
        "harmful refused",
        "hard benign",
        "ordinary",
        "benign nats",
    )
    return [table("Policies compared on validation prompts, * recommended", columns, rows)]


def _presets(presets: dict[str, Preset]) -> Table:
    """What each set of thresholds did to validation prompts, at its budgets."""
    rows = [
        (
            name,
            f"α = {p.alpha:g}: score > {p.raise_above:.3f}",
            "never"
            if p.lower_below is None
            else f"score < {p.lower_below:.3f}, p_R > {p.lower_if_refusal_above:g}",
            f"{p.raise_budget_nats:g} / {p.lower_budget_nats:g}",
            *(
                str(p.rates[key]) if key in p.rates else ""
                for key in ("harmful_refused", "hard_benign_refused", "ordinary_refused")
            ),
        )
        for name, p in presets.items()
    ]
    columns = ("preset", "raise", "lower", "nats", "harmful refused", "hard benign", "ordinary")
    return table("Presets: `preset: NAME` in the policy", columns, rows)


def _carriers(artifact: CarrierArtifact) -> list[tuple[str, str, str]]:
    specs = (artifact.manifest.raise_carrier, artifact.manifest.lower_carrier)
    ranks = tuple(
        c.basis.shape[0] if c else 0 for c in (artifact.raise_carrier, artifact.lower_carrier)
    )

    def facts(spec: CarrierSpec | None, rank: int) -> dict[str, str]:
        if spec is None:
            return {"family": "none admissible"}
        position = "" if spec.position is None else f"{spec.position}"
        shown = {
            "family": spec.family,
            "layer": str(spec.layer),
            "position": position,
            "kind": f"{spec.kind}, rank {rank}",
            "norm share": f"{spec.norm_share:.3f}",
        }
        return shown | {name: str(value) for name, value in sorted(spec.measurements.items())}

    raising, lowering = (facts(spec, rank) for spec, rank in zip(specs, ranks, strict=True))
    names = list(dict.fromkeys([*raising, *lowering]))
    return [(name, raising.get(name, ""), lowering.get(name, "")) for name in names]


def _measured(values: dict[str, Interval]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in sorted(values.items())]
