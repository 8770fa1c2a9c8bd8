"""From a deployed chat model to a guard file.

    prompts ─► listen ─► capture ─► gate ─► sweep ─► refine ─► controls ─► confirm ─► test ─► guard
               refusal    hidden    probe,   effect   by         random      generated   both ways,
               openings   states    τ        at equal gradient               responses   on held-out
                                             KL                                          prompts

Directions are computed on the training split, chosen on validation, thresholds come from the
calibration split, and every reported rate from the test split.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from calibration.capture import WorkFolder, capture_hidden, fingerprint, listen
from calibration.causal import (
    Admission,
    Bench,
    Effect,
    RefusalTokens,
    Sign,
    admit,
    dose_response,
    measure,
)
from calibration.config import CalibrationConfig
from calibration.directions import Candidate, category_subspaces, difference_in_means
from calibration.evaluate import Answered, answer_pairs, compare, read_gate
from calibration.frontier import FrontierPoint
from calibration.gate_fit import (
    Labelled,
    Probe,
    ThresholdFit,
    fit_probe,
    fit_thresholds,
    gate_measurements,
    template_window,
)
from calibration.geometry import effective_rank, participation_ratio, split_half_cosine
from calibration.policies import Outcome, compile_policies, grid, tabulate
from calibration.progress import Progress, Silent
from calibration.prompts import (
    Prompt,
    Splits,
    check_two_sided,
    datasets_sha256,
    load_prompts,
    shipped_prompts,
    split_prompts,
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
    Preset,
    load_artifact,
    save_artifact,
)
from guard.errors import InputError, NoAdmissibleCarrierError
from guard.gate import GateReading, Zone, conformal_upper, refusal_probability
from guard.policy import Policy
from guard.refusal import Verdict, judge

__all__ = ["CalibrationResult", "calibrate", "calibrate_subject"]

_MIN_REFUSALS = 8
_SAFE_ROWS = 32
_TARGET_ROWS = 24
_MIN_TARGETS = 8
_RAISE_IF_REFUSAL_BELOW = 0.9
_LOWER_IF_REFUSAL_ABOVE = 0.1
_CONFIRMED = 2
_LAYERS_APART = 2
_LAYERS_TRIED = 12
_CONFIRM_SCALES = (1.0, 2.0)
_MOST_SPENT = 0.9
_SIGNS: tuple[Sign, ...] = ("raise", "lower")
_SUBSPACE_SIZES = (2, 4)
_ALPHAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
_REFUSAL_ABOVE = (0.1, 0.2, 0.3)
_DOSES = torch.tensor([0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0])


@dataclass(frozen=True)
class Choice:
    """The carrier chosen for one direction of steering.

    Attributes:
        effect: at equal KL, on validation prompts.
        admission: against random controls.
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


