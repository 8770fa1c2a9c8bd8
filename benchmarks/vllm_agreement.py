"""Do two machines guard alike? Zones, KL and unflagged responses of 200 shipped prompts in vLLM.

    python -m benchmarks.vllm_agreement serve --model M --out gpu.json      with TRIMTAB_GUARD
    python -m benchmarks.vllm_agreement serve --model M --out stock.json --again 16      without
    python -m benchmarks.vllm_agreement compare --one gpu.json --other cpu.json
        --stock stock.json --out RESULT

Every KL is recomputed here by its definition in float64, outside the guard's code.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

TOKENS = 20
POSITIONS = 8  # logprobs are compared where both responses still agree


def main() -> int:
    """Serve once, or compare what was served."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("serve", "compare"))
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rows", type=int, default=64, help="answered at a time")
    parser.add_argument("--again", type=int, default=0, help="then once more, so many at a time")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel; above 1 no audit")
    for name in ("one", "other", "stock"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.what == "serve":
        result = serve(args.model, args.prompts, args.rows, args.again, args.ranks)
    else:
        files = (args.one, args.other, args.stock)
        result = compare(*(json.loads(file.read_text()) for file in files))
        print(json.dumps(result, indent=1))
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def serve(model: str, n: int, rows: int, again: int, ranks: int) -> dict[str, Any]:
    """Answer the prompts greedily and say what was done to each."""
    if ranks == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the guard's state is in this process
    import torch
    from torch import Tensor
    from vllm import LLM, SamplingParams, __version__

    from calibration.prompts import shipped_prompts

    texts = spread([p.text for p in shipped_prompts()], n)
    llm = LLM(
        model, max_model_len=2048, max_num_seqs=rows, dtype="bfloat16", seed=0,
        gpu_memory_utilization=0.03, kv_cache_memory_bytes=1 << 30,  # beside others
        tensor_parallel_size=ranks,
    )  # fmt: skip
    found: Any = None
    if ranks == 1:
        worker: Any = llm.llm_engine.model_executor.driver_worker  # type: ignore[attr-defined]
        found = worker.__dict__.get("trimtab")
    nats: dict[str, list[float]] = defaultdict(list)
    gaps: list[float] = []

    def audit(name: str, _: int, mixed: Tensor, base: Tensor, charged: float) -> None:
        p, q = torch.softmax(mixed.double(), -1), torch.softmax(base.double(), -1)
        nats[name].append(float(torch.special.xlogy(p, p / q).nan_to_num(0.0).sum()))
        gaps.append(abs(nats[name][-1] - charged))

    if found is not None:
        found.guard.on_mixture = audit
    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=5)
    chats: list[Any] = [[{"role": "user", "content": text}] for text in texts]
    outputs = llm.chat(chats, greedy, use_tqdm=False)
    others = []
    for start in range(0, n if again else 0, again or 1):
        others += llm.chat(chats[start : start + again], greedy, use_tqdm=False)
    records: dict[str, Any] = {}
    if found is not None:
        found.guard.settle()
        for name, state in {**found.guard._ended, **found.guard.requests}.items():
            record = state.session.record()
            records[name.rsplit("-", 1)[0]] = {
                "zone": record.zone,
                "score": record.gate_score,
                "refusal_prob": record.refusal_prob,
                "kl_nats": record.kl_nats,
                "budget_nats": record.budget_nats,
                "recomputed_nats": nats[name],
            }

    statuses: list[dict[str, Any]] = []
    if os.environ.get("TRIMTAB_GUARD"):
        statuses = [json.loads(status) for status in llm.collective_rpc("trimtab_status")]
    if ranks > 1 and statuses:
        llm.generate({"prompt_token_ids": [0]}, SamplingParams(max_tokens=1), use_tqdm=False)
        drained = [json.loads(rank) for rank in llm.collective_rpc("trimtab_drain")]
        for name, state in drained[0].items():
            kept = ("zone", "refusal_prob", "kl_nats", "budget_nats")
            records[name.rsplit("-", 1)[0]] = {
                **{key: state["record"][key] for key in kept},
                "score": state["record"]["gate_score"],
                "recomputed_nats": [],
                "ranks_agree": all(rank[name]["record"] == state["record"] for rank in drained),
            }

    def said(output: Any) -> dict[str, Any]:
        return {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                {str(token): value.logprob for token, value in step.items()}
                for step in (output.outputs[0].logprobs or [])[:POSITIONS]
            ],
            "record": records.get(output.request_id),
        }

    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu(),
        "vllm": __version__,
        "torch": torch.__version__,
        "rows": rows,
        "ranks": ranks,
        "guard": statuses[0]["guard"] if statuses else None,
        "canary": [status["canary"] for status in statuses],
        "largest_gap_of_charge_nats": max(gaps, default=0.0),
        "answers": [said(output) for output in outputs],
        "answers_again": [said(output) for output in others],
    }


