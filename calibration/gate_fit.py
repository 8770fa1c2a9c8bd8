"""Fit the gate: a linear probe for harmfulness and conformal thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from calibration.prompts import Prompt
from calibration.statistics import auroc, share_interval
from guard.artifact import Interval
from guard.errors import InputError
from guard.gate import conformal_lower, conformal_upper, probe_score

__all__ = [
    "Labelled",
    "Probe",
    "Read",
    "ThresholdFit",
    "fit_probe",
    "fit_thresholds",
    "gate_measurements",
    "template_window",
]

_REGULARISATION = (1e-2, 3e-2)
_MESSAGE = (0,)


@dataclass(frozen=True)
class Labelled:
    """Prompts with their hidden states.

    Attributes:
        prompts: n prompts.
        hidden: (n, n_layers, n_positions, d_model) resid_pre: the mean over the message, its last
            token, the template's tokens behind it.
    """

    prompts: Sequence[Prompt]
    hidden: Tensor

    @property
    def harmful(self) -> Tensor:
        """(n,) bool."""
        return torch.tensor([p.label == "harmful" for p in self.prompts])

    def mask(self, label: str, stratum: str | None = None) -> Tensor:
        """(n,) bool: the prompts of a label and, if given, a stratum."""
        return torch.tensor(
            [p.label == label and stratum in (None, p.stratum) for p in self.prompts]
        )


@dataclass(frozen=True)
class Read:
    """One place where a probe reads.

    Attributes:
        layer: whose input.
        window: the positions that are averaged, as in `Labelled`.
        weight: (d_model,) float32.
    """

    layer: int
    window: tuple[int, ...]
    weight: Tensor

    def scores(self, data: Labelled) -> Tensor:
        """(n,), without bias."""
        return probe_score(_pooled(data, self.window, self.layer), self.weight, 0.0)


@dataclass(frozen=True)
class Probe:
    """A logistic probe on the message and on the template's tokens behind it.

    Attributes:
        message: the part that reads the mean over the message; None: it is not read.
        template: the part that reads what the template puts behind it.
        bias: added to the scores of both.
        validation_auroc: harmful against hard benign, on the validation split.
    """

    message: Read | None
    template: Read
    bias: float
    validation_auroc: float

    def scores(self, data: Labelled) -> Tensor:
        """(n,) logits, higher is more harmful."""
        scores = self.template.scores(data) + self.bias
        return scores if self.message is None else scores + self.message.scores(data)


def fit_probe(
    train: Labelled,
    validation: Labelled,
    layers: Sequence[int],
    window: tuple[int, ...],
    seed: int,
    read_message: bool = True,
) -> Probe:
    """Fit probes and keep what tells harmful from hard benign prompts best.

    The mean over the message is read at the layer that does best alone; a second layer is then
    chosen for the template's tokens behind it. The three groups (harmful, ordinary benign, hard
    benign) weigh the same in training, and a matched pair is always on one side of a split, so
    style carries as little as the data allows.

    Args:
        train: prompts that the weights are fitted on.
        validation: prompts that layers and regularisation are chosen on.
        layers: candidates.
        window: the template's positions, as in `Labelled`.
        seed: of the solver.
        read_message: False: the template's tokens alone.

    Raises:
        InputError: no layers.
    """
    if not layers:
        raise InputError("the probe needs at least one layer")

    def best(window: tuple[int, ...], before: Sequence[tuple[int, tuple[int, ...]]]) -> _Fit:
        places = ([*before, (layer, window)] for layer in layers)
        fits = (fit for place in places for fit in _fits(train, validation, place, seed))
        return max(fits, key=lambda fit: fit.validation_auroc)

    first = [(best(_MESSAGE, []).reads[0].layer, _MESSAGE)] if read_message else []
    found = best(window, first)
    message = found.reads[0] if read_message else None
    return Probe(message, found.reads[-1], found.bias, found.validation_auroc)


@dataclass(frozen=True)
class _Fit:
    """A probe on any number of places."""

    reads: list[Read]
    bias: float
    validation_auroc: float


def _fits(
    train: Labelled,
    validation: Labelled,
    places: Sequence[tuple[int, tuple[int, ...]]],
    seed: int,
) -> Iterator[_Fit]:
    """A probe on these (layer, window) places for each regularisation."""
    features = torch.cat([_pooled(train, window, layer) for layer, window in places], 1).numpy()
    positive, negative = validation.mask("harmful"), validation.mask("benign", "hard")
    if not bool(negative.any()):
        negative = validation.mask("benign")
    weights = _balanced(train)
    for c in _REGULARISATION:
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=c, max_iter=500, random_state=seed)
        )
        model.fit(features, train.harmful.numpy(), logisticregression__sample_weight=weights)
        weight, bias = _unscaled(model)
        parts = weight.chunk(len(places))
        reads = [Read(*place, part.clone()) for place, part in zip(places, parts, strict=True)]
        scores = torch.stack([read.scores(validation) for read in reads]).sum(0)
        area = float((scores[positive][:, None] > scores[negative][None]).float().mean())
        yield _Fit(reads, bias, area)


@dataclass(frozen=True)
class ThresholdFit:
    """Thresholds and what they rest on.

    Attributes:
        raise_above: τ_hi.
        lower_below: τ_lo; None where δ cannot be certified with the prompts at hand.
        n_by_stratum: calibration prompts behind each.
        note: why lower is not certified; empty if it is.
    """

    raise_above: float
    lower_below: float | None
    n_by_stratum: dict[str, int]
    note: str


def fit_thresholds(probe: Probe, data: Labelled, alpha: float, delta: float) -> ThresholdFit:
    """Split-conformal thresholds, the worst over strata.

    Args:
        probe: fitted on other prompts.
        data: the calibration split.
        alpha: most benign prompts of any stratum to score above τ_hi.
        delta: most harmful prompts to score below τ_lo.

    Raises:
        InputError: too few prompts for alpha; the message says how many would do.
    """
    scores = probe.scores(data)
    counts: dict[str, int] = {}
    upper: list[float] = []
    for stratum in ("ordinary", "hard"):
        chosen = data.mask("benign", stratum)
        counts[f"{stratum} benign"] = int(chosen.sum())
        if bool(chosen.any()):
            upper.append(conformal_upper(scores[chosen], alpha))
    harmful = data.mask("harmful")
    counts["harmful"] = int(harmful.sum())
    tau_hi = max(upper)
    try:
        tau_lo = conformal_lower(scores[harmful], delta)
    except InputError as err:
        return ThresholdFit(tau_hi, None, counts, f"lower is not certified: {err}")
    return ThresholdFit(tau_hi, min(tau_lo, tau_hi), counts, "")


def gate_measurements(
    probe: Probe, thresholds: ThresholdFit, test: Labelled, seed: int
) -> dict[str, Interval]:
    """AUROC and zone rates per stratum on prompts that nothing was fitted on."""
    scores = probe.scores(test)
    harmful = scores[test.mask("harmful")]
    found: dict[str, Interval] = {}
    for stratum in ("ordinary", "hard"):
        benign = scores[test.mask("benign", stratum)]
        if not len(benign) or not len(harmful):
            continue
        found[f"auroc_harmful_vs_{stratum}_benign"] = auroc(harmful, benign, seed)
        above = int((benign > thresholds.raise_above).sum())
        found[f"{stratum}_benign_above_raise"] = share_interval(above, len(benign))
        if thresholds.lower_below is not None:
            below = int((benign < thresholds.lower_below).sum())
            found[f"{stratum}_benign_below_lower"] = share_interval(below, len(benign))
    above = int((harmful > thresholds.raise_above).sum())
    found["harmful_above_raise"] = share_interval(above, len(harmful))
    if thresholds.lower_below is not None:
        below = int((harmful < thresholds.lower_below).sum())
        found["harmful_below_lower"] = share_interval(below, len(harmful))
    return found


def template_window(n_suffix: int) -> tuple[int, ...]:
    """Return which tokens at the end of a prompt a probe reads beside the message.

    The last instruction token is often a full stop or a question mark, and a probe that reads it
    fails on prompts without one. The template's tokens behind it are the same for every prompt. The
    first two, averaged, carried over from the shipped prompts to AdvBench against OR-Bench-hard far
    better than any one token (docs/LOG.md). What follows them tells serving where they are, so it
    has to be at least two tokens; a shorter template leaves one of them, or the last instruction
    token after all.
    """
    if n_suffix >= 4:
        return (2, 3)
    return (2,) if n_suffix == 3 else (1,)


def _pooled(data: Labelled, window: tuple[int, ...], layer: int) -> Tensor:
    """(n, d_model) float32."""
    return data.hidden[:, layer, list(window)].float().mean(1)


def _balanced(data: Labelled) -> np.ndarray:
    """Harmful weighs as much as benign, and ordinary benign as much as hard benign."""
    weights = torch.zeros(len(data.prompts))
    benign = [data.mask("benign", s) for s in ("ordinary", "hard")]
    present = [m for m in benign if bool(m.any())]
    for mask in present:
        weights[mask] = 0.5 / len(present) / mask.sum()
    harmful = data.mask("harmful")
    weights[harmful] = 0.5 / harmful.sum()
    return (weights * len(data.prompts)).numpy()


def _unscaled(model: object) -> tuple[Tensor, float]:
    """Fold the scaler into weight and bias, so that serving needs one dot product."""
    scaler, logistic = model[0], model[1]  # type: ignore[index]
    weight = logistic.coef_[0] / scaler.scale_
    bias = float(logistic.intercept_[0] - (weight * scaler.mean_).sum())
    return torch.tensor(weight, dtype=torch.float32), bias
