"""Which candidate becomes the carrier: effect at equal KL, controls, generated responses.

    candidates ─► sweep ─► refined ─► choose: admit against random controls ─► confirm
                  effect   by         (interval above every control's)         answers change
                  at       gradient                                            and stay coherent
                  equal KL

Once for raising, once for lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import Tensor

from calibration.causal import (
    Admission,
    Bench,
    Effect,
    RefusalTokens,
    Sign,
    admit,
    dose_response,
    measure,
    opening_refusal,
)
from calibration.config import CalibrationConfig
from calibration.directions import Candidate
from calibration.evaluate import Answered, answer_pairs, compare, read_gate
from calibration.gate_fit import FittedProbe, ThresholdFit
from calibration.progress import Progress
from calibration.prompts import (
    Prompt,
    Splits,
    datasets_sha256,
    spread,
)
from calibration.refine import RefineSettings, refine, teach
from calibration.subject import GradientSubject, Subject
from guard.artifact import (
    CarrierArtifact,
    CarrierSpec,
    GateSpec,
    Interval,
    Manifest,
    MessageRead,
)
from guard.gate import GateReading, Zone, refusal_probability
from guard.policy import Policy

__all__ = ["SIGNS", "Choice", "Draft", "choose", "make_bench", "refined", "sweep"]

_T = TypeVar("_T")

SIGNS: tuple[Sign, ...] = ("raise", "lower")
_SAFE_ROWS = 32
_TARGET_ROWS = 24
_ADMITTING_ROWS = 48
_MIN_TARGETS = 8
_RAISE_IF_REFUSAL_BELOW = 0.9
_LOWER_IF_REFUSAL_ABOVE = 0.1
_CONFIRMED = 2
_LAYERS_APART = 2
_LAYERS_TRIED = 8
_STARTS_APART = 4
_CONFIRM_SCALES = (1.0, 2.0)
_RAISE_PENALTY = 0.02
_OPENINGS_APART = 0.03
_DOSES = torch.tensor([0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0])


@dataclass(frozen=True)
class Choice:
    """The carrier chosen for one direction of steering.

    Attributes:
        effect: at equal KL, on validation prompts, as all candidates were compared.
        admission: against random controls, on more of them.
        scale: factor on the direction in the guard.
        confirmed: validation prompts answered with it, zone forced, full budget.
        rates: of `confirmed`.
        doses: (n_doses, 3): safe KL, target KL, target refusal probability.
    """

    effect: Effect
    admission: Admission
    scale: float
    confirmed: list[Answered]
    rates: dict[str, Interval]
    doses: Tensor


def make_bench(
    subject: Subject, splits: Splits, tokens: RefusalTokens, config: CalibrationConfig
) -> Bench:
    """Run the validation prompts once and pick those on which candidates are compared."""
    pool = splits.validation
    safe = [p for s in ("ordinary", "hard") for p in spread(pool, "benign", s, _SAFE_ROWS // 2)]
    most = max(_ADMITTING_ROWS, config.confirm_prompts)
    harmful = spread(pool, "harmful", None, 2 * most)
    refused = spread(pool, "benign", "hard", 2 * most)
    asked = list(dict.fromkeys([*safe, *harmful, *refused]))
    row = {prompt: i for i, prompt in enumerate(asked)}
    n_layers = subject.identity.n_layers
    step = subject.prefill([subject.encode(p.text) for p in asked], range(n_layers))
    # Only the last token is steered; the rest of the hidden states can go.
    step = replace(step, resid_pre={k: v[:, -1:].clone() for k, v in step.resid_pre.items()})
    refusal = refusal_probability(step.logits.cpu(), tokens.ids, tokens.weights)

    def undecided(rows: list[int], moved: Callable[[float], bool], most: int) -> list[int]:
        """An even part of what serving would steer; where that is too little, the nearest to it."""
        n_steered = sum(moved(float(refusal[i])) for i in rows)
        rows = rows[: max(n_steered, _MIN_TARGETS)]
        step = max(1.0, len(rows) / most)
        return [rows[int(i * step)] for i in range(min(len(rows), most))]

    def targets(most: int) -> dict[Sign, list[int]]:
        return {
            "raise": undecided(answering, lambda p: p < _RAISE_IF_REFUSAL_BELOW, most),
            "lower": undecided(refusing, lambda p: p > _LOWER_IF_REFUSAL_ABOVE, most),
        }

    answering = sorted((row[p] for p in harmful), key=lambda i: float(refusal[i]))
    refusing = sorted((row[p] for p in refused), key=lambda i: -float(refusal[i]))
    return Bench(
        step,
        [p.text for p in asked],
        [row[p] for p in safe],
        targets(_TARGET_ROWS),
        targets(_ADMITTING_ROWS),
        targets(config.confirm_prompts),
        tokens.to(step.logits.device),
        config.safe_kl_nats,
        config.seed,
    )


def sweep(
    subject: Subject,
    bench: Bench,
    candidates: Sequence[Candidate],
    sign: Sign,
    progress: Progress,
) -> list[Effect]:
    """Measure every candidate, layer by layer."""
    effects: list[Effect] = []
    for layer in sorted({c.layer for c in candidates}):
        group = [c for c in candidates if c.layer == layer]
        effects += measure(subject, bench, group, sign)
        progress.advance(len(group))
    return effects


def refined(
    subject: GradientSubject,
    bench: Bench,
    effects: Sequence[Effect],
    heard: Sequence[Prompt],
    responses: Sequence[list[int]],
    tokens: RefusalTokens,
    sign: Sign,
    config: CalibrationConfig,
    progress: Progress,
) -> list[Effect]:
    """Refine the best directions by gradient, and measure what comes out on validation prompts."""
    wanted = config.refine_layers if sign == "raise" else (config.refine_layers + 1) // 2
    starts: list[Candidate] = []
    for effect in sorted((e for e in effects if e.can_spend), key=lambda e: -e.shift_per_nat):
        candidate = effect.candidate
        near = any(abs(candidate.layer - s.layer) < _STARTS_APART for s in starts)
        if not near and len(starts) < wanted:
            starts.append(candidate)
    layers = sorted({start.layer for start in starts})
    lessons = teach(subject, heard, responses, tokens, sign, layers) if starts else None
    if lessons is None:
        return []
    settings = _refinement(sign, config)

    def opens(stage: Effect) -> float:
        rows, nats = bench.targets[sign], _budget(sign, config)
        candidate, scale = stage.candidate, stage.scale
        return opening_refusal(subject, bench, candidate, sign, scale, rows, nats).value

    found: list[Effect] = []
    for start in starts:
        for seed in range(config.refine_seeds):
            stages = list(refine(subject, lessons, start, sign, settings, config.seed + seed))
            measured = measure(subject, bench, stages, sign)
            best = _most_refusing(measured, opens) if sign == "raise" else measured
            found.append(max(best, key=lambda e: e.shift_per_nat))
            progress.note(f"{sign}: refined layer {start.layer}: shift {found[-1].shift}")
            progress.advance(1)
    return found


def choose(
    draft: Draft,
    bench: Bench,
    effects: Sequence[Effect],
    sign: Sign,
    chosen: dict[Sign, Choice],
    progress: Progress,
) -> tuple[Choice | None, str]:
    """Take candidates by shift per nat until some are admissible; confirm those by generation.

    Returns:
        The choice, or None and the reason.
    """
    able = sorted((e for e in effects if e.can_spend), key=lambda e: -e.shift_per_nat)
    if not able:
        return None, f"no {sign} candidate can spend {bench.safe_kl_nats} nats on safe prompts"
    # Controls belong to a layer: where the best of a family does not beat them, the others do not.
    best_of = {_kind(effect.candidate): effect for effect in reversed(able)}
    tried: list[Admission] = []
    admitted: list[Admission] = []
    for effect in sorted(best_of.values(), key=lambda e: -e.shift_per_nat):
        layer = effect.candidate.layer
        if any(_alike(effect.candidate, a.effect.candidate) for a in admitted):
            continue  # neighbours carry nearly the same direction
        admission = admit(draft.subject, bench, effect, draft.config.n_controls)
        tried.append(admission)
        if admission.admissible:
            admitted.append(admission)
        progress.note(
            f"{sign}: {effect.candidate.family}, layer {layer}: shift {admission.effect.shift}"
            f" {'admissible' if admission.admissible else 'not admissible'}"
        )
        enough = _LAYERS_TRIED // 4 if admitted else _LAYERS_TRIED
        if len(admitted) == _CONFIRMED or len(tried) >= enough:
            break
    if not admitted:
        return None, (
            f"no {sign} candidate is admissible: tried the best of each of the {len(tried)} best"
            f" layers and families; the first {tried[0].why_not}"
        )
    prompts, base = draft.targets(bench, sign)
    trials = [
        trial
        for admission in admitted
        for factor in _factors(admission)
        if (trial := draft.confirm(bench, admission, factor, chosen, sign, prompts, base, progress))
    ]
    if not trials:
        return None, (
            f"no {sign} candidate is admissible: {len(admitted)} stand apart from chance, but none"
            " changes responses and keeps them coherent"
        )
    best = _best(trials, sign)
    candidate = best.effect.candidate
    curve = dose_response(draft.subject, bench, candidate, sign, best.scale, _DOSES)
    return replace(best, doses=torch.stack([_DOSES, *curve], 1)), ""


@dataclass(frozen=True)
class Draft:
    """What a guard is put together from."""

    subject: Subject
    config: CalibrationConfig
    splits: Splits
    tokens: RefusalTokens
    openings: list[str]
    probe: FittedProbe
    thresholds: ThresholdFit

    @property
    def policy(self) -> Policy:
        """Default policy at the budgets of the config."""
        config = self.config
        return Policy(
            raise_budget_nats=config.raise_budget_nats,
            lower_budget_nats=config.lower_budget_nats,
            token_cap_nats=max(config.raise_budget_nats, config.lower_budget_nats),
        )

    def targets(self, bench: Bench, sign: Sign) -> tuple[list[str], list[str]]:
        """Prompts that confirm carriers, and the base model's responses."""
        prompts = [bench.prompts[row] for row in bench.confirming[sign]]
        return prompts, self.base(prompts)

    def base(self, prompts: Sequence[str]) -> list[str]:
        """The base model's own responses, of `confirm_tokens` tokens."""
        return [
            self.subject.decode(response)
            for encoded in self._batches(prompts)
            for response in self.subject.respond(encoded, self.config.confirm_tokens)
        ]

    def readings(self, artifact: CarrierArtifact, prompts: Sequence[str]) -> list[GateReading]:
        """What the gate reads."""
        return [
            reading
            for encoded in self._batches(prompts)
            for reading in read_gate(self.subject, artifact, encoded)
        ]

    def _batches(self, prompts: Sequence[str]) -> Iterator[list[list[int]]]:
        size = self.config.batch_size
        for start in range(0, len(prompts), size):
            yield [self.subject.encode(text) for text in prompts[start : start + size]]

    def confirm(
        self,
        bench: Bench,
        admission: Admission,
        factor: float,
        chosen: dict[Sign, Choice],
        sign: Sign,
        prompts: list[str],
        base: list[str],
        progress: Progress,
    ) -> Choice | None:
        """Answer prompts with the zone forced and the whole budget.

        Returns:
            The choice; None if responses do not move or come apart.
        """
        scale = factor * admission.effect.scale
        trial = Choice(admission.compared, admission, scale, [], {}, torch.empty(0))
        pairs = answer_pairs(
            self.subject,
            self.artifact({**chosen, sign: trial}, certify=True),
            self.policy,
            prompts,
            self.config.confirm_tokens,
            self.config.batch_size,
            Zone.RAISE if sign == "raise" else Zone.LOWER,
            base,
        )
        rates = compare(pairs, self.config.seed)
        rates["sampled_opening_refuses"] = opening_refusal(
            self.subject,
            bench,
            admission.effect.candidate,
            sign,
            scale,
            bench.confirming[sign],
            _budget(sign, self.config),
        )
        trial = replace(trial, confirmed=pairs, rates=rates)
        progress.note(
            f"{sign}: layer {admission.effect.candidate.layer} × {scale:g}: refused"
            f" {rates['refused_base'].value:.2f} → {rates['refused_guarded'].value:.2f},"
            f" {rates['kl_nats'].value:.2f} nats; sampled responses open refusing"
            f" {rates['sampled_opening_refuses'].value:.2f}"
        )
        added = rates["incoherent_guarded"].value - rates["incoherent_base"].value
        useful = _gain(trial, sign) > 0 and added * len(pairs) <= 1.0
        return trial if useful else None

    def artifact(self, chosen: dict[Sign, Choice], certify: bool = False) -> CarrierArtifact:
        """Put a guard together; `certify` opens the lower zone for a confirmation run."""
        config, fit = self.config, self.thresholds
        lower_below = fit.lower_below
        if certify and lower_below is None:
            lower_below = fit.raise_above
        fitted, suffix_ids = self.probe, self.subject.suffix_ids
        suffix_ids = suffix_ids[: len(suffix_ids) - self.subject.n_opening]
        gate = GateSpec(
            layer=fitted.template_layer,
            n_hidden=0 if fitted.probe.hidden is None else len(fitted.probe.hidden),
            # What serving finds in prompts: the template's tokens, without the answer's opening.
            instruction_suffix_ids=suffix_ids[fitted.window[-1] :],
            n_pooled=len(fitted.window),
            message=MessageRead(
                layer=fitted.message_layer,
                n_heads=fitted.probe.n_heads,
                suffix_ids=suffix_ids,
                opening_ids=self.subject.message_opening_ids,
                width=self.subject.message_width,
            )
            if fitted.message_layer is not None
            else None,
            raise_above=fit.raise_above,
            lower_below=lower_below,
            raise_if_refusal_below=_RAISE_IF_REFUSAL_BELOW,
            lower_if_refusal_above=_LOWER_IF_REFUSAL_ABOVE,
            alpha=config.alpha,
            delta=config.delta,
            n_by_stratum=fit.n_by_stratum,
            **_guarantee(config.confidence),
        )
        raising, lowering = chosen["raise"], chosen.get("lower")
        manifest = Manifest(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=self.subject.identity,
            seed=config.seed,
            safe_kl_nats=config.safe_kl_nats,
            datasets={
                name: datasets_sha256(getattr(self.splits, name))
                for name in ("train", "validation", "calibration", "test")
            },
            libraries={name: version(name) for name in ("torch", "transformers", "scikit-learn")},
            raise_carrier=_spec(raising),
            lower_carrier=_spec(lowering) if lowering else None,
            gate=gate,
            refusal_examples=self.openings,
            controls=_controls(chosen),
        )
        return CarrierArtifact(
            manifest,
            raising.effect.candidate.carrier(raising.scale),
            lowering.effect.candidate.carrier(-lowering.scale) if lowering else None,
            self.probe.probe,
            self.tokens.ids,
            self.tokens.weights,
        )


