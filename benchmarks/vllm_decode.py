"""What the guard costs inside vLLM on one GPU, beside stock vLLM, by samples taken in turns.

The model has the shape of Qwen2.5-7B and random weights, written as a real checkpoint, so the guard
starts as it always does. Its artifact is written by the code that calibration uses: random
carriers at two thirds of the depth, and a probe of the size that calibration trains (attention over
the message at five twelfths of the depth, template tokens at five eighths, a hidden layer). It
tells three kinds of prompts apart: harmful ones, which are raised; benign ones, which would be
lowered if the model were about to refuse them, as ordinary traffic would; and uncertain ones, which
the score alone lets pass.

    python -m benchmarks.vllm_decode --shape FOLDER --tokenizer FOLDER --work FOLDER --out FILE

FOLDER of the shape holds config.json, that of the tokenizer a tokenizer with its chat template.
Every mode is an engine in a process of its own. They live side by side on the card and answer one
after the other, a sample each, round after round; all samples are kept, and medians are compared.
Three of them take 70 GB. Mode `stock_again` is stock once more: what two engines of the same code
differ by. Mode `hotwire` needs hotwire-vllm installed.
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
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPT, SHORT, LONG = 128, 8, 136
BENIGN, UNCERTAIN, HARMFUL = 2000, 2500, 3000  # token ids of which the kinds of prompts are made
HEAD = 13  # random tokens before it
OPENING, SUFFIX = [151644, 872, 198], [151645, 198, 151644, 77091, 198]
N_HEADS, N_VALUES, N_TEMPLATE, N_HIDDEN, WINDOW = 4, 8, 16, 32, 512
TOKENS = 256
KV_BYTES = 11 << 29  # 256 rows of 384 tokens, and little more: engines share the card
POLICY = {
    "shadow_tokens": 16,
    "raise_budget_nats": 4.0,
    "token_cap_nats": 0.25,
    "policies": {
        "k64": {"shadow_tokens": 64, "raise_budget_nats": 16.0, "lower": "off"},
        "every": {"shadow_tokens": 65536, "raise_budget_nats": 64.0, "lower": "off"},
    },
}
"""No ledger runs dry before the last token that is due: 16 · 0.25 = 4."""

EVERY = {"trimtab_policy": "every"}
HOTWIRE = {"hotwire": json.dumps({"id": "carrier", "layer": 19, "scale": 1.0})}
MODES = ("stock", "guard", "stock_again", "stock_eager", "hotwire")
REHEARSED_BY = {  # cases that warm nothing up that another has not
    "flagged_1", "flagged_8", "flagged_128", "flagged_256_share_0.1", "flagged_256_share_0.5",
    "flagged_32_k64", "flagged_32_every", "staggered_10pct", "staggered_uncertain",
    "staggered_tentative", "first_token_uncertain", "whole_1", "whole_8", "whole_128",
}  # fmt: skip

MANY, FEW = 9, 2  # rounds in which a case is taken: what is compared with goals, what shows growth

Case = tuple[str, dict[str, Any], int]
"""Method of `Engine`, its arguments, and in how many rounds it is taken."""


def cases(mode: str) -> dict[str, Case]:
    """What is measured of one mode, by name; equal names compare."""
    found: dict[str, Case] = {}
    for batch in (1, 32, 256):
        found[f"decode_{batch}"] = ("per_token", {"batch": batch}, MANY)
    if mode == "stock_eager":
        return found
    if mode == "hotwire":
        for batch in (1, 32, 256):
            found[f"steered_{batch}"] = ("per_token", {"batch": batch, "extra": HOTWIRE}, MANY)
        return found
    found["staggered"] = ("staggered", {"every": 0}, MANY)
    found["first_token"] = ("first_token", {}, MANY)
    if mode == "stock_again":
        return found
    for batch in (1, 8, 32, 128, 256):
        found[f"whole_{batch}"] = ("whole", {"batch": batch}, MANY if batch == 32 else FEW)
    if mode == "guard":
        found["staggered_2pct"] = ("staggered", {"every": 50}, MANY)
        found["staggered_10pct"] = ("staggered", {"every": 10}, FEW)
        found["staggered_uncertain"] = ("staggered", {"every": 0, "kind": UNCERTAIN}, FEW)
        found["staggered_tentative"] = ("staggered", {"every": 0, "waits": False}, FEW)
        found["first_token_uncertain"] = ("first_token", {"kind": UNCERTAIN}, FEW)
        for batch in (1, 8, 32, 128, 256):
            flagged = {"batch": batch, "share": 1.0}
            found[f"flagged_{batch}"] = ("whole", flagged, MANY if batch == 32 else FEW)
        for share in (0.1, 0.5):
            part = {"batch": 256, "share": share}
            found[f"flagged_256_share_{share}"] = ("whole", part, FEW)
        for name in ("k64", "every"):
            longer = {"batch": 32, "share": 1.0, "extra": {"trimtab_policy": name}}
            found[f"flagged_32_{name}"] = ("whole", longer, FEW)
        for batch in (1, 32, 256):
            steered = {"batch": batch, "kind": HARMFUL, "extra": EVERY}
            found[f"every_{batch}"] = ("per_token", steered, MANY)
    return found


def main() -> int:
    """Make the model, let every mode answer in turns, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="takes 15 GB")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", default=["stock", "guard"], choices=MODES)
    parser.add_argument("--rounds", type=int, default=9, help="at most")
    parser.add_argument("--only", nargs="+", help="these cases")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no round after them")
    parser.add_argument("--profile", action="store_true", help="sum up kernels by name at the end")
    parser.add_argument("--make", action="store_true", help="only make model and guard")
    parser.add_argument("--engine", choices=MODES, help="be one mode's engine")
    parser.add_argument("--answers", type=int, help="file descriptor that an engine answers to")
    args = parser.parse_args()
    if args.engine:
        answer(args.engine, args.work, args.answers)
        return 0
    if not (args.work / "guard.safetensors").exists():
        in_fork(lambda: make(args.shape, args.tokenizer, args.work))
    if args.make:
        return 0
    began = time.perf_counter()
    engines: dict[str, Remote] = {}
    found: dict[str, Any] = {}
    wanted = {
        mode: {k: c for k, c in cases(mode).items() if not args.only or k in args.only}
        for mode in args.modes
    }
    order = dict.fromkeys(name for mode in args.modes for name in wanted[mode])

    def start(mode: str) -> None:
        engine = Remote(mode, args.work)
        try:
            found[mode] = {"start": engine.read(), "samples_ms": {}}
            engines[mode] = engine
        except EOFError as error:
            print(error, flush=True)

    for mode in args.modes:  # one by one: a compiler that chooses kernels times them on the card
        start(mode)
    print("started:", *engines, flush=True)
    for turn in range(-1, args.rounds):  # the first is a rehearsal
        if time.perf_counter() - began > args.seconds:
            break
        for name in order:
            for mode in [*engines][:: 1 if turn % 2 else -1]:
                method, arguments, rounds = wanted[mode].get(name, ("", {}, -1))
                if turn < min(rounds, args.rounds) and not (turn < 0 and name in REHEARSED_BY):
                    sample = engines[mode].ask(method, arguments)
                    if turn >= 0:
                        found[mode]["samples_ms"].setdefault(name, []).append(sample)
        for mode, engine in engines.items():
            found[mode]["guard_did"] = engine.ask("drain", {})
        args.out.write_text(json.dumps(compare(found), indent=1) + "\n")
        print(f"round {turn}", json.dumps(compare(found)["ratios"]), flush=True)
    for mode, engine in engines.items():
        kernels = found[mode]["kernels"] = {}
        for batch in (1, 32, 256) if args.profile and mode in ("stock", "guard") else ():
            kernels[f"decode_{batch}"] = engine.ask("kernels", {"batch": batch})
            if mode == "guard":
                steered = {"batch": batch, "kind": HARMFUL, "extra": EVERY}
                kernels[f"every_{batch}"] = engine.ask("kernels", steered)
        if "staggered" in wanted[mode] and mode != "stock_again":
            if args.profile and mode == "guard":
                found[mode]["host"] = engine.ask("host", {})
                found[mode]["rounding"] = {
                    n: engine.ask("rounding", {"batch": n}) for n in (64, 256)
                }
            shares = (0, 50) if mode == "guard" else (0,)
            found[mode]["steps"] = {str(n): engine.ask("steps", {"every": n}) for n in shares}
        args.out.write_text(json.dumps(compare(found), indent=1) + "\n")
        engine.stop()
    args.out.write_text(json.dumps(compare(found), indent=1) + "\n")
    return 0


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


