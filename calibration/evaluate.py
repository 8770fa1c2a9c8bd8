"""Answer prompts with and without a guard, on the same prompts, and compare.

Greedy, by the same guarded step that serving uses. Verdicts are string matches (guard.refusal):
read the texts as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from calibration.statistics import mean_interval, share_interval
from calibration.subject import Subject
from guard.artifact import CarrierArtifact, Interval
from guard.gate import GateReading, Zone
from guard.policy import Policy
from guard.reading import gate_places, read_gates
from guard.refusal import Verdict, judge
from guard.session import GuardSession, Record

__all__ = ["Answered", "answer_pairs", "compare", "force", "read_gate"]


@dataclass(frozen=True)
class Answered:
    """One prompt, answered twice.

    Attributes:
        prompt: the user's message.
        base: the model's own response.
        guarded: the response with the guard.
        base_verdict: of `base`.
        record: the guard's record, the verdict of `guarded` in it.
    """

    prompt: str
    base: str
    guarded: str
    base_verdict: Verdict
    record: Record


def read_gate(
    subject: Subject, artifact: CarrierArtifact, prompts: Sequence[Sequence[int]]
) -> list[GateReading]:
    """Score and refusal probability of encoded prompts, as serving reads them."""
    gate = artifact.manifest.gate
    n_last = None
    if gate.message is not None:  # no more than the longest message, whatever the gate's width
        found = [(len(ids), gate_places(artifact, ids)) for ids in prompts]
        n_last = max(n - min(*template, *message) for n, (template, message) in found)
    step = subject.prefill(prompts, gate.layers, n_last)
    return read_gates(artifact, step, prompts)


def force(artifact: CarrierArtifact, zone: Zone) -> GateReading:
    """A reading that puts a request into a zone, to measure an actuator without its gate."""
    thresholds = artifact.thresholds
    if zone is Zone.RAISE:
        return GateReading(thresholds.raise_above + 1.0, 0.0)
    below = thresholds.lower_below if thresholds.lower_below is not None else 0.0
    return GateReading(below - 1.0, 1.0)


def answer_pairs(
    subject: Subject,
    artifact: CarrierArtifact,
    policy: Policy,
    prompts: Sequence[str],
    max_tokens: int,
    batch_size: int = 32,
    zone: Zone | None = None,
    base: Sequence[str] | None = None,
) -> list[Answered]:
    """Answer prompts with and without the guard.

    Args:
        subject: the model.
        artifact: the guard.
        policy: budgets, K, mode.
        prompts: user messages.
        max_tokens: of each response.
        batch_size: prompts answered together.
        zone: put every prompt into this zone in place of asking the gate.
        base: the model's own responses, where they are known already.
    """
    encoded = [subject.encode(text) for text in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    answered: dict[int, Answered] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = [encoded[i] for i in rows]
        readings = (
            read_gate(subject, artifact, ids)
            if zone is None
            else [force(artifact, zone)] * len(ids)
        )
        sessions = [GuardSession(artifact, policy) for _ in rows]
        for session, reading in zip(sessions, readings, strict=True):
            session.open(reading)
        guarded = [subject.decode(t) for t in subject.respond(ids, max_tokens, sessions)]
        plain = (
            [subject.decode(t) for t in subject.respond(ids, max_tokens)]
            if base is None
            else [base[i] for i in rows]
        )
        for i, session, text, own in zip(rows, sessions, guarded, plain, strict=True):
            answered[i] = Answered(prompts[i], own, text, judge(own), session.record(text))
    return [answered[i] for i in range(len(prompts))]


def compare(pairs: Sequence[Answered], seed: int) -> dict[str, Interval]:
    """Refusals, incoherent outputs and nats, base beside guarded, and the paired difference."""
    n = len(pairs)
    refusing = (Verdict.REFUSED, Verdict.PARTIAL)
    base = [p.base_verdict in refusing for p in pairs]
    guarded = [p.record.verdict in refusing for p in pairs]
    return {
        "refused_base": share_interval(sum(base), n),
        "refused_guarded": share_interval(sum(guarded), n),
        "refused_difference": mean_interval(
            torch.tensor([float(g) - float(b) for b, g in zip(base, guarded, strict=True)]), seed
        ),
        "incoherent_base": share_interval(sum(p.base_verdict is Verdict.UNCLEAR for p in pairs), n),
        "incoherent_guarded": share_interval(
            sum(p.record.verdict is Verdict.UNCLEAR for p in pairs), n
        ),
        "kl_nats": mean_interval(torch.tensor([p.record.kl_nats for p in pairs]), seed),
        "flagged": share_interval(sum(p.record.zone is not Zone.PASS for p in pairs), n),
    }