@dataclass
class CalibrationResult:
    """Everything a calibration found out; the report is drawn from it.

    Attributes:
        artifact: the guard, with its id once it is written.
        effects: every candidate that was measured, by sign.
        chosen: the carrier of each sign; "lower" is missing if none was admissible.
        notes: what the user should know, one sentence each.
        scores: (group → scores) of the test split under the gate.
        probe: the fitted gate.
        tested: held-out prompts answered with and without the guard, by group.
        seconds: time by stage.
        frontier: refusal beside over-refusal under each policy that was tried, if any was.
    """

    artifact: CarrierArtifact
    effects: dict[Sign, list[Effect]]
    chosen: dict[Sign, Choice]
    notes: list[str]
    scores: dict[str, Tensor]
    probe: Probe
    tested: dict[str, list[Answered]]
    seconds: dict[str, float] = field(default_factory=dict)
    frontier: list[FrontierPoint] = field(default_factory=list)

    @property
    def artifact_id(self) -> str:
        """First 12 hex digits of the guard file's SHA-256."""
        return self.artifact.artifact_id

    def summary(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        manifest = self.artifact.manifest
        return {
            "artifact_id": self.artifact_id,
            "model": manifest.model.model_id,
            "raise_carrier": manifest.raise_carrier.model_dump(mode="json"),
            "lower_carrier": manifest.lower_carrier.model_dump(mode="json")
            if manifest.lower_carrier
            else None,
            "gate": manifest.gate.model_dump(mode="json"),
            "refusal_examples": manifest.refusal_examples,
            "presets": {
                name: preset.model_dump(mode="json") for name, preset in manifest.presets.items()
            },
            "notes": self.notes,
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
        }


def calibrate(config: CalibrationConfig, progress: Progress | None = None) -> CalibrationResult:
    """Calibrate a guard for a model and write it.

    Raises:
        PromptSetError: a prompt file cannot be used.
        InputError: no such model or endpoint, or a folder that cannot be written.
        EndpointError: the endpoint broke off; what was captured is kept.
        UnsupportedModelError: the model cannot be guarded exactly.
        NoAdmissibleCarrierError: nothing meets the KL constraint and beats the controls; no guard
            is written.
    """
    prompts = gather_prompts(config)

    progress = progress or Silent()
    progress.stage("load model", None)
    subject = _open_subject(config, prompts)
    work = WorkFolder(
        config.work_folder,
        fingerprint(
            subject.identity.model_dump_json(),
            datasets_sha256(prompts),
            config.seed,
            config.batch_size,
            config.listen_tokens,
            config.device if config.endpoint is None else "endpoint",
            config.answer_opening,
            config.message_width,
        ),
    )
    try:
        result = calibrate_subject(subject, prompts, config, work, progress)
    except NoAdmissibleCarrierError:
        work.remove()  # an answer, too
        raise
    progress.stage("write", None)
    save_artifact(result.artifact, config.out)
    result.artifact = load_artifact(config.out)
    if config.report_dir is not None:
        from calibration.report import write_report

        write_report(result, config.report_dir)
    work.remove()
    return result


def _open_subject(config: CalibrationConfig, prompts: Sequence[Prompt]) -> Subject:
    # The imports are here so that prompts are checked before gigabytes are loaded.
    if config.endpoint is None:
        from calibration.transformers_subject import load_subject

        return load_subject(config)
    from calibration.endpoint_subject import EndpointSubject

    key = config.admin_key.get_secret_value()
    texts = [prompt.text for prompt in prompts]
    return EndpointSubject(config.endpoint, key, config.model_name, texts)


def gather_prompts(config: CalibrationConfig) -> list[Prompt]:
    """The user's prompt files where given, the shipped sets for the rest.

    Raises:
        PromptSetError: a file cannot be used, or one side is missing.
    """
    prompts = list(shipped_prompts())
    if config.harmful:
        prompts = [p for p in prompts if p.label != "harmful"]
        prompts += [p for f in config.harmful for p in load_prompts(f, label="harmful")]
    if config.benign:
        prompts = [p for p in prompts if not (p.label == "benign" and p.stratum == "ordinary")]
        prompts += [p for f in config.benign for p in load_prompts(f, label="benign")]
    if config.hard_benign:
        prompts = [p for p in prompts if not (p.label == "benign" and p.stratum == "hard")]
        prompts += [
            p for f in config.hard_benign for p in load_prompts(f, label="benign", stratum="hard")
        ]
    check_two_sided(prompts)
    return prompts


def calibrate_subject(
    subject: Subject,
    prompts: Sequence[Prompt],
    config: CalibrationConfig,
    work: WorkFolder,
    progress: Progress,
) -> CalibrationResult:
    """Calibrate a guard for a subject; nothing is written but the work folder.

    Raises:
        NoAdmissibleCarrierError: as `calibrate`.
    """
    clock = _Clock()
    notes: list[str] = []
    splits = split_prompts(prompts, config.seed)
    n_layers = subject.identity.n_layers

    # How does this model refuse?
    heard = _listening_set(splits)
    progress.stage("listen to refusals", len(heard))
    responses = listen(
        subject, heard, config.listen_tokens, config.batch_size, work, "listen", progress
    )
    tokens, openings = learn_refusals(subject, heard, responses)
    clock.lap("listen")

    # One forward pass over every prompt.
    progress.stage("capture hidden states", len(prompts))
    n_suffix = len(subject.suffix_ids)
    captured: dict[str, Labelled] = {}
    for name in ("train", "validation", "calibration", "test"):
        group = getattr(splits, name)
        hidden = capture_hidden(
            subject, group, n_layers, n_suffix, config.batch_size, work, name, progress
        )
        captured[name] = Labelled(group, hidden)
    clock.lap("capture")

    # Who is flagged?
    progress.stage("fit gate", None)
    middle = range(max(1, n_layers // 4), max(2, (3 * n_layers) // 4 + 1), max(1, n_layers // 8))
    window = template_window(n_suffix - subject.n_opening)
    probe = fit_probe(
        captured["train"],
        captured["validation"],
        middle,
        window,
        config.seed,
        subject.message_width > 0,
    )
    if probe.message is None:
        notes.append(
            "the gate reads the template's tokens alone: the states of whole messages were not to"
            " be had, or not asked for"
        )
    thresholds = fit_thresholds(probe, captured["calibration"], config.alpha, config.delta)
    if thresholds.note:
        notes.append(thresholds.note)
    clock.lap("gate")

    # Which directions modulate refusal, at equal KL on safe prompts?
    train = captured["train"]
    suffix = train.hidden[:, :, 2:]  # (n, n_layers, n_suffix, d_model)
    candidates = difference_in_means(
        suffix[train.mask("harmful")], suffix[train.mask("benign", "ordinary")]
    )
    last = suffix[:, :, -1]
    candidates += category_subspaces(
        last[train.mask("harmful")],
        [p.category for p in train.prompts if p.label == "harmful"],
        last[train.mask("benign", "ordinary")],
        _SUBSPACE_SIZES,
    )
    bench = make_bench(subject, splits, tokens, config)
    progress.stage("measure candidates", 2 * len(candidates))
    effects: dict[Sign, list[Effect]] = {
        sign: sweep(subject, bench, candidates, sign, progress) for sign in _SIGNS
    }
    clock.lap("sweep")

    # Do gradients find better ones?
    if not isinstance(subject, GradientSubject):
        notes.append(
            "carriers were not refined: gradients need the model's weights in this process; the"
            " candidates are differences in means and subspaces"
        )
    elif config.refine_steps:
        progress.stage("refine", 2 * config.refine_layers * config.refine_seeds)
        for sign in _SIGNS:
            effects[sign] += refined(
                subject, bench, effects[sign], heard, responses, tokens, sign, config, progress
            )
    clock.lap("refine")

    # Which of them stand apart from chance, and make the model answer otherwise?
    progress.stage("test against controls", None)
    draft = _Draft(subject, config, splits, tokens, openings, probe, thresholds)
    chosen: dict[Sign, Choice] = {}
    for sign in _SIGNS:
        choice, why = choose(draft, bench, effects[sign], sign, chosen, progress)
        if choice is not None:
            chosen[sign] = choice
        elif sign == "raise":
            raise NoAdmissibleCarrierError(
                f"{subject.identity.model_id}: no admissible carrier: {why}. No guard written."
            )
        else:
            notes.append(f"no lower carrier: {why}; over-refusals will not be lowered")
    clock.lap("choose")

    # Which thresholds and budgets are worth offering?
    artifact = draft.artifact(chosen)
    frontier: list[FrontierPoint] = []
    if config.policy_prompts:
        progress.stage("compare policies", None)
        frontier, presets, unmet = _policies(draft, artifact, captured["calibration"], probe)
        artifact = _with_presets(artifact, presets)
        notes += unmet
    clock.lap("policies")

    # What does the guard do to prompts that nothing has seen?
    progress.stage("answer held-out prompts", None)
    tested = _test(draft, artifact, splits)
    clock.lap("test")
    measurements = gate_measurements(probe, thresholds, captured["test"], config.seed)
    for group, pairs in tested.items():
        rates = compare(pairs, config.seed)
        measurements |= {f"{group}_{name}": value for name, value in rates.items()}
    harmful = suffix[train.mask("harmful")]
    benign = suffix[train.mask("benign", "ordinary")]
    artifact = _with_measurements(
        artifact, measurements, _geometry(candidates, chosen, harmful, benign, config.seed)
    )
    return CalibrationResult(
        artifact,
        effects,
        chosen,
        notes,
        _scores_by_group(probe, captured["test"]),
        probe,
        tested,
        clock.seconds,
        frontier,
    )


def learn_refusals(
    subject: Subject, prompts: Sequence[Prompt], responses: Sequence[list[int]]
) -> tuple[RefusalTokens, list[str]]:
    """Learn from the model's own responses which first tokens open a refusal.

    The weight of a token is the share of the responses that open with it and refuse, with one
    answered response added, so that a token seen once does not count for certain.

    Returns:
        The tokens, and the model's most frequent refusals as text.

    Raises:
        NoAdmissibleCarrierError: the model hardly ever refuses.
    """
    seen: Counter[int] = Counter()
    refusing: Counter[int] = Counter()
    texts: Counter[str] = Counter()
    for response in responses:
        if not response:
            continue
        seen[response[0]] += 1
        text = subject.decode(response)
        if judge(text) in (Verdict.REFUSED, Verdict.PARTIAL):
            refusing[response[0]] += 1
            texts[text.strip()] += 1
    total = sum(refusing.values())
    if total < _MIN_REFUSALS:
        harmful = sum(p.label == "harmful" for p in prompts)
        raise NoAdmissibleCarrierError(
            f"{subject.identity.model_id}: no admissible carrier: it refused {total} of"
            f" {len(prompts)} prompts ({harmful} of them harmful); at least {_MIN_REFUSALS}"
            " refusals are needed to find what carries refusal in it. No guard written."
        )
    weights = {t: k / (seen[t] + 1) for t, k in refusing.items()}
    kept = sorted((t for t, w in weights.items() if w >= 0.2), key=lambda t: -refusing[t])
    kept = kept or [refusing.most_common(1)[0][0]]
    tokens = RefusalTokens(torch.tensor(kept), torch.tensor([weights[t] for t in kept]))
    return tokens, [text for text, _ in texts.most_common(8)]


def make_bench(
    subject: Subject, splits: Splits, tokens: RefusalTokens, config: CalibrationConfig
) -> Bench:
    """Run the validation prompts once and pick those on which candidates are compared."""
    pool = splits.validation
    safe = [p for s in ("ordinary", "hard") for p in _some(pool, "benign", s, _SAFE_ROWS // 2)]
    harmful = _some(pool, "harmful", None, 3 * _TARGET_ROWS)
    refused = _some(pool, "benign", "hard", 3 * _TARGET_ROWS)
    asked = list(dict.fromkeys([*safe, *harmful, *refused]))
    row = {prompt: i for i, prompt in enumerate(asked)}
    n_layers = subject.identity.n_layers
    step = subject.prefill([subject.encode(p.text) for p in asked], range(n_layers))
    # Only the last token is steered; the rest of the hidden states can go.
    step = replace(step, resid_pre={k: v[:, -1:].clone() for k, v in step.resid_pre.items()})
    refusal = refusal_probability(step.logits.cpu(), tokens.ids, tokens.weights)

    def undecided(rows: list[int], moved: Callable[[float], bool]) -> list[int]:
        """Rows that serving would steer; where those are too few, the nearest to them."""
        n_steered = sum(moved(float(refusal[i])) for i in rows)
        return rows[: min(max(n_steered, _MIN_TARGETS), _TARGET_ROWS)]

    answering = sorted((row[p] for p in harmful), key=lambda i: float(refusal[i]))
    refusing = sorted((row[p] for p in refused), key=lambda i: -float(refusal[i]))
    return Bench(
        step,
        [p.text for p in asked],
        [row[p] for p in safe],
        {
            "raise": undecided(answering, lambda p: p < _RAISE_IF_REFUSAL_BELOW),
            "lower": undecided(refusing, lambda p: p > _LOWER_IF_REFUSAL_ABOVE),
        },
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
    starts: list[Candidate] = []
    for effect in sorted((e for e in effects if e.can_spend), key=lambda e: -e.shift_per_nat):
        candidate = effect.candidate
        near = any(abs(candidate.layer - s.layer) < _LAYERS_APART for s in starts)
        if not near and len(starts) < config.refine_layers:
            starts.append(candidate)
    layers = sorted({start.layer for start in starts})
    lessons = teach(subject, heard, responses, tokens, sign, layers) if starts else None
    if lessons is None:
        return []
    settings = RefineSettings(steps=config.refine_steps)
    found: list[Effect] = []
    for start in starts:
        for seed in range(config.refine_seeds):
            stages = list(refine(subject, lessons, start, sign, settings, config.seed + seed))
            measured = measure(subject, bench, stages, sign)
            best = max(measured, key=lambda e: e.shift_per_nat)
            found.append(best)
            progress.note(f"{sign}: refined layer {start.layer}: shift {best.shift}")
            progress.advance(1)
    return found


def choose(
    draft: _Draft,
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
            f"{sign}: {effect.candidate.family}, layer {layer}: shift {effect.shift}"
            f" {'admissible' if admission.admissible else 'not admissible'}"
        )
        enough = _LAYERS_TRIED // 3 if admitted else _LAYERS_TRIED
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
        for factor in _CONFIRM_SCALES
        if (trial := draft.confirm(admission, factor, chosen, sign, prompts, base, progress))
    ]
    if not trials:
        return None, (
            f"no {sign} candidate is admissible: {len(admitted)} stand apart from chance, but none"
            " changes responses, keeps them coherent and leaves some of the budget: a model that"
            " refuses by itself goes on with a refusal once it has begun"
        )
    # The greatest effect; among those within one prompt of it, the one that spends least.
    most = max(_gain(trial, sign) for trial in trials)
    nearly = [t for t in trials if (most - _gain(t, sign)) * len(prompts) < 1.5]
    best = min(nearly, key=lambda t: t.rates["kl_nats"].value)
    candidate = best.effect.candidate
    curve = dose_response(draft.subject, bench, candidate, sign, best.scale, _DOSES)
    return replace(best, doses=torch.stack([_DOSES, *curve], 1)), ""


@dataclass(frozen=True)
class _Draft:
    """What a guard is put together from."""

    subject: Subject
    config: CalibrationConfig
    splits: Splits
    tokens: RefusalTokens
    openings: list[str]
    probe: Probe
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
        """The prompts on which candidates were compared, and the base model's responses."""
        prompts = [bench.prompts[row] for row in bench.targets[sign]]
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
            The choice; None if responses do not move, come apart or take the whole budget.
        """
        scale = factor * admission.effect.scale
        trial = Choice(admission.effect, admission, scale, [], {}, torch.empty(0))
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
        trial = replace(trial, confirmed=pairs, rates=rates)
        progress.note(
            f"{sign}: layer {admission.effect.candidate.layer} × {scale:g}: refused"
            f" {rates['refused_base'].value:.2f} → {rates['refused_guarded'].value:.2f},"
            f" {rates['kl_nats'].value:.2f} nats"
        )
        added = rates["incoherent_guarded"].value - rates["incoherent_base"].value
        # A model that refuses by itself goes on with a refusal that has begun, and spending stops.
        # Gradients can also find what writes a refusal word by word, at the whole budget for every
        # response, into a model that has none.
        spent = rates["kl_nats"].value / self.policy.raise_budget_nats
        refined = admission.effect.candidate.family == "gradient_refined"
        written = sign == "raise" and refined and spent > _MOST_SPENT
        useful = _gain(trial, sign) > 0 and added * len(pairs) <= 1.0
        return trial if useful and not written else None

    def artifact(self, chosen: dict[Sign, Choice], certify: bool = False) -> CarrierArtifact:
        """Put a guard together; `certify` opens the lower zone for a confirmation run."""
        config, fit = self.config, self.thresholds
        lower_below = fit.lower_below
        if certify and lower_below is None:
            lower_below = fit.raise_above
        message, suffix_ids = self.probe.message, self.subject.suffix_ids
        suffix_ids = suffix_ids[: len(suffix_ids) - self.subject.n_opening]
        gate = GateSpec(
            layer=self.probe.template.layer,
            bias=self.probe.bias,
            # What serving finds in prompts: the template's tokens, without the answer's opening.
            instruction_suffix_ids=suffix_ids[self.probe.template.window[-1] - 1 :],
            n_pooled=len(self.probe.template.window),
            message=MessageRead(
                layer=message.layer,
                suffix_ids=suffix_ids,
                opening_ids=self.subject.message_opening_ids,
                width=self.subject.message_width,
            )
            if message
            else None,
            raise_above=fit.raise_above,
            lower_below=lower_below,
            raise_if_refusal_below=_RAISE_IF_REFUSAL_BELOW,
            lower_if_refusal_above=_LOWER_IF_REFUSAL_ABOVE,
            alpha=config.alpha,
            delta=config.delta,
            n_by_stratum=fit.n_by_stratum,
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
            self.probe.template.weight,
            self.tokens.ids,
            self.tokens.weights,
            message_weight=message.weight if message else None,
        )


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _spec(choice: Choice) -> CarrierSpec:
    effect = choice.effect
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


def _kind(candidate: Candidate) -> tuple[int, str]:
    """Layer and family, all subspaces being one family."""
    return candidate.layer, candidate.family.split("_")[0]


def _alike(one: Candidate, other: Candidate) -> bool:
    (layer, family), (other_layer, other_family) = _kind(one), _kind(other)
    return family == other_family and abs(layer - other_layer) < _LAYERS_APART


def _gain(choice: Choice, sign: Sign) -> float:
    difference = choice.rates["refused_difference"].value
    return difference if sign == "raise" else -difference


def _some(pool: Sequence[Prompt], label: str, stratum: str | None, most: int) -> list[Prompt]:
    """At most so many prompts of a kind, from all over the pool: files are sorted by category."""
    kind = [p for p in pool if p.label == label and stratum in (None, p.stratum)]
    n = min(most, len(kind))
    return [kind[i * len(kind) // n] for i in range(n)]


def _listening_set(splits: Splits) -> list[Prompt]:
    """Training prompts from which the model's way of refusing is learned."""
    train = splits.train
    return [
        *_some(train, "harmful", None, 96),
        *_some(train, "benign", "hard", 64),
        *_some(train, "benign", "ordinary", 32),
    ]


def _test(draft: _Draft, artifact: CarrierArtifact, splits: Splits) -> dict[str, list[Answered]]:
    groups = {
        "harmful": ("harmful", None),
        "hard_benign": ("benign", "hard"),
        "ordinary_benign": ("benign", "ordinary"),
    }
    most = draft.config.test_prompts // len(groups)
    prompts = {name: _some(splits.test, *which, most) for name, which in groups.items()}
    pairs = answer_pairs(
        draft.subject,
        artifact,
        draft.policy,
        [p.text for group in prompts.values() for p in group],
        draft.config.test_tokens,
        draft.config.batch_size,
    )
    tested: dict[str, list[Answered]] = {}
    for name, group in prompts.items():
        tested[name], pairs = pairs[: len(group)], pairs[len(group) :]
    return {name: group for name, group in tested.items() if group}


def _policies(
    draft: _Draft, artifact: CarrierArtifact, held: Labelled, probe: Probe
) -> tuple[list[FrontierPoint], dict[str, Preset], list[str]]:
    """Compare policies on validation prompts; their thresholds are quantiles of other prompts."""
    subject, config = draft.subject, draft.config
    groups = {
        "harmful": ("harmful", None),
        "hard_benign": ("benign", "hard"),
        "ordinary": ("benign", "ordinary"),
    }
    chosen = {
        group: _some(draft.splits.validation, *kind, config.policy_prompts)
        for group, kind in groups.items()
    }
    texts = [p.text for prompts in chosen.values() for p in prompts]
    base, readings = draft.base(texts), draft.readings(artifact, texts)
    names = [group for group, prompts in chosen.items() for _ in prompts]
    outcomes = [
        Outcome(group, reading, judge(text) in (Verdict.REFUSED, Verdict.PARTIAL))
        for group, reading, text in zip(names, readings, base, strict=True)
    ]
    scores = probe.scores(held)
    strata = [scores[m] for s in ("ordinary", "hard") if bool((m := held.mask("benign", s)).any())]
    raise_above = {}
    for alpha in sorted({*_ALPHAS, config.alpha}):
        with suppress(InputError):  # too few prompts for it
            raise_above[alpha] = max(conformal_upper(stratum, alpha) for stratum in strata)
    most = config.budget_nats or config.raise_budget_nats
    settings = grid(
        artifact.thresholds,
        raise_above,
        _REFUSAL_ABOVE,
        sorted({min(1.0, most), most}),
        min(config.lower_budget_nats, most),
    )

    def answer(rows: Sequence[int], zone: Zone, budget: float) -> list[Answered]:
        policy = Policy(raise_budget_nats=budget, lower_budget_nats=budget, token_cap_nats=budget)
        return answer_pairs(
            subject,
            artifact,
            policy,
            [texts[i] for i in rows],
            config.confirm_tokens,
            config.batch_size,
            zone,
            [base[i] for i in rows],
        )

    tabulate(outcomes, settings, answer)
    return compile_policies(
        outcomes, settings, config.target_over_refusal, config.budget_nats, config.seed
    )


def _with_presets(artifact: CarrierArtifact, presets: dict[str, Preset]) -> CarrierArtifact:
    """The guard with its presets, and with what they found to be worth lowering."""
    above = presets["balanced"].lower_if_refusal_above
    gate = artifact.manifest.gate.model_copy(update={"lower_if_refusal_above": above})
    fields = {"gate": gate, "presets": presets}
    return replace(artifact, manifest=artifact.manifest.model_copy(update=fields))


def _scores_by_group(probe: Probe, test: Labelled) -> dict[str, Tensor]:
    scores = probe.scores(test)
    return {
        "harmful": scores[test.mask("harmful")],
        "hard benign": scores[test.mask("benign", "hard")],
        "ordinary benign": scores[test.mask("benign", "ordinary")],
    }


def _geometry(
    candidates: Sequence[Candidate],
    chosen: dict[Sign, Choice],
    harmful: Tensor,
    benign: Tensor,
    seed: int,
) -> dict[str, float]:
    means = [c for c in candidates if c.family == "difference_in_means"]
    rows = torch.stack([c.direction / c.direction.norm() for c in means])
    found = {
        "effective_rank": effective_rank(rows),
        "participation_ratio": participation_ratio(rows),
        "n_directions": float(len(rows)),
        "n_harmful": float(len(harmful)),
        "n_benign": float(len(benign)),
    }
    for sign, choice in chosen.items():
        place = choice.effect.candidate
        found[f"{sign}_split_half_cosine"] = split_half_cosine(
            harmful[:, place.layer, place.position], benign[:, place.layer, place.position], seed
        )
    return found


def _with_measurements(
    artifact: CarrierArtifact, gate: dict[str, Interval], geometry: dict[str, float]
) -> CarrierArtifact:
    manifest = artifact.manifest
    fields = {"gate": manifest.gate.model_copy(update={"measurements": gate}), "geometry": geometry}
    return replace(artifact, manifest=manifest.model_copy(update=fields))
