"""How much the shadow pass saves: the same candidate sweep, by one token and by full forwards.

Both sides read the same prompts and candidates in one run and their steered log-probabilities are
compared. The full sweep runs every prompt anew for each candidate, steered at its last token.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from calibration.causal import RefusalTokens
from calibration.choose import make_bench
from calibration.config import CalibrationConfig
from calibration.directions import Candidate, random_directions
from calibration.prompts import shipped_prompts, split_prompts
from calibration.transformers_subject import TransformersSubject, load_subject
from cli.models import resolve_model
from guard.shadow import BaseStep


def main() -> int:
    """Time both sweeps and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--candidates", type=int, default=46, help="spread over all layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--out", type=Path, help="write the object there, too")
    args = parser.parse_args()
    config = CalibrationConfig(model=resolve_model(args.model), model_name=args.model)
    subject = load_subject(config)
    splits = split_prompts(shipped_prompts(), args.seed)
    tokens = RefusalTokens(torch.tensor([0]), torch.ones(1))

    # Which prompts are steered is settled before either sweep; both then run over these alone.
    picked = make_bench(subject, splits, tokens, config)
    chosen = [picked.prompts[row] for row in picked.rows("raise")]
    encoded = [subject.encode(text) for text in chosen]
    began = time.perf_counter()
    step = subject.prefill(encoded, range(subject.identity.n_layers))
    prefill_seconds = time.perf_counter() - began
    candidates = spread(step, args.candidates, args.seed)
    rows = list(range(len(chosen)))
    prompts = step.input_ids, step.attention_mask

    def by_shadow(candidate: Candidate) -> Tensor:
        steered = candidate.carrier().apply(step.last_hidden(candidate.layer).float())
        return subject.shadow(step, rows, candidate.layer, steered)

    def by_full(candidate: Candidate) -> Tensor:
        return full_forward(subject, prompts, candidate)

    by_shadow(candidates[0]), by_full(candidates[0])  # warm up both
    shadow_seconds, one = timed(by_shadow, candidates)
    full_seconds, other = timed(by_full, candidates)
    gap = max(
        float((a.log_softmax(-1).exp() - b.log_softmax(-1).exp()).abs().sum(-1).mean() / 2)
        for a, b in zip(one, other, strict=True)
    )
    result = {
        "full_seconds": round(full_seconds, 2),
        "shadow_seconds": round(shadow_seconds + prefill_seconds, 2),
        "shadow_sweep_seconds": round(shadow_seconds, 2),
        "prefill_seconds": round(prefill_seconds, 2),
        "ratio": round(full_seconds / (shadow_seconds + prefill_seconds), 2),
        "largest_mean_total_variation": round(gap, 4),
        "candidates": len(candidates),
        "prompts": len(rows),
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(f"{len(candidates)} candidates, {len(rows)} prompts: full {full_seconds:.1f} s,")
    print(f"shadow {shadow_seconds:.1f} s and {prefill_seconds:.1f} s to prefill once")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.json:
        print(json.dumps(result))
    return 0


def spread(step: BaseStep, n: int, seed: int) -> list[Candidate]:
    """Random directions of a third of the stream's norm, evenly over the layers."""
    found = []
    n_layers = len(step.resid_pre)
    for i in range(n):
        layer = 1 + i * (n_layers - 1) // n
        norm = step.last_hidden(layer).float().norm(dim=-1).mean()
        d_model = step.last_hidden(layer).shape[-1]
        like = torch.ones(d_model) / d_model**0.5 * norm * 0.3
        found.append(Candidate(layer, -1, random_directions(like, 1, seed + i)[0], 0.3))
    return found


@torch.inference_mode()
def full_forward(
    subject: TransformersSubject, prompts: tuple[Tensor, Tensor], candidate: Candidate
) -> Tensor:
    """Logits of a whole forward pass over the prompts, steered at the last token."""
    ids, mask = prompts
    carrier = candidate.carrier()

    def steer(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, -1] = carrier.apply(hidden[:, -1].float()).to(hidden.dtype)
        return (
            ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        )

    hook = subject.runner.layers[candidate.layer].register_forward_pre_hook(steer, with_kwargs=True)
    try:
        width = mask.shape[1] - ids.shape[1]
        return subject.runner.base(ids, mask, subject.prefix_cache(len(ids), width)).logits.float()
    finally:
        hook.remove()


def timed(
    sweep: Callable[[Candidate], Tensor], candidates: list[Candidate]
) -> tuple[float, list[Tensor]]:
    """Seconds for all candidates, and the logits of the first three to compare."""
    kept: list[Tensor] = []
    began = time.perf_counter()
    for candidate in candidates:
        logits = sweep(candidate)
        if len(kept) < 3:
            kept.append(logits)
    return time.perf_counter() - began, kept


if __name__ == "__main__":
    sys.exit(main())