class Remote:
    """One mode's engine in a process of its own, with the environment that makes the mode."""

    def __init__(self, mode: str, work: Path) -> None:
        environment = dict(os.environ)
        for name in ("TRIMTAB_GUARD", "TRIMTAB_POLICY"):
            environment.pop(name, None)
        environment["VLLM_PLUGINS"] = ""
        if mode == "guard":
            file = work / "policy.yaml"
            file.write_text(json.dumps(POLICY))
            environment["TRIMTAB_GUARD"] = str(work / "guard.safetensors")
            environment["TRIMTAB_POLICY"] = str(file)
            environment["VLLM_PLUGINS"] = "trimtab"
        if mode == "hotwire":
            environment["HOTWIRE_VECTORS"] = str(work / "vectors")
            environment["VLLM_PLUGINS"] = "hotwire"
        environment["VLLM_CACHE_ROOT"] = str(work / "cache")  # one for all: plugins salt it
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions sent to the worker
        ours, theirs = os.pipe()
        command = [
            sys.executable, "-m", "benchmarks.vllm_decode", "--engine", mode, "--answers",
            str(theirs), "--work", str(work), "--shape", ".", "--tokenizer", ".", "--out", ".",
        ]  # fmt: skip
        with (work / f"{mode}.log").open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=log,
                stderr=subprocess.STDOUT, pass_fds=(theirs,), text=True,
            )  # fmt: skip
        os.close(theirs)
        self._mode, self._answers = mode, os.fdopen(ours)
        self._questions: Any = self._process.stdin

    def read(self) -> Any:
        """The next answer."""
        line = self._answers.readline()
        if not line:
            raise EOFError(f"the engine of {self._mode} ended: see its log")
        return json.loads(line)

    def ask(self, method: str, arguments: dict[str, Any]) -> Any:
        """Call a method of the engine there."""
        print(json.dumps([method, arguments]), file=self._questions, flush=True)
        return self.read()

    def stop(self) -> None:
        """End it."""
        self._questions.close()
        self._process.wait()


