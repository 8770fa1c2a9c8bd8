"""How long a whole calibration takes, by stage, and what it found.

`--search N` also times N evaluations of a search like heretic's, in which each candidate answers
100 harmful prompts (30 tokens) and shows its first token on 100 harmless ones, and says what 200 of
them would take on this machine.

The cost model: n prompts are run once, O(n · tokens · layers · d_model²); a candidate costs one
token per bench prompt behind its layer, and there are layers × (template tokens + 4) of them, twice
(raise and lower); a gradient step is three such passes over 48 rows; all that grows with prompts ×
layers × d_model², as a forward pass does. Responses of a few tokens each confirm and test.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.frontier import added_everywhere, commit, hardware
from calibration.config import CalibrationConfig
from calibration.pipeline import calibrate
from calibration.prompts import shipped_prompts
from calibration.transformers_subject import TransformersSubject, load_subject
from cli.memory import keep_freed_memory
from cli.models import resolve_model
from cli.output import RichProgress
from guard.artifact import load_artifact
from guard.steering import Carrier

TRIALS = 200
PROMPTS = 100
RESPONSE_TOKENS = 30
BATCH = 32


def evaluation_seconds(subject: TransformersSubject, carrier: Carrier, n: int) -> float:
    """Mean time of one evaluation of a search: refusals of harmful, first token of harmless."""
    prompts = shipped_prompts()
    harmful = [subject.encode(p.text) for p in prompts if p.label == "harmful"][:PROMPTS]
    harmless = [
        subject.encode(p.text) for p in prompts if p.label == "benign" and p.stratum == "ordinary"
    ][:PROMPTS]
    began = time.perf_counter()
    for trial in range(n):
        with added_everywhere(subject.runner.layers, carrier, 1.0 + trial):
            for start in range(0, PROMPTS, BATCH):
                subject.respond(harmful[start : start + BATCH], RESPONSE_TOKENS)
                subject.prefill(harmless[start : start + BATCH], [])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / n


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, and write how long it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder, hub id or embedded model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guard", type=Path, help="keep the guard there")
    parser.add_argument("--report", type=Path, help="write the report there")
    parser.add_argument("--thorough", action="store_true", help="as trimtab calibrate has it")
    parser.add_argument("--search", type=int, default=0, metavar="N", help="evaluations to time")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    parser.add_argument(
        "--json", type=Path, default=Path(f"benchmarks/results/calibration_{today}.json")
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        config = CalibrationConfig(
            model=resolve_model(args.model),
            model_name=args.model,
            device=args.device,
            seed=args.seed,
            out=args.guard or Path(folder) / "guard.safetensors",
            report_dir=args.report,
        )
        if args.thorough:
            config = config.thorough()
        began = time.perf_counter()
        with RichProgress() as progress:
            result = calibrate(config, progress)
        seconds = time.perf_counter() - began
        artifact = load_artifact(config.out)
    found: dict[str, Any] = {
        "full_calibration_seconds": round(seconds, 1),
        **result.summary(),
        "thorough": args.thorough,
        "n_prompts_at_hand": len(shipped_prompts()),
        "most_prompts_used": config.prompt_limit or len(shipped_prompts()),
        "n_candidates": {sign: len(effects) for sign, effects in result.effects.items()},
        "hardware": hardware(args.device),
        "torch": torch.__version__,
        "seed": args.seed,
        "commit": commit(),
        "date": today,
    }
    if args.search:
        subject = load_subject(config)
        each = evaluation_seconds(subject, artifact.raise_carrier, args.search)
        found["search"] = {
            "seconds_per_evaluation": round(each, 2),
            "evaluations_timed": args.search,
            f"seconds_for_{TRIALS}": round(TRIALS * each, 1),
        }
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{seconds:.0f} s; {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
