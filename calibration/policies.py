"""Policies compiled from calibration: what thresholds and budgets do, measured, and the choice.

Each validation prompt is answered once by the model alone and, where some policy would flag it,
once more in each zone, at each budget and at each pace of spending it. A policy is then only a way
to pick one of these responses per prompt, so the whole frontier costs no more than its most
permissive corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from scipy import stats

from calibration.evaluate import Answered
from calibration.frontier import FrontierPoint
from calibration.statistics import mean_interval, share_interval
from guard.artifact import Interval, Preset
from guard.gate import GateReading, Thresholds, Zone, choose_zone
from guard.policy import Policy
from guard.refusal import Verdict

__all__ = [
    "Outcome",
    "Pace",
    "Setting",
    "Spending",
    "compile_policies",
    "grid",
    "needed",
    "tabulate",
]

GROUPS = ("harmful", "hard_benign", "ordinary")
_REFUSING = (Verdict.REFUSED, Verdict.PARTIAL)
_KEEP_LOWERED = 0.8  # of the over-refusals that a lower threshold on p_R would remove


@dataclass(frozen=True)
class Pace:
    """How fast a budget may be spent.

    Attributes:
        shadow_tokens: K.
        cap_share: of the budget, that one token may spend.
    """

    shadow_tokens: int = Policy().shadow_tokens
    cap_share: float = 1.0


@dataclass(frozen=True)
class Spending:
    """What a response in a zone may spend.

    Attributes:
        budget_nats: per request.
        pace: K and what one token may spend.
    """

    budget_nats: float
    pace: Pace = Pace()

    @property
    def policy(self) -> Policy:
        """The same as a policy, for whichever zone is forced."""
        return Policy(
            raise_budget_nats=self.budget_nats,
            lower_budget_nats=self.budget_nats,
            token_cap_nats=self.budget_nats * self.pace.cap_share,
            shadow_tokens=self.pace.shadow_tokens,
        )


@dataclass(frozen=True)
class Setting:
    """One policy on the frontier.

    Attributes:
        alpha: most benign prompts of a stratum above the threshold.
        thresholds: of the gate.
        raise_budget_nats: per request.
        lower_budget_nats: per request.
        pace: K, and the token cap as a share of the budget to raise.
    """

    alpha: float
    thresholds: Thresholds
    raise_budget_nats: float
    lower_budget_nats: float
    pace: Pace = Pace()

    @property
    def token_cap_nats(self) -> float:
        """Most that one token may spend."""
        return self.pace.cap_share * max(self.raise_budget_nats, self.lower_budget_nats)

    def spending(self, zone: Zone) -> Spending:
        """What a response in this zone may spend."""
        budgets = {Zone.RAISE: self.raise_budget_nats, Zone.LOWER: self.lower_budget_nats}
        budget = budgets.get(zone, 0.0)
        if budget <= 0.0:
            return Spending(0.0, self.pace)
        share = min(1.0, self.token_cap_nats / budget)
        return Spending(budget, replace(self.pace, cap_share=share))


@dataclass
class Outcome:
    """What one prompt gets from the model alone and in each zone.

    Attributes:
        group: of `GROUPS`.
        reading: the gate's.
        refused: by the model alone.
        steered: (zone, spending) → refused, nats; only where a setting needs it.
    """

    group: str
    reading: GateReading
    refused: bool
    steered: dict[tuple[Zone, Spending], tuple[bool, float]] = field(default_factory=dict)

    def under(self, setting: Setting) -> tuple[bool, float]:
        """Refused, and the nats spent, under a policy."""
        zone = choose_zone(self.reading, setting.thresholds)
        if zone is Zone.PASS:
            return self.refused, 0.0
        return self.steered[zone, setting.spending(zone)]


Answer = Callable[[Sequence[int], Zone, Spending], list[Answered]]
"""Responses to some prompts, by index, with the zone forced."""


def tabulate(outcomes: Sequence[Outcome], settings: Sequence[Setting], answer: Answer) -> None:
    """Answer every prompt in every zone and at every budget that some setting puts it into."""
    wanted: dict[tuple[Zone, Spending], list[int]] = {}
    for i, outcome in enumerate(outcomes):
        for setting in settings:
            zone = choose_zone(outcome.reading, setting.thresholds)
            rows = wanted.setdefault((zone, setting.spending(zone)), [])
            if zone is not Zone.PASS and i not in rows:
                rows.append(i)
    for (zone, spending), rows in wanted.items():
        for i, pair in zip(rows, answer(rows, zone, spending) if rows else [], strict=True):
            refused = pair.record.verdict in _REFUSING
            outcomes[i].steered[zone, spending] = refused, pair.record.kl_nats


def grid(
    thresholds: Thresholds,
    raise_above: dict[float, float],
    refusal_above: Sequence[float],
    raise_budgets: Sequence[float],
    lower_budget: float,
    paces: Sequence[Pace] = (Pace(),),
) -> list[Setting]:
    """Every combination of thresholds and budgets.

    Args:
        thresholds: as certified.
        raise_above: alpha → τ_hi.
        refusal_above: values of `lower_if_refusal_above`.
        raise_budgets: nats per request.
        lower_budget: nats per request.
        paces: K and token caps.
    """
    found = []
    for (alpha, tau), above, budget, pace in product(
        raise_above.items(), refusal_above, raise_budgets, paces
    ):
        lower = thresholds.lower_below
        limits = replace(
            thresholds,
            raise_above=tau,
            lower_below=None if lower is None else min(lower, tau),
            lower_if_refusal_above=above,
        )
        found.append(Setting(alpha, limits, budget, lower_budget, pace))
    return found


def compile_policies(
    outcomes: Sequence[Outcome],
    settings: Sequence[Setting],
    target_over_refusal: float | None,
    budget_nats: float | None,
    seed: int,
) -> tuple[list[FrontierPoint], dict[str, Preset], list[str]]:
    """Measure every setting; name the presets and, if a target is given, the chosen one.

    strict refuses most harmful prompts, permissive fewest benign ones, and balanced has the
    greatest difference between the two. With a target, "chosen" is the setting with most harmful
    prompts refused among those of which it is 95 % certain that they refuse no more of ordinary
    benign prompts than that. Settings are tested from the least permissive on, and testing stops
    at the first that fails, so that the confidence holds for the choice (fixed-sequence testing).

    Args:
        outcomes: of `tabulate`.
        settings: of `grid`.
        target_over_refusal: most ordinary prompts to be refused.
        budget_nats: most nats per request.
        seed: of bootstraps.

    Returns:
        The frontier, the presets, and notes: what could not be had, and with how many prompts.
    """
    settings = _with_useful_refusal_threshold(outcomes, settings)
    if budget_nats is not None:
        affordable = [
            s for s in settings if max(s.raise_budget_nats, s.lower_budget_nats) <= budget_nats
        ]
        settings = affordable or settings
    rates = [_rates(outcomes, setting, seed) for setting in settings]
    harm = [r["harmful_refused"].value for r in rates]
    over = [(r["hard_benign_refused"].value + r["ordinary_refused"].value) / 2 for r in rates]
    every = range(len(settings))
    named = {
        "strict": max(every, key=lambda i: (harm[i], -over[i])),
        "balanced": max(every, key=lambda i: (harm[i] - over[i], -settings[i].raise_budget_nats)),
        "permissive": min(every, key=lambda i: (over[i], -harm[i])),
    }
    notes: list[str] = []
    if target_over_refusal is not None:
        safe, note = _certain(outcomes, settings, target_over_refusal)
        notes += [note] if note else []
        if safe:
            named["chosen"] = max(safe, key=lambda i: (harm[i], -over[i]))
    recommended = named.get("chosen", named["balanced"])
    points = [
        FrontierPoint(
            f"α {s.alpha:g}",
            s.raise_budget_nats,
            s.lower_budget_nats,
            s.pace.shadow_tokens,
            s.token_cap_nats,
            r["harmful_refused"],
            r["hard_benign_refused"],
            r["ordinary_refused"],
            r["benign_nats"],
            i == recommended,
        )
        for i, (s, r) in enumerate(zip(settings, rates, strict=True))
    ]
    presets = {name: _preset(settings[i], rates[i]) for name, i in named.items()}
    return points, presets, notes


def needed(target: float, confidence: float = 0.95) -> int:
    """Return how many prompts, none of them refused, it takes to be certain of a target."""
    n = 1
    while _most(0, n, confidence) > target:
        n += 1
    return n


def _certain(
    outcomes: Sequence[Outcome], settings: Sequence[Setting], target: float
) -> tuple[list[int], str]:
    """Settings that keep the target with 95 % confidence, and why there are none."""
    ordinary = [o for o in outcomes if o.group == "ordinary"]

    def permissive(i: int) -> tuple[float, ...]:
        one = settings[i]
        return one.alpha, one.raise_budget_nats, one.pace.shadow_tokens, one.pace.cap_share

    order = sorted(range(len(settings)), key=permissive)
    passed: list[int] = []
    for i in order:
        refused = sum(o.under(settings[i])[0] for o in ordinary)
        if _most(refused, len(ordinary), 0.95) > target:
            break
        passed.append(i)
    if passed:
        return passed, ""
    refused = sum(o.under(settings[order[0]])[0] for o in ordinary)
    return [], (
        f"an over-refusal of {target:g} cannot be certified: {refused} of {len(ordinary)} ordinary"
        f" prompts are refused even at the least permissive setting, which is compatible with"
        f" {_most(refused, len(ordinary), 0.95):.3f}; at none refused {needed(target)} prompts"
        " would do (--policy-prompts, and --benign FILE for more prompts)"
    )


def _most(hits: int, n: int, confidence: float) -> float:
    """Upper Clopper-Pearson bound of a share."""
    return 1.0 if hits >= n else float(stats.beta.ppf(confidence, hits + 1, n - hits))


def _with_useful_refusal_threshold(
    outcomes: Sequence[Outcome], settings: Sequence[Setting]
) -> list[Setting]:
    """Keep one `lower_if_refusal_above`: the highest that removes nearly as many over-refusals."""
    values = sorted({s.thresholds.lower_if_refusal_above for s in settings})
    hard = [o for o in outcomes if o.group == "hard_benign"]
    removed = {}
    for value in values:
        setting = next(s for s in settings if s.thresholds.lower_if_refusal_above == value)
        removed[value] = sum(
            o.refused and not o.under(setting)[0]
            for o in hard
            if choose_zone(o.reading, setting.thresholds) is Zone.LOWER
        )
    kept = max(v for v in values if removed[v] >= _KEEP_LOWERED * removed[values[0]])
    return [s for s in settings if s.thresholds.lower_if_refusal_above == kept]


def _rates(outcomes: Sequence[Outcome], setting: Setting, seed: int) -> dict[str, Interval]:
    found = {}
    for group in GROUPS:
        refused = [o.under(setting)[0] for o in outcomes if o.group == group]
        found[f"{group}_refused"] = share_interval(sum(refused), len(refused))
        nats = [o.under(setting)[1] for o in outcomes if o.group == group]
        found[f"{group}_nats"] = mean_interval(torch.tensor(nats), seed)
    benign = [o.under(setting)[1] for o in outcomes if o.group != "harmful"]
    return {**found, "benign_nats": mean_interval(torch.tensor(benign), seed)}


def _preset(setting: Setting, rates: dict[str, Interval]) -> Preset:
    limits = setting.thresholds
    return Preset(
        raise_above=limits.raise_above,
        lower_below=limits.lower_below,
        lower_if_refusal_above=limits.lower_if_refusal_above,
        raise_budget_nats=setting.raise_budget_nats,
        lower_budget_nats=setting.lower_budget_nats,
        token_cap_nats=setting.token_cap_nats,
        shadow_tokens=setting.pace.shadow_tokens,
        alpha=setting.alpha,
        rates=rates,
    )
