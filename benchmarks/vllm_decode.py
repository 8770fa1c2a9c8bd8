"""What the guard costs inside vLLM on one GPU: stock and guarded, in one run on one card.

The model has the shape of Qwen2.5-7B and random weights, written as a real checkpoint, so the guard
starts as it always does. Its artifact is written by the code that calibration uses: a random
carrier at two thirds of the depth, and a probe that tells two kinds of prompts apart by their last
instruction token, so that each prompt is flagged or not as the benchmark asks.

    python -m benchmarks.vllm_decode --shape FOLDER --tokenizer FOLDER --work FOLDER --out FILE

FOLDER of the shape holds config.json, that of the tokenizer a tokenizer with its chat template.
Every mode is a process of its own; all samples are kept, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROMPT, SHORT, LONG = 128, 8, 136
BENIGN, HARMFUL = 2000, 3000  # token ids that end the two kinds of instruction
SUFFIX = [151645, 198, 151644, 77091, 198]
BATCHES = (1, 32, 256)
TOKENS = 256
FLAGGED_EVERY = 50
MODES = {
    "stock": None,
    "guard": {"shadow_tokens": 16, "raise_budget_nats": 4.0, "token_cap_nats": 0.25},
    "guard_every_token": {
        "shadow_tokens": 65536,
        "raise_budget_nats": 64.0,
        "token_cap_nats": 0.25,
    },
    "stock_eager": None,
}
"""Policies by mode. No ledger runs dry before the last token that is due: 16 · 0.25 = 4."""


def main() -> int:
    """Make the model, run every mode, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="takes 15 GB")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", default=["stock", "guard", "guard_every_token"])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--make", action="store_true", help="only make model and guard")
    parser.add_argument("--measure", choices=MODES, help="one mode, in this process")
    args = parser.parse_args()
    if args.measure:
        args.out.write_text(json.dumps(measure(args.measure, args.work, args.samples)))
        return 0
    if not (args.work / "guard.safetensors").exists():
        in_fork(lambda: make(args.shape, args.tokenizer, args.work))
    if args.make:
        return 0
    found = {}
    for mode in args.modes:
        out = args.work / f"{mode}.json"
        began = time.perf_counter()
        code = in_process(mode, args, out)
        print(f"{mode}: {time.perf_counter() - began:.0f} s, exit code {code}", flush=True)
        if code == 0:
            found[mode] = json.loads(out.read_text())
            print(json.dumps(found[mode]["medians"]), flush=True)
        args.out.write_text(json.dumps(compare(found), indent=1) + "\n")
    print(json.dumps(compare(found)["ratios"]))
    return 0 if len(found) == len(args.modes) else 1


def in_fork(function: Callable[[], None]) -> None:
    """Run a step that uses the GPU in a process of its own, so that its memory is free again."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise SystemExit("making the model failed")


def in_process(mode: str, args: argparse.Namespace, out: Path) -> int:
    """One mode, with its environment: the guard's two variables or none."""
    environment = dict(os.environ)
    for name in ("TRIMTAB_GUARD", "TRIMTAB_POLICY"):
        environment.pop(name, None)
    policy = MODES[mode]
    environment["VLLM_PLUGINS"] = ""
    if policy is not None:
        file = args.work / f"{mode}.yaml"
        file.write_text("".join(f"{key}: {value}\n" for key, value in policy.items()))
        environment["TRIMTAB_GUARD"] = str(args.work / "guard.safetensors")
        environment["TRIMTAB_POLICY"] = str(file)
        environment["VLLM_PLUGINS"] = "trimtab"
    environment["VLLM_CACHE_ROOT"] = str(args.work / "cache")  # one for all: the guard salts it
    log = out.with_suffix(".log")
    command = [
        sys.executable, "-m", "benchmarks.vllm_decode", "--measure", mode, "--out", str(out),
        "--work", str(args.work), "--shape", str(args.shape), "--tokenizer", str(args.tokenizer),
        "--samples", str(args.samples),
    ]  # fmt: skip
    with log.open("w") as file_out:
        return subprocess.run(
            command, env=environment, stdout=file_out, stderr=subprocess.STDOUT, check=False
        ).returncode


# ------------------------------------------------------------------ model and guard


