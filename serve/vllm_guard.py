"""The guard's work in one vLLM worker: scores, zones, shadow passes and ledgers, step by step.

    forward ─► project tokens into their KV slots ─► sampling rows: gate once, shadow, mix ─► book

It knows model runners only through `Runner`; `vllm_runner` says how vLLM's are read.

**Why the gate is exact under prefix caching, chunked prefill and preemption.** The score of a token
depends on the same tokens as its keys and values do. So what the probe needs of a token, a few
dozen floats, is kept where they are: by KV slot, written by the same step that writes the slot.
Whoever may read a cached block's keys may read them, and a block that is evicted and computed again
is projected again. No cache hit is given up, and nothing has to be recomputed. A slot that was
never written holds NaN: an error.

**Why the host does not wait.** A GPU that is busy runs behind the host that feeds it, and waiting
for it drains the queue. So outcomes of a step are read in the next one, after its forward pass was
issued: the ledger is exact when it is asked again, and the device stays busy. The gate's score is
read while the layers behind it still run. Where a score leaves the zone open, it hangs on the base
model's refusal probability, which only the logits tell: then either the host waits for them, or,
where others would wait with it, the row is steered at once with a budget that the device sets to
nothing if the probability disagrees, which leaves the base row. A device that keeps pace with the
host has no queue: there the host waits for both readings at once, which is the least work.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from guard.artifact import CarrierArtifact
from guard.errors import NotArmedError
from guard.gate import (
    GateReading,
    Zone,
    refusal_probability,
)
from guard.kl import Moved
from guard.policy import Policy
from guard.probe import pool_message, probe_scores, project
from guard.reading import gate_places, padded
from guard.session import GuardSession, Record
from guard.steering import Carrier

__all__ = [
    "MAX_STEERED",
    "GuardedRequest",
    "Later",
    "Runner",
    "SamplingRow",
    "SlotReads",
    "Steering",
    "StepGuard",
    "has_triton",
    "on_device",
]

_log = logging.getLogger("trimtab.vllm")

MAX_STEERED = 256
"""Rows steered in one pass; more take several."""

_MAX_KEPT = 65536  # records that nobody asked for; the oldest go first
_CHUNK = 2048  # tokens scored at once, so that the float32 copy stays small
_MOST_TENTATIVE = 32  # rows: beyond, the pass costs more than the wait
_OTHERS_WAIT = 32  # rows of a step from which on a wait costs more than a pass
_KERNELS_AGREE = 1e-3  # float32 sums in another order
_IMPOSSIBLE = -1e9  # finite: a grammar that forbids the end token leaves a uniform row, not NaN


class SamplingRow(NamedTuple):
    """A request that samples a token in this step.

    Attributes:
        row: of the logits.
        request_id: vLLM's internal one.
        position: of the token to be sampled, from 0.
        n_prompt: tokens of the prompt.
        temperature: at which it samples; 0 is greedy.
        policy: the published policy that it asked for; None is the default.
    """

    row: int
    request_id: str
    position: int
    n_prompt: int
    temperature: float
    policy: str | None = None


class Runner(Protocol):
    """What a model runner shows of the step whose forward pass has just run."""

    @property
    def n_slots(self) -> int:
        """How many KV slots there are."""

    @property
    def n_ranks(self) -> int:
        """How many tensor-parallel ranks take this step together."""

    @property
    def end_token_ids(self) -> Sequence[int]:
        """Tokens that end a response."""

    @property
    def request_ids(self) -> Sequence[str]:
        """All requests of this step, in the order of the rows."""

    def sampling_rows(self, wanted: Container[str]) -> list[SamplingRow]:
        """Their rows that sample; prompts that are not finished do not."""

    def prompt_ids(self, request_id: str) -> Sequence[int]:
        """Token ids of a request's prompt."""

    def slots_written(self) -> Tensor:
        """(n_tokens,) int64: the KV slot of every token of this step."""

    def block_table(self) -> tuple[Tensor, int]:
        """(n_rows, n_blocks) int32, on the device: the step's KV blocks; and tokens a block."""

    def hidden(self, layer: int) -> Tensor:
        """(n_tokens, d_model): the residual stream before `layer`, of every token of this step."""

    def last_hidden(self, layer: int) -> Tensor:
        """(n_rows, d_model): likewise, of the last token of each row."""

    def last_token_again(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        """(len(rows), vocab) logits of the rows' last tokens, entered at `layer` with `hidden`.

        It reads the KV cache and never writes it.
        """

    def steer(self, work: Steering, logits: Tensor) -> tuple[Tensor, Moved]:
        """Shadow pass, null rows beside steered ones, and mixture of some rows.

        Returns:
            (n,) int64 indices of the rows, and what became of them; valid until the next call.
        """

    @property
    def kept(self) -> bool:
        """True if `StepGuard.keep` ran inside this step's CUDA graph."""

    @property
    def nearly_done(self) -> bool:
        """True if the device is known to be at the end of this step's forward pass."""

    def at_gate(self) -> AbstractContextManager[None]:
        """Device work that waits for the gate's layer only, not for the rest of the forward pass.

        So the host can read the gate while the device is still busy with the layers behind it.
        """

    def agree(self, readings: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """The first tensor-parallel rank's readings, on every rank."""


@dataclass(frozen=True)
class Tentative:
    """A request that is steered before its zone is known.

    Attributes:
        carrier: of the zone that its score leads to.
        allowance_nats: what its first token may spend there.
        fresh: its place among the step's new requests.
    """

    carrier: Carrier
    allowance_nats: float
    fresh: int


class Later:
    """Numbers on their way from the device to the host; only `read` waits for them.

    Attributes:
        values: on the device.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._done: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def read(self) -> Any:
        """Nested lists of the values."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.tolist()


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy host numbers to the device without waiting for it, as `torch.tensor` would."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@dataclass(frozen=True)
class Steering:
    """What to do to some rows of a step.

    Attributes:
        carrier: to apply, its tensors on the device.
        rows: of the logits.
        budgets_nats: what each may spend.
        temperatures: at which KL is measured, > 0.
        spare: (vocab,) logits for rows that cannot be computed; None: their base row.
        only_if: (len(rows),) float64 on the device: 0 where a row has no budget; None: all have it.
    """

    carrier: Carrier
    rows: Sequence[int]
    budgets_nats: Sequence[float]
    temperatures: Sequence[float]
    spare: Tensor | None
    only_if: Tensor | None = None


class SlotReads:
    """What a probe keeps of the token behind every KV slot: its projections.

    Args:
        n_slots: of the KV cache.
        width: projections of a token.
        device: of the model.
    """

    def __init__(self, n_slots: int, width: int, device: torch.device) -> None:
        self._kept = torch.full((n_slots, width), math.nan, dtype=torch.float32, device=device)

    def write(self, slots: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Project the tokens that this step computed, (n_tokens, d_model), into their slots."""
        for start in range(0, len(slots), _CHUNK):
            part = slice(start, start + _CHUNK)
            self._kept[slots[part]] = project(hidden[part], weight)

    def copy_blocks(self, copies: Sequence[tuple[int, int]], n_blocks: int) -> None:
        """Follow a copy of whole KV blocks: (source, destination) pairs, all at once."""
        blocks = self._kept.view(n_blocks, -1)
        source, target = zip(*copies, strict=True)
        blocks[list(target)] = blocks[list(source)]

    def read(self, slots: Tensor) -> Tensor:
        """Return what is kept there, (…, width); NaN where nothing was ever written."""
        return self._kept[slots]

    @property
    def kept(self) -> Tensor:
        """(n_slots, width) float32 of all slots."""
        return self._kept

    def clear(self) -> None:
        """Forget everything."""
        self._kept.fill_(math.nan)


@dataclass
class GuardedRequest:
    """What the guard keeps of one request.

    Attributes:
        session: its ledger and zone.
        n_prompt: tokens of the prompt that was gated.
        failed: the guard could not compute: nothing but end tokens is sampled.
        unguarded: likewise, but the policy lets it go on.
        gate_seconds: what reading its gate took.
        drained: its record was handed over while it still ran.
        waits: for so many readings and outcomes that are still on their way.
    """

    session: GuardSession
    n_prompt: int
    failed: bool = False
    unguarded: bool = False
    gate_seconds: float = 0.0
    drained: bool = False
    waits: int = 0


OnMixture = Callable[[str, int, Tensor, Tensor, float], None]


class StepGuard:
    """The guard of one worker.

    Args:
        artifact: the guard file.
        policy: the operator's; its mode is not "off".
        device: of the model.

    Attributes:
        on_mixture: for auditors: request id, position, mixed and base logits (vocab,), nats.
        on_base: for the canary: the runner and (n_rows, vocab) logits of every base pass.
        requests: state of the requests that are running.
        n_steps: steps it has seen.
        awake: False while vLLM warms up with requests of its own; nothing is served then.
        rehearsing: True while the canary runs, which warms up what steering needs.
        spared: says which requests are not guarded: those of a calibration.
        most_tentative: rows of a step that may be steered before their zone is known.
        others_wait: rows of a step from which on they are.
        late: read everything a step later, as from a GPU, also where it is at hand.
    """

    def __init__(self, artifact: CarrierArtifact, policy: Policy, device: torch.device) -> None:
        if policy.mode == "off":
            raise NotArmedError("mode off has no guard")
        self.artifact, self.policy = _on(artifact, device), policy
        self.on_mixture: OnMixture | None = None
        self.on_base: Callable[[Runner, Tensor], None] | None = None
        self.requests: dict[str, GuardedRequest] = {}
        self.n_steps = 0
        self.awake = False
        self.rehearsing = False
        self.spared: Callable[[str], bool] = lambda _: False
        self.most_tentative, self.others_wait = _MOST_TENTATIVE, _OTHERS_WAIT
        self.late = device.type == "cuda"
        self._device = device
        self._kernels: Any = None
        if device.type == "cuda" and has_triton():
            from serve import vllm_kernels

            self._kernels = vllm_kernels
        self._ended: OrderedDict[str, GuardedRequest] = OrderedDict()
        self._active: dict[str, GuardedRequest] = {}  # that are steered, or failed
        self._fresh: list[SamplingRow] = []  # that sample their first token in this step
        self._fresh_scores: Tensor | None = None  # (n,) on the device
        self._early: Later | None = None  # the same on their way, where they are read early
        self._fresh_asked: Tensor | None = None  # (n, 4) on the device: rows and places
        self._tentative: dict[str, Tentative] = {}  # of this step
        self._agrees: Tensor | None = None  # (n,) on the device: 1 where a zone is the score's
        limits = artifact.thresholds
        self._limits = torch.tensor(  # of score and refusal probability, as the host compares them
            [limits.raise_above, limits.raise_if_refusal_below, limits.lower_if_refusal_above],
            dtype=torch.float64,
            device=device,
        )
        self._awaited: list[tuple[Later, list[GuardedRequest], Callable[[Any], None]]] = []
        self._reads: list[SlotReads] = []  # of the template, of the message
        self._spare: Tensor | None = None

    @property
    def layers(self) -> list[int]:
        """Layers whose input is read: the gate's and the carriers', rising."""
        return self.artifact.layers

    @property
    def gate_layer(self) -> int:
        """The last layer at which the gate reads."""
        return self.artifact.manifest.gate.layers[-1]

    def renew(self, request_id: str, n_prompt: int) -> None:
        """A request is announced, perhaps again: one whose prompt has grown is gated anew."""
        known = self.requests.get(request_id)
        if known is not None and known.n_prompt != n_prompt:
            del self.requests[request_id]
            self._active.pop(request_id, None)

    def end(self, request_ids: Sequence[str]) -> None:
        """Requests that vLLM has forgotten; their records stay until they are drained."""
        for request_id in request_ids:
            state = self.requests.pop(request_id, None)
            self._active.pop(request_id, None)
            if state is not None and not state.drained:
                self._ended[request_id] = state
        while len(self._ended) > _MAX_KEPT:
            self._ended.popitem(last=False)

    def drain(self, request_ids: Sequence[str] | None = None) -> dict[str, GuardedRequest]:
        """Hand over the state of ended requests; of all that ended where none are named.

        A request that the front end knows to be over may still run here: its state is handed over,
        and nothing of it is booked twice.
        """
        wanted = list(self._ended) if request_ids is None else list(request_ids)
        found: dict[str, GuardedRequest] = {}
        for request_id in wanted:
            state = self._ended.pop(request_id, None) or self.requests.get(request_id)
            if state is not None and not state.drained:
                state.drained = True
                found[request_id] = state
        if any(state.waits for state in found.values()):
            self.settle()
        return found

    def reset(self) -> None:
        """Forget every request and every score, as after the canary."""
        self._awaited.clear()
        self._fresh = []
        self._active.clear()
        self.requests.clear()
        self._ended.clear()
        for reads in self._reads:
            reads.clear()

    def copy_blocks(self, copies: Sequence[tuple[int, int]], n_blocks: int) -> None:
        """Follow a copy of whole KV blocks."""
        for reads in self._reads if copies else ():
            reads.copy_blocks(copies, n_blocks)

    @torch.inference_mode()
    def begin(self, runner: Runner) -> bool:
        """Score the tokens of a step whose forward pass has been issued, and read new gates.

        Returns:
            True if `step` has to see its logits; otherwise nothing in it is guarded.
        """
        if not self.awake:
            return False
        self.n_steps += 1
        self.settle()
        new = (name for name in runner.request_ids if name not in self.requests)
        unknown = {name for name in new if not self.spared(name)}
        self._fresh = runner.sampling_rows(unknown) if unknown else []
        waits = bool(self._fresh) and (runner.nearly_done or runner.n_ranks > 1)
        with runner.at_gate() if self._fresh and not waits else nullcontext():
            if self.rehearsing or not runner.kept:
                self._keep_step(runner)
            if self._fresh:
                self._fresh_scores = self._read_gates(runner, self._fresh)
                self._early = None if waits else Later(self._fresh_scores)
        return bool(self._fresh or self._active or self.on_base)

    def keep(self, runner: Runner, hidden: Callable[[int], Tensor], slots: Tensor) -> None:
        """Project tokens into their KV slots; with the kernels, inside a CUDA graph, too.

        Args:
            runner: whose slots they are.
            hidden: layer → (≥ n_tokens, d_model), the residual stream before it.
            slots: (n_tokens,) int64; negative ones are left out, with the kernels.
        """
        if not self._reads:
            self._reads = [
                SlotReads(runner.n_slots, len(weight), self._device)
                for _, weight in self._projections()
            ]
        written = [
            (hidden(layer)[: len(slots)], weight, reads)
            for reads, (layer, weight) in zip(self._reads, self._projections(), strict=True)
        ]
        if self._kernels is not None:
            into = [(states, weight, reads.kept) for states, weight, reads in written]
            self._kernels.project_tokens(into, slots)
        else:
            for states, weight, reads in written:
                reads.write(slots, states, weight)

    def _keep_step(self, runner: Runner) -> None:
        """`keep` the tokens of a step, or check that its CUDA graph did."""
        slots = runner.slots_written()
        if not runner.kept:
            self.keep(runner, runner.hidden, slots)
        if self._kernels is not None and self.rehearsing:
            for reads, (layer, weight) in zip(self._reads, self._projections(), strict=True):
                hidden = runner.hidden(layer)
                summed = project(hidden.abs(), weight.abs())  # what rounding is in proportion to
                _check_kernels("projection", reads.read(slots), project(hidden, weight), summed)

    @torch.inference_mode()
    def step(self, runner: Runner, logits: Tensor) -> Tensor:
        """Return the logits to sample from: `logits` itself where nothing is moved.

        Args:
            runner: the step for which `begin` was called.
            logits: (n_rows, vocab) of the base pass.

        Raises:
            BudgetError: a charge above the allowance: a bug.
        """
        if self.on_base is not None:
            self.on_base(runner, logits)
        self._open(runner, logits)
        if self._active or self._tentative:
            rows = runner.sampling_rows(self._active.keys() | self._tentative.keys())
            logits = self._silence(runner, rows, self._guarded(runner, rows, logits))
            self._tentative.clear()
        # Sampler kernels are compiled per type: before anyone is served, and steered, for float32.
        return logits.to(torch.float32) if self.rehearsing else logits

    def settle(self) -> None:
        """Book what the device has sent since: it was issued a step ago, so the wait is short.

        Raises:
            BudgetError: a charge above the allowance: a bug.
        """
        awaited, self._awaited = self._awaited, []
        for later, states, book in awaited:
            for state in states:
                state.waits -= 1
            book(later.read())

    def record(self, state: GuardedRequest, text: str | None = None) -> Record:
        """The record of a request."""
        return state.session.record(text)

    def _await(
        self, later: Later, states: list[GuardedRequest], book: Callable[[Any], None]
    ) -> None:
        if not self.late:
            book(later.read())
            return
        for state in states:
            state.waits += 1
        self._awaited.append((later, states, book))

    def _projections(self) -> list[tuple[int, Tensor]]:
        """Layer and weights of what is kept of every token: the template's, the message's."""
        probe, gate = self.artifact.probe, self.artifact.manifest.gate
        found = [(gate.layer, probe.template)]
        if gate.message is not None and probe.message is not None:
            found.append((gate.message.layer, probe.message))
        return found

    def _read_gates(self, runner: Runner, rows: Sequence[SamplingRow]) -> Tensor:
        """(len(rows),) scores on the device."""
        found = [gate_places(self.artifact, runner.prompt_ids(row.request_id)) for row in rows]
        if self._kernels is None:
            return self._scores(runner, rows, found)
        gate = self.artifact.manifest.gate
        asked = [
            [row.row, template[0], message[0] if message else 0, len(message)]
            for row, (template, message) in zip(rows, found, strict=True)
        ]
        self._fresh_asked = on_device(asked, torch.int32, self._device)
        scores: Tensor = self._kernels.gate_scores(
            self.artifact.probe, self._fresh_asked, *runner.block_table(), self._reads[0].kept,
            self._reads[1].kept if len(self._reads) > 1 else None,
            gate.n_pooled, gate.message.width if gate.message else 0,
        )  # fmt: skip
        if self.rehearsing:
            _check_kernels("gate score", scores, self._scores(runner, rows, found))
        return scores

    def _scores(
        self,
        runner: Runner,
        rows: Sequence[SamplingRow],
        found: Sequence[tuple[list[int], list[int]]],
    ) -> Tensor:
        """(len(rows),) scores, of the places that `gate_places` found."""
        first, second = [places for places, _ in found], [places for _, places in found]
        table, size = runner.block_table()

        def kept(reads: SlotReads, places: Sequence[Sequence[int]]) -> Tensor:
            owners = [[row.row] * len(p) for row, p in zip(rows, places, strict=True)]
            at, where = on_device([owners, places], torch.int64, table.device)
            return reads.read(table[at, where // size].long() * size + where % size)

        template = kept(self._reads[0], first).mean(1)
        message, read = None, self.artifact.manifest.gate.message
        if read is not None:
            # As wide for every prompt: a sum's rounding must not depend on what is read beside it.
            places, present = padded(second, read.width)
            there = on_device(present, torch.bool, self._device)
            message = pool_message(kept(self._reads[1], places), there, read.n_heads)
        return probe_scores(self.artifact.probe, template, message)

    def _readings(
        self, rows: Sequence[SamplingRow], logits: Tensor, scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(2, len(rows)) float32 scores and refusal probabilities; (len(rows),) float64, 1: agree.

        They agree where the probability lets the zone be the one that the score leads to.
        """
        ids, weights = self.artifact.refusal_token_ids, self.artifact.refusal_token_weights

        def agreeing(prob: Tensor) -> Tensor:
            above, below_prob, above_prob = self._limits
            yes = torch.where(
                scores.double() > above, prob.double() < below_prob, prob.double() > above_prob
            )
            return yes.double()

        found: tuple[Tensor, Tensor] | None = None
        if self._kernels is not None:
            found = self._kernels.gate_readings(
                logits, self._fresh_asked, ids, weights, scores, self._limits
            )
        if found is None or self.rehearsing:
            prob = refusal_probability(logits[[row.row for row in rows]], ids, weights)
            if found is None:
                return torch.stack([scores, prob]), agreeing(prob)
            _check_kernels("refusal probability", found[0], torch.stack([scores, prob]))
            _check_kernels("comparison of it", found[1], agreeing(found[0][1]))
        return found

    def _open(self, runner: Runner, logits: Tensor) -> None:
        """Decide the zones of requests that sample their first token, or put it off.

        A score that was read early is here long before the logits. Where it decides the zone alone,
        the refusal probability is only recorded, and nobody waits for the end of the forward pass.
        """
        rows, scores, early = self._fresh, self._fresh_scores, self._early
        self._fresh, self._fresh_scores, self._early = [], None, None
        if not rows or scores is None:
            return
        began = time.perf_counter()
        readings, agrees = self._readings(rows, logits, scores)
        arriving = Later(readings)
        states = []
        for row in rows:
            policy = self._policy_of(row) or self.policy
            session = GuardSession(self.artifact, policy, lockstep=runner.n_ranks > 1)
            states.append(GuardedRequest(session, row.n_prompt))
            self.requests[row.request_id] = states[-1]

        def open_sessions(read: list[list[float]]) -> None:
            agreed = runner.agree(list(zip(*read, strict=True)))
            for row, state, reading in zip(rows, states, agreed, strict=True):
                self._open_one(row, state, *reading)

        unsure = None
        if early is not None and self.late:
            unsure = self._unsure(len(runner.request_ids), rows, states, early.read())
        if unsure is None:
            open_sessions(arriving.read())
        else:
            self._await(arriving, states, open_sessions)
            self._agrees, self._tentative = agrees, unsure
        seconds = time.perf_counter() - began
        for state in states:
            state.gate_seconds = seconds

    def _unsure(
        self,
        n_rows: int,
        rows: Sequence[SamplingRow],
        states: Sequence[GuardedRequest],
        scores: Sequence[float],
    ) -> dict[str, Tentative] | None:
        """Requests whose zone hangs on their refusal probability; None: it has to be waited for."""
        unsure: dict[str, Tentative] = {}
        for i, (row, state, score) in enumerate(zip(rows, states, scores, strict=True)):
            if row.position != 0 or self._policy_of(row) is None or not math.isfinite(score):
                return None
            carrier, allowance = state.session.outlook(score)
            if carrier is not None and allowance > 0.0:
                unsure[row.request_id] = Tentative(carrier, allowance, i)
        crowded = n_rows >= self.others_wait and len(unsure) <= self.most_tentative
        return unsure if crowded or not unsure else None

    def _agreement(self, unsure: Sequence[Tentative | None]) -> Tensor | None:
        """(n,) float64 that is 0 where a row has no budget after all; None: all have theirs."""
        if self._agrees is None or not any(unsure):
            return None
        n = len(self._agrees)
        fresh = [n if one is None else one.fresh for one in unsure]
        if fresh == list(range(n)):  # nobody but the step's new requests, as mostly
            return self._agrees
        all_of_them = torch.cat([self._agrees, self._agrees.new_ones(1)])
        return all_of_them[on_device(fresh, torch.int64, self._device)]

    def _open_one(
        self, row: SamplingRow, state: GuardedRequest, score: float, refusal_prob: float
    ) -> None:
        name = row.request_id
        if self._policy_of(row) is None:  # the front end lets none through
            self._fail(name, state, "the policy that it asks for is not published")
        elif row.position != 0:
            self._fail(name, state, "its first token was sampled before the guard saw it")
        elif not (math.isfinite(score) and math.isfinite(refusal_prob)):
            # every comparison with NaN is false, so it would pass as harmless
            self._fail(name, state, f"its gate reads {score} and {refusal_prob}")
        else:
            zone = state.session.open(GateReading(score, refusal_prob))
            if zone is not Zone.PASS and self.requests.get(name) is state:  # it may be over since
                self._active[name] = state

    def _policy_of(self, row: SamplingRow) -> Policy | None:
        """What governs a request; None: it asks for a policy that is not published."""
        return self.policy if row.policy is None else self.policy.policies.get(row.policy)

    def _fail(self, name: str, state: GuardedRequest, why: str) -> None:
        if state.session.fails_closed:
            state.failed = True
            if self.requests.get(name) is state:
                self._active[name] = state
            _log.error("request %s cannot be guarded and is ended: %s", name, why)
        else:
            state.unguarded = True
            _log.warning("request %s goes on unguarded: %s", name, why)

    def _guarded(self, runner: Runner, rows: Sequence[SamplingRow], logits: Tensor) -> Tensor:
        groups: dict[tuple[int, bool], list[SamplingRow]] = {}
        for row in rows:
            name, state = row.request_id, self.requests[row.request_id]
            if state.failed:
                continue
            tentative = self._tentative.get(name)
            if tentative is None and (
                state.unguarded or not state.session.wants_shadow(row.position)
            ):
                del self._active[name]  # its last outcome is booked: see `begin`
                continue
            carrier = tentative.carrier if tentative else state.session.carrier
            groups.setdefault((id(carrier), state.session.fails_closed), []).append(row)
        mixed = logits
        for due in groups.values():
            for start in range(0, len(due), MAX_STEERED):
                mixed = self._steer(runner, due[start : start + MAX_STEERED], logits, mixed)
        return mixed

    def _steer(
        self, runner: Runner, due: Sequence[SamplingRow], base: Tensor, mixed: Tensor
    ) -> Tensor:
        """Steer rows that share a carrier and a way to fail; what is spent is booked later."""
        states = [self.requests[row.request_id] for row in due]
        unsure = [self._tentative.get(row.request_id) for row in due]
        first = unsure[0]
        carrier = states[0].session.carrier if first is None else first.carrier
        if carrier is None:
            return mixed
        work = Steering(
            carrier,
            [row.row for row in due],
            [
                state.session.ledger.allowance_nats if one is None else one.allowance_nats
                for one, state in zip(unsure, states, strict=True)
            ],
            [row.temperature or 1.0 for row in due],
            self._spare_row(runner, base) if states[0].session.fails_closed else None,
            self._agreement(unsure),
        )
        index, moved = runner.steer(work, base)
        if self.policy.mode == "enforce":
            if len(due) == len(base):  # every row, in their order
                mixed = moved.logits
            else:
                if mixed is base:
                    mixed = base.to(torch.float32, copy=True)
                mixed.index_copy_(0, index, moved.logits)
        if self.on_mixture is not None:
            for i, (nats, _, faulty) in enumerate(moved.outcome.tolist()):
                if not faulty:
                    row = due[i]
                    self.on_mixture(
                        row.request_id, row.position, moved.logits[i], base[row.row].float(), nats
                    )

        def book(outcome: list[list[float]]) -> None:
            for row, state, (nats, flipped, faulty) in zip(due, states, outcome, strict=True):
                if faulty:
                    why = f"the shadow pass from layer {carrier.layer} gave NaN or infinite logits"
                    self._fail(row.request_id, state, why)
                elif nats > 0.0 or state.session.zone is not Zone.PASS:
                    state.session.charge(nats, bool(flipped))

        self._await(Later(moved.outcome), states, book)
        return mixed

    def _spare_row(self, runner: Runner, logits: Tensor) -> Tensor:
        """(vocab,) logits that allow nothing but the end of the response."""
        if self._spare is None:
            self._spare = torch.full(logits.shape[1:], _IMPOSSIBLE, device=logits.device)
            self._spare[list(runner.end_token_ids)] = 0.0
        return self._spare

    def _silence(self, runner: Runner, rows: Sequence[SamplingRow], logits: Tensor) -> Tensor:
        """Let requests that cannot be guarded say nothing but the end token."""
        failed = [row.row for row in rows if self.requests[row.request_id].failed]
        if not failed:
            return logits
        logits = logits.to(torch.float32, copy=True)
        logits[failed] = self._spare_row(runner, logits)
        return logits


def _check_kernels(what: str, found: Tensor, wanted: Tensor, scale: Tensor | None = None) -> None:
    """Refuse to serve with kernels that do not compute what they should.

    Args:
        what: they compute.
        found: by them.
        wanted: the same shape.
        scale: of the numbers that were summed up, likewise; None: that of `wanted`.

    Raises:
        NotArmedError: says how far they are off.
    """
    scale = wanted.abs() if scale is None else scale
    gap = float(((found - wanted).abs() / scale.clamp(min=1.0)).max())
    if not gap <= _KERNELS_AGREE:
        raise NotArmedError(
            f"the GPU kernel of the {what} is off by {gap:.2g} from the same in PyTorch;"
            " this device, driver or Triton is not supported"
        )


def has_triton() -> bool:
    """True if the GPU's kernels can be compiled here."""
    return importlib.util.find_spec("triton") is not None


def _on(artifact: CarrierArtifact, device: torch.device) -> CarrierArtifact:
    """The same guard with its tensors on the device."""

    def moved(carrier: Carrier) -> Carrier:
        return replace(carrier, basis=carrier.basis.to(device), target=carrier.target.to(device))

    return replace(
        artifact,
        raise_carrier=moved(artifact.raise_carrier),
        lower_carrier=moved(artifact.lower_carrier) if artifact.lower_carrier else None,
        probe=artifact.probe.map(lambda weight: weight.to(device)),
        refusal_token_ids=artifact.refusal_token_ids.to(device),
        refusal_token_weights=artifact.refusal_token_weights.to(device),
    )