def answer(mode: str, work: Path, descriptor: int) -> None:
    """Be one mode's engine: methods come in by name, results go out."""
    from benchmarks import vllm_decode  # whose functions a worker can import

    with os.fdopen(descriptor, "w") as answers:
        engine = vllm_decode.Engine(work / "model", eager=mode == "stock_eager")
        print(json.dumps(engine.status()), file=answers, flush=True)
        for line in sys.stdin:
            method, arguments = json.loads(line)
            result = getattr(engine, method)(**arguments)
            print(method, arguments, result, flush=True)
            print(json.dumps(result), file=answers, flush=True)


# ------------------------------------------------------------------ model and guard


def make(shape: Path, tokenizer: Path, work: Path) -> None:
    """Write a checkpoint with random weights, and a guard for it."""
    from types import SimpleNamespace

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from guard.artifact import (
        CarrierArtifact,
        CarrierSpec,
        GateSpec,
        Manifest,
        MessageRead,
        save_artifact,
    )
    from guard.probe import Probe, pool_message, probe_scores, project
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
    message_layer, gate_layer = round(n_layers * 5 / 12), round(n_layers * 5 / 8)
    carrier_layer = round(n_layers * 2 / 3)

    @torch.inference_mode()
    def read(kind: int, seed: int) -> tuple[Any, Any, Any]:
        chance = random.Random(seed)  # noqa: S311 - prompts
        ids = torch.tensor([prompt(chance, kind, PROMPT) for _ in range(32)])
        states = model(ids.cuda(), output_hidden_states=True).hidden_states
        end, opened = -len(SUFFIX), HEAD + len(OPENING)
        return (
            states[message_layer][:, opened:end].float().cpu(),
            states[gate_layer][:, end : end + 2].float().cpu(),
            states[carrier_layer][:, -1].float(),
        )

    seen = {kind: read(kind, kind) for kind in (BENIGN, HARMFUL)}
    stream = seen[BENIGN][2]
    means = {kind: message.mean((0, 1)) for kind, (message, _, _) in seen.items()}
    noise = torch.Generator().manual_seed(2)

    def small(*size: int) -> Any:
        return torch.randn(size, generator=noise) / d_model**0.5 / 10

    # Every head averages, its first value tells the kinds apart, and one hidden unit adds those up.
    direction = means[HARMFUL] - means[BENIGN]
    scale = 4.0 / float(direction.norm() ** 2)
    message_weights = small(N_HEADS + N_VALUES, d_model)
    message_weights[N_HEADS] = direction * scale
    middle = float((means[HARMFUL] + means[BENIGN]) @ direction * scale / 2)
    hidden = small(N_HIDDEN, N_HEADS * N_VALUES + N_TEMPLATE + 1)
    hidden[0] = 0.0
    hidden[0, : N_HEADS * N_VALUES : N_VALUES] = 1 / N_HEADS
    hidden[0, -1] = 10.0 - middle  # where GELU is a line
    out = torch.zeros(N_HIDDEN + 1)
    out[0], out[-1] = 1.0, -10.0
    probe = Probe(small(N_TEMPLATE, d_model), out, message_weights, N_HEADS, hidden)
    scores = {}
    for kind in (BENIGN, UNCERTAIN, HARMFUL):
        message, template, _ = read(kind, kind + 1)
        there = torch.ones(message.shape[:2], dtype=torch.bool)
        pooled = pool_message(project(message, message_weights), there, N_HEADS)
        scores[kind] = probe_scores(probe, project(template, probe.template).mean(1), pooled)
    print({kind: (float(s.min()), float(s.max())) for kind, s in scores.items()}, flush=True)
    cuts = []
    for below, above in ((BENIGN, UNCERTAIN), (UNCERTAIN, HARMFUL)):
        if not scores[below].max() < scores[above].min():
            raise SystemExit("the probe does not tell the three kinds apart")
        cuts.append(float(scores[below].max() + scores[above].min()) / 2)
    carriers = torch.randn(2, d_model, generator=torch.Generator().manual_seed(1))
    carriers *= 0.3 * float(stream.norm(dim=-1).mean()) / carriers.norm(dim=-1, keepdim=True)
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
        lower_carrier=CarrierSpec(
            layer=carrier_layer, kind="add", family="random", norm_share=0.3
        ),
        gate=GateSpec(
            layer=gate_layer, n_hidden=N_HIDDEN, instruction_suffix_ids=SUFFIX[2:], n_pooled=2,
            message=MessageRead(
                layer=message_layer, width=WINDOW, suffix_ids=SUFFIX, opening_ids=OPENING,
                n_heads=N_HEADS,
            ),
            raise_above=cuts[1], lower_below=cuts[0], raise_if_refusal_below=0.9,
            lower_if_refusal_above=0.1, alpha=0.05, delta=0.05, n_by_stratum={},
        ),
    )  # fmt: skip
    artifact = CarrierArtifact(
        manifest,
        raise_carrier=Carrier.additive(carrier_layer, carriers[0]),
        lower_carrier=Carrier.additive(carrier_layer, carriers[1]),
        probe=probe,
        refusal_token_ids=torch.tensor([40, 19152]),
        refusal_token_weights=torch.ones(2),
    )
    save_artifact(artifact, work / "guard.safetensors")
    (work / "vectors").mkdir(exist_ok=True)
    torch.save(carriers[0], work / "vectors" / "carrier.pt")
    print(f"gate at {message_layer} and {gate_layer}, carriers at {carrier_layer}", flush=True)