def make(shape: Path, tokenizer: Path, work: Path) -> None:
    """Write a checkpoint with random weights, and a guard for it."""
    from types import SimpleNamespace

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from guard.artifact import CarrierArtifact, CarrierSpec, GateSpec, Manifest, save_artifact
    from guard.steering import Carrier
    from serve.vllm_identity import checkpoint_identity

    folder = work / "model"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(shape)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(folder, max_shard_size="4GB")
    for file in tokenizer.iterdir():
        if "token" in file.name or "chat_template" in file.name:
            shutil.copy(file, folder / file.name)
    n_layers, d_model = config.num_hidden_layers, config.hidden_size
    gate_layer, carrier_layer = n_layers // 2, round(n_layers * 2 / 3)

    @torch.inference_mode()
    def read(kind: int, seed: int) -> tuple[Any, Any]:
        chance = random.Random(seed)  # noqa: S311 - prompts
        ids = torch.tensor([prompt(chance, kind, PROMPT) for _ in range(32)])
        states = model(ids.cuda(), output_hidden_states=True).hidden_states
        place = -1 - len(SUFFIX)
        return states[gate_layer][:, place].float().cpu(), states[carrier_layer][:, -1].float()

    benign, stream = read(BENIGN, 0)
    harmful, _ = read(HARMFUL, 1000)
    probe = harmful.mean(0) - benign.mean(0)
    probe = probe / probe.norm()
    middle = float((harmful.mean(0) + benign.mean(0)) @ probe / 2)
    gap = float(((harmful - benign) @ probe).mean())
    fresh = [read(kind, 5000)[0] @ probe - middle for kind in (BENIGN, HARMFUL)]
    if not (float(fresh[0].max()) < 0.0 < float(fresh[1].min())):
        raise SystemExit(f"the probe does not separate the two kinds: {fresh}")
    direction = torch.randn(d_model, generator=torch.Generator().manual_seed(1))
    direction *= 0.3 * float(stream.norm(dim=-1).mean()) / direction.norm()
    dtype = SimpleNamespace(
        model=str(folder), tokenizer=str(folder), revision=None, tokenizer_revision=None,
        trust_remote_code=False, hf_config=config, dtype=torch.bfloat16,
    )  # fmt: skip
    manifest = Manifest(
        created="2026-11-25T00:00:00Z",
        model=checkpoint_identity(dtype),
        seed=0,
        safe_kl_nats=0.1,
        datasets={},
        libraries={"torch": torch.__version__},
        raise_carrier=CarrierSpec(
            layer=carrier_layer, kind="add", family="random", norm_share=0.3
        ),
        lower_carrier=None,
        gate=GateSpec(
            layer=gate_layer, bias=-middle, instruction_suffix_ids=SUFFIX, raise_above=0.0,
            lower_below=None, raise_if_refusal_below=0.9, lower_if_refusal_above=0.1,
            alpha=0.05, delta=0.05, n_by_stratum={},
        ),
    )  # fmt: skip
    artifact = CarrierArtifact(
        manifest,
        raise_carrier=Carrier.additive(carrier_layer, direction),
        lower_carrier=None,
        probe_weight=probe,
        refusal_token_ids=torch.tensor([40, 19152]),
        refusal_token_weights=torch.ones(2),
    )
    save_artifact(artifact, work / "guard.safetensors")
    print(f"gate at {gate_layer}, carrier at {carrier_layer}, kinds {gap:.3g} apart", flush=True)


def prompt(chance: random.Random, kind: int, length: int) -> list[int]:
    """Random tokens, the token that says which kind it is, many times, and the suffix.

    Many times, for random weights keep little of a single token after a dozen layers.
    """
    head = [chance.randrange(5000, 150000) for _ in range(16)]
    return [*head, *[kind] * (length - len(head) - len(SUFFIX)), *SUFFIX]


# ------------------------------------------------------------------ measuring


