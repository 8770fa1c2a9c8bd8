"""One guarded decoding step: base pass in, logits to sample from out.

    base pass ─► for each carrier layer: shadow pass ─► mix inside the allowance ─► charge

Every engine and the calibration's own evaluation go through these few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from guard.kl import mix_within_budget
from guard.session import GuardSession
from guard.steering import Carrier

__all__ = ["BasePass", "OnMixture", "Shadower", "guarded_logits", "layers_wanted"]

OnMixture = Callable[[int, Tensor, Tensor, float], None]
"""Called with (row, mixed logits, base logits, kl_nats) for auditors; tensors are (vocab,)."""


class BasePass(Protocol):
    """What a base pass must leave behind to be steered."""

    @property
    def logits(self) -> Tensor:
        """(n_rows, vocab) at the last token of every row, in the model's type."""

    def last_hidden(self, layer: int) -> Tensor:
        """(n_rows, d_model): the residual stream of the last token before `layer`."""


_Pass = TypeVar("_Pass", bound=BasePass, contravariant=True)


class Shadower(Protocol[_Pass]):
    """Whatever can run the shadow pass of the base pass it just made."""

    def shadow(self, step: _Pass, rows: Sequence[int], layer: int, steered: Tensor) -> Tensor:
        """Return (n_shadow, vocab) float32 steered logits; see `guard.shadow.ShadowModel`."""


def layers_wanted(
    sessions: Sequence[GuardSession | None], position: int | Sequence[int]
) -> list[int]:
    """Return the carrier layers that response token `position` needs, rising, without repeats."""
    positions = _per_row(position, len(sessions))
    carriers = [_due(s, p) for s, p in zip(sessions, positions, strict=True)]
    return sorted({carrier.layer for carrier in carriers if carrier is not None})


_Step = TypeVar("_Step", bound=BasePass)


def guarded_logits(
    model: Shadower[_Step],
    step: _Step,
    sessions: Sequence[GuardSession | None],
    position: int | Sequence[int],
    temperatures: Sequence[float],
    on_mixture: OnMixture | None = None,
) -> Tensor:
    """Return the logits to sample response token `position` from, and charge the ledgers.

    Args:
        model: the model that made `step`.
        step: the base pass, with resid_pre of `layers_wanted(sessions, position)`.
        sessions: one per row; None leaves the row as it is.
        position: of the token to be sampled, from 0; one for all rows, or one per row.
        temperatures: one per row, ≥ 0, at which KL is measured; 0 (greedy) counts as 1.
        on_mixture: an auditor's view of every mixture.

    Returns:
        (n_rows, vocab): `step.logits` itself if no row is steered (bit for bit), else float32.

    Raises:
        NumericsError: NaN or infinite values in a shadow pass.
        BudgetError: a charge above the allowance: a bug.
    """
    logits = step.logits
    positions = _per_row(position, len(sessions))
    for layer in layers_wanted(sessions, positions):
        rows: list[int] = []
        open_sessions: list[GuardSession] = []
        steered: list[Tensor] = []
        for row, session in enumerate(sessions):
            carrier = _due(session, positions[row])
            if session is None or carrier is None or carrier.layer != layer:
                continue
            rows.append(row)
            open_sessions.append(session)
            steered.append(carrier.apply(step.last_hidden(layer)[row].float()))
        base = step.logits[rows].float()
        mixture = mix_within_budget(
            base,
            model.shadow(step, rows, layer, torch.stack(steered)),
            torch.tensor([s.ledger.allowance_nats for s in open_sessions], dtype=torch.float64),
            torch.tensor([temperatures[row] or 1.0 for row in rows], dtype=torch.float64),
        )
        flips = (mixture.logits.argmax(-1) != base.argmax(-1)).tolist()
        spent = mixture.kl_nats.tolist()
        for i, session in enumerate(open_sessions):
            session.charge(spent[i], flips[i])
            if on_mixture is not None:
                on_mixture(rows[i], mixture.logits[i], base[i], spent[i])
        applied = [i for i, session in enumerate(open_sessions) if session.applies]
        if applied:
            if logits is step.logits:
                logits = logits.to(torch.float32, copy=True)
            logits[[rows[i] for i in applied]] = mixture.logits[applied]
    return logits


def _per_row(position: int | Sequence[int], n_rows: int) -> Sequence[int]:
    return [position] * n_rows if isinstance(position, int) else position


def _due(session: GuardSession | None, position: int) -> Carrier | None:
    if session is None or not session.wants_shadow(position):
        return None
    return session.carrier