def prompt(chance: random.Random, kind: int, length: int) -> list[int]:
    """Random tokens, the token that says which kind it is, many times, and the suffix.

    Many times, for random weights keep little of a single token after a dozen layers.
    """
    head = [*[chance.randrange(5000, 150000) for _ in range(HEAD)], *OPENING]
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
            gpu_memory_utilization=0.2,  # free at the start
            kv_cache_memory_bytes=KV_BYTES,
            enable_prefix_caching=False,
            enforce_eager=eager,
            seed=0,
        )
        self.start_seconds = time.perf_counter() - began
        self.chance = random.Random(0)  # noqa: S311 - prompts

    def seconds(
        self,
        kinds: Sequence[int],
        tokens: Sequence[int],
        length: int = PROMPT,
        extra: dict[str, Any] | None = None,
    ) -> float:
        """Answer all at once, as many at a time as there are rows."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": prompt(self.chance, kind, length)} for kind in kinds]
        params = [
            SamplingParams(
                temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False, extra_args=extra
            )
            for n in tokens
        ]
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        if [len(output.outputs[0].token_ids) for output in outputs] != list(tokens):
            raise SystemExit("a response has the wrong length")
        return seconds

    def per_token(
        self, batch: int, kind: int = BENIGN, extra: dict[str, Any] | None = None
    ) -> float:
        """Milliseconds of one decoding step, prompts and start-up taken out."""
        short = self.seconds([kind] * batch, [SHORT] * batch, extra=extra)
        long = self.seconds([kind] * batch, [LONG] * batch, extra=extra)
        return round((long - short) / (LONG - SHORT) * 1000, 4)

    def whole(self, batch: int, share: float = 0.0, extra: dict[str, Any] | None = None) -> float:
        """Milliseconds per token of whole responses, their prompts included; a share flagged."""
        kinds = [HARMFUL if int((i + 1) * share) > int(i * share) else BENIGN for i in range(batch)]
        return round(self.seconds(kinds, [TOKENS] * batch, extra=extra) / TOKENS * 1000, 4)

    def staggered(self, every: int, kind: int = BENIGN, waits: bool = True) -> float:
        """Milliseconds per step of 256 rows while requests come and go, one `every` flagged.

        The first 256 end after 1, 2, 3 … tokens; each that ends lets in one of 256 that follow.

        Args:
            every: 0: nobody is flagged.
            kind: of the others.
            waits: False: never wait for a refusal probability, also where the device keeps pace.
        """
        tokens = [*range(1, 257), *[TOKENS] * 256]
        kinds = [HARMFUL if every and i % every == every // 2 else kind for i in range(512)]
        if not waits:
            self.llm.collective_rpc(never_wait, args=(True,))
        found = round(self.seconds(kinds, tokens) / (sum(tokens) / 256) * 1000, 4)
        if not waits:
            self.llm.collective_rpc(never_wait, args=(False,))
        return found

    def first_token(self, kind: int = BENIGN) -> float:
        """Milliseconds to the first token of a prompt of 512: median of ten, one after another."""
        samples = [self.seconds([kind], [1], 512) for _ in range(10)]
        return round(statistics.median(samples) * 1000, 4)

    def kernels(
        self, batch: int, kind: int = BENIGN, extra: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Device time of a decoding step by kernel: those of 48 tokens less those of 16."""
        found = []
        for tokens in (16, 48):
            self.llm.collective_rpc(profile)
            self.seconds([kind] * batch, [tokens] * batch, extra=extra)
            found.append(self.llm.collective_rpc(profiled)[0])
        short, long = found
        by_name = {
            name: (
                round((us - short.get(name, (0, 0))[0]) / 32, 2),
                round((count - short.get(name, (0, 0))[1]) / 32, 2),
            )
            for name, (us, count) in long.items()
        }
        ordered = sorted(by_name.items(), key=lambda item: -item[1][0])
        return {
            "busy_us_per_step": round(sum(us for us, _ in by_name.values()), 1),
            "launches_per_step": round(sum(count for _, count in by_name.values()), 1),
            "us_and_launches_by_kernel": dict(ordered[:40]),
        }

    def steps(self, every: int) -> list[dict[str, Any]]:
        """Where the host's time goes in staggered arrivals: mean milliseconds by kind of step."""
        self.llm.collective_rpc(watch)
        self.staggered(every)
        found: list[dict[str, Any]] = self.llm.collective_rpc(watched)[0]
        return found

    def host(self) -> list[dict[str, Any]]:
        """The guard's own functions on the host in staggered arrivals, by time; Python profiled."""
        self.llm.collective_rpc(watch_host)
        self.staggered(50)
        found: list[dict[str, Any]] = self.llm.collective_rpc(host_watched)[0]
        return found

    def rounding(self, batch: int) -> dict[str, float]:
        """What a carrier that adds nothing would spend on the rows of a batch, nats."""
        self.llm.collective_rpc(watch_rounding, args=(batch,))
        self.seconds([BENIGN] * batch, [16] * batch)
        found: dict[str, float] = self.llm.collective_rpc(rounding_watched)[0]
        return found

    def status(self) -> dict[str, Any]:
        """What it runs on and what it takes."""
        import torch

        found = {}
        if os.environ.get("TRIMTAB_GUARD"):
            found = json.loads(self.llm.collective_rpc("trimtab_status")[0])
        return {
            "start_seconds": round(self.start_seconds, 1),
            "graph_bytes": found.get("graph_bytes", 0),
            "canary": found.get("canary"),
            "reserved_bytes": self.llm.collective_rpc(reserved)[0],
            "hardware": torch.cuda.get_device_name(),
            "libraries": {name: version(name) for name in ("torch", "vllm")},
        }

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


