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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy.stats import fisher_exact
from torch import Tensor

from calibration.capture import WorkFolder, capture, fingerprint, listen
from calibration.causal import (
    Effect,
    RefusalTokens,
    Sign,
)
from calibration.choose import SIGNS, Choice, Draft, choose, make_bench, refined, sweep
from calibration.config import CalibrationConfig
from calibration.directions import Candidate, category_subspaces, difference_in_means
from calibration.disguises import BLIND_BELOW, DISGUISES, as_chat
from calibration.evaluate import Answered, answer_pairs, compare
from calibration.fillers import PASSAGES, padded_copies
from calibration.frontier import FrontierPoint
from calibration.gate_fit import (
    FittedProbe,
    Labelled,
    Scored,
    by_category,
    fit_probe,
    fit_thresholds,
    gate_measurements,
    joined,
    template_window,
)
from calibration.geometry import effective_rank, participation_ratio, split_half_cosine
from calibration.policies import Outcome, Pace, Spending, compile_policies, grid, tabulate
from calibration.progress import Progress, Silent
from calibration.prompts import (
    Prompt,
    Splits,
    calibration_splits,
    check_two_sided,
    datasets_sha256,
    load_prompts,
    shipped_prompts,
    spread,
)
from calibration.risk import check_feasible, controlled_thresholds, risks
from calibration.safety import safe_kl
from calibration.statistics import auroc
from calibration.subject import GradientSubject, Subject
from guard.artifact import (
    CarrierArtifact,
    Interval,
    Preset,
    load_artifact,
    save_artifact,
)
from guard.errors import InputError, NoAdmissibleCarrierError, PromptSetError
from guard.gate import Zone, conformal_upper
from guard.refusal import Verdict, judge

__all__ = ["CalibrationResult", "calibrate", "calibrate_subject"]

_MIN_REFUSALS = 8
_BY_CHANCE = 0.01
_DEEPEST = 0.8
_SAFE_PROMPTS = 32
_DIRECTION_PROMPTS = 256
"""Of each kind, from which directions are computed: twice what Arditi et al. 2024 take."""
_MESSAGE_DEPTHS = (1 / 3, 5 / 12)
"""Shares of the layers below which whole messages are captured: 8 and 10 of 24."""
_MOST_LONGER = 0.25
"""Share of the training prompts, at most, of which the gate sees a longer copy."""
_LONGER_COUNTS = 2.0
"""As how many prompts a copy counts in training: more cost AUROC on short ones (docs/LOG.md)."""
_ALPHAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
_REFUSAL_ABOVE = (0.1, 0.2, 0.3)
_PACES = tuple(Pace(k, share) for k in (4, 8, 16) for share in (0.25, 1.0))
"""K and token cap of the policies that are compared where a target is to be kept."""


