"""Runs one scenario in real vLLM and writes what it saw as JSON; a process of its own each time.

vLLM is one engine per process, and a guard is part of the process. So the tests start this file:

    python -m tests.serve.vllm_driver SCENARIO MODEL OUT [JSON OPTIONS]
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILES = ("harmful", "hard_benign", "ordinary_benign")
TEMPERATURES = (0.0, 0.8, 0.0, 1.2)


def texts(n_each: int) -> list[str]:
    """Prompts of three kinds, mixed."""
    chosen = []
    for name in FILES:
        lines = files("calibration").joinpath(f"prompt_sets/{name}.jsonl").read_text().splitlines()
        chosen.append([json.loads(line)["text"] for line in lines[:: len(lines) // n_each]])
    return [text for group in zip(*(c[:n_each] for c in chosen), strict=True) for text in group]


# ------------------------------------------------------------------ guard and reference


def make_guard(model: str, out: Path, _: dict[str, Any]) -> None:
    """A guard with differences in means, made in seconds; a third is raised and a third lowered."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from guard.artifact import save_artifact
    from tests.serve.test_engine_model import Subject, _make_guard

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    save_artifact(_make_guard(Subject(loaded, tokenizer, None)), out)  # type: ignore[arg-type]


def quantise(model: str, out: Path, _: dict[str, Any]) -> None:
    """A checkpoint with 4-bit weights in groups of 128, in the format of compressed-tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import load_file, save_file

    folder = out.with_suffix("")
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(model).glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if name.endswith("_proj.weight"):
                groups = weight.float().unflatten(1, (-1, 128))
                scale = (groups.abs().amax(dim=-1, keepdim=True) / 7).clamp_min(1e-8)
                whole = (groups / scale).round().clamp(-8, 7).to(torch.int8).flatten(1)
                tensors[name + "_packed"] = pack_to_int32(whole, 4)
                tensors[name + "_scale"] = scale.squeeze(-1).to(weight.dtype)
                tensors[name + "_shape"] = torch.tensor(weight.shape)
            else:
                tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    four_bits = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**four_bits, "strategy": "group", "group_size": 128},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    out.write_text(json.dumps(str(folder)))


def reference(model: str, out: Path, options: dict[str, Any]) -> None:
    """Gate readings and zones of the transformers engine."""
    from guard.policy import Policy
    from serve.engine import ChatMessage, GenerationRequest, SamplingOptions
    from serve.transformers_engine import load_engine

    engine = load_engine(model, Path(os.environ["TRIMTAB_GUARD"]), Policy(mode="observe"))

    async def ask(text: str) -> dict[str, Any]:
        ids = engine.encode_chat([ChatMessage("user", text)])
        request = GenerationRequest("r", ids, SamplingOptions(max_tokens=1, temperature=0.0))
        steps = [step async for step in engine.generate(request)]
        record = steps[-1].record
        assert record is not None
        return {
            "zone": record.zone,
            "score": record.gate_score,
            "refusal_prob": record.refusal_prob,
        }

    async def run() -> list[dict[str, Any]]:
        await engine.start()
        readings = [await ask(text) for text in texts(options["n_each"])]
        await engine.stop()
        return readings

    out.write_text(json.dumps(asyncio.run(run())))


# ------------------------------------------------------------------ vLLM


class Engine:
    """An `LLM` in this process, with the guard's own state in reach if there is one."""

    def __init__(self, model: str, **options: Any) -> None:
        from vllm import LLM

        defaults = {"enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 16}
        self.llm = LLM(model, **{**defaults, **options})
        worker = self.llm.llm_engine.model_executor.driver_worker
        found = worker.__dict__.get("trimtab")
        self.guard = found.guard if found is not None else None
        self.spent: dict[str, float] = defaultdict(float)
        self.temperatures: dict[str, float] = {}
        if self.guard is not None:
            self.guard.on_mixture = self._audit
        core = self.llm.llm_engine.engine_core.engine_core
        # vLLM compiles grammars in a thread, and a request joins the batch when its grammar is
        # there: under load a step later, and the rows of another batch shape round otherwise.
        core.structured_output_manager._use_async_grammar_compilation = False
        self.batches: list[list[int]] = []
        schedule = core.scheduler.schedule

        def noting_schedule(*args: Any, **kwargs: Any) -> Any:
            step = schedule(*args, **kwargs)
            self.batches.append(list(step.num_scheduled_tokens.values()))
            return step

        core.scheduler.schedule = noting_schedule

    def _audit(self, name: str, _: int, mixed: Tensor, base: Tensor, nats: float) -> None:
        """KL(mixed ‖ base) by its definition, in float64 and independently of the guard's code."""
        temperature = self.temperatures.get(name.rsplit("-", 1)[0]) or 1.0
        p = torch.softmax(mixed.double() / temperature, dim=-1)
        q = torch.softmax(base.double() / temperature, dim=-1)
        self.spent[name] += float(torch.special.xlogy(p, p / q).nan_to_num(0.0).sum())
        assert nats >= 0.0

    def records(self) -> dict[str, dict[str, Any]]:
        """External request id → what the guard did, with the KL recomputed here."""
        found: dict[str, dict[str, Any]] = {}
        if self.guard is None:
            return found
        states = {**self.guard._ended, **self.guard.requests}
        for name, state in states.items():
            record = state.session.record()
            found[name.rsplit("-", 1)[0]] = {
                "zone": record.zone,
                "score": record.gate_score,
                "refusal_prob": record.refusal_prob,
                "kl_nats": record.kl_nats,
                "budget_nats": record.budget_nats,
                "shadow_passes": record.shadow_passes,
                "recomputed": self.spent[name],
                "failed": state.failed,
            }
        return found

    def chat(
        self, conversations: Sequence[Any], params: Sequence[Any], **options: Any
    ) -> list[dict[str, Any]]:
        """Answer; conversations are texts or lists of messages."""
        first = int(self.llm.request_counter.counter)
        for i, param in enumerate(params):
            self.temperatures[str(first + i)] = param.temperature
        asked = [
            [{"role": "user", "content": c}] if isinstance(c, str) else c for c in conversations
        ]
        outputs = self.llm.chat(asked, list(params), use_tqdm=False, **options)
        records = self.records()
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "text": output.outputs[0].text,
                "cached": output.num_cached_tokens,
                "logprobs": [
                    sorted((token, value.logprob) for token, value in step.items())
                    for step in output.outputs[0].logprobs or []
                ],
                "record": records.get(output.request_id),
            }
            for output in outputs
        ]


