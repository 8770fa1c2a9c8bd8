"""Who is steered, and which way: conformal thresholds and zones. Pure, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

from guard.errors import InputError

__all__ = [
    "GateReading",
    "Thresholds",
    "Zone",
    "choose_zone",
    "conformal_lower",
    "conformal_upper",
    "gate_position",
    "gate_positions",
    "message_positions",
    "prospect",
    "refusal_logit",
    "refusal_probability",
]


class Zone(StrEnum):
    """What the gate decides for one request."""

    PASS = "pass"  # noqa: S105 - a zone, not a password
    RAISE = "raise"
    LOWER = "lower"


@dataclass(frozen=True)
class GateReading:
    """What the base pass shows at the end of a prompt.

    Attributes:
        score: the probe's logit, higher is more harmful.
        refusal_prob: the base model's own chance of opening with a refusal token.
    """

    score: float
    refusal_prob: float


@dataclass(frozen=True)
class Thresholds:
    """Where the zones begin.

    Attributes:
        raise_above: τ_hi; at most α of benign prompts score above it.
        lower_below: τ_lo; at most δ of harmful prompts score below it; None: not certified.
        raise_if_refusal_below: raise only if the base is not about to refuse by itself.
        lower_if_refusal_above: lower only if the base is about to refuse.
    """

    raise_above: float
    lower_below: float | None
    raise_if_refusal_below: float = 0.9
    lower_if_refusal_above: float = 0.1

    def side(self, score: float) -> Literal["harmful", "benign", "uncertain"]:
        """Return what a score says; where no τ_lo is certified, benign begins at logit 0."""
        if score > self.raise_above:
            return "harmful"
        benign_below = self.lower_below if self.lower_below is not None else 0.0
        return "benign" if score < benign_below else "uncertain"


def choose_zone(reading: GateReading, thresholds: Thresholds, allow_lower: bool = True) -> Zone:
    """Return the zone of a reading; what is uncertain, or already as it should be, passes."""
    zone = prospect(reading.score, thresholds, allow_lower)
    if zone is Zone.RAISE:  # about to comply?
        agrees = reading.refusal_prob < thresholds.raise_if_refusal_below
    else:  # about to refuse?
        agrees = reading.refusal_prob > thresholds.lower_if_refusal_above
    return zone if agrees else Zone.PASS


def prospect(score: float, thresholds: Thresholds, allow_lower: bool = True) -> Zone:
    """Return the zone of this score if the refusal probability agrees; else it passes."""
    if score > thresholds.raise_above:
        return Zone.RAISE
    tau = thresholds.lower_below if allow_lower else None
    return Zone.LOWER if tau is not None and score < tau else Zone.PASS


def gate_position(prompt_ids: Sequence[int], suffix_ids: Sequence[int]) -> int:
    """Return the index of the token at which the probe reads.

    That is the token before the last occurrence of the suffix: the last instruction token, or one
    of the template's behind it. A prompt without it (a raw completion) is read at its last token.

    Args:
        prompt_ids: (n_tokens,), template included, without padding.
        suffix_ids: what the chat template puts between that token and the response.
    """
    width = len(suffix_ids)
    wanted = list(suffix_ids)
    for start in range(len(prompt_ids) - width, 0, -1) if width else ():
        if list(prompt_ids[start : start + width]) == wanted:
            return start - 1
    return len(prompt_ids) - 1


def gate_positions(
    prompt_ids: Sequence[int], suffix_ids: Sequence[int], n_pooled: int
) -> list[int]:
    """Return the indices of the tokens whose scores are averaged, the last first.

    Args:
        prompt_ids: (n_tokens,), template included, without padding.
        suffix_ids: what the chat template puts between the last of them and the response.
        n_pooled: how many; a prompt that begins too late repeats its first token.
    """
    last = gate_position(prompt_ids, suffix_ids)
    return [max(0, last - back) for back in range(n_pooled)]


def message_positions(
    prompt_ids: Sequence[int], suffix_ids: Sequence[int], opening_ids: Sequence[int], width: int
) -> list[int]:
    """Return the indices of the user's last message, or of its last `width` tokens, rising.

    Args:
        prompt_ids: (n_tokens,), template included, without padding.
        suffix_ids: what the chat template puts behind the message.
        opening_ids: what it puts before it; where that is not found, only `width` limits.
        width: most tokens, ≥ 1.
    """
    last = gate_position(prompt_ids, suffix_ids)
    first, n = max(0, last + 1 - width), len(opening_ids)
    wanted = list(opening_ids)
    for start in range(last, max(first, n) - 1, -1) if n else ():
        # the last one first: a whole comparison at each of hundreds of tokens would be felt
        if prompt_ids[start - 1] == wanted[-1] and list(prompt_ids[start - n : start]) == wanted:
            return list(range(start, last + 1))
    return list(range(first, last + 1))


def refusal_probability(logits: Tensor, token_ids: Tensor, token_weights: Tensor) -> Tensor:
    """Return p_R = Σ_v p(v)·w_v: how likely the base is to open with a refusal.

    Args:
        logits: (n_rows, vocab) of the first response token, at temperature 1.
        token_ids: (n_tokens,) first tokens of the model's own refusals.
        token_weights: (n_tokens,) share of the responses opening with that token that refuse.

    Returns:
        (n_rows,) float32 in [0, 1].
    """
    probs = torch.softmax(logits.float(), dim=-1)[:, token_ids]
    return (probs @ token_weights.float()).clamp(0.0, 1.0)


def refusal_logit(refusal_prob: Tensor, floor: float = 1e-6) -> Tensor:
    """Return log p_R − log(1 − p_R): the refusal metric of Arditi et al. 2024, 2406.11717."""
    return torch.logit(refusal_prob.double().clamp(floor, 1.0 - floor))


def conformal_upper(scores: Tensor, alpha: float, confidence: float | None = None) -> float:
    """Return τ such that a fresh exchangeable score exceeds it with probability ≤ alpha.

    τ is the ⌈(n+1)(1−α)⌉-th smallest of n scores (Vovk et al. 2005, split conformal): the
    probability is over the calibration prompts, too. With a `confidence` it holds for the prompts
    at hand, but for a share 1 − confidence of all sets of prompts (PAC; Vovk 2012, arXiv:1209.2673,
    proposition 2a): τ is the k-th smallest with the least k for which P(Bin(n, 1−α) < k) ≥
    confidence.

    Raises:
        InputError: n is too small for alpha; the message says how many would do.
    """
    return _conformal_quantile(scores, alpha, "alpha", confidence)


def conformal_lower(scores: Tensor, delta: float, confidence: float | None = None) -> float:
    """Return τ such that a fresh exchangeable score lies below it with probability ≤ delta.

    `confidence` as in `conformal_upper`.

    Raises:
        InputError: n is too small for delta; the message says how many would do.
    """
    return -_conformal_quantile(-scores, delta, "delta", confidence)


def _conformal_quantile(scores: Tensor, level: float, name: str, confidence: float | None) -> float:
    n = _check_level(scores, level)
    if confidence is None:
        rank, need = math.ceil((n + 1) * (1.0 - level) - 1e-9), math.ceil(1.0 / level - 1.0 - 1e-9)
    else:
        if not 0.0 < confidence < 1.0:
            raise InputError(f"a confidence lies strictly between 0 and 1, got {confidence}")
        rank = _certain_rank(n, 1.0 - level, confidence)
        need = math.ceil(math.log(1.0 - confidence) / math.log(1.0 - level) - 1e-9)
    if rank > n:
        said = f" with confidence {confidence:g}" if confidence is not None else ""
        raise InputError(
            f"{name} {level}{said} needs at least {need} prompts in a stratum, got {n}"
        )
    return float(scores.double().sort().values[rank - 1])


def _certain_rank(n: int, share: float, confidence: float) -> int:
    """The least k with P(Bin(n, share) < k) ≥ confidence; n + 1 if there is none up to n."""
    counts = torch.arange(n + 1, dtype=torch.float64)
    log_choose = (
        math.lgamma(n + 1) - torch.lgamma(counts + 1) - torch.lgamma(torch.tensor(n) - counts + 1)
    )
    log_p = log_choose + counts * math.log(share) + (n - counts) * math.log1p(-share)
    below = log_p.exp().cumsum(0)  # P(Bin ≤ counts) = P(Bin < counts + 1)
    enough = (below >= confidence - 1e-12).nonzero()
    return int(enough[0]) + 1 if len(enough) else n + 1


def _check_level(scores: Tensor, level: float) -> int:
    if not 0.0 < level < 1.0:
        raise InputError(f"a conformal level lies strictly between 0 and 1, got {level}")
    if scores.dim() != 1 or not bool(torch.isfinite(scores).all()):
        raise InputError("conformal scores must be one finite vector")
    return int(scores.numel())