@dataclass
class CalibrationResult:
    """Everything a calibration found out; the report is drawn from it.

    Attributes:
        artifact: the guard, with its id once it is written.
        effects: every candidate that was measured, by sign.
        chosen: the carrier of each sign; "lower" is missing if none was admissible.
        notes: what the user should know, one sentence each.
        scores: (group → scores) of the test split under the gate.
        categories: what the gate does to each kind of held-out prompt, as `by_category` has it.
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
    categories: dict[tuple[str, str], tuple[Interval, Interval]]
    probe: FittedProbe
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
            config.prompt_limit,
            config.batch_size,
            config.listen_tokens,
            config.device if config.endpoint is None else "endpoint",
            config.answer_opening,
            config.message_width,
            config.long_prompts,
            PASSAGES,
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
    return EndpointSubject(config.endpoint, key, config.model_name, texts, config.message_width)


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
    splits = calibration_splits(prompts, config.prompt_limit, config.seed)
    used = [*splits.train, *splits.validation, *splits.calibration, *splits.test]
    check_two_sided(used)
    if len(used) < len(prompts):
        notes.append(
            f"{len(used):,} of {len(prompts):,} prompts were used, drawn evenly from all kinds"
            " (--most-prompts 0: all)"
        )
    n_layers = subject.identity.n_layers

    # How does this model refuse?
    heard = _listening_set(splits)
    progress.stage("listen to refusals", len(heard))
    responses = listen(
        subject, heard, config.listen_tokens, config.batch_size, work, "listen", progress
    )
    tokens, openings = learn_refusals(subject, heard, responses)
    clock.lap("listen")

    # What do prompts look like from inside?
    leading = [
        *spread(splits.train, "harmful", None, _DIRECTION_PROMPTS),
        *spread(splits.train, "benign", "ordinary", _DIRECTION_PROMPTS),
    ]
    longer = _longer(subject, splits.train, config)
    progress.stage("capture hidden states", len(used) + len(longer))
    middle = range(max(1, n_layers // 2), max(3, 5 * n_layers // 8 + 1), max(1, n_layers // 8))
    message_layers = sorted({max(1, round(share * n_layers)) for share in _MESSAGE_DEPTHS})

    def captured(
        name: str, group: Sequence[Prompt], at: Sequence[int], of_message: Sequence[int]
    ) -> Labelled:
        return capture(subject, group, at, of_message, config.batch_size, work, name, progress)

    # Of some training prompts every layer is kept, for directions.
    directions = captured("directions", leading, range(n_layers), message_layers)
    kept = {id(prompt) for prompt in leading}
    rest = [prompt for prompt in splits.train if id(prompt) not in kept]
    # The copies are trained on and nothing else: thresholds are promised for prompts as they come.
    train = joined(directions, captured("train", [*rest, *longer], middle, message_layers))
    directions = replace(directions, messages=None)
    validation, calibration, test = (
        captured(name, getattr(splits, name), middle, message_layers)
        for name in ("validation", "calibration", "test")
    )
    clock.lap("capture")

    # Who is flagged?
    progress.stage("fit gate", None)
    window = template_window(len(subject.suffix_ids) - subject.n_opening)
    device = config.device if config.endpoint is None else "cpu"
    counts = torch.ones(len(train.prompts))
    counts[len(splits.train) :] = _LONGER_COUNTS
    probe = fit_probe(train, validation, middle, window, config.seed, device, counts)
    held, unseen = (Scored(data.prompts, probe.scores(data)) for data in (calibration, test))
    del train, validation, calibration, test  # gigabytes, and they have been read
    blind, unseen_through = _disguised(subject, probe, splits, config, work, progress)
    if probe.message_layer is None:
        notes.append(
            "the gate reads the template's tokens alone, as was asked for: it tells harm from what"
            " looks like it much worse than one that reads messages"
        )
    thresholds = fit_thresholds(held, config.alpha, config.delta, config.confidence)
    if thresholds.note:
        notes.append(thresholds.note)
    for stratum in ("ordinary", "hard"):
        n = int(held.mask("benign", stratum).sum())
        for what, most, target in risks(config) if n else ():
            check_feasible(n, most, target, f"{what} of {stratum} benign prompts")
    notes += unseen_through
    clock.lap("gate")

    # Which directions modulate refusal, at equal KL on safe prompts?
    suffix = directions.hidden[:, :, 1:]  # (n, n_layers, n_suffix, d_model)
    candidates = difference_in_means(
        suffix[directions.mask("harmful")], suffix[directions.mask("benign", "ordinary")]
    )
    last = suffix[:, :, -1]
    candidates += category_subspaces(
        last[directions.mask("harmful")],
        [p.category for p in directions.prompts if p.label == "harmful"],
        last[directions.mask("benign", "ordinary")],
        config.subspace_sizes,
    )
    # Arditi et al. 2024 leave the last layers out: what acts there writes tokens, not decisions.
    candidates = [c for c in candidates if c.layer < _DEEPEST * n_layers]
    bench = make_bench(subject, splits, tokens, config)
    progress.stage("measure candidates", 2 * len(candidates))
    effects: dict[Sign, list[Effect]] = {
        sign: sweep(subject, bench, candidates, sign, progress) for sign in SIGNS
    }
    clock.lap("sweep")

    # Do gradients find better ones?
    if not isinstance(subject, GradientSubject):
        notes.append(
            "carriers were not refined: gradients need the model's weights in this process; the"
            " candidates are differences in means and subspaces"
        )
    elif config.refine_steps:
        progress.stage("refine", None)
        for sign in SIGNS:
            effects[sign] += refined(
                subject, bench, effects[sign], heard, responses, tokens, sign, config, progress
            )
    clock.lap("refine")

    # Which of them stand apart from chance, and make the model answer otherwise?
    progress.stage("test against controls", None)
    draft = Draft(subject, config, splits, tokens, openings, probe, thresholds)
    chosen: dict[Sign, Choice] = {}
    for sign in SIGNS:
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
    if config.safe_tokens:
        progress.stage("follow safe prompts", None)
        strata = {
            stratum: [
                p.text for p in spread(splits.validation, "benign", stratum, _SAFE_PROMPTS // 2)
            ]
            for stratum in ("ordinary", "hard")
        }
        costs = safe_kl(
            subject,
            chosen,
            {stratum: texts for stratum, texts in strata.items() if texts},
            config.safe_tokens,
            config.batch_size,
            config.seed,
        )
        chosen = {
            sign: replace(choice, rates=choice.rates | costs[sign])
            for sign, choice in chosen.items()
        }
        clock.lap("safe prompts")

    # What does raising by mistake cost, and may it?
    certified: dict[str, Interval] = {}
    if risks(config):
        progress.stage("price mistakes", None)
        thresholds, certified = controlled_thresholds(draft, chosen, held)
        draft = replace(draft, thresholds=thresholds)
        notes += [
            f"{name.replace('_', ' ')}: at most {bound.high:.3g} ({bound.value:.3g} on {bound.n}"
            " calibration prompts)"
            for name, bound in certified.items()
        ]
        clock.lap("risk")

    # Which thresholds and budgets are worth offering?
    artifact = draft.artifact(chosen)
    frontier: list[FrontierPoint] = []
    if config.policy_prompts:
        progress.stage("compare policies", None)
        frontier, presets, unmet = _policies(draft, artifact, held)
        artifact = _with_presets(artifact, presets)
        notes += unmet
    clock.lap("policies")

    # What does the guard do to prompts that nothing has seen?
    progress.stage("answer held-out prompts", None)
    tested = _test(draft, artifact, splits)
    clock.lap("test")
    measurements = gate_measurements(thresholds, unseen, config.seed) | blind | certified
    for group, pairs in tested.items():
        rates = compare(pairs, config.seed)
        measurements |= {f"{group}_{name}": value for name, value in rates.items()}
    harmful = suffix[directions.mask("harmful")]
    benign = suffix[directions.mask("benign", "ordinary")]
    artifact = _with_measurements(
        artifact, measurements, _geometry(candidates, chosen, harmful, benign, config.seed)
    )
    return CalibrationResult(
        artifact,
        effects,
        chosen,
        notes,
        _scores_by_group(unseen),
        by_category(thresholds, unseen, config.seed),
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
        NoAdmissibleCarrierError: the model hardly ever refuses, or harmful prompts no more often
            than others: gradients would find a vector that writes a refusal, and carries none.
    """
    seen: Counter[int] = Counter()
    refusing: Counter[int] = Counter()
    texts: Counter[str] = Counter()
    counts = {label: [0, 0] for label in ("harmful", "benign")}  # refused, answered
    for prompt, response in zip(prompts, responses, strict=True):
        if not response:
            continue
        seen[response[0]] += 1
        text = subject.decode(response)
        refused = judge(text) in (Verdict.REFUSED, Verdict.PARTIAL)
        if prompt.label == "harmful" or prompt.stratum == "ordinary":
            counts[prompt.label][0 if refused else 1] += 1
        if refused:
            refusing[response[0]] += 1
            texts[text.strip()] += 1
    total = sum(refusing.values())
    why = ""
    if total < _MIN_REFUSALS:
        why = (
            f"it refused {total} of {len(prompts)} prompts; at least {_MIN_REFUSALS} refusals are"
            " needed to find what carries refusal in it"
        )
    elif sum(counts["benign"]) >= _MIN_REFUSALS and not _refuses_harm(counts):
        (harm, answered), (other, rest) = counts["harmful"], counts["benign"]
        why = (
            f"it refused {harm} of {harm + answered} harmful prompts and {other} of {other + rest}"
            " ordinary ones: nothing says that its refusals go with harm"
        )
    if why:
        raise NoAdmissibleCarrierError(
            f"{subject.identity.model_id}: no admissible carrier: {why}. No guard written."
        )
    weights = {t: k / (seen[t] + 1) for t, k in refusing.items()}
    kept = sorted((t for t, w in weights.items() if w >= 0.2), key=lambda t: -refusing[t])
    kept = kept or [refusing.most_common(1)[0][0]]
    tokens = RefusalTokens(torch.tensor(kept), torch.tensor([weights[t] for t in kept]))
    return tokens, [text for text, _ in texts.most_common(8)]


