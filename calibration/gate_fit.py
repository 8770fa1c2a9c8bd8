"""Fit the gate: a linear probe for harmfulness and conformal thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

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
    "ThresholdFit",
    "fit_probe",
    "fit_thresholds",
    "gate_measurements",
    "probe_windows",
]

_REGULARISATION = (1e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Labelled:
    """Prompts with their hidden states at the end.

    Attributes:
        prompts: n prompts.
        hidden: (n, n_positions, n_layers, d_model) resid_pre: at the last instruction token, then
            at the post-instruction tokens.
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
class Probe:
    """A logistic probe on one layer and token.

    Attributes:
        layer: whose input it reads.
        window: the token positions whose hidden states are averaged, as in `Labelled`.
        weight: (d_model,) float32.
        bias: added to the product.
        validation_auroc: harmful against hard benign, on the validation split.
    """

    layer: int
    window: tuple[int, ...]
    weight: Tensor
    bias: float
    validation_auroc: float

    def scores(self, data: Labelled) -> Tensor:
        """(n,) logits, higher is more harmful."""
        return probe_score(_pooled(data, self.window, self.layer), self.weight, self.bias)


def fit_probe(
    train: Labelled,
    validation: Labelled,
    layers: Sequence[int],
    windows: Sequence[tuple[int, ...]],
    seed: int,
) -> Probe:
    """Fit a probe at each layer and window; keep what tells harmful from hard benign best.

    The three groups (harmful, ordinary benign, hard benign) weigh the same in training, and a
    matched pair is always on one side of a split, so style carries as little as the data allows.

    Args:
        train: prompts that the weights are fitted on.
        validation: prompts that layer and regularisation are chosen on.
        layers: candidates.
        windows: candidates: positions, as in `Labelled`, to be averaged.
        seed: of the solver.
    """
    weights = _balanced(train)
    labels = train.harmful.numpy()
    positive = validation.mask("harmful")
    negative = validation.mask("benign", "hard")
    if not bool(negative.any()):
        negative = validation.mask("benign")
    best: Probe | None = None
    for window, layer in product(windows, layers):
        features = _pooled(train, window, layer).numpy()
        for c in _REGULARISATION:
            model = make_pipeline(
                StandardScaler(), LogisticRegression(C=c, max_iter=500, random_state=seed)
            )
            model.fit(features, labels, logisticregression__sample_weight=weights)
            weight, bias = _unscaled(model)
            probe = Probe(layer, window, weight, bias, 0.0)
            scores = probe.scores(validation)
            area = float((scores[positive][:, None] > scores[negative][None]).float().mean())
            if best is None or area > best.validation_auroc:
                best = replace(probe, validation_auroc=area)
    if best is None:
        raise InputError("the probe needs at least one layer and window")
    return best


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


def probe_windows(n_suffix: int) -> list[tuple[int, ...]]:
    """Return where a probe may read, given the template's post-instruction tokens.

    The last instruction token is often a full stop or a question mark, and a probe that reads it
    fails on prompts without one. The template's tokens behind it are the same for every prompt. The
    first two, averaged, carried over from the shipped prompts to AdvBench against OR-Bench-hard far
    better than any one token (docs/LOG.md). What follows them tells serving where they are, so it
    has to be at least two tokens; a shorter template leaves fewer choices.
    """
    if n_suffix >= 4:
        return [(1, 2)]
    return [(position,) for position in range(max(1, n_suffix - 1))]


def _pooled(data: Labelled, window: tuple[int, ...], layer: int) -> Tensor:
    """(n, d_model) float32."""
    return data.hidden[:, list(window), layer].float().mean(1)


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
