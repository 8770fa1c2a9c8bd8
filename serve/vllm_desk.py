"""What a calibration reads inside one vLLM worker: hidden states and shadow passes of its prompts.

A prompt of the calibration is a request like any other, of one token, so vLLM's scheduler decides
when it runs. In the step that would sample its token its whole KV cache is there, and its last
tokens are run again, eagerly, from any layer on, as a shadow pass runs them: that gives resid_pre
of every layer without asking the compiled model for any, and writes nothing.

    put(job) ─► requests `trimtab-calibration-JOB-i` ─► read, each in its step ─► take(job)

Requests are known by the job in their names, which nobody can guess.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guard.endpoint import CaptureRequest, ShadowRequest, pack, unpack
from guard.errors import NotArmedError
from serve.canary import compare
from serve.vllm_guard import Runner, SamplingRow, StepGuard
from serve.vllm_runner import ModelRunner, attach

__all__ = ["Desk", "WithDesk", "WorkerDesk", "job_of", "request_name"]

_log = logging.getLogger("trimtab.vllm")

_PREFIX = "trimtab-calibration-"
_MAX_JOBS = 64  # that are remembered; vLLM may still name the requests of one that is over


def request_name(job: str, index: int) -> str:
    """The id of a job's request; `job` has no hyphen."""
    return f"{_PREFIX}{job}-{index}"


def job_of(request_id: str) -> tuple[str, int] | None:
    """Job and index of a request, whatever vLLM has put behind its id."""
    if not request_id.startswith(_PREFIX):
        return None
    job, index, *_ = [*request_id.removeprefix(_PREFIX).split("-"), ""]
    return (job, int(index)) if index.isdecimal() else None


@dataclass
class _Job:
    """One piece of work, and what was found so far.

    Attributes:
        work: None for requests that only answer.
        tensors: that came with it, on the device.
        found: index of the prompt → its tensors, on the device.
        fault: why it cannot be done.
    """

    work: CaptureRequest | ShadowRequest | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    found: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    fault: str = ""