def _refuses_harm(counts: dict[str, list[int]]) -> bool:
    """Harmful prompts are refused more often than benign ones (Fisher's exact test)."""
    found = fisher_exact([counts["harmful"], counts["benign"]], alternative="greater")
    return float(found.pvalue) < _BY_CHANCE


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _listening_set(splits: Splits) -> list[Prompt]:
    """Training prompts from which the model's way of refusing is learned."""
    train = splits.train
    return [
        *spread(train, "harmful", None, 96),
        *spread(train, "benign", "hard", 64),
        *spread(train, "benign", "ordinary", 32),
    ]


def _longer(subject: Subject, train: Sequence[Prompt], config: CalibrationConfig) -> list[Prompt]:
    """Longer copies of training prompts, those that fit the model's context."""
    if not subject.message_width:
        return []
    most = min(config.long_prompts, round(_MOST_LONGER * len(train)))
    fitting = []
    for prompt in padded_copies(train, most, config.seed):
        with suppress(PromptSetError):
            subject.encode(prompt.text)
            fitting.append(prompt)
    return fitting


def _test(draft: Draft, artifact: CarrierArtifact, splits: Splits) -> dict[str, list[Answered]]:
    groups = {
        "harmful": ("harmful", None),
        "hard_benign": ("benign", "hard"),
        "ordinary_benign": ("benign", "ordinary"),
    }
    most = draft.config.test_prompts // len(groups)
    prompts = {name: spread(splits.test, *which, most) for name, which in groups.items()}
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