def answers(model: str, out: Path, options: dict[str, Any]) -> None:
    """A mixed batch with logprobs: greedy and sampled, penalties, a grammar.

    Every response has its full length, steered or not, so that all runs have the same batches.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    engine = Engine(model, enforce_eager=options.get("eager", True))
    prompts = texts(options["n_each"])
    params = [
        SamplingParams(
            temperature=TEMPERATURES[i % 4],
            seed=i,
            max_tokens=options.get("max_tokens", 20),
            ignore_eos=i != 7,
            logprobs=2,
            repetition_penalty=1.2 if i % 5 == 4 else 1.0,
            structured_outputs=StructuredOutputsParams(choice=["yes", "no"]) if i == 7 else None,
        )
        for i in range(len(prompts))
    ]
    found = engine.chat(prompts, params)
    batches = list(engine.batches)
    raised = [
        text
        for text, answer in zip(prompts, found, strict=True)
        if engine.guard is not None and answer["record"]["zone"] == "raise"
    ]
    features = _features(engine, raised[0]) if raised else {}
    late: list[dict[str, Any]] = []
    if engine.guard is not None and options.get("eager", True):
        engine.guard.late, engine.guard.others_wait = True, 1  # as on a GPU under load
        engine.llm.reset_prefix_cache()
        engine.batches.clear()
        late = engine.chat(prompts, params)
    again = {"answers": late, "batches": list(engine.batches)}
    written = {"answers": found, "batches": batches, "features": features, "late": again}
    out.write_text(json.dumps(written))


def _features(engine: Engine, text: str) -> dict[str, Any]:
    """Request features of vLLM on a prompt that is raised: name → what every choice was."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    answer = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}}
    schema = {**answer, "required": ["answer"], "additionalProperties": False}
    cases = {
        "n": SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=20),
        "stop": SamplingParams(temperature=0.0, max_tokens=20, stop=[" "]),
        "json": SamplingParams(
            temperature=0.0, max_tokens=40, structured_outputs=StructuredOutputsParams(json=schema)
        ),
        "sampling": SamplingParams(
            temperature=0.9,
            top_p=0.9,
            top_k=40,
            min_p=0.02,
            presence_penalty=1.0,
            frequency_penalty=1.0,
            repetition_penalty=1.1,
            logit_bias={0: -50.0},
            bad_words=["sorry"],
            min_tokens=20,
            max_tokens=20,
            seed=1,
        ),
        "logprobs": SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=1),
    }
    first = int(engine.llm.request_counter.counter)
    for i, params in enumerate(cases.values()):
        names = [f"{first + i}", *(f"{choice}_{first + i}" for choice in range(3))]
        engine.temperatures.update(dict.fromkeys(names, params.temperature))
    chats: list[Any] = [[{"role": "user", "content": text}]] * len(cases)
    outputs = engine.llm.chat(chats, list(cases.values()), use_tqdm=False)
    records = engine.records()
    return {
        name: [
            {
                "text": choice.text,
                "n_tokens": len(choice.token_ids),
                "n_logprobs": len(choice.logprobs or []),
                "n_prompt_logprobs": len(output.prompt_logprobs or []),
                "record": records[
                    output.request_id if params.n == 1 else f"{choice.index}_{output.request_id}"
                ],
            }
            for choice in output.outputs
        ]
        for (name, params), output in zip(cases.items(), outputs, strict=True)
    }