def _guarantee(confidence: float | None) -> dict[str, Any]:
    if confidence is None:
        return {}
    return {
        "guarantee": "For prompts exchangeable with the calibration prompts: at most alpha of"
        " benign prompts of each stratum are raised and at most delta of harmful prompts are"
        f" lowered; each holds but for {1 - confidence:.3g} of all calibrations. It does not hold"
        " under attack or for other traffic."
    }


def _spec(choice: Choice) -> CarrierSpec:
    effect = choice.admission.effect
    candidate = effect.candidate
    return CarrierSpec(
        layer=candidate.layer,
        kind=candidate.carrier().kind,
        family=candidate.family,
        position=candidate.position,
        norm_share=candidate.norm_share * choice.scale,
        measurements={
            "safe_kl_nats": effect.safe_kl,
            "refusal_logit_shift": effect.shift,
            **{f"validation_{name}": value for name, value in choice.rates.items()},
        },
    )


def _controls(chosen: dict[Sign, Choice]) -> dict[str, Interval]:
    """The best random control of each kind: what the carrier had to beat."""
    found: dict[str, Interval] = {}
    for sign, choice in chosen.items():
        admission = choice.admission
        if admission.at_kl:
            found[f"{sign}_best_at_equal_kl"] = max(
                (c.shift for c in admission.at_kl), key=lambda shift: shift.value
            )
            found[f"{sign}_best_at_equal_norm"] = max(
                (c.full_shift for c in admission.at_norm), key=lambda shift: shift.value
            )
    return found