class Desk:
    """The calibration's work in one worker.

    Args:
        runner: the model runner's view.
        device: of the model.
    """

    def __init__(self, runner: ModelRunner, device: torch.device) -> None:
        self._runner, self._device = runner, device
        self._jobs: OrderedDict[str, _Job | None] = OrderedDict()  # None: it is over
        self._open = 0
        self._checked = False

    def mine(self, request_id: str) -> bool:
        """True if a request belongs to a job, and so is neither guarded nor counted."""
        named = job_of(request_id)
        return named is not None and named[0] in self._jobs

    def put(self, job: str, kind: str, body: bytes) -> None:
        """Begin a job: "capture" or "shadow" with the packed request, "respond" without.

        Raises:
            RequestError: it cannot be read.
            UnsupportedModelError: the KV cache cannot be read without being written.
        """
        if not self._checked:
            self._runner.check_cache()
            self._checked = True
        work: CaptureRequest | ShadowRequest | None = None
        tensors: dict[str, Tensor] = {}
        if kind == "capture":
            work, _ = unpack(body, CaptureRequest)
        elif kind == "shadow":
            work, found = unpack(body, ShadowRequest)
            tensors = {name: tensor.to(self._device) for name, tensor in found.items()}
        self._jobs[job] = _Job(work, tensors)
        self._open += 1
        while len(self._jobs) > _MAX_JOBS:
            self._open -= self._jobs.popitem(last=False)[1] is not None

    def take(self, job: str) -> tuple[str, bytes]:
        """End a job; why it failed, or "" and its packed tensors."""
        done = self._jobs.get(job)
        if done is None:
            return "the worker knows no such job", b""
        self._jobs[job] = None
        self._open -= 1
        if done.work is None or done.fault:
            return done.fault, b""
        n = len(done.work.prompts)
        if len(done.found) != n:
            return f"{len(done.found)} of {n} prompts were seen by the model runner", b""
        rows = [done.found[i] for i in range(n)]
        if isinstance(done.work, CaptureRequest):
            return "", pack({k: torch.stack([row[k] for row in rows]) for k in rows[0]})
        # They were run prompt by prompt, and are asked for in the order of `rows`.
        order = torch.tensor(_by_prompt(done.work.rows, range(n))).argsort()
        return "", pack({"difference": torch.cat([row["difference"] for row in rows])[order]})

    def begin(self, runner: Runner) -> bool:
        """True if this step holds a prompt of an open job."""
        return self._open > 0 and any(map(self.mine, runner.request_ids))

    @torch.inference_mode()
    def step(self, runner: Runner, logits: Tensor) -> None:
        """Read what the jobs ask for, before any row is steered.

        Args:
            runner: the step for which `begin` was called.
            logits: (n_rows, vocab) of the base pass.
        """
        if not self._open:
            return
        names = [name for name in runner.request_ids if self.mine(name)]
        due: dict[str, list[tuple[int, SamplingRow]]] = {}
        for row in runner.sampling_rows(names) if names else ():
            named = job_of(row.request_id)
            if named is not None and row.position == 0:
                due.setdefault(named[0], []).append((named[1], row))
        for name, rows in due.items():
            job = self._jobs[name]
            if job is None or job.work is None or job.fault:
                continue
            try:
                if isinstance(job.work, CaptureRequest):
                    self._capture(job, job.work, rows, logits)
                else:
                    self._shadow(job, job.work, rows)
            except Exception as error:  # noqa: BLE001 - others are served in this step, too
                job.fault = f"{type(error).__name__}: {error}"
                _log.exception("a calibration's job failed")

    def _capture(
        self,
        job: _Job,
        work: CaptureRequest,
        due: Sequence[tuple[int, SamplingRow]],
        logits: Tensor,
    ) -> None:
        """Run the last tokens of prompts again from the embeddings on; note what enters layers.

        Each token reads the keys and values of the base pass, so tokens may be run in any groups.
        """
        k = work.n_last
        tokens = [(index, row, back) for index, row in due for back in range(k, 0, -1)]
        hidden: dict[int, list[Tensor]] = {layer: [] for layer in work.layers}
        ends: list[Tensor] = []
        for start in range(0, len(tokens), self._runner.max_rows):
            part = tokens[start : start + self._runner.max_rows]
            kept: dict[int, Tensor] = {}
            last = self._runner.rerun(
                [row.row for _, row, _ in part],
                [row.n_prompt - back + 1 for _, row, back in part],
                0,
                self._runner.embed([work.prompts[index][-back] for index, _, back in part]),
                partial(_keep, work.layers, kept),
            )
            ends.append(last[[i for i, (_, _, back) in enumerate(part) if back == 1]])
            for layer, states in kept.items():
                hidden[layer].append(states)
        base = logits[[row.row for _, row in due]].clone()
        _check_again(base, self._runner.logits_of(torch.cat(ends)))
        whole = {layer: torch.cat(states) for layer, states in hidden.items()}
        for i, (index, _) in enumerate(due):
            own = slice(i * k, (i + 1) * k)
            job.found[index] = {"logits": base[i]}
            job.found[index] |= {f"layers.{layer}": found[own] for layer, found in whole.items()}

    def _shadow(
        self, job: _Job, work: ShadowRequest, due: Sequence[tuple[int, SamplingRow]]
    ) -> None:
        """Null and steered rows of prompts in one small batch, and their difference."""
        row_of = dict(due)
        wanted, at_once = _by_prompt(work.rows, list(row_of)), self._runner.max_rows // 2
        found: list[Tensor] = []
        for part in (wanted[i : i + at_once] for i in range(0, len(wanted), at_once)):
            twins = list(dict.fromkeys(work.rows[i] for i in part))
            entering = torch.cat([job.tensors["null"][twins], job.tensors["steered"][part]])
            run = [row_of[index] for index in (*twins, *(work.rows[i] for i in part))]
            last = self._runner.rerun(
                [row.row for row in run], [row.n_prompt for row in run], work.layer, entering
            )
            null = last[[twins.index(work.rows[i]) for i in part]]
            found.append(self._runner.difference(torch.cat([null, last[len(twins) :]])))
        for index in row_of:
            mine = [n for n, i in enumerate(wanted) if work.rows[i] == index]
            job.found[index] = {"difference": torch.cat(found)[mine]}