def zones(model: str, out: Path, options: dict[str, Any]) -> None:
    """Gate readings of many prompts, with chunked prefill; every one twice, the second cached."""
    from vllm import SamplingParams

    engine = Engine(model, max_num_batched_tokens=options.get("chunk", 48), block_size=32)
    one = SamplingParams(temperature=0.0, max_tokens=1)
    prompts = texts(options["n_each"])
    rounds = [engine.chat(prompts, [one] * len(prompts)) for _ in range(2)]
    out.write_text(json.dumps(rounds))


def prefix(model: str, out: Path, _: dict[str, Any]) -> None:
    """Shared prefixes and a second turn behind a guarded first one, cached and cold."""
    from vllm import SamplingParams

    engine = Engine(model, block_size=32)
    long = "You are a careful assistant. " + "Rule: be brief, and be exact about units. " * 40
    greedy = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2)
    prompts = texts(2)

    def ask(text: str, *history: dict[str, str]) -> dict[str, Any]:
        messages = [{"role": "system", "content": long}, *history]
        return engine.chat([[*messages, {"role": "user", "content": text}]], [greedy])[0]

    def conversation(cold: bool) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for text in prompts:
            found.append(ask(text))
            if cold:
                engine.llm.reset_prefix_cache()
            history = [
                {"role": "user", "content": text},
                {"role": "assistant", "content": first[len(found) // 2]},
            ]
            found.append(ask("And why is that?", *history))
            if cold:
                engine.llm.reset_prefix_cache()
        return found

    first = ["I would rather talk about something else."] * len(prompts)
    warm = conversation(cold=False)
    again = ask(prompts[0])
    engine.llm.reset_prefix_cache()
    out.write_text(json.dumps({"warm": warm, "again": again, "cold": conversation(cold=True)}))


def storm(model: str, out: Path, options: dict[str, Any]) -> None:
    """Many requests at once, random aborts, and a KV cache that forces preemption."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    engine = Engine(
        model,
        max_num_seqs=64,
        num_gpu_blocks_override=options["n_blocks"],
        block_size=32,
        max_num_batched_tokens=256,
        max_model_len=512,
        enable_prefix_caching=True,
        disable_log_stats=False,
    )
    llm = engine.llm.llm_engine
    tokenizer = engine.llm.get_tokenizer()
    chance = random.Random(0)  # noqa: S311 - which requests are aborted
    prompts = texts(22)[:64]
    for i, text in enumerate(prompts):
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        # No seeds: vLLM 0.32 itself fails on a CPU where a seeded prompt is prefilled in chunks.
        params = SamplingParams(temperature=TEMPERATURES[i % 4], max_tokens=chance.randint(4, 40))
        engine.temperatures[f"s{i}"] = params.temperature
        llm.add_request(f"s{i}", {"prompt_token_ids": list(ids)}, params)
    aborted, finished, steps = [], {}, 0
    while llm.has_unfinished_requests():
        for output in llm.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        left = [f"s{i}" for i in range(64) if f"s{i}" not in finished and f"s{i}" not in aborted]
        if steps % 7 == 0 and left and len(aborted) < 12:
            victim = chance.choice(left)
            llm.abort_request([victim])
            aborted.append(victim)
    try:
        loose = SamplingParams(max_tokens=1, extra_args={"trimtab_policy": "loose"})
        engine.chat(["Hello"], [loose])
        refused = None
    except VLLMValidationError as error:
        refused = str(error)
    # A last request flushes what vLLM still has to tell its workers; then nothing may be left.
    engine.chat(["Hello"], [SamplingParams(max_tokens=1, temperature=0.0)])
    engine.chat(["Hello"], [SamplingParams(max_tokens=1, temperature=0.0)])
    preemptions = sum(
        getattr(metric, "value", 0)  # histograms have none
        for metric in engine.llm.get_metrics()
        if metric.name.startswith("vllm:num_preemptions")
    )
    out.write_text(
        json.dumps(
            {
                "records": engine.records(),
                "finished": finished,
                "aborted": aborted,
                "preemptions": preemptions,
                "refused": refused,
                "running": sorted(engine.guard.requests) if engine.guard else [],
            }
        )
    )


def lora(model: str, out: Path, options: dict[str, Any]) -> None:
    """A batch in which every other request has an adapter, and the zero-strength shadow of each."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from serve.canary import compare

    engine = Engine(model, enable_lora=True, max_lora_rank=8, max_num_seqs=12)
    adapter = LoRARequest("adapter", 1, _random_adapter(model, out.with_suffix("")))
    gaps: list[float] = []

    def look(runner: Any, logits: Tensor) -> None:
        # Backwards and twice, so that no row has the place that it has in the step.
        rows = list(range(logits.shape[0]))[::-1] * 2
        for layer in engine.guard.layers[1:]:
            null = runner.last_hidden(layer)[rows]
            again = runner.last_token_again(rows, layer, null)
            gaps.append(compare("none", layer, logits[rows], again, again + 1.0).gap)

    if engine.guard is not None:
        engine.guard.on_base = look
    prompts = texts(options["n_each"])
    params = [
        SamplingParams(
            temperature=TEMPERATURES[i % 4], seed=i, max_tokens=12, ignore_eos=True, logprobs=2
        )
        for i in range(len(prompts))
    ]
    adapters = [adapter if i % 2 else None for i in range(len(prompts))]
    found = engine.chat(prompts, params, lora_request=adapters)
    out.write_text(json.dumps({"answers": found, "batches": engine.batches, "gaps": gaps}))


def _random_adapter(model: str, folder: Path) -> str:
    """A LoRA adapter that changes what every layer does."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    heads = config.hidden_size // config.num_attention_heads
    sizes = {
        "self_attn.q_proj": (config.hidden_size, config.hidden_size),
        "self_attn.v_proj": (config.hidden_size, config.num_key_value_heads * heads),
        "mlp.down_proj": (config.intermediate_size, config.hidden_size),
    }
    chance = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (n_in, n_out) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(8, n_in, generator=chance) / n_in**0.5
            b = torch.randn(n_out, 8, generator=chance) * 0.05
            tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
        "target_modules": [name.split(".")[1] for name in sizes],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return str(folder)


def two_ranks(model: str, out: Path, options: dict[str, Any]) -> None:
    """Tensor parallelism: what each rank's guard did, over the RPC that operators have."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[-1]}"  # else one NUMA node each
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, enforce_eager=True, max_model_len=1024, max_num_seqs=16, tensor_parallel_size=2
    )
    prompts = texts(options["n_each"])
    params = [
        SamplingParams(temperature=TEMPERATURES[i % 4], seed=i, max_tokens=20)
        for i in range(len(prompts))
    ]
    llm.chat([[{"role": "user", "content": text}] for text in prompts], params, use_tqdm=False)
    llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=1), use_tqdm=False)
    ranks = [json.loads(reply) for reply in llm.collective_rpc("trimtab_drain")]
    statuses = [json.loads(reply) for reply in llm.collective_rpc("trimtab_status")]
    found = [{k: v["record"] for k, v in rank.items()} for rank in ranks]
    out.write_text(json.dumps({"ranks": found, "statuses": statuses}))


