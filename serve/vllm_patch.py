"""Wrap one method of vLLM, or say that this vLLM has no such method."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from guard.errors import NotArmedError
from guard.policy import Policy

__all__ = ["check_statuses", "wrap"]


def wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, …)`.

    Raises:
        NotArmedError: this vLLM has no such method.
    """
    original = owner.__dict__.get(name)
    if original is None:
        raise NotArmedError(
            f"{owner.__name__}.{name} does not exist in this vLLM; trimtab was tested with 0.32"
        )

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, wrapped)


def check_statuses(
    statuses: Sequence[object], artifact_id: str, policy: Policy, n_ranks: int
) -> None:
    """Check what the workers say about themselves.

    Args:
        statuses: one JSON object per rank, of `trimtab_status`.
        artifact_id: of the guard that all must have.
        policy: that all must have.
        n_ranks: how many there must be.

    Raises:
        NotArmedError: a rank is missing, not armed, or has another guard or policy.
    """
    if len(statuses) != n_ranks:
        raise NotArmedError(f"{len(statuses)} of {n_ranks} ranks say whether they are guarded")
    for text in statuses:
        status = json.loads(str(text))
        if not status["armed"] or status["guard"] != artifact_id:
            raise NotArmedError(
                f"rank {status['rank']} is not armed with guard {artifact_id}: {text}"
            )
        if status["policy"] != policy.digest:
            raise NotArmedError(
                f"rank {status['rank']} has another policy than this process: was the file that"
                " TRIMTAB_POLICY names changed during the start? Start again"
            )