class Engine:
    """An `LLM`, its clock, and what its guard says it did."""

    def __init__(self, model: Path, eager: bool) -> None:
        from vllm import LLM

        began = time.perf_counter()
        self.llm = LLM(
            model=str(model),
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=256,
            gpu_memory_utilization=0.8,
            enable_prefix_caching=False,
            enforce_eager=eager,
            seed=0,
        )
        self.start_seconds = time.perf_counter() - began
        self.chance = random.Random(0)  # noqa: S311 - prompts

    def seconds(self, kinds: Sequence[int], tokens: Sequence[int], length: int = PROMPT) -> float:
        """Answer all at once, as many at a time as there are rows."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": prompt(self.chance, kind, length)} for kind in kinds]
        params = [
            SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in tokens
        ]
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        if [len(output.outputs[0].token_ids) for output in outputs] != list(tokens):
            raise SystemExit("a response has the wrong length")
        return seconds

    def per_token(self, kind: int, batch: int) -> float:
        """Milliseconds of one decoding step, prompts and start-up taken out."""
        short = self.seconds([kind] * batch, [SHORT] * batch)
        long = self.seconds([kind] * batch, [LONG] * batch)
        return (long - short) / (LONG - SHORT) * 1000

    def whole(self, kind: int, batch: int) -> float:
        """Milliseconds per token of whole responses, their prompts included."""
        return self.seconds([kind] * batch, [TOKENS] * batch) / TOKENS * 1000

    def staggered(self, every: int) -> float:
        """Milliseconds per step of 256 rows while requests come and go, one `every` flagged.

        The first 256 end after 1, 2, 3 … tokens; each that ends lets in one of 256 that follow.
        """
        tokens = [*range(1, 257), *[TOKENS] * 256]
        kinds = [HARMFUL if every and i % every == every // 2 else BENIGN for i in range(512)]
        return self.seconds(kinds, tokens) / (sum(tokens) / 256) * 1000

    def first_token(self) -> float:
        """Milliseconds to the first token of a prompt of 512."""
        return self.seconds([BENIGN], [1], 512) * 1000

    def drain(self) -> dict[str, Any]:
        """What the guard did since it was last asked."""
        if os.environ.get("TRIMTAB_GUARD") is None:
            return {}
        self.seconds([BENIGN], [1])  # vLLM tells its workers of the end of a request a step later
        records = [
            found["record"]
            for found in json.loads(self.llm.collective_rpc("trimtab_drain")[0]).values()
        ]
        flagged = [record for record in records if record["zone"] == "raise"]
        return {
            "requests": len(records),
            "flagged": len(flagged),
            "shadow_passes": sum(record["shadow_passes"] for record in flagged),
            "kl_nats_max": max((record["kl_nats"] for record in flagged), default=0.0),
            "within_budget": all(r["kl_nats"] <= r["budget_nats"] for r in records),
        }


def measure(mode: str, work: Path, n: int) -> dict[str, Any]:
    """All cases of one mode."""
    import torch

    engine = Engine(work / "model", eager=mode == "stock_eager")
    cases: dict[str, tuple[Callable[[], float], int]] = {}
    kind = HARMFUL if mode == "guard_every_token" else BENIGN
    for batch in BATCHES:
        cases[f"decode_{batch}"] = (
            lambda batch=batch: engine.per_token(kind, batch),  # type: ignore[misc]
            max(n, 9) if batch == 256 and n >= 5 else n,
        )
    if mode in ("stock", "guard"):
        flagged = HARMFUL if mode == "guard" else BENIGN
        cases["whole_1"] = (lambda: engine.whole(flagged, 1), max(1, n - 2))
        cases["whole_32"] = (lambda: engine.whole(flagged, 32), n)
        cases["whole_256"] = (lambda: engine.whole(flagged, 256), max(1, n - 2))
        cases["staggered"] = (lambda: engine.staggered(FLAGGED_EVERY), n)
        cases["first_token"] = (engine.first_token, 4 * n)
    if mode == "guard":
        cases["staggered_nobody"] = (lambda: engine.staggered(0), max(1, n - 2))
    samples, did = {}, {}
    for name, (case, times) in cases.items():
        case()
        engine.drain()
        samples[name] = [round(case(), 4) for _ in range(times)]
        did[name] = engine.drain()
        print(name, samples[name], did[name], flush=True)
    status = {}
    if os.environ.get("TRIMTAB_GUARD"):
        status = json.loads(engine.llm.collective_rpc("trimtab_status")[0])
    blocks = engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return {
        "medians": {name: round(statistics.median(values), 3) for name, values in samples.items()},
        "samples_ms": samples,
        "guard_did": did,
        "start_seconds": round(engine.start_seconds, 1),
        "graph_bytes": status.get("graph_bytes", 0),
        "kv_blocks": blocks,
        "hardware": torch.cuda.get_device_name(),
        "libraries": {"torch": torch.__version__, "vllm": version("vllm")},
    }


def version(name: str) -> str:
    """Of an installed distribution."""
    from importlib.metadata import version as installed

    return installed(name)


def compare(found: dict[str, Any]) -> dict[str, Any]:
    """Ratios to stock, each of medians of the same run."""

    def ratio(mode: str, case: str, to: str | None = None) -> float | None:
        ours = found.get(mode, {}).get("medians", {}).get(case)
        stock = found.get("stock", {}).get("medians", {}).get(to or case)
        return round(ours / stock, 4) if ours and stock else None

    def by_batch(mode: str) -> dict[str, float | None]:
        return {str(batch): ratio(mode, f"decode_{batch}") for batch in BATCHES}

    first: dict[str, Any] = next(iter(found.values()), {})
    return {
        "ratios": {
            "idle": by_batch("guard"),
            "flagged_2pct": ratio("guard", "staggered"),
            "all_flagged_k16": ratio("guard", "whole_32"),
            "every_token": by_batch("guard_every_token"),
            "ttft_idle": ratio("guard", "first_token"),
            "all_flagged_k16_by_batch": {
                str(batch): ratio("guard", f"whole_{batch}") for batch in BATCHES
            },
            "staggered_nobody_flagged": ratio("guard", "staggered_nobody", "staggered"),
            "stock_eager": by_batch("stock_eager"),
        },
        "hardware": first.get("hardware"),
        "libraries": first.get("libraries"),
        "date": time.strftime("%Y-%m-%d"),
        "model": "Qwen2.5-7B shape, random bfloat16 weights, CUDA graphs on, V2 model runner",
        "policies": {mode: MODES[mode] for mode in found},
        "modes": found,
    }


if __name__ == "__main__":
    sys.exit(main())
