"""Exact mixing inside a KL budget, and the ledger that adds it up. Pure tensors, no I/O.

The shadow pass gives steered logits z1 beside the base logits z0. With p_i = softmax(z_i / T),

    p_t ∝ p0^(1-t) · p1^t = softmax(((1-t)·z0 + t·z1) / T),    t ∈ [0, 1],

and KL(p_t ‖ p0) rises with t: its derivative is t·Var_{p_t}(log p1 − log p0) ≥ 0. So a bracketed
search finds the largest t inside the budget, and p_t is the I-projection of p1 onto the KL ball
around p0 (Csiszár 1975). Whatever is returned has been checked in float64: an estimate only seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from guard.errors import BudgetError, NumericsError

__all__ = [
    "Ledger",
    "Mixture",
    "Moved",
    "kl_per_token",
    "log_probs",
    "mix_rows",
    "mix_within_budget",
]

_MAX_STEPS = 60
_RELATIVE_SLACK = 1e-4  # stop once KL is within this share below the cap


def log_probs(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) in float64.

    Args:
        logits: (n_rows, vocab), any float type; −inf marks tokens that cannot occur.
        temperature: (n_rows,) or a number, > 0.

    Returns:
        (n_rows, vocab), float64.
    """
    scale = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device)
    return torch.log_softmax(logits.double() / scale.reshape(-1, 1), dim=-1)


