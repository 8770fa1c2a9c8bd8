"""The guard inside one vLLM worker: attached after the model is loaded, proven after warm-up."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from guard.artifact import CarrierArtifact
from guard.errors import NotArmedError, UnsupportedModelError
from guard.policy import Policy
from guard.session import Record
from serve.canary import CanaryReading, check_reading, compare
from serve.vllm_desk import Desk, WithDesk
from serve.vllm_guard import GuardedRequest, Runner, StepGuard
from serve.vllm_runner import ModelRunner, attach, is_v1

__all__ = ["WorkerGuard"]

_log = logging.getLogger("trimtab.vllm")

_CANARY = "trimtab-canary"
_GRAPHS_AGREE = 3.0  # times the rounding of one pass: null and steered rows round by themselves


class WorkerGuard:
    """One worker's guard and what it can say about itself.

    Args:
        worker: vLLM's, with its model loaded and nothing run yet.
        artifact: the guard file.
        policy: the operator's.
        calibrated: it can be calibrated, too.

    Attributes:
        guard: the guard of its steps.
        desk: where calibrations are served; None unless `calibrated`.
        runner: which of vLLM's model runners it has, V1 or V2.
        readings: what the canary showed; empty until it ran.
        graph_bytes: device memory that the captured shadow passes take.

    Raises:
        UnsupportedModelError: this model or runner cannot be guarded.
    """

    def __init__(
        self,
        worker: Any,
        artifact: CarrierArtifact,
        policy: Policy,
        *,
        calibrated: bool = False,
    ) -> None:
        self._worker = worker
        self._artifact = artifact
        runner = worker.model_runner
        n_layers = runner.model_config.get_num_layers(runner.parallel_config)
        self.guard = StepGuard(artifact, policy, runner.device)
        if self.guard.layers[-1] >= n_layers:
            raise UnsupportedModelError(
                f"the guard reads layers {self.guard.layers} of a {n_layers}-layer model"
            )
        self.runner = "V1" if is_v1(runner) else "V2"
        self.desk: Desk | None = None
        if calibrated:
            both = WithDesk(self.guard)
            self._view: ModelRunner = attach(runner, both)
            self.desk = both.desk = Desk(self._view, torch.device(runner.device))
        else:
            self._view = attach(runner, self.guard)
        self.readings: list[CanaryReading] = []
        self.graph_bytes = 0

    @property
    def armed(self) -> bool:
        """True once the canary has shown that the guard works here."""
        return bool(self.readings)

    def status(self) -> str:
        """JSON: rank, whether it is armed, with which guard and policy, and what was seen."""
        return json.dumps(
            {
                "rank": self._worker.rank,
                "armed": self.armed,
                "guard": self._artifact.artifact_id,
                "model": self._artifact.manifest.model.weights_sha256,  # checked before the load
                "mode": self.guard.policy.mode,
                "policy": self.guard.policy.digest,
                "runner": self.runner,
                "layers": self.guard.layers,
                "running": len(self.guard.requests),
                "graph_bytes": self.graph_bytes,
                "canary": [asdict(reading) for reading in self.readings],
            }
        )

    def drain(self, request_ids: Sequence[str] | None) -> str:
        """JSON: request id → what the guard did to it; see `StepGuard.drain`."""
        states = self.guard.drain(request_ids)
        return json.dumps({name: _as_json(self.guard, state) for name, state in states.items()})

    @torch.inference_mode()
    def arm(self) -> None:
        """Prove on vLLM's own path, prefill and decode, that the guard works.

        Raises:
            UnsupportedModelError: the KV cache cannot be read without being written.
            NotArmedError: it does not work here; the message says what was seen.
        """
        self._view.check_cache()
        self.graph_bytes = self._view.capture([carrier for _, carrier in self._carriers()])
        readings: list[CanaryReading] = []

        def look(runner: Runner, logits: Tensor) -> None:
            readings[:] = [self._try(runner, logits, *item) for item in self._carriers()]
            for reading in readings:
                check_reading(reading)

        self.guard.awake = self.guard.rehearsing = True
        self.guard.on_base = look
        try:
            steps = self._run_canary()
        finally:
            self.guard.on_base, self.guard.rehearsing = None, False
            self.guard.reset()
        if steps != 2 or not readings:
            raise NotArmedError(
                f"the guard saw {steps} of the canary's 2 steps: something else replaces vLLM's"
                " model runner; remove other plugins or name only trimtab in VLLM_PLUGINS"
            )
        self.readings = readings
        _log.info("rank %s is armed: %s", self._worker.rank, self.status())

    def _carriers(self) -> list[tuple[str, Any]]:
        artifact = self.guard.artifact  # whose tensors are on the device
        found = {"raise": artifact.raise_carrier, "lower": artifact.lower_carrier}
        return [(name, carrier) for name, carrier in found.items() if carrier is not None]

    def _try(self, runner: Runner, logits: Tensor, name: str, carrier: Any) -> CanaryReading:
        rows = list(range(logits.shape[0]))
        null = runner.last_hidden(carrier.layer)
        steered = carrier.apply(null.float()).to(null.dtype)
        reading = compare(
            name,
            carrier.layer,
            logits,
            runner.last_token_again(rows, carrier.layer, null.clone()),
            runner.last_token_again(rows, carrier.layer, steered),
        )
        gap = self._view.graph_gap(carrier, rows, logits)
        if not gap <= _GRAPHS_AGREE * reading.tolerance:
            raise NotArmedError(
                f"the captured shadow pass of the {name} carrier gives other logits than the same"
                f" pass without CUDA graphs: off by {gap:.2g} standard deviations; start vLLM with"
                " --enforce-eager"
            )
        return reading

    def _run_canary(self) -> int:
        """Run two short requests for two tokens each; return the steps the guard saw."""
        from vllm import SamplingParams
        from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

        prompts = self._prompts()
        params = SamplingParams(temperature=0.0, max_tokens=2)
        if self._worker.device.type == "cuda":  # its samplers compile what an option needs
            params = SamplingParams.for_sampler_warmup()
            params.prompt_logprobs = None
        size = self._view.n_slots // self._view.n_blocks
        names = [f"{_CANARY}-{i}" for i in range(len(prompts))]
        lengths = dict(zip(names, map(len, prompts), strict=True))
        prefill = SchedulerOutput.make_empty()
        first = 1  # block 0 is vLLM's null block
        for name, prompt in zip(names, prompts, strict=True):
            n_blocks = -(-(len(prompt) + 2) // size)
            blocks = list(range(first, first + n_blocks))
            first += n_blocks
            prefill.scheduled_new_reqs.append(_new_request(name, prompt, blocks, params))
        if first > self._view.n_blocks:
            raise NotArmedError("the KV cache is too small for the canary; give vLLM more memory")
        prefill.num_scheduled_tokens = dict(lengths)
        prefill.total_num_scheduled_tokens = sum(lengths.values())
        decode = SchedulerOutput.make_empty()
        cached = CachedRequestData.make_empty()
        cached.req_ids = names
        cached.new_block_ids = [None] * len(names)
        cached.num_computed_tokens = [lengths[name] for name in names]
        cached.num_output_tokens = [1] * len(names)
        decode.scheduled_cached_reqs = cached
        decode.num_scheduled_tokens = dict.fromkeys(names, 1)
        decode.total_num_scheduled_tokens = len(names)
        over = SchedulerOutput.make_empty()
        over.finished_req_ids = set(names)
        runner, seen = self._worker.model_runner, 0
        for step in (prefill, decode):
            before = self.guard.n_steps
            runner.execute_model(step)
            output = runner.sample_tokens(None)
            if hasattr(output, "get_output"):
                output.get_output()
            seen += self.guard.n_steps - before
        runner.execute_model(over)
        return seen

    def _prompts(self) -> list[list[int]]:
        ids = [
            *self._artifact.refusal_token_ids.tolist()[:8],
            *self._artifact.manifest.gate.instruction_suffix_ids,
        ]
        return [ids * 2, ids] if len(ids) > 1 else [ids * 4, ids * 2]


def _new_request(name: str, prompt: list[int], blocks: list[int], params: Any) -> Any:
    from vllm.v1.core.sched.output import NewRequestData

    return NewRequestData(
        req_id=name,
        prompt_token_ids=prompt,
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=(blocks,),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=prompt,  # read by the V2 runner only
    )


def _as_json(guard: StepGuard, state: GuardedRequest) -> dict[str, Any]:
    record: Record = guard.record(state)
    return {
        "record": asdict(record),
        "failed": state.failed,
        "unguarded": state.unguarded,
        "gate_seconds": state.gate_seconds,
    }
