"""One request from gate to record.

    base pass ─► gate reading ─► zone ─► (shadow pass ─► mix ─► charge) × K ─► record

The zone is decided where steering begins: at the response's first token or, under the policy's
`steer_from: answer`, at the first token behind the thinking of a reasoning model.

A session holds no tensors and runs no model: an engine asks it what to do at each response token
and tells it what was spent. So every engine enforces the same budget by the same few lines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from guard.answer import AnswerStart
from guard.artifact import CarrierArtifact
from guard.errors import NotArmedError
from guard.gate import GateReading, Zone, choose_zone, prospect
from guard.kl import Ledger
from guard.policy import Policy
from guard.refusal import Verdict, judge
from guard.steering import Carrier

__all__ = ["GuardSession", "Record", "shadow_due"]


@dataclass(frozen=True)
class Record:
    """What the guard did to one request. It holds no user text.

    Attributes:
        zone: the gate's decision; None if the request ended before its gate was read, or its
            answer never began.
        gate_score: probe logit; None if the request ended before its prompt was read.
        refusal_prob: the base model's own refusal probability where steering begins: at the first
            token of the response or, if the policy says so, of the answer; None without a zone.
        kl_nats: Σ KL(p_t ‖ p0) of the request; in observe mode, what would have been spent.
        budget_nats: the request's whole budget; 0 in the pass zone.
        steered_tokens: response tokens whose distribution was moved (observe: would have been).
        shadow_passes: shadow passes run.
        token_flips: steered tokens whose most likely token changed.
        exhausted: the budget was used up.
        applied: False in observe mode, where nothing was changed.
        gate_says: the side of the thresholds on which the score lies.
        verdict: of the finished text; None while it is not finished.
    """

    zone: Zone | None
    gate_score: float | None
    refusal_prob: float | None
    kl_nats: float
    budget_nats: float
    steered_tokens: int
    shadow_passes: int
    token_flips: int
    exhausted: bool
    applied: bool
    gate_says: Literal["harmful", "benign", "uncertain"]
    verdict: Verdict | None = None

    @property
    def suspected_over_refusal(self) -> bool:
        """Refused though the gate says benign: suspected, because truth needs a label."""
        refused = self.verdict in (Verdict.REFUSED, Verdict.PARTIAL)
        return refused and self.gate_says == "benign"

    @property
    def suspected_under_refusal(self) -> bool:
        """Answered though the gate says harmful: suspected, likewise."""
        return self.verdict is Verdict.COMPLIED and self.gate_says == "harmful"


def shadow_due(zone: Zone, position: int, shadow_tokens: int, start: int = 0) -> bool:
    """True if response token `position` (from 0) of a request in `zone` gets a shadow pass.

    These are the K = `shadow_tokens` tokens from `start` on, where the zone was decided.
    A pure function of zone and position, never of the ledger, so that the ranks of a tensor-
    parallel engine take the same path without talking about it.
    """
    return zone is not Zone.PASS and start <= position < start + shadow_tokens


class GuardSession:
    """The guard's state for one request.

    Args:
        artifact: the guard.
        policy: the operator's, or one that it publishes; mode "off" must not create sessions.
        lockstep: run shadow passes that the ledger can no longer pay for, too (they move nothing),
            so that ranks take the same path whatever each of them has booked.
        answer: of this request, if the policy steers from the answer's start; else None.

    Raises:
        NotArmedError: the policy steers from the answer's start, and nobody watches for it.
    """

    def __init__(
        self,
        artifact: CarrierArtifact,
        policy: Policy,
        *,
        lockstep: bool = False,
        answer: AnswerStart | None = None,
    ) -> None:
        if policy.steer_from == "answer" and answer is None:
            raise NotArmedError(
                "the policy says steer_from: answer, and nobody watches for the answer's start;"
                " set steer_from: response"
            )
        self._artifact = artifact
        self._policy = policy
        self._lockstep = lockstep
        self._answer = answer
        self._start = 0
        self._zone: Zone | None = None
        self._reading: GateReading | None = None
        self._score: float | None = None
        self._ledger = Ledger(0.0)
        self._steered = self._shadows = self._flips = 0

    @property
    def zone(self) -> Zone | None:
        """The gate's decision, None before `open`."""
        return self._zone

    @property
    def ledger(self) -> Ledger:
        """The request's ledger; budget 0 until a zone gives it one."""
        return self._ledger

    @property
    def applies(self) -> bool:
        """True if mixed logits are to be sampled from; False in observe mode."""
        return self._policy.mode == "enforce"

    @property
    def fails_closed(self) -> bool:
        """True if this request must not be served once it cannot be guarded."""
        return self._policy.fails_closed

    @property
    def carrier(self) -> Carrier | None:
        """The carrier of the request's zone, None in the pass zone."""
        return self._carrier_of(self._zone)

    @property
    def awaits_start(self) -> bool:
        """True as long as steering may begin at a later token: the engine must call `see`."""
        return self._answer is not None and not self._answer.begun

    @property
    def at_start(self) -> bool:
        """True if steering may begin at the next token."""
        return self._reading is None if self._answer is None else self._answer.due

    @property
    def reads_gate(self) -> bool:
        """True if `open` is to be called with what the base pass before the next token shows.

        Whitespace between the marker and the answer is not steered if the gate says so there; then
        it is asked again at the token after it.
        """
        return self.at_start and self._zone in (None, Zone.PASS)

    def see(self, response: str) -> None:
        """Take the text of the response until now, special tokens included."""
        if self._answer is not None:
            self._answer.see(response)

    def take_score(self, score: float) -> None:
        """Note the prompt's score, which is told even if no zone is ever decided."""
        self._score = score

    def open(self, reading: GateReading, position: int = 0) -> Zone:
        """Decide the zone before response token `position` and open the ledger."""
        self._reading, self._score, self._start = reading, reading.score, position
        self._zone = choose_zone(reading, self._artifact.thresholds, self._allows_lower)
        self._ledger = self._ledger_of(self._zone)
        return self._zone

    def outlook(self, score: float) -> tuple[Carrier | None, float]:
        """What `open` would lead to if the refusal probability agreed with a score.

        Returns:
            The zone's carrier, None in the pass zone, and what its first token could spend, nats.
        """
        zone = prospect(score, self._artifact.thresholds, self._allows_lower)
        return self._carrier_of(zone), self._ledger_of(zone).allowance_nats

    @property
    def _allows_lower(self) -> bool:
        return self._policy.lower == "certified"

    def _carrier_of(self, zone: Zone | None) -> Carrier | None:
        if zone is Zone.RAISE:
            return self._artifact.raise_carrier
        return self._artifact.lower_carrier if zone is Zone.LOWER else None

    def _ledger_of(self, zone: Zone) -> Ledger:
        policy = self._policy
        budgets = {Zone.RAISE: policy.raise_budget_nats, Zone.LOWER: policy.lower_budget_nats}
        return Ledger(budgets.get(zone, 0.0), policy.token_cap_nats)

    def wants_shadow(self, position: int) -> bool:
        """True if response token `position` is to be steered and the ledger can still pay."""
        due = self._zone is not None and shadow_due(
            self._zone, position, self._policy.shadow_tokens, self._start
        )
        # What is left of a used-up budget moves nothing that could be seen: spare the pass.
        pays = self._ledger.allowance_nats > 0 and not self._ledger.exhausted
        return due and (self._lockstep or pays)

    def charge(self, kl_nats: float, flipped: bool) -> None:
        """Book one shadow pass: its KL, and whether the most likely token changed.

        Raises:
            BudgetError: the KL is above the allowance.
        """
        self._ledger.charge(kl_nats)
        self._shadows += 1
        self._steered += kl_nats > 0
        self._flips += flipped

    def record(self, text: str | None = None) -> Record:
        """The request's record; with the finished text, its verdict too."""
        thresholds, score, reading = self._artifact.thresholds, self._score, self._reading
        record = Record(
            zone=self._zone,
            gate_score=score,
            refusal_prob=reading.refusal_prob if reading else None,
            kl_nats=self._ledger.spent_nats,
            budget_nats=self._ledger.budget_nats,
            steered_tokens=self._steered,
            shadow_passes=self._shadows,
            token_flips=self._flips,
            exhausted=self._ledger.exhausted,
            applied=self.applies,
            gate_says="uncertain" if score is None else thresholds.side(score),
        )
        return record if text is None else replace(record, verdict=judge(text))