def reserved(_: Any) -> int:
    """In a worker: bytes that PyTorch took of the device, weights, KV cache and graphs."""
    import torch

    return torch.cuda.memory_reserved()


def never_wait(wrapper: Any, on: bool) -> None:
    """In a worker: steer tentatively also where the device keeps pace with the host, or not."""
    view = wrapper.__dict__["trimtab"]._view
    passing = view.__dict__.setdefault("end_of_forward", view._end)
    view._end = None if on else passing


def watch_rounding(wrapper: Any, batch: int) -> None:
    """In a worker: steer a step's rows with a carrier that adds nothing, from now on."""
    import torch

    from guard.steering import Carrier
    from serve.vllm_guard import Steering

    guarded = wrapper.__dict__["trimtab"]
    view, guard = guarded._view, guarded.guard
    layer, basis = guard.artifact.raise_carrier.layer, guard.artifact.raise_carrier.basis
    nothing = Carrier.additive(layer, torch.zeros_like(basis[0]))
    view.graphs.capture(nothing)
    found = wrapper.__dict__["rounding"] = []

    def look(_: Any, logits: Any) -> None:
        if len(logits) == batch:
            work = Steering(nothing, list(range(batch)), [64.0] * batch, [1.0] * batch, None)
            found.append(view.steer(work, logits)[1].outcome[:, 0].clone())

    guard.on_base = look


