"""One guarded decoding step: base pass in, logits to sample from out.

    base pass ─► for each carrier layer: shadow pass ─► mix inside the allowance ─► charge

Every engine and the calibration's own evaluation go through these few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from guard.kl import mix_within_budget
from guard.session import GuardSession
from guard.shadow import BaseStep, ShadowModel
from guard.steering import Carrier

__all__ = ["OnMixture", "guarded_logits", "layers_wanted"]

OnMixture = Callable[[int, Tensor, Tensor, float], None]
"""Called with (row, mixed logits, base logits, kl_nats) for auditors; tensors are (vocab,)."""


def layers_wanted(sessions: Sequence[GuardSession | None], position: int) -> list[int]:
    """Return the carrier layers that response token `position` needs, rising, without repeats."""
    carriers = [s.carrier for s in sessions if s is not None and s.wants_shadow(position)]
    return sorted({carrier.layer for carrier in carriers if carrier is not None})


def guarded_logits(
    model: ShadowModel,
    step: BaseStep,
    sessions: Sequence[GuardSession | None],
    position: int,
    temperatures: Sequence[float],
    on_mixture: OnMixture | None = None,
) -> Tensor:
    """Return the logits to sample response token `position` from, and charge the ledgers.

    Args:
        model: the model that made `step`.
        step: the base pass, with resid_pre of `layers_wanted(sessions, position)`.
        sessions: one per row; None leaves the row as it is.
        position: of the token to be sampled, from 0.
        temperatures: one per row, ≥ 0, at which KL is measured; 0 (greedy) counts as 1.
        on_mixture: an auditor's view of every mixture.

    Returns:
        (n_rows, vocab): `step.logits` itself if no row is steered (bit for bit), else float32.

    Raises:
        NumericsError: NaN or infinite values in a shadow pass.
        BudgetError: a charge above the allowance: a bug.
    """
    logits = step.logits
    for layer in layers_wanted(sessions, position):
        rows: list[int] = []
        open_sessions: list[GuardSession] = []
        steered: list[Tensor] = []
        for row, session in enumerate(sessions):
            carrier = _due(session, position)
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


def _due(session: GuardSession | None, position: int) -> Carrier | None:
    if session is None or not session.wants_shadow(position):
        return None
    return session.carrier