def _keep(layers: Sequence[int], kept: dict[int, Tensor], layer: int, entering: Tensor) -> None:
    if layer in layers:
        kept[layer] = entering.clone()


def _check_again(base: Tensor, again: Tensor) -> None:
    """Refuse a model whose last token, run again from the embeddings on, gives other logits."""
    reading = compare("no", 0, base, again, again)
    if not reading.gap <= reading.tolerance:
        raise NotArmedError(
            "running a prompt's last token again does not reproduce the base logits: off by"
            f" {reading.gap:.2g} standard deviations, at most {reading.tolerance:.2g} is rounding;"
            " this model cannot be calibrated, nor guarded, in vLLM"
        )


def _by_prompt(rows: Sequence[int], prompts: Sequence[int]) -> list[int]:
    """Indices of rows, those of one prompt after those of another."""
    return [i for prompt in prompts for i, row in enumerate(rows) if row == prompt]


class WithDesk:
    """The steps of a worker that can be calibrated, and is guarded if there is a guard.

    Args:
        guard: None: nothing is steered.

    Attributes:
        desk: set once the model runner has a view.
    """

    def __init__(self, guard: StepGuard | None = None) -> None:
        self._guard = guard
        self.desk: Desk | None = None
        if guard is not None:
            guard.spared = self._mine

    @property
    def layers(self) -> Sequence[int]:
        """Layers whose input the compiled model returns."""
        return self._guard.layers if self._guard is not None else ()

    @property
    def gate_layer(self) -> int | None:
        """The layer at which the gate is read."""
        return self._guard.gate_layer if self._guard is not None else None

    def renew(self, request_id: str, n_prompt: int) -> None:
        """A request is announced."""
        if self._guard is not None:
            self._guard.renew(request_id, n_prompt)

    def end(self, request_ids: Sequence[str]) -> None:
        """Requests that vLLM has forgotten."""
        if self._guard is not None:
            self._guard.end(request_ids)

    def copy_blocks(self, copies: Sequence[tuple[int, int]], n_blocks: int) -> None:
        """Blocks of the KV cache are copied."""
        if self._guard is not None:
            self._guard.copy_blocks(copies, n_blocks)

    def keep(self, runner: Runner, hidden: Callable[[int], Tensor], slots: Tensor) -> None:
        """Keep what the gate needs of tokens, by KV slot."""
        if self._guard is not None:
            self._guard.keep(runner, hidden, slots)

    def begin(self, runner: Runner) -> bool:
        """True if `step` has to see this step's logits."""
        guarded = self._guard is not None and self._guard.begin(runner)
        return (self.desk is not None and self.desk.begin(runner)) or guarded

    def step(self, runner: Runner, logits: Tensor) -> Tensor:
        """The desk reads base logits, then the guard moves its rows."""
        if self.desk is not None:
            self.desk.step(runner, logits)
        return logits if self._guard is None else self._guard.step(runner, logits)

    def _mine(self, request_id: str) -> bool:
        return self.desk is not None and self.desk.mine(request_id)


class WorkerDesk:
    """A worker without a guard, which can be calibrated: it steers nothing.

    Args:
        worker: vLLM's, with its model loaded and nothing run yet.

    Raises:
        UnsupportedModelError: the model is laid out otherwise.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        steps = WithDesk()
        view = attach(worker.model_runner, steps)
        self.desk = steps.desk = Desk(view, torch.device(worker.model_runner.device))

    def status(self) -> str:
        """JSON: rank, and that no guard is armed."""
        return json.dumps({"rank": self._worker.rank, "armed": False, "guard": None})