def kl_per_token(mixed_logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    """Return KL(mixed ‖ base) in nats, summed over the vocabulary.

    Args:
        mixed_logprobs: (n_rows, vocab), normalised.
        base_logprobs: (n_rows, vocab), normalised.

    Returns:
        (n_rows,), ≥ 0; +inf where mixed puts mass on a token that base cannot produce.
    """
    term = mixed_logprobs.exp() * (mixed_logprobs - base_logprobs)
    term = torch.where(mixed_logprobs == -math.inf, 0.0, term)
    return term.sum(dim=-1).clamp_min(0.0)


@dataclass(frozen=True)
class Mixture:
    """The distribution to sample from, at every row of a batch.

    Attributes:
        logits: (n_rows, vocab) float32, before temperature; a row with strength 0 is the base row.
        strength: (n_rows,) float64, the t that was applied.
        kl_nats: (n_rows,) float64, KL(p_t ‖ p0) of these very logits, at the row's temperature.
    """

    logits: Tensor
    strength: Tensor
    kl_nats: Tensor


def mix_within_budget(
    base_logits: Tensor,
    steered_logits: Tensor,
    budget_nats: Tensor,
    temperature: Tensor | float = 1.0,
) -> Mixture:
    """Mix toward the steered logits as far as KL(p_t ‖ p0) ≤ budget allows, per row.

    Args:
        base_logits: (n_rows, vocab), finite or −inf; every row has a finite entry.
        steered_logits: (n_rows, vocab), likewise.
        budget_nats: (n_rows,), ≥ 0: min(token cap, what the ledger has left).
        temperature: (n_rows,) or a number, > 0, at which KL is measured (1 for greedy decoding).

    Returns:
        A `Mixture` with kl_nats ≤ budget_nats in every row.

    Raises:
        NumericsError: NaN or +inf in the logits, a row without a possible token, a bad budget.
    """
    _check(base_logits, "base logits")
    _check(steered_logits, "steered logits")
    cap = torch.as_tensor(budget_nats, dtype=torch.float64, device=base_logits.device)
    cap = cap.expand(base_logits.shape[0])
    if not bool((cap >= 0).all()):
        raise NumericsError(f"KL budgets must be ≥ 0 nats, got {cap.tolist()}")
    base = base_logits.float()
    steered = steered_logits.float()
    base_lp = log_probs(base, temperature)
    strength = _largest_strength(base_lp, log_probs(steered, temperature), cap)
    # The search worked in float64; what is sampled is float32. Check that, and step back if needed.
    mixed, kl = _apply(base, steered, strength, base_lp, temperature)
    for shrink in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        over = kl > cap
        if not bool(over.any()):
            break
        strength = torch.where(over, strength * (1.0 - shrink), strength)
        mixed, kl = _apply(base, steered, strength, base_lp, temperature)
    return Mixture(mixed, strength, kl)


@dataclass(frozen=True)
class Moved:
    """What `mix_rows` gives to sample from, and to book.

    Attributes:
        logits: (n_rows, vocab) float32, before temperature.
        outcome: (n_rows, 3) float64: nats spent, 1 if the most likely token changed, 1 if the row
            could not be computed.
    """

    logits: Tensor
    outcome: Tensor


def mix_rows(
    base_logits: Tensor,
    difference: Tensor,
    budget_nats: Tensor,
    temperature: Tensor,
    spare: Tensor | None = None,
) -> Moved:
    """Mix toward base + difference as far as the budget allows; faults stay in their rows.

    The difference is that of a steered and a null row of one small batch, so what its shape does
    to both cancels. This is the reference of the GPU's `serve.vllm_kernels.mix_rows`.

    Args:
        base_logits: (n_rows, vocab) of the base pass.
        difference: (n_rows, vocab) steered − null logits; −inf: impossible once steered.
        budget_nats: (n_rows,) float64, ≥ 0.
        temperature: (n_rows,) float64, > 0, at which KL is measured.
        spare: (vocab,) logits for rows that hold NaN or +inf; None: their base row.
    """
    base = base_logits.float()
    target = torch.where(base == -math.inf, -math.inf, base + difference.float())
    # NaN wins amax, so one reduction sees every fault
    tops = [base.amax(dim=-1), difference.amax(dim=-1).clamp_min(0.0)]
    faulty = ~torch.isfinite(torch.stack(tops)).all(dim=0)
    held = faulty.unsqueeze(-1)
    safe = torch.where(held, 0.0, base)
    mixture = mix_within_budget(safe, torch.where(held, safe, target), budget_nats, temperature)
    logits = torch.where(held, base if spare is None else spare.float(), mixture.logits)
    flipped = ~faulty & (mixture.logits.argmax(-1) != safe.argmax(-1))
    outcome = torch.stack([mixture.kl_nats, flipped.double(), faulty.double()], dim=-1)
    return Moved(logits, outcome)


def _check(logits: Tensor, name: str) -> None:
    highest = logits.amax(dim=-1)  # NaN wins amax, so one reduction sees every fault
    if not bool(torch.isfinite(highest).all()):
        raise NumericsError(f"{name} hold NaN or +inf, or a row with no possible token")


def _apply(
    base: Tensor, steered: Tensor, strength: Tensor, base_lp: Tensor, temperature: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Mixed float32 logits and their KL; a row of strength 0 is the base row bit for bit."""
    t = strength.float().unsqueeze(-1)
    mixed = base + t * (steered - base)
    mixed = torch.where(steered == -math.inf, -math.inf, mixed)
    mixed = torch.where((base == -math.inf) | (t == 0), base, mixed)
    kl = kl_per_token(log_probs(mixed, temperature), base_lp)
    kl = torch.where(strength == 0, 0.0, kl)
    # Supports that do not meet leave no token at all: never inside any budget.
    return mixed, torch.where(mixed.amax(dim=-1) == -math.inf, math.inf, kl.nan_to_num(math.inf))


def _largest_strength(base_lp: Tensor, steered_lp: Tensor, cap: Tensor) -> Tensor:
    """Bracketed Newton on sqrt(KL), which is nearly straight in t, falling back to bisection.

    Keeps KL(low) ≤ cap < KL(high) throughout and returns low, so a step can never overshoot.
    """
    delta = torch.where(base_lp == -math.inf, 0.0, steered_lp - base_lp)
    low = torch.zeros_like(cap)
    high = torch.ones_like(cap)
    kl, _ = _kl_at(high, base_lp, delta)
    low = torch.where(kl <= cap, high, low)
    low_kl = torch.where(kl <= cap, kl, torch.zeros_like(kl))
    t = high * 0.5
    target = cap * (1.0 - 0.5 * _RELATIVE_SLACK)
    for _ in range(_MAX_STEPS):
        open_rows = (low < 1.0) & (cap > 0) & (low_kl < cap * (1 - _RELATIVE_SLACK))
        open_rows &= (high - low) > 1e-9
        if not bool(open_rows.any()):
            break
        kl, slope = _kl_at(t, base_lp, delta)
        fits = kl <= cap
        low_kl = torch.where(open_rows & fits, kl, low_kl)
        low = torch.where(open_rows & fits, t, low)
        high = torch.where(open_rows & ~fits, t, high)
        root = kl.clamp_min(0.0).sqrt()
        newton = t + (target.sqrt() - root) * 2.0 * root / slope
        inside = (newton > low) & (newton < high)  # False for NaN and inf, too
        t = torch.where(inside, newton, 0.5 * (low + high))
    return low


def _kl_at(t: Tensor, base_lp: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p_t ‖ p0) = t·E[Δ] − log Z and its derivative t·Var[Δ], under p_t ∝ p0·exp(t·Δ)."""
    weight = (base_lp + t.unsqueeze(-1) * delta).exp()
    total = weight.sum(dim=-1)
    reach = torch.where(weight > 0, delta, 0.0)
    mean = (weight * reach).sum(dim=-1) / total
    var = (weight * reach.square()).sum(dim=-1) / total - mean.square()
    kl = torch.where(total > 0, t * mean - total.log(), math.inf)
    return kl.nan_to_num(math.inf), t * var.clamp_min(0.0)


class Ledger:
    """What one request has spent of its KL budget: Σ KL(p_t ‖ p0) ≤ budget on every path.

    By the chain rule for KL that sum bounds KL(guarded response ‖ base response), so total
    variation between the two is at most min(√(B/2), √(1 − e^−B)).
    """

    __slots__ = ("_budget", "_spent", "_token_cap")

    def __init__(self, budget_nats: float, token_cap_nats: float = math.inf) -> None:
        if not (budget_nats >= 0 and math.isfinite(budget_nats)) or not token_cap_nats >= 0:
            raise BudgetError(f"budget {budget_nats} and token cap {token_cap_nats} must be ≥ 0")
        self._budget = float(budget_nats)
        self._token_cap = float(token_cap_nats)
        self._spent = 0.0

    @property
    def budget_nats(self) -> float:
        """The request's whole budget."""
        return self._budget

    @property
    def spent_nats(self) -> float:
        """Nats charged so far."""
        return self._spent

    @property
    def allowance_nats(self) -> float:
        """What the next token may spend: min(token cap, what is left)."""
        return max(0.0, min(self._token_cap, self._budget - self._spent))

    @property
    def exhausted(self) -> bool:
        """True once less than a ten-thousandth of the budget is left."""
        return self._budget > 0 and self._budget - self._spent <= 1e-4 * self._budget

    def charge(self, kl_nats: float) -> None:
        """Add one token's KL.

        Raises:
            BudgetError: the charge is not finite, negative, or above the allowance.
        """
        if not 0.0 <= kl_nats <= self.allowance_nats:
            raise BudgetError(f"charge of {kl_nats} nats, allowance {self.allowance_nats}")
        # The allowance was rounded once, so the sum may pass the budget by one ulp: cut it there.
        self._spent = min(self._budget, self._spent + kl_nats)