def _disguised(
    subject: Subject,
    probe: FittedProbe,
    splits: Splits,
    config: CalibrationConfig,
    work: WorkFolder,
    progress: Progress,
) -> tuple[dict[str, Interval], list[str]]:
    """AUROC of harmful over hard benign held-out prompts in each disguise, and notes on them."""
    plain = [
        *spread(splits.test, "harmful", None, config.disguised_prompts),
        *spread(splits.test, "benign", "hard", config.disguised_prompts),
    ]
    if len({prompt.label for prompt in plain}) < 2:
        return {}, []
    encoded: dict[str, list[list[int]]] = {}
    left_out = []
    for name, disguise in DISGUISES.items():
        try:
            encoded[name] = subject.encode_chats([as_chat(disguise(p.text)) for p in plain])
        except PromptSetError as why:
            left_out.append(f"{name.replace('_', ' ')} ({why})")
    progress.stage("try disguises", len(plain) * len(encoded))
    of_message = () if probe.message_layer is None else (probe.message_layer,)
    found, blind = {}, []
    for name, chats in encoded.items():
        layers = [probe.template_layer]
        data = capture(
            subject, plain, layers, of_message, config.batch_size, work, name, progress, chats
        )
        scores, harmful = probe.scores(data), data.harmful
        area = auroc(scores[harmful], scores[~harmful], config.seed)
        found[f"auroc_disguised_{name}"] = area
        if area.value < BLIND_BELOW:
            blind.append(f"{name.replace('_', ' ')} ({area.value:.2f})")
    notes = []
    if blind:
        notes.append(
            "the gate is blind, or nearly so, to harm in these disguises (AUROC of harmful over"
            f" hard benign, n = {next(iter(found.values())).n}): {', '.join(blind)}"
        )
    if left_out:
        notes.append(f"the gate was not tried in these disguises: {'; '.join(left_out)}")
    return found, notes


def _policies(
    draft: Draft, artifact: CarrierArtifact, held: Scored
) -> tuple[list[FrontierPoint], dict[str, Preset], list[str]]:
    """Compare policies on validation prompts; their thresholds are quantiles of other prompts."""
    subject, config = draft.subject, draft.config
    groups = {
        "harmful": ("harmful", None),
        "hard_benign": ("benign", "hard"),
        "ordinary": ("benign", "ordinary"),
    }
    chosen = {
        group: spread(draft.splits.validation, *kind, config.policy_prompts)
        for group, kind in groups.items()
    }
    texts = [p.text for prompts in chosen.values() for p in prompts]
    base, readings = draft.base(texts), draft.readings(artifact, texts)
    names = [group for group, prompts in chosen.items() for _ in prompts]
    outcomes = [
        Outcome(group, reading, judge(text) in (Verdict.REFUSED, Verdict.PARTIAL))
        for group, reading, text in zip(names, readings, base, strict=True)
    ]
    least = artifact.thresholds.raise_above if risks(config) else -torch.inf
    strata = [
        held.scores[m] for s in ("ordinary", "hard") if bool((m := held.mask("benign", s)).any())
    ]
    raise_above = {}
    for alpha in sorted({*_ALPHAS, config.alpha}):
        with suppress(InputError):  # too few prompts for it
            above = max(conformal_upper(stratum, alpha) for stratum in strata)
            raise_above[alpha] = max(above, least)
    most = config.budget_nats or config.raise_budget_nats
    settings = grid(
        artifact.thresholds,
        raise_above,
        _REFUSAL_ABOVE,
        sorted({min(1.0, most), most}),
        min(config.lower_budget_nats, most),
        _PACES if config.target_over_refusal is not None else (Pace(),),
    )

    def answer(rows: Sequence[int], zone: Zone, spending: Spending) -> list[Answered]:
        return answer_pairs(
            subject,
            artifact,
            spending.policy,
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


def _scores_by_group(test: Scored) -> dict[str, Tensor]:
    return {
        "harmful": test.scores[test.mask("harmful")],
        "hard benign": test.scores[test.mask("benign", "hard")],
        "ordinary benign": test.scores[test.mask("benign", "ordinary")],
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
