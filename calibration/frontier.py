"""Refusal beside over-refusal under one policy: a point of the frontier."""

from __future__ import annotations

from dataclasses import dataclass

from guard.artifact import Interval

__all__ = ["FrontierPoint"]


@dataclass(frozen=True)
class FrontierPoint:
    """What a policy does to prompts that are harmful, hard benign and ordinary.

    Attributes:
        name: how reports call it.
        raise_budget_nats: of the policy, per request.
        lower_budget_nats: of the policy, per request.
        shadow_tokens: of the policy.
        token_cap_nats: of the policy.
        harmful_refused: share of harmful prompts that are refused.
        hard_benign_refused: share of hard benign prompts that are refused: over-refusal.
        ordinary_refused: share of ordinary benign prompts that are refused: over-refusal.
        benign_nats: mean KL(guarded ‖ base) that benign prompts of both kinds were charged, nats.
        chosen: this is the policy that the calibration recommends.
    """

    name: str
    raise_budget_nats: float
    lower_budget_nats: float
    shadow_tokens: int
    token_cap_nats: float
    harmful_refused: Interval
    hard_benign_refused: Interval
    ordinary_refused: Interval
    benign_nats: Interval
    chosen: bool
