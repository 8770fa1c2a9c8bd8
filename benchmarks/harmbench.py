"""Refusals on HarmBench's standard behaviours, base against guarded, with over-refusal beside them.

The same prompts, greedy, in one run: the base model, the guard as it serves, and the guard with
every prompt flagged (what the carrier could do behind a perfect gate). Benign prompts are the
shipped test split, which calibration only reports on. Verdicts are string matches.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.frontier import hardware
from calibration.config import CalibrationConfig
from calibration.evaluate import Answered, answer_pairs, compare
from calibration.prompts import (
    load_prompts,
    shipped_prompts,
    splits_behind,
)
from calibration.transformers_subject import TransformersSubject, load_subject
from cli.models import resolve_model
from guard.artifact import CarrierArtifact, load_artifact
from guard.gate import Zone
from guard.policy import Policy


def main() -> int:
    """Answer every prompt and write the rates with their intervals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--guard", type=Path, default=Path("build/demo/guard.safetensors"))
    parser.add_argument("--prompts", type=Path, required=True, help="harmbench_text_val.csv")
    parser.add_argument("--preset", help="of the guard; default: the certified thresholds")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--benign", type=int, default=48, help="of each stratum")
    parser.add_argument("--most-prompts", type=int, default=0, help="if not a default")
    parser.add_argument("--json", action="store_true", help="print the object on stdout")
    parser.add_argument("--out", type=Path, help="write the object there")
    args = parser.parse_args()
    subject = load_subject(
        CalibrationConfig(model=resolve_model(args.model), model_name=args.model)
    )
    artifact = load_artifact(args.guard).with_preset(args.preset)
    artifact.check_model(subject.identity)
    manifest = artifact.manifest
    splits = splits_behind(manifest.datasets, shipped_prompts(), manifest.seed, args.most_prompts)
    if splits is None:
        raise SystemExit(
            f"{args.guard}: calibrated with other prompts, or --most-prompts, than here"
        )
    groups = {"harmbench_standard": standard_behaviours(args.prompts)}
    for stratum in ("hard", "ordinary"):
        kind = [p.text for p in splits.test if p.label == "benign" and p.stratum == stratum]
        groups[f"{stratum}_benign"] = kind[: args.benign]
    policy = Policy()
    found: dict[str, Any] = {}
    for name, texts in groups.items():
        pairs = answer(subject, artifact, policy, texts, args.max_tokens)
        found[name] = rates(pairs, artifact)
        if name == "harmbench_standard":
            base = [pair.base for pair in pairs]
            flagged = answer(
                subject, artifact, policy, texts, args.max_tokens, zone=Zone.RAISE, base=base
            )
            found[f"{name}_all_flagged"] = rates(flagged, artifact)
        print(f"{name}: {len(texts)} prompts done", file=sys.stderr)
    result = {
        "model": artifact.manifest.model.model_id,
        "guard": artifact.artifact_id,
        "policy": policy.model_dump(mode="json"),
        "decoding": f"greedy, {args.max_tokens} tokens",
        "verdicts": "string match (guard/refusal.py)",
        "hardware": hardware("cpu"),
        "torch": torch.__version__,
        "groups": found,
    }
    text = json.dumps(result, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    if args.json:
        print(json.dumps(result))
    return 0


def standard_behaviours(path: Path) -> list[str]:
    """Behaviours of the functional category "standard": they need no context."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = [row for row in rows if row["FunctionalCategory"] == "standard"]
    with tempfile.TemporaryDirectory() as folder:  # through the loader that users have
        copy = Path(folder) / "standard.csv"
        with copy.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(chosen)
        return [prompt.text for prompt in load_prompts(copy, label="harmful")]


def answer(
    subject: TransformersSubject,
    artifact: CarrierArtifact,
    policy: Policy,
    texts: list[str],
    max_tokens: int,
    **options: Any,
) -> list[Answered]:
    """Every prompt, without and with the guard."""
    return answer_pairs(subject, artifact, policy, texts, max_tokens, 32, **options)


def rates(pairs: list[Answered], artifact: CarrierArtifact) -> dict[str, Any]:
    """The rates with intervals, and the largest spending: it never passes the budget."""
    found: dict[str, Any] = {
        name: value.model_dump() for name, value in compare(pairs, artifact.manifest.seed).items()
    }
    found["largest_kl_nats"] = max(pair.record.kl_nats for pair in pairs)
    found["largest_budget_nats"] = max(pair.record.budget_nats for pair in pairs)
    return found


if __name__ == "__main__":
    sys.exit(main())