def rounding_watched(wrapper: Any) -> dict[str, float]:
    """In a worker: what a carrier that adds nothing spent, nats a row."""
    import torch

    wrapper.__dict__["trimtab"].guard.on_base = None
    nats = torch.cat(wrapper.__dict__.pop("rounding"))
    return {
        "rows": len(nats),
        "mean_nats": float(nats.mean()),
        "p99_nats": float(nats.quantile(0.99)),
        "largest_nats": float(nats.max()),
    }


def profile(wrapper: Any) -> None:
    """In a worker: watch the device's kernels from now on."""
    import torch

    wrapper.__dict__["profiler"] = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA]
    )
    wrapper.__dict__["profiler"].start()


def profiled(wrapper: Any) -> dict[str, tuple[float, int]]:
    """In a worker: kernel → microseconds and launches since `profile`."""
    import torch

    torch.cuda.synchronize()
    profiler = wrapper.__dict__.pop("profiler")
    profiler.stop()
    found: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        name = event.key[:120]  # of which long ones may have several
        us, count = found.get(name, (0.0, 0))
        found[name] = us + float(event.self_device_time_total), count + int(event.count)
    return {name: total for name, total in found.items() if total[0] > 0}


def watch(wrapper: Any) -> None:
    """In a worker: time what the host does in each step, from now on."""
    if "watched" in wrapper.__dict__:
        wrapper.__dict__["watched"].clear()
        return
    log: list[dict[str, Any]] = []
    wrapper.__dict__["watched"] = log
    runner, guarded = wrapper.worker.model_runner, wrapper.__dict__.get("trimtab")
    guard = guarded.guard if guarded else None

    def timed(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if log:
                    log[-1][name] += (time.perf_counter() - began) * 1000

        setattr(owner, name, run)

    timed(runner, "execute_model")
    timed(runner, "sample_tokens")
    if guard is not None:
        from serve.vllm_guard import Later

        for name in ("begin", "step", "settle"):
            timed(guard, name)
        timed(Later, "read")
    execute = runner.execute_model

    def noting(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        row: dict[str, Any] = defaultdict(float)
        row["at"], row["prompts"] = time.perf_counter(), len(scheduled.scheduled_new_reqs)
        row["rows"] = len(scheduled.num_scheduled_tokens)
        row["steered"] = len(guard._active) if guard else 0
        log.append(row)
        return execute(scheduled, *args, **kwargs)

    runner.execute_model = noting


def watch_host(wrapper: Any) -> None:
    """In a worker: profile what the guard does on the host, from now on."""
    import cProfile

    profiler = wrapper.__dict__["host_profiler"] = cProfile.Profile()
    guard = wrapper.__dict__["trimtab"].guard

    def profiled_too(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            profiler.enable()
            try:
                return function(*args)
            finally:
                profiler.disable()

        return run

    for name in ("begin", "step"):
        setattr(guard, name, profiled_too(getattr(guard, name)))


def host_watched(wrapper: Any) -> list[dict[str, Any]]:
    """In a worker: the functions that took most time since `watch_host`, less what they call."""
    import pstats

    guard, profiler = wrapper.__dict__["trimtab"].guard, wrapper.__dict__.pop("host_profiler")
    for name in ("begin", "step"):
        delattr(guard, name)
    rows = [
        {
            "function": f"{Path(file).name}:{line} {name}",
            "calls": calls,
            "own_ms": round(own * 1000, 2),
            "with_callees_ms": round(whole * 1000, 2),
        }
        for (file, line, name), (_, calls, own, whole, _) in pstats.Stats(profiler).stats.items()
    ]
    return sorted(rows, key=lambda row: -float(row["own_ms"]))[:60]


def watched(wrapper: Any) -> list[dict[str, Any]]:
    """In a worker: means of what was timed, by kind of step."""
    log = wrapper.__dict__["watched"]
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row, following in pairwise(log):
        row["whole"] = (following["at"] - row["at"]) * 1000
        kind = (min(row["prompts"], 2), row["steered"] > 0, row["rows"] > 128)
        kinds[kind].append(row)
    names = ("whole", "execute_model", "sample_tokens", "begin", "settle", "step", "read")
    return [
        {
            "prompts": kind[0],
            "steered": kind[1],
            "over_128_rows": kind[2],
            "steps": len(rows),
            "median_whole": round(statistics.median(row["whole"] for row in rows), 3),
            **{name: round(statistics.fmean(row[name] for row in rows), 3) for name in names},
        }
        for kind, rows in sorted(kinds.items())
    ]


def version(name: str) -> str:
    """Of an installed distribution."""
    from importlib.metadata import version as installed

    return installed(name)


def compare(found: dict[str, Any]) -> dict[str, Any]:
    """Ratios of medians to stock's, or, where stock has no such case, to the guard's own."""
    for mode in found.values():
        mode["medians"] = {
            name: round(statistics.median(values), 3) for name, values in mode["samples_ms"].items()
        }

    def ratio(mode: str, case: str, to: str | None = None, base: str = "stock") -> float | None:
        ours = found.get(mode, {}).get("medians", {}).get(case)
        other = found.get(base, {}).get("medians", {}).get(to or case)
        return round(ours / other, 4) if ours and other else None

    def by_batch(mode: str, case: str, to: str, batches: Sequence[int]) -> dict[str, float | None]:
        return {str(n): ratio(mode, f"{case}_{n}", f"{to}_{n}") for n in batches}

    first: dict[str, Any] = next(iter(found.values()), {})
    three, five = (1, 32, 256), (1, 8, 32, 128, 256)
    return {
        "ratios": {
            "idle": by_batch("guard", "decode", "decode", three),
            "flagged_2pct": ratio("guard", "staggered_2pct", "staggered"),
            "all_flagged_k16": ratio("guard", "flagged_32", "whole_32"),
            "every_token": by_batch("guard", "every", "decode", three),
            "ttft_idle": ratio("guard", "first_token"),
            "all_flagged_k16_by_batch": by_batch("guard", "flagged", "whole", five),
            "whole_idle": by_batch("guard", "whole", "whole", five),
            "staggered_nobody_flagged": ratio("guard", "staggered"),
            "flagged_2pct_to_nobody": ratio("guard", "staggered_2pct", "staggered", "guard"),
            "staggered_10pct": ratio("guard", "staggered_10pct", "staggered"),
            "staggered_uncertain": ratio("guard", "staggered_uncertain", "staggered"),
            "staggered_never_waiting": ratio("guard", "staggered_tentative", "staggered"),
            "ttft_uncertain": ratio("guard", "first_token_uncertain", "first_token"),
            "batch_256_by_share": {
                str(share): ratio("guard", f"flagged_256_share_{share}", "whole_256")
                for share in (0.1, 0.5)
            },
            "batch_32_by_k": {
                name: ratio("guard", f"flagged_32_{name}", "whole_32") for name in ("k64", "every")
            },
            "stock_again": {
                "decode": by_batch("stock_again", "decode", "decode", three),
                "staggered": ratio("stock_again", "staggered"),
                "first_token": ratio("stock_again", "first_token"),
            },
            "enforce_eager": by_batch("stock_eager", "decode", "decode", three),
            "hotwire": {
                "idle": by_batch("hotwire", "decode", "decode", three),
                "all_steered": by_batch("hotwire", "steered", "decode", three),
            },
        },
        "hardware": first["start"]["hardware"],
        "libraries": first["start"]["libraries"],
        "date": time.strftime("%Y-%m-%d"),
        "seed": 0,
        "model": "Qwen2.5-7B shape, random bfloat16 weights, CUDA graphs on, V2 model runner",
        "policy": POLICY,
        "modes": found,
    }


if __name__ == "__main__":
    sys.exit(main())
