"""The guard's work in one vLLM worker: scores, zones, shadow passes and ledgers, step by step.

    forward ─► score tokens into their KV slots ─► sampling rows: gate once, shadow, mix, charge

It knows model runners only through `Runner`; `vllm_runner` says how vLLM's are read.

**Why the gate is exact under prefix caching, chunked prefill and preemption.** The score of a token
depends on the same tokens as its keys and values do. So it is kept where they are: one float per
KV slot, written by the same step that writes the slot. Whoever may read a cached block's keys may
read its scores, and a block that is evicted and computed again is scored again. No cache hit is
given up, and nothing has to be recomputed. A slot that was never written holds NaN: an error.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from guard.artifact import CarrierArtifact
from guard.errors import NotArmedError, NumericsError
from guard.gate import GateReading, gate_position, probe_score, refusal_probability
from guard.policy import Policy
from guard.session import GuardSession, Record
from guard.step import guarded_logits, layers_wanted

__all__ = ["GuardedRequest", "Runner", "SamplingRow", "SlotScores", "StepGuard", "VllmStep"]

_log = logging.getLogger("trimtab.vllm")

_MAX_KEPT = 65536  # records that nobody asked for; the oldest go first
_CHUNK = 2048  # tokens scored at once, so that the float32 copy stays small
_IMPOSSIBLE = -1e9  # finite: a grammar that forbids the end token leaves a uniform row, not NaN


@dataclass(frozen=True)
class SamplingRow:
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

    def sampling_rows(self) -> list[SamplingRow]:
        """The rows that sample; prompts that are not finished do not."""

    def prompt_ids(self, request_id: str) -> Sequence[int]:
        """Token ids of a request's prompt."""

    def slots_written(self) -> Tensor:
        """(n_tokens,) int64: the KV slot of every token of this step."""

    def slots_of(self, rows: Sequence[int], places: Sequence[int]) -> Tensor:
        """(len(rows),) int64: the KV slot of each row's token at its place, from 0."""

    def hidden(self, layer: int) -> Tensor:
        """(n_tokens, d_model): the residual stream before `layer`, of every token of this step."""

    def last_hidden(self, layer: int) -> Tensor:
        """(n_rows, d_model): likewise, of the last token of each row."""

    def last_token_again(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        """(len(rows), vocab) logits of the rows' last tokens, entered at `layer` with `hidden`.

        It reads the KV cache and never writes it.
        """

    def agree(self, readings: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """The first tensor-parallel rank's readings, on every rank."""


@dataclass(frozen=True)
class VllmStep:
    """A base pass as `guard.step` sees it."""

    logits: Tensor
    runner: Runner

    def last_hidden(self, layer: int) -> Tensor:
        """(n_rows, d_model): the residual stream of the last token before `layer`."""
        return self.runner.last_hidden(layer)


class _Shadow:
    """Steered logits as base + (steered − null), null and steered in one small batch."""

    def shadow(self, step: VllmStep, rows: Sequence[int], layer: int, steered: Tensor) -> Tensor:
        null = step.last_hidden(layer)[list(rows)]
        hidden = torch.cat([null, steered.to(null.dtype)])
        logits = step.runner.last_token_again([*rows, *rows], layer, hidden).float()
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise NumericsError(f"the shadow pass from layer {layer} gave NaN or infinite logits")
        difference = logits[len(rows) :] - logits[: len(rows)]
        base = step.logits[list(rows)].float()
        # A token that cannot occur (−inf in every pass) has difference NaN: it stays impossible.
        return torch.where(torch.isnan(difference), base, base + difference)


class SlotScores:
    """The probe's score of the token behind every KV slot."""

    def __init__(self, n_slots: int, device: torch.device) -> None:
        self._scores = torch.full((n_slots,), math.nan, dtype=torch.float32, device=device)

    def write(self, slots: Tensor, hidden: Tensor, weight: Tensor, bias: float) -> None:
        """Score the tokens that this step computed, (n_tokens, d_model), into their slots."""
        for start in range(0, len(slots), _CHUNK):
            part = slice(start, start + _CHUNK)
            self._scores[slots[part]] = probe_score(hidden[part], weight, bias)

    def copy_blocks(self, copies: Sequence[tuple[int, int]], n_blocks: int) -> None:
        """Follow a copy of whole KV blocks: (source, destination) pairs, all at once."""
        blocks = self._scores.view(n_blocks, -1)
        source, target = zip(*copies, strict=True)
        blocks[list(target)] = blocks[list(source)]

    def read(self, slots: Tensor) -> list[float]:
        """The scores of some slots, (n,) int64; NaN where nothing was ever written."""
        values: list[float] = self._scores[slots].tolist()
        return values

    def clear(self) -> None:
        """Forget everything."""
        self._scores.fill_(math.nan)


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
    """

    session: GuardSession
    n_prompt: int
    failed: bool = False
    unguarded: bool = False
    gate_seconds: float = 0.0
    drained: bool = False


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
    """

    def __init__(self, artifact: CarrierArtifact, policy: Policy, device: torch.device) -> None:
        if policy.mode == "off":
            raise NotArmedError("mode off has no guard")
        self.artifact, self.policy = artifact, policy
        self.on_mixture: OnMixture | None = None
        self.on_base: Callable[[Runner, Tensor], None] | None = None
        self.requests: dict[str, GuardedRequest] = {}
        self.n_steps = 0
        self._device = device
        self._ended: OrderedDict[str, GuardedRequest] = OrderedDict()
        self._scores: SlotScores | None = None
        self._probe = artifact.probe_weight.to(device)
        self._refusal_ids = artifact.refusal_token_ids.to(device)
        self._refusal_weights = artifact.refusal_token_weights.to(device)

    @property
    def layers(self) -> list[int]:
        """Layers whose input is read: the gate's and the carriers', rising."""
        carriers = (self.artifact.raise_carrier, self.artifact.lower_carrier)
        return sorted({self.artifact.manifest.gate.layer, *(c.layer for c in carriers if c)})

    def end(self, request_ids: Sequence[str]) -> None:
        """Requests that vLLM has forgotten; their records stay until they are drained."""
        for request_id in request_ids:
            state = self.requests.pop(request_id, None)
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
        return found

    def reset(self) -> None:
        """Forget every request and every score, as after the canary."""
        self.requests.clear()
        self._ended.clear()
        if self._scores is not None:
            self._scores.clear()

    def copy_blocks(self, copies: Sequence[tuple[int, int]], n_blocks: int) -> None:
        """Follow a copy of whole KV blocks."""
        if copies and self._scores is not None:
            self._scores.copy_blocks(copies, n_blocks)

    @torch.inference_mode()
    def step(self, runner: Runner, logits: Tensor) -> Tensor:
        """Return the logits to sample from: `logits` itself where nothing is moved.

        Args:
            runner: the step that has just run.
            logits: (n_rows, vocab) of the base pass.

        Raises:
            BudgetError: a charge above the allowance: a bug.
        """
        if self._scores is None:
            self._scores = SlotScores(runner.n_slots, self._device)
        self.n_steps += 1
        if self.on_base is not None:
            self.on_base(runner, logits)
        gate = self.artifact.manifest.gate
        self._scores.write(
            runner.slots_written(), runner.hidden(gate.layer), self._probe, gate.bias
        )
        rows = runner.sampling_rows()
        self._open(runner, [r for r in rows if self._is_new(r)], logits)
        return self._silence(runner, rows, self._guarded(runner, rows, logits))

    def record(self, state: GuardedRequest, text: str | None = None) -> Record:
        """The record of a request."""
        return state.session.record(text)

    def _is_new(self, row: SamplingRow) -> bool:
        known = self.requests.get(row.request_id)
        return known is None or known.n_prompt != row.n_prompt

    def _open(self, runner: Runner, rows: Sequence[SamplingRow], logits: Tensor) -> None:
        """Read the gate of requests that sample their first token."""
        if not rows or self._scores is None:
            return
        began = time.perf_counter()
        suffix = self.artifact.manifest.gate.instruction_suffix_ids
        places = [gate_position(runner.prompt_ids(row.request_id), suffix) for row in rows]
        scores = self._scores.read(runner.slots_of([row.row for row in rows], places))
        refusal_probs = refusal_probability(
            logits[[row.row for row in rows]], self._refusal_ids, self._refusal_weights
        ).tolist()
        readings = runner.agree(list(zip(scores, refusal_probs, strict=True)))
        seconds = time.perf_counter() - began
        for row, (score, refusal_prob) in zip(rows, readings, strict=True):
            policy = self.policy if row.policy is None else self.policy.policies.get(row.policy)
            session = GuardSession(
                self.artifact, policy or self.policy, lockstep=runner.n_ranks > 1
            )
            state = GuardedRequest(session, row.n_prompt, gate_seconds=seconds)
            self.requests[row.request_id] = state
            if policy is None:  # the front end lets none through
                self._fail(row.request_id, "the policy that it asks for is not published")
            elif row.position != 0:
                self._fail(row.request_id, "its first token was sampled before the guard saw it")
            elif not (math.isfinite(score) and math.isfinite(refusal_prob)):
                # every comparison with NaN is false, so it would pass as harmless
                self._fail(row.request_id, f"its gate reads {score} and {refusal_prob}")
            else:
                state.session.open(GateReading(score, refusal_prob))

    def _fail(self, request_id: str, why: str) -> None:
        state = self.requests[request_id]
        if state.session.fails_closed:
            state.failed = True
            _log.error("request %s cannot be guarded and is ended: %s", request_id, why)
        else:
            state.unguarded = True
            _log.warning("request %s goes on unguarded: %s", request_id, why)

    def _guarded(self, runner: Runner, rows: Sequence[SamplingRow], logits: Tensor) -> Tensor:
        n_rows = logits.shape[0]
        sessions: list[GuardSession | None] = [None] * n_rows
        positions = [0] * n_rows
        for row in rows:
            state = self.requests[row.request_id]
            if not (state.failed or state.unguarded):
                sessions[row.row], positions[row.row] = state.session, row.position
        step = VllmStep(logits, runner)
        mixed = logits
        for layer in layers_wanted(sessions, positions):
            due = [
                row
                for row in rows
                if (session := sessions[row.row]) is not None
                and session.wants_shadow(row.position)
                and session.carrier is not None
                and session.carrier.layer == layer
            ]
            mixed = self._steer(step, due, mixed)
        return mixed

    def _steer(self, step: VllmStep, due: Sequence[SamplingRow], mixed: Tensor) -> Tensor:
        """Steer rows that share a layer; if that fails, find out whose fault it is, row by row.

        `guarded_logits` charges only after all of its rows of one layer are computed, so a row
        that is tried again was not charged before.
        """
        n_rows = mixed.shape[0]
        sessions: list[GuardSession | None] = [None] * n_rows
        positions, temperatures = [0] * n_rows, [0.0] * n_rows
        for row in due:
            sessions[row.row] = self.requests[row.request_id].session
            positions[row.row], temperatures[row.row] = row.position, row.temperature
        names = {row.row: row for row in due}

        def audit(index: int, moved: Tensor, base: Tensor, kl_nats: float) -> None:
            if self.on_mixture is not None:
                row = names[index]
                self.on_mixture(row.request_id, row.position, moved, base, kl_nats)

        try:
            steered = guarded_logits(_Shadow(), step, sessions, positions, temperatures, audit)
        except NumericsError as error:
            if len(due) == 1:
                self._fail(due[0].request_id, str(error))
                return mixed
            for row in due:
                mixed = self._steer(step, [row], mixed)
            return mixed
        if steered is step.logits:  # nothing applied: observe mode
            return mixed
        if mixed is step.logits:
            return steered
        indices = [row.row for row in due]
        mixed[indices] = steered[indices]
        return mixed

    def _silence(self, runner: Runner, rows: Sequence[SamplingRow], logits: Tensor) -> Tensor:
        """Let requests that cannot be guarded say nothing but the end token."""
        failed = [row.row for row in rows if self.requests[row.request_id].failed]
        if not failed:
            return logits
        logits = logits.to(torch.float32, copy=True)
        logits[failed] = _IMPOSSIBLE
        for token_id in runner.end_token_ids:
            logits[failed, token_id] = 0.0
        return logits
