"""How calibration grows with the model's size, beside a search like heretic's, on one device.

A model of random weights refuses nothing, so there would be nothing to calibrate. Instead a real
model is widened to the shapes of larger ones without a change in what it computes: its weights are
a block of theirs, what is added to the stream's width stays zero, added heads and units are random
and lead nowhere, added layers add nothing. So the whole calibration runs at every size, does the
same work, and should find the same carriers.

Heads keep the small model's 64 numbers, since rotary frequencies hang on that: a shape has twice as
many heads of half the size. Some of the added weights are zero, on which a device may be faster by
some percent.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.calibration import TRIALS, evaluation_seconds
from benchmarks.frontier import commit, hardware
from calibration.config import CalibrationConfig
from calibration.pipeline import calibrate
from calibration.transformers_subject import load_subject
from cli.memory import keep_freed_memory
from cli.models import resolve_model
from cli.output import RichProgress
from guard.artifact import load_artifact


@dataclass(frozen=True)
class Shape:
    """A size of Qwen2.5."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int


SHAPES = {
    "0.5B": Shape(896, 24, 14, 2, 4864),
    "1.5B": Shape(1536, 28, 28, 4, 8960),
    "7B": Shape(3584, 28, 56, 8, 18944),
}


def placed(small: Tensor, shape: Sequence[int], noise: bool) -> Tensor:
    """`small` in the upper left corner of a larger tensor; the rest is noise or zero."""
    large = torch.zeros(tuple(shape), dtype=small.dtype, device=small.device)
    if noise:
        large.normal_(0.0, 0.02)
    corner = tuple(slice(0, n) for n in small.shape)
    for axis in range(small.dim()):  # noise must not be read by what was there before
        if noise and axis == 1:
            large[corner[0], small.shape[1] :] = 0.0
    large[corner] = small
    return large


@torch.no_grad()
def widened(model: nn.Module, shape: Shape) -> nn.Module:
    """The same function with the weights of a larger shape.

    Args:
        model: a Qwen2 for causal language modelling.
        shape: at least as large in everything, the same number of queries a key head.

    Raises:
        SystemExit: the model is no Qwen2 of smaller shape.
    """
    old = model.config
    d_head = old.hidden_size // old.num_attention_heads
    groups = old.num_attention_heads // old.num_key_value_heads
    if old.model_type != "qwen2" or shape.n_heads // shape.n_kv_heads != groups:
        raise SystemExit(f"cannot widen a {old.model_type} with {groups} queries a key head")
    config = AutoConfig.for_model(**{**old.to_dict(), "head_dim": d_head})
    config.hidden_size, config.intermediate_size = shape.d_model, shape.d_mlp
    config.num_hidden_layers = shape.n_layers
    config.num_attention_heads, config.num_key_value_heads = shape.n_heads, shape.n_kv_heads
    ratio = old.hidden_size / shape.d_model
    config.rms_norm_eps = old.rms_norm_eps * ratio  # the mean square is over more numbers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * shape.n_layers
        config.max_window_layers = shape.n_layers
    parameter = next(model.parameters())
    with torch.device(parameter.device):
        large = AutoModelForCausalLM.from_config(config, dtype=parameter.dtype)
    source, target = dict(model.named_parameters()), dict(large.named_parameters())
    added = shape.n_layers - old.num_hidden_layers
    ends = {round((i + 1) * old.num_hidden_layers / max(added, 1)) + i for i in range(added)}
    kept = [layer for layer in range(shape.n_layers) if layer not in ends]
    origin = {large_layer: small_layer for small_layer, large_layer in enumerate(kept)}
    for name, weight in target.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in origin:  # reads what it likes and adds nothing
                if "o_proj" in name or "down_proj" in name:
                    weight.zero_()
                continue
            parts[2] = str(origin[int(parts[2])])
        small = source[".".join(parts)]
        if "norm" in name:
            small = small * ratio**0.5
        leads_on = not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_"))
        weight.copy_(placed(small, weight.shape, noise=not leads_on))
    return large.eval()


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate at each size, and time some evaluations of a search."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder, hub id or embedded model: a Qwen2.5 of 0.5B")
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--search", type=int, default=3, metavar="N", help="evaluations to time")
    parser.add_argument("--work", type=Path, help="for the models; the largest takes 15 GB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    keep_freed_memory()
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    out = args.json or Path(f"benchmarks/results/calibration_growth_{today}.json")
    folder = Path(resolve_model(args.model))
    found = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.work) as place:
            target = Path(place) / f"qwen2.5-{size.lower()}-shape"
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            large = widened(model.to(args.device), SHAPES[size])
            n_parameters = sum(p.numel() for p in large.parameters())
            large.save_pretrained(target, max_shard_size="4GB")
            del model, large
            gc.collect()
            for file in folder.iterdir():
                if "token" in file.name or "chat_template" in file.name:
                    shutil.copy(file, target / file.name)
            config = CalibrationConfig(
                model=str(target), device=args.device, out=Path(place) / "guard.safetensors"
            )
            began = time.perf_counter()
            with RichProgress() as progress:
                result = calibrate(config, progress)
            seconds = time.perf_counter() - began
            subject = load_subject(config)
            carrier = load_artifact(config.out).raise_carrier
            each = evaluation_seconds(subject, carrier, args.search)
            found[size] = {
                "parameters": n_parameters,
                "full_calibration_seconds": round(seconds, 1),
                "seconds": result.summary()["seconds"],
                "search_seconds_per_evaluation": round(each, 2),
                f"search_seconds_for_{TRIALS}": round(TRIALS * each, 1),
                "raise_carrier": result.summary()["raise_carrier"],
                "gate": result.summary()["gate"],
            }
            del subject
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        everything = {
            "sizes": found,
            "evaluations_timed": args.search,
            "hardware": hardware(args.device),
            "torch": torch.__version__,
            "commit": commit(),
            "date": today,
        }
        out.write_text(json.dumps(everything, indent=1) + "\n")
        print(f"{size}: {seconds:.0f} s, search {TRIALS * each:.0f} s; {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