def spread(items: list[str], n: int) -> list[str]:
    """`n` of the items, evenly over the list."""
    return [items[i * len(items) // n] for i in range(n)]


def cpu() -> str:
    """A word for a machine without a GPU."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def compare(one: dict[str, Any], other: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    """Two guarded runs, and unflagged responses against stock beside stock against itself."""
    pairs = list(zip(one["answers"], other["answers"], strict=True))
    records = [(a["record"], b["record"]) for a, b in pairs]
    zones = [(a["zone"], b["zone"]) for a, b in records]
    first = [
        (a["recomputed_nats"][0], b["recomputed_nats"][0])
        for a, b in records
        if a["recomputed_nats"] and b["recomputed_nats"]
    ]
    whole = [
        (a["record"]["kl_nats"], b["record"]["kl_nats"])
        for a, b in pairs
        if a["tokens"] == b["tokens"] and a["record"]["recomputed_nats"]
    ]
    everything = [a["record"] for a in one["answers"]] + [b["record"] for b in other["answers"]]
    again = {"answers": stock["answers_again"]}
    passed = [i for i, a in enumerate(one["answers"]) if a["record"]["zone"] == "pass"]
    return {
        "prompts": len(pairs),
        "zones_equal": sum(a == b for a, b in zones),
        "zones_that_differ": [
            {"zones": z, "scores": [a["score"], b["score"]],
             "refusal_probs": [a["refusal_prob"], b["refusal_prob"]]}
            for z, (a, b) in zip(zones, records, strict=True) if z[0] != z[1]
        ],
        "zones": dict(Counter(zone for zone, _ in zones)),
        "score_gap": distance([(a["score"], b["score"]) for a, b in records]),
        "refusal_prob_gap": distance([(a["refusal_prob"], b["refusal_prob"]) for a, b in records]),
        "first_token_nats_gap": distance(first),
        "whole_nats_gap_where_tokens_agree": distance(whole),
        "largest_overrun_nats": max(
            sum(r["recomputed_nats"]) - r["budget_nats"] for r in everything if r["recomputed_nats"]
        ),
        "largest_gap_of_charge_nats": max(
            one["largest_gap_of_charge_nats"], other["largest_gap_of_charge_nats"]
        ),
        "unflagged": {
            "requests": len(passed),
            "guarded_against_stock": apart(one, stock, passed),
            "stock_against_stock_at_another_batch_size": apart(stock, again, passed),
        },
        "runs": {
            name: {key: value for key, value in run.items() if not key.startswith("answers")}
            for name, run in {"one": one, "other": other, "stock": stock}.items()
        },
    }  # fmt: skip


def distance(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Median and largest distance."""
    gaps = [abs(a - b) for a, b in pairs]
    if not gaps:
        return {"n": 0}
    return {"n": len(gaps), "median": statistics.median(gaps), "largest": max(gaps)}


def apart(one: dict[str, Any], other: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """How often whole responses are equal, and how far logprobs are while they are."""
    gaps, equal = [], 0
    for i in rows:
        a, b = one["answers"][i], other["answers"][i]
        equal += a["tokens"] == b["tokens"]
        for place, (x, y) in enumerate(zip(a["logprobs"], b["logprobs"], strict=True)):
            gaps += [(x[token], y[token]) for token in x.keys() & y.keys()]
            if a["tokens"][place] != b["tokens"][place]:
                break
    return {"equal_responses": equal, "logprob_gap": distance(gaps)}


if __name__ == "__main__":
    sys.exit(main())
