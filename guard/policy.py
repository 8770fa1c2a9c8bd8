"""The operator's policy: a small YAML file, frozen once read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guard.errors import PolicyError

__all__ = ["Policy", "load_policy"]


class Policy(BaseModel):
    """What the operator allows the guard to do; clients can never change it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["off", "observe", "enforce"] = Field(
        default="enforce",
        description="off: no gate; observe: compute zones and would-be KL, change nothing;"
        " enforce: steer.",
    )
    raise_budget_nats: float = Field(
        default=4.0, ge=0.0, le=64.0, description="KL budget of a request that is raised, in nats."
    )
    lower_budget_nats: float = Field(
        default=1.0, ge=0.0, le=64.0, description="KL budget of a request that is lowered, in nats."
    )
    token_cap_nats: float = Field(
        default=4.0, ge=0.0, le=64.0, description="Most that one token may spend, in nats."
    )
    shadow_tokens: int = Field(
        default=16,
        ge=1,
        le=65536,
        description="K: how many response tokens of a flagged request get a shadow pass.",
    )
    lower: Literal["certified", "off"] = Field(
        default="certified",
        description="certified: lower only where the artifact certifies its threshold; off: never.",
    )
    on_failure: Literal["closed", "open"] = Field(
        default="closed",
        description="closed: a request that cannot be guarded fails; open: it is served unguarded.",
    )
    debug_fields: bool = Field(
        default=False,
        description="Add zone, score and nats to responses. An oracle for attackers: keep it off.",
    )

    @model_validator(mode="after")
    def _finite(self) -> Self:
        for name in ("raise_budget_nats", "lower_budget_nats", "token_cap_nats"):
            value = getattr(self, name)
            if value != value:
                raise ValueError(f"{name} must be a number, got NaN")
        return self


def load_policy(path: Path | None) -> Policy:
    """Read a policy file; None gives the defaults.

    Raises:
        PolicyError: unreadable file, YAML that is not a mapping, unknown key, value out of range.
    """
    if path is None:
        return Policy()
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise PolicyError(f"{path}: cannot read the policy: {err}") from err
    if raw is None:
        return Policy()
    if not isinstance(raw, dict):
        raise PolicyError(f"{path}: expected a mapping of keys, got {type(raw).__name__}")
    try:
        return Policy.model_validate(raw)
    except ValidationError as err:
        known = ", ".join(Policy.model_fields)
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'policy'}: {e['msg']} (got {e['input']!r})"
            for e in err.errors()
        )
        raise PolicyError(f"{path}: {faults}. Known keys: {known}") from err
