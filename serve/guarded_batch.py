"""Requests that are decoded together, each inside its own KL budget. Plain calls, no threads.

    base pass ─► gate (once, where steering begins) ─► shadow, mix, charge ─► sample ─► compact

All rows of a batch are at the same response token, so one position counts for all of them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from guard.artifact import CarrierArtifact
from guard.errors import GuardError, NumericsError
from guard.gate import GateReading
from guard.kl import log_probs
from guard.reading import gate_scores, refusal_probs
from guard.session import GuardSession, Record
from guard.shadow import BaseStep, ShadowModel
from guard.step import guarded_logits, layers_wanted
from serve.engine import FinishReason, GenerationRequest, TokenLogprob, TokenStep
from serve.sampling import Sampler
from serve.text_stream import TextStream

__all__ = ["GuardedBatch", "Observers", "Row", "left_pad"]

_log = logging.getLogger("trimtab.serve")


@dataclass(frozen=True)
class Observers:
    """Who is told what happens; called in the thread that runs the model.

    Attributes:
        record: once per request, when it ends in whatever way.
        gate: once per request, seconds from the end of its prompt's base pass to its score, and to
            its zone unless the policy has that wait for the answer.
        unguarded: the guard failed on a request and it goes on without (`on_failure: open`).
        mixture: for auditors: request id, position, mixed and base logits (vocab,) float32, nats.
    """

    record: Callable[[Record], None] | None = None
    gate: Callable[[float], None] | None = None
    unguarded: Callable[[], None] | None = None
    mixture: Callable[[str, int, Tensor, Tensor, float], None] | None = None


class Row:
    """One request, from the queue to its last token.

    Args:
        request: what to do.
        tokenizer: of the model.
        device: of the model.
        session: the guard's state; None if the mode is off.
        deliver: takes each step, or the error that ends the request.
        on_record: takes the record, once.

    Attributes:
        sampler: draws its tokens.
        last_token: the newest of them.
        score: the probe's, of the prompt.
        aborted: set it, from any thread, and the row stops at its next token.
        unguarded: the guard failed, and the policy lets the request go on without it.
        done: nothing more will be delivered.
    """

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Any,
        device: torch.device,
        session: GuardSession | None,
        deliver: Callable[[TokenStep | GuardError], None],
        on_record: Callable[[Record], None] | None = None,
    ) -> None:
        self.request = request
        self.session = session
        self.sampler = Sampler(request.options, device)
        self.aborted = self.unguarded = self.done = False
        self.last_token = 0
        self.score = math.nan
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, request.options.stop)
        self._tokens: list[int] = []
        # Where in the text the answer begins, which is what is judged; None until it may begin.
        self._answer_at = None if session is not None and session.awaits_start else 0
        self._deliver, self._on_record = deliver, on_record

    @property
    def guard(self) -> GuardSession | None:
        """The session as long as the row is to be guarded."""
        return None if self.done or self.unguarded else self.session

    def accept(self, token_id: int, logits: Tensor, ends: bool) -> None:
        """Take the next token and deliver what it means.

        Args:
            token_id: the token.
            logits: (vocab,) it was sampled from.
            ends: it is an end-of-sequence token.
        """
        self.last_token = token_id
        self._tokens.append(token_id)
        self._watch_for_answer()
        text = "" if ends else self._text.push(token_id)
        reason: FinishReason | None = None
        if ends or self._text.stopped:
            reason = "stop"
        elif len(self._tokens) >= self.request.options.max_tokens:
            reason = "length"
        if reason is not None:
            text += self._text.flush()
        chosen, others = self._logprobs(token_id, logits)
        record = None if reason is None else self._close(self._text.text)
        self._deliver(TokenStep(token_id, text, chosen, others, reason, record))

    def fail(self, error: GuardError) -> None:
        """End the row with an error; what the guard did until now is recorded."""
        if not self.done:
            self._close(None)
            self._deliver(error)

    def leave(self) -> None:
        """End a row whose client went away."""
        if not self.done:
            self._close(None)

    def _watch_for_answer(self) -> None:
        """Tell the session what was written, with the newest token, until its answer begins."""
        session = self.session
        if session is None or not session.awaits_start:
            return
        if session.at_start:
            self._answer_at = len(self._text.text)
        session.see(
            self._tokenizer.decode(
                self._tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _close(self, text: str | None) -> Record | None:
        self.done = True
        if self.session is None:
            return None
        if text is not None:
            text = "" if self._answer_at is None else text[self._answer_at :]
        record = self.session.record(text)
        if self._on_record is not None:
            self._on_record(record)
        return record

    def _logprobs(
        self, token_id: int, logits: Tensor
    ) -> tuple[TokenLogprob | None, tuple[TokenLogprob, ...]]:
        wanted = self.request.options.logprobs
        if wanted is None:
            return None, ()
        logprobs = log_probs(logits.unsqueeze(0), self.sampler.temperature)[0]
        best = logprobs.topk(min(wanted, logprobs.numel()))
        values, ids = best.values.tolist(), best.indices.tolist()
        others = (self._named(i, value) for i, value in zip(ids, values, strict=True))
        return self._named(token_id, float(logprobs[token_id])), tuple(others)

    def _named(self, token_id: int, logprob: float) -> TokenLogprob:
        token = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return TokenLogprob(token_id, token, logprob)


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (n_rows, n_tokens) token ids and their attention mask, prompts flush right."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class GuardedBatch:
    """Rows that are prefilled together and then decoded in step.

    Args:
        model: the model with its base and shadow passes.
        rows: at least one.
        eos_ids: tokens that end a response.
        artifact: the guard; None if the mode is off.
        observers: who is told.
    """

    def __init__(
        self,
        model: ShadowModel,
        rows: Sequence[Row],
        eos_ids: frozenset[int],
        artifact: CarrierArtifact | None,
        observers: Observers | None = None,
    ) -> None:
        self.rows = list(rows)
        self.cache: Any = DynamicCache(config=model.model.config)
        self.position = 0
        self._model, self._eos_ids = model, eos_ids
        self._artifact = artifact
        self._observers = observers or Observers()
        self._ids, self._mask = left_pad([row.request.prompt_ids for row in rows], model.device)

    @property
    def done(self) -> bool:
        """True once every row is."""
        return all(row.done for row in self.rows)

    @torch.inference_mode()
    def step(self) -> None:
        """Make one token for every row that goes on.

        Raises:
            NumericsError: the base model itself gave NaN or infinite logits.
            BudgetError: a charge above the allowance: a bug.
        """
        self._drop_aborted()
        if self.done:
            return
        opening = any(row.guard is not None and row.guard.reads_gate for row in self.rows)
        layers = self._layers_to_capture(opening)
        base = self._model.base(self._ids, self._mask, self.cache, layers)
        self._read_gates(base, opening)
        self._sample(self._guarded(base))
        self._compact()
        self._advance()

    def fail(self, error: GuardError) -> None:
        """End every row that goes on with an error."""
        for row in self.rows:
            row.fail(error)

    def _drop_aborted(self) -> None:
        for row in self.rows:
            if row.aborted:
                row.leave()

    def _layers_to_capture(self, opening: bool) -> list[int]:
        """The gate's at the prompt's end, all carriers' where one may open, else those in use."""
        artifact = self._artifact
        if artifact is None:
            return []
        layers = set(layers_wanted([row.guard for row in self.rows], self.position))
        if self.position == 0:
            layers.update(artifact.manifest.gate.layers)
        if opening:
            carriers = [artifact.raise_carrier, artifact.lower_carrier]
            layers.update(carrier.layer for carrier in carriers if carrier is not None)
        return sorted(layers)

    def _read_gates(self, base: BaseStep, opening: bool) -> None:
        """Score prompts at their end; open sessions where steering may begin."""
        artifact = self._artifact
        if artifact is None:
            return
        began = time.perf_counter()
        guarded = [row for row in self.rows if row.guard is not None] if self.position == 0 else []
        if guarded:
            prompts = [row.request.prompt_ids for row in self.rows]
            for row, score in zip(self.rows, gate_scores(artifact, base, prompts), strict=True):
                row.score = score
                if row.guard is None:
                    continue
                if math.isfinite(score):
                    row.guard.take_score(score)
                else:  # every comparison with NaN is false, so it would pass as harmless
                    self._guard_failed(row, NumericsError(f"the gate's score is {score}"))
        if opening:
            for row, refusal_prob in zip(self.rows, refusal_probs(artifact, base), strict=True):
                if row.guard is not None and row.guard.reads_gate:
                    row.guard.open(GateReading(row.score, refusal_prob), self.position)
        if self._observers.gate is not None:
            for _ in guarded:
                self._observers.gate(time.perf_counter() - began)

    def _guarded(self, base: BaseStep) -> Tensor:
        """(n_rows, vocab) float32 logits to sample from, ledgers charged."""
        logits = base.logits.float()
        for layer in layers_wanted([row.guard for row in self.rows], self.position):
            due = [
                i
                for i, row in enumerate(self.rows)
                if row.guard is not None
                and row.guard.wants_shadow(self.position)
                and row.guard.carrier is not None
                and row.guard.carrier.layer == layer
            ]
            logits = self._steer(base, due, logits)
        return logits

    def _steer(self, base: BaseStep, due: list[int], logits: Tensor) -> Tensor:
        """Steer rows that share a layer; if that fails, find out whose fault it is, row by row.

        `guarded_logits` charges only after all of its rows of one layer are computed, so a row
        that is tried again was not charged before.
        """
        sessions = [row.guard if i in due else None for i, row in enumerate(self.rows)]
        temperatures = [row.sampler.temperature for row in self.rows]
        try:
            steered = guarded_logits(
                self._model, base, sessions, self.position, temperatures, self._audit
            )
        except NumericsError as error:
            if len(due) == 1:
                self._guard_failed(self.rows[due[0]], error)
                return logits
            for i in due:
                logits = self._steer(base, [i], logits)
            return logits
        if steered is base.logits:  # nothing applied: observe mode
            return logits
        logits = logits.clone()
        logits[due] = steered[due]
        return logits

    def _audit(self, row: int, mixed: Tensor, base: Tensor, kl_nats: float) -> None:
        if self._observers.mixture is not None:
            name = self.rows[row].request.request_id
            self._observers.mixture(name, self.position, mixed, base, kl_nats)

    def _guard_failed(self, row: Row, error: NumericsError) -> None:
        """Fail the row, unless the policy is to serve it unguarded or is only observing."""
        if row.session is not None and row.session.fails_closed:
            row.fail(error)
            return
        row.unguarded = True
        if self._observers.unguarded is not None:
            self._observers.unguarded()
        _log.warning("request %s goes on unguarded: %s", row.request.request_id, error)

    def _sample(self, logits: Tensor) -> None:
        for row, row_logits in zip(self.rows, logits, strict=True):
            if not row.done:
                token_id = row.sampler.draw(row_logits)
                row.accept(token_id, row_logits, ends=token_id in self._eos_ids)

    def _compact(self) -> None:
        """Drop finished rows from the batch once they are more than half of it."""
        alive = [i for i, row in enumerate(self.rows) if not row.done]
        if not alive or 2 * len(alive) >= len(self.rows):
            return
        keep = torch.tensor(alive, device=self._mask.device)
        self.cache.batch_select_indices(keep)
        self._mask = self._mask[keep]
        self.rows = [self.rows[i] for i in alive]

    def _advance(self) -> None:
        tokens = [[row.last_token] for row in self.rows]
        self._ids = torch.tensor(tokens, device=self._mask.device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self.position += 1
