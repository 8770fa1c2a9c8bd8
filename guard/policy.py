"""The operator's policy: a small YAML file, frozen once read.

    mode: enforce                 # the default policy
    raise_budget_nats: 4.0
    policies:                     # what a client may ask for by name: each is the default, changed
      strict: {raise_budget_nats: 8.0, lower: off}

A client chooses among names and nothing else, and every name is stricter than the default: in no
state of a response may it move less towards refusal, or more away from it. A file that publishes
anything else is not read at all.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from guard.errors import PolicyError, RequestError

__all__ = ["POLICY_FIELD", "Policy", "load_policy", "looser_in"]

POLICY_FIELD = "trimtab_policy"
"""What a client calls the field in which it names a published policy."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def _yaml_off(value: object) -> object:
    return "off" if value is False else value  # an unquoted `off` is false in YAML


class Policy(BaseModel):
    """What the operator allows the guard to do; clients can never change it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Annotated[Literal["off", "observe", "enforce"], BeforeValidator(_yaml_off)] = Field(
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
    steer_from: Literal["response", "answer"] = Field(
        default="response",
        description="Where the K tokens are counted from and the model's own refusal probability is"
        " read. response: the first token; answer: the first one behind a reasoning model's"
        " thinking.",
    )
    answer_marker: str | None = Field(
        default=None,
        pattern=r"\S",
        description="Text that ends the thinking, for steer_from: answer; by default what the chat"
        " template or the vocabulary has.",
    )
    preset: str | None = Field(
        default=None,
        description="Thresholds of the guard to use, e.g. strict, balanced or permissive; by"
        " default those that its calibration certified for alpha.",
    )
    lower: Annotated[Literal["certified", "off"], BeforeValidator(_yaml_off)] = Field(
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
    policies: dict[str, Policy] = Field(
        default_factory=dict,
        description="Stricter policies that clients may ask for, by name; what one does not say is"
        " as in the default.",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Fill what a published policy does not say from the default that publishes it."""
        published = given.get("policies") if isinstance(given, dict) else None
        if not isinstance(published, dict):
            return given
        default = {k: v for k, v in given.items() if k in cls.model_fields and k != "policies"}
        complete = {
            name: {**default, **changes} if isinstance(changes, dict) else changes
            for name, changes in published.items()
        }
        return {**given, "policies": complete}

    @model_validator(mode="after")
    def _finite(self) -> Self:
        for name in ("raise_budget_nats", "lower_budget_nats", "token_cap_nats"):
            value = getattr(self, name)
            if value != value:
                raise ValueError(f"{name} must be a number, got NaN")
        return self

    @model_validator(mode="after")
    def _marker_in_use(self) -> Self:
        if self.answer_marker is not None and self.steer_from != "answer":
            raise ValueError("answer_marker has no effect without steer_from: answer")
        return self

    @model_validator(mode="after")
    def _only_stricter(self) -> Self:
        if self.policies and self.mode == "off":
            raise ValueError("mode off has no guard, so it cannot publish policies")
        for name, policy in self.policies.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"policy name {name!r}: use lower case letters, digits, - and _")
            if policy.policies:
                raise ValueError(f"policy {name!r} publishes policies of its own")
            if faults := looser_in(policy, self):
                raise ValueError(
                    f"policy {name!r} is not stricter than the default: {'; '.join(faults)}"
                )
        return self

    @property
    def fails_closed(self) -> bool:
        """True if a request that cannot be guarded must not be served."""
        return self.on_failure == "closed" and self.mode == "enforce"

    @property
    def digest(self) -> str:
        """What tells this policy from another: processes of one server compare it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def published(self, name: str | None) -> Policy:
        """Return what a client asked for by name; None asks for the default.

        Raises:
            RequestError: the operator publishes no such policy.
        """
        if name is None:
            return self
        found = self.policies.get(name)
        if found is None:
            known = ", ".join(self.policies) or "none"
            raise RequestError(
                f"{POLICY_FIELD}: no such policy; this server publishes {known}", POLICY_FIELD
            )
        return found


def looser_in(policy: Policy, default: Policy) -> list[str]:
    """Return what keeps `policy` from being at least as strict as `default`; nothing if it is.

    With allowance(policy, zone, i, s) the nats that response token i may spend after s were spent
    (min(token cap, budget − s) for i < K, else 0), a stricter policy has, for every i and s,

        allowance(policy, raise, i, s) ≥ allowance(default, raise, i, s)
        allowance(policy, lower, i, s) ≤ allowance(default, lower, i, s)

    and never turns from closed to open, from lowering off to on, or to a mode, debug fields or a
    start of its own, which are the whole server's.
    """
    mine, theirs = policy, default
    faults = []
    if not _reaches(_reach(mine, mine.raise_budget_nats), _reach(theirs, theirs.raise_budget_nats)):
        faults.append(
            "raise_budget_nats, token_cap_nats and shadow_tokens must let a raised response move"
            " at least as far"
        )
    if theirs.lower == "off" and mine.lower != "off":
        faults.append("lower must stay off")
    if not _reaches(_reach(theirs, _lowering(theirs)), _reach(mine, _lowering(mine))):
        faults.append(
            "lower_budget_nats, token_cap_nats and shadow_tokens must let a lowered response move"
            " no further, on no more tokens; or set lower: off"
        )
    if theirs.on_failure == "closed" and mine.on_failure != "closed":
        faults.append("on_failure must stay closed")
    faults += [
        f"{name} is the whole server's"
        for name in ("mode", "debug_fields", "steer_from", "answer_marker", "preset")
        if getattr(mine, name) != getattr(theirs, name)
    ]
    return faults


def _lowering(policy: Policy) -> float:
    return policy.lower_budget_nats if policy.lower != "off" else 0.0


def _reach(policy: Policy, budget_nats: float) -> tuple[float, float, int]:
    """Budget, most of one token, and tokens that can be moved: all 0 if nothing can be."""
    per_token = min(policy.token_cap_nats, budget_nats)
    return (budget_nats, per_token, policy.shadow_tokens) if per_token > 0 else (0.0, 0.0, 0)


def _reaches(wider: tuple[float, ...], narrower: tuple[float, ...]) -> bool:
    return all(a >= b for a, b in zip(wider, narrower, strict=True))


def load_policy(path: Path | None) -> Policy:
    """Read a policy file; None gives the defaults.

    Raises:
        PolicyError: unreadable file, YAML that is not a mapping, unknown key, value out of range,
            a published policy that is not stricter than the default.
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