def refused(model: str, out: Path, options: dict[str, Any]) -> None:
    """Every configuration that is not exact, with the error it gives before anything is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    cases: dict[str, dict[str, Any]] = {
        "fine": {},
        "--pipeline-parallel-size": {"pipeline_parallel_size": 2},
        "--data-parallel-size": {"data_parallel_size": 2},
        "--speculative-config": {
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}
        },
        "VLLM_USE_RUST_FRONTEND": {},
        "--enable-prompt-embeds": {"enable_prompt_embeds": True},
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": {"enable_lora": True},
        "--max-num-batched-tokens": {
            "enable_lora": True,
            "max_num_seqs": 512,
            "max_num_batched_tokens": 512,
        },
        "--load-format": {"load_format": "dummy"},
        "--quantization": {"quantization": "fp8"},
        "--runner": {"runner": "pooling"},
        "--kv-transfer-config": {
            "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
        },
        **options.get("more", {}),
    }
    seen = {}
    for name, extra in cases.items():
        for variable in ("VLLM_USE_RUST_FRONTEND", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            os.environ[variable] = str(int(name == variable))
        try:
            config = EngineArgs(model, max_model_len=512, **extra).create_engine_config()
            seen[name] = f"started, salt {config.additional_config.get('trimtab')}"
        except Exception as error:  # noqa: BLE001 - the test looks at what it is
            seen[name] = f"{type(error).__name__}: {error}"
    out.write_text(json.dumps(seen))


def start(model: str, out: Path, options: dict[str, Any]) -> None:
    """Start an engine, which is expected to fail; also with the first error swallowed."""
    seen = []
    for _ in range(options.get("times", 1)):
        try:
            Engine(model)
            seen.append("started")
        except Exception as error:  # noqa: BLE001 - the test looks at what it is
            seen.append(f"{type(error).__name__}: {error}")
    out.write_text(json.dumps(seen))


SCENARIOS: dict[str, Callable[[str, Path, dict[str, Any]], None]] = {
    f.__name__: f
    for f in (
        make_guard,
        quantise,
        reference,
        answers,
        zones,
        prefix,
        storm,
        lora,
        two_ranks,
        refused,
        start,
    )
}

if __name__ == "__main__":
    scenario, model_dir, target, *rest = sys.argv[1:]
    SCENARIOS[scenario](model_dir, Path(target), json.loads(rest[0]) if rest else {})