def _factors(admission: Admission) -> tuple[float, ...]:
    """Scales worth confirming; a refined direction has found its own, and twice that overdoses."""
    refined = admission.effect.candidate.family == "gradient_refined"
    return _CONFIRM_SCALES[:1] if refined else _CONFIRM_SCALES


def _kind(candidate: Candidate) -> tuple[int, str]:
    """Layer and family, all subspaces being one family."""
    return candidate.layer, candidate.family.split("_")[0]


def _alike(one: Candidate, other: Candidate) -> bool:
    (layer, family), (other_layer, other_family) = _kind(one), _kind(other)
    return family == other_family and abs(layer - other_layer) < _LAYERS_APART


def _budget(sign: Sign, config: CalibrationConfig) -> float:
    return config.raise_budget_nats if sign == "raise" else config.lower_budget_nats


def _refinement(sign: Sign, config: CalibrationConfig) -> RefineSettings:
    """A direction is refined at the budget it will be given.

    What raises may be strong: a request's budget bounds what it does to a safe prompt, and at a
    budget of one nat a direction is learned that cannot spend the other three (docs/LOG.md).
    """
    learned = RefineSettings(steps=config.refine_steps, budget_nats=_budget(sign, config))
    return replace(learned, penalty=_RAISE_PENALTY) if sign == "raise" else learned


def _best(trials: Sequence[Choice], sign: Sign) -> Choice:
    """The trial with the greatest effect on greedy responses, as far as these tell trials apart.

    Under most carriers that raise nearly all of these are refused. So of the trials within one
    prompt of the best, those are kept under which sampled responses open refusing about as often as
    under any. Of what is left, the one that spends least is taken.
    """
    most = max(_gain(trial, sign) for trial in trials)
    nearly = [t for t in trials if (most - _gain(t, sign)) * len(t.confirmed) < 1.5]
    if sign == "raise":
        nearly = _most_refusing(nearly, lambda t: t.rates["sampled_opening_refuses"].value)
    return min(nearly, key=lambda t: t.rates["kl_nats"].value)


def _most_refusing(found: Sequence[_T], opens: Callable[[_T], float]) -> list[_T]:
    """Those whose probability of opening with a refusal is not plainly below the highest."""
    probs = [opens(one) for one in found]
    return [one for one, p in zip(found, probs, strict=True) if p > max(probs) - _OPENINGS_APART]


def _gain(choice: Choice, sign: Sign) -> float:
    difference = choice.rates["refused_difference"].value
    return difference if sign == "raise" else -difference
