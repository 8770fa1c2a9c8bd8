"""Fit the gate: an attention probe for harmfulness, and conformal thresholds.

Layers are chosen by ridge regression, which costs a matrix solve each; the probe itself
(`guard/probe.py`) is trained at these layers by gradient descent, on the device of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from calibration.prompts import Prompt
from calibration.statistics import auroc, share_interval
from guard.artifact import Interval
from guard.errors import InputError
from guard.gate import conformal_lower, conformal_upper
from guard.probe import Probe, pool_message, probe_scores, project
from guard.reading import padded

__all__ = [
    "FittedProbe",
    "Group",
    "Labelled",
    "Messages",
    "Scored",
    "ThresholdFit",
    "balanced",
    "by_category",
    "fit_probe",
    "fit_thresholds",
    "gate_measurements",
    "joined",
    "template_window",
]

_N_HEADS, _N_VALUES, _N_TEMPLATE, _N_HIDDEN = 4, 8, 16, 32
_STEPS, _EVERY, _RATE, _DECAY, _DROPOUT = 200, 20, 3e-3, 0.3, 0.5
_MEMORY = 0.97  # of the average over steps: some thirty of them
_RIDGE = 1.0  # times the mean of the diagonal: it ranks layers, and is not tuned


@dataclass(frozen=True)
class Messages:
    """Hidden states of whole messages.

    Attributes:
        hidden: layer → (n_tokens, d_model) resid_pre, the messages one after another.
        lengths: n counts of tokens, each at least 1.
    """

    hidden: dict[int, Tensor]
    lengths: Tensor

    @property
    def owner(self) -> Tensor:
        """(n_tokens,) int64: whose token it is."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)


@dataclass(frozen=True)
class Group:
    """Prompts of one split.

    Attributes:
        prompts: n prompts.
    """

    prompts: Sequence[Prompt]

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
class Scored(Group):
    """Prompts with their scores under the gate.

    Attributes:
        scores: (n,) logits, higher is more harmful.
    """

    scores: Tensor


@dataclass(frozen=True)
class Labelled(Group):
    """Prompts with their hidden states.

    Attributes:
        layers: of which states were kept, rising.
        hidden: (n, len(layers), n_positions, d_model) resid_pre: the last token of the message, and
            the template's tokens behind it.
        messages: every token of the messages, where they were to be had.
    """

    layers: Sequence[int]
    hidden: Tensor
    messages: Messages | None = None

    def template(self, layer: int, window: tuple[int, ...]) -> Tensor:
        """(n, d_model) float32: the mean of some positions."""
        return self.hidden[:, self.layers.index(layer), list(window)].float().mean(1)

    def message(self, layer: int) -> Tensor:
        """(n, d_model) float32: the mean of each message.

        Raises:
            InputError: these prompts came without their messages.
        """
        if self.messages is None:
            raise InputError("the gate reads messages, and these prompts came without theirs")
        tokens, owner = self.messages.hidden[layer].float(), self.messages.owner
        total = tokens.new_zeros(len(self.prompts), tokens.shape[1]).index_add(0, owner, tokens)
        return total / self.messages.lengths.unsqueeze(1)


def joined(one: Labelled, other: Labelled) -> Labelled:
    """Both groups' prompts, one after the other, with the layers that the second has."""
    places = [list(one.layers).index(layer) for layer in other.layers]
    messages = None
    if one.messages is not None and other.messages is not None:
        hidden = {
            layer: torch.cat([one.messages.hidden[layer], tokens])
            for layer, tokens in other.messages.hidden.items()
        }
        messages = Messages(hidden, torch.cat([one.messages.lengths, other.messages.lengths]))
    return Labelled(
        [*one.prompts, *other.prompts],
        other.layers,
        torch.cat([one.hidden[:, places], other.hidden]),
        messages,
    )


@dataclass(frozen=True)
class FittedProbe:
    """The gate's probe and where it reads.

    Attributes:
        probe: its weights.
        template_layer: whose input it reads behind the message.
        window: the positions averaged there, as in `Labelled`.
        message_layer: whose input it reads of the message; None: it does not.
        validation_auroc: harmful against hard benign, on the validation split.
    """

    probe: Probe
    template_layer: int
    window: tuple[int, ...]
    message_layer: int | None
    validation_auroc: float

    def scores(self, data: Labelled) -> Tensor:
        """(n,) logits, higher is more harmful."""
        template = project(data.template(self.template_layer, self.window), self.probe.template)
        message = None
        if self.message_layer is not None and self.probe.message is not None:
            if data.messages is None:
                raise InputError("the probe reads messages, and these prompts come without theirs")
            projected = project(data.messages.hidden[self.message_layer], self.probe.message)
            message = pool_message(*_rectangle(projected, data.messages), self.probe.n_heads)
        return probe_scores(self.probe, template, message)


def fit_probe(
    train: Labelled,
    validation: Labelled,
    layers: Sequence[int],
    window: tuple[int, ...],
    seed: int,
    device: str = "cpu",
    counts: Tensor | None = None,
) -> FittedProbe:
    """Fit the probe that tells harmful from hard benign prompts best.

    The message is read at the layer where its mean does best alone, of those that were captured; a
    second layer is then chosen for the template's tokens behind it. The three groups (harmful,
    ordinary benign, hard benign) weigh the same in training, and a matched pair is always on one
    side of a split, so style carries as little as the data allows. The weights are an average over
    the last steps (Polyak and Juditsky 1992), training stops where validation is best, and the
    logit is then scaled on validation (Platt 1999).

    Args:
        train: prompts that the weights are fitted on.
        validation: prompts that layers, stopping and scale are chosen on.
        layers: candidates for the template's tokens.
        window: the template's positions, as in `Labelled`.
        seed: of initial weights and dropout.
        device: a torch device to train on.
        counts: (n,) how often each training prompt counts among those of its group; default: once.

    Raises:
        InputError: no layers.
    """
    if not layers:
        raise InputError("the probe needs at least one layer")
    message_layer, means = None, None
    if train.messages is not None:
        found = {}
        for at in train.messages.hidden:
            pair = train.message(at), validation.message(at)
            found[at] = _ridge(train, validation, *pair), pair
        message_layer = max(found, key=lambda at: found[at][0])
        means = found[message_layer][1]
    separation = {}
    for at in layers:
        of_train, of_others = train.template(at, window), validation.template(at, window)
        if means is not None:
            of_train = torch.cat([means[0], of_train], 1)
            of_others = torch.cat([means[1], of_others], 1)
        separation[at] = _ridge(train, validation, of_train, of_others)
    layer = max(layers, key=separation.__getitem__)
    inputs, others = (
        _Inputs.of(data, layer, window, message_layer, device) for data in (train, validation)
    )
    probe = _trained(inputs, others, balanced(train, counts), train.harmful, validation, seed)
    scores = FittedProbe(probe, layer, window, message_layer, 0.0).scores(validation)
    return FittedProbe(
        _scaled(probe, scores, validation),
        layer,
        window,
        message_layer,
        _separates(scores, validation),
    )


@dataclass(frozen=True)
class _Inputs:
    """What the probe reads of some prompts, on the device that it is trained on.

    Attributes:
        template: (n, d_model) mean over the window.
        message: (n_tokens, d_model), or None.
        owner: (n_tokens,) int64.
    """

    template: Tensor
    message: Tensor | None
    owner: Tensor

    @staticmethod
    def of(
        data: Labelled,
        layer: int,
        window: tuple[int, ...],
        message_layer: int | None,
        device: str,
    ) -> _Inputs:
        template = data.template(layer, window).to(device)
        if message_layer is None or data.messages is None:
            return _Inputs(template, None, torch.zeros(0, dtype=torch.int64, device=device))
        message = data.messages.hidden[message_layer].to(device).float()
        return _Inputs(template, message, data.messages.owner.to(device))

    def standard(
        self, template_scale: tuple[Tensor, Tensor], message_scale: tuple[Tensor, Tensor] | None
    ) -> _Inputs:
        """The same, each coordinate less its mean and over its spread."""
        message = self.message
        if message is not None and message_scale is not None:
            message = _standard(message, message_scale)
        return _Inputs(_standard(self.template, template_scale), message, self.owner)


class _Net(torch.nn.Module):
    """The probe of `guard/probe.py` in training: on standardised inputs, tokens not padded."""

    def __init__(self, d_model: int, reads_message: bool) -> None:
        super().__init__()

        def random(width: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(width, d_model) * d_model**-0.5)

        self.query = torch.nn.Parameter(torch.zeros(_N_HEADS if reads_message else 0, d_model))
        self.value = random(_N_VALUES if reads_message else 0)
        self.template = random(_N_TEMPLATE)
        self.hidden = torch.nn.Linear(_N_HEADS * len(self.value) + _N_TEMPLATE, _N_HIDDEN)
        self.out = torch.nn.Linear(_N_HIDDEN, 1)

    def forward(self, inputs: _Inputs, dropout: float) -> Tensor:
        query, value, template = self.query, self.value, self.template
        if dropout:  # of whole coordinates of the stream, which costs nothing on the weights
            ones = torch.full((2, template.shape[1]), 1.0 - dropout, device=template.device)
            keep, keep_template = torch.bernoulli(ones) / (1.0 - dropout)
            query, value, template = query * keep, value * keep, template * keep_template
        features = inputs.template @ template.T
        if inputs.message is not None:
            # One product for both: on a CPU it is bound by reading the tokens.
            projected = inputs.message @ torch.cat([query, value]).T
            heads = self._attend(projected, inputs.owner, features)
            features = torch.cat([heads, features], 1)
        hidden = torch.nn.functional.gelu(self.hidden(features))
        hidden = torch.nn.functional.dropout(hidden, dropout)
        logits: Tensor = self.out(hidden).squeeze(1)
        return logits

    def _attend(self, projected: Tensor, owner: Tensor, like: Tensor) -> Tensor:
        """(n, n_heads · n_values): `pool_message` without padding."""
        n, logits, values = len(like), projected[:, :_N_HEADS], projected[:, _N_HEADS:]
        highest = like.new_full((n, _N_HEADS), float("-inf")).scatter_reduce(
            0, owner.unsqueeze(1).expand(-1, _N_HEADS), logits.detach(), "amax"
        )
        weights = (logits - highest[owner]).exp()
        total = like.new_zeros(n, _N_HEADS).index_add(0, owner, weights)
        shares = weights / total[owner]
        heads = [
            like.new_zeros(n, _N_VALUES).index_add(0, owner, shares[:, h : h + 1] * values)
            for h in range(_N_HEADS)
        ]
        return torch.cat(heads, 1)


def _trained(
    inputs: _Inputs,
    others: _Inputs,
    balance: np.ndarray,
    harmful: Tensor,
    validation: Group,
    seed: int,
) -> Probe:
    """Train, keep what separates validation best, and fold the standardisation in."""
    device = inputs.template.device
    template_scale = _scale(inputs.template)
    message_scale = None if inputs.message is None else _scale(inputs.message)
    inputs, others = (data.standard(template_scale, message_scale) for data in (inputs, others))
    weights = torch.tensor(balance, dtype=torch.float32, device=device)
    target = harmful.float().to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        net = _Net(inputs.template.shape[1], inputs.message is not None).to(device)
        optimiser = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=_DECAY)
        averaged = copy.deepcopy(net)  # over the last steps: it depends less on which of them
        best, kept = -1.0, _weights(averaged)
        for step in range(1, _STEPS + 1):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                net(inputs, _DROPOUT), target, weights
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                share = max(1.0 - _MEMORY, 10 / (step + 10))  # its first steps are soon forgotten
                for mean, now in zip(averaged.parameters(), net.parameters(), strict=True):
                    mean.lerp_(now, share)
                if step % _EVERY == 0:
                    area = _separates(averaged(others, 0.0).cpu(), validation)
                    if area > best:
                        best, kept = area, _weights(averaged)
    return _folded(kept, template_scale, message_scale)


def _weights(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def _folded(
    net: dict[str, Tensor],
    template_scale: tuple[Tensor, Tensor],
    message_scale: tuple[Tensor, Tensor] | None,
) -> Probe:
    """The probe that computes on raw hidden states what the net does on standardised ones.

    Attention adds up to one, so the means' share of values moves to the hidden layer's bias; what
    the means add to a query is the same for all tokens and falls out of the softmax.
    """
    net = {name: parameter.cpu().double() for name, parameter in net.items()}
    mean, spread = (part.cpu().double() for part in template_scale)
    template = net["template"] / spread
    offsets, message = [template @ mean], None
    if message_scale is not None:
        mean, spread = (part.cpu().double() for part in message_scale)
        value = net["value"] / spread
        offsets = [value @ mean] * _N_HEADS + offsets
        message = torch.cat([net["query"] / spread, value]).float()
    weight = net["hidden.weight"]
    bias = net["hidden.bias"] - weight @ torch.cat(offsets)
    return Probe(
        template=template.float(),
        out=torch.cat([net["out.weight"].squeeze(0), net["out.bias"]]).float(),
        message=message,
        n_heads=0 if message is None else _N_HEADS,
        hidden=torch.cat([weight, bias.unsqueeze(1)], 1).float(),
    )


def _scaled(probe: Probe, scores: Tensor, data: Group) -> Probe:
    """The probe with its logit scaled and moved so that it means what it says (Platt 1999).

    Targets are Platt's, just short of 0 and 1: else the slope has no end where nothing overlaps.
    """
    harmful = data.harmful.numpy()
    n, n_harmful = len(harmful), int(harmful.sum())
    target = np.where(harmful, (n_harmful + 1) / (n_harmful + 2), 1 / (n - n_harmful + 2))
    weight = balanced(data)
    model = LogisticRegression(C=1e6).fit(
        scores.repeat(2).unsqueeze(1).numpy(),  # each prompt as harmful and, for the rest, as not
        np.repeat([True, False], n),
        sample_weight=np.concatenate([weight * target, weight * (1 - target)]),
    )
    slope, offset = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0.0:  # it separates nothing: leave it to the thresholds to say so
        return probe
    out = slope * probe.out
    out[-1] += offset
    return Probe(probe.template, out, probe.message, probe.n_heads, probe.hidden)


def _ridge(train: Group, validation: Group, features: Tensor, others: Tensor) -> float:
    """AUROC on validation of a weighted ridge regression on features of both groups' prompts."""
    scale = _scale(features)
    features, others = _standard(features, scale), _standard(others, scale)
    balance = torch.tensor(balanced(train), dtype=torch.float32).unsqueeze(1)
    target = torch.where(train.harmful, 1.0, -1.0).unsqueeze(1)
    gram = features.T @ (balance * features)
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, features.T @ (balance * target))
    return _separates((others @ weight).squeeze(1), validation)


def _separates(scores: Tensor, data: Group) -> float:
    """AUROC of harmful over hard benign, or over all benign where there are no hard ones."""
    negative = data.mask("benign", "hard")
    if not bool(negative.any()):
        negative = data.mask("benign")
    above = scores[data.mask("harmful")][:, None] > scores[negative][None]
    return float(above.float().mean())


def _scale(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of each coordinate; 1 where a coordinate never moves."""
    spread = rows.std(0)
    return rows.mean(0), torch.where(spread > 1e-6, spread, 1.0)


def _standard(rows: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    return (rows - scale[0]) / scale[1]


def _rectangle(projected: Tensor, messages: Messages) -> tuple[Tensor, Tensor]:
    """(n, width, …) rows of messages with padding behind, and (n, width) what is none."""
    starts = messages.lengths.cumsum(0) - messages.lengths
    ranges = [
        list(range(start, start + length))
        for start, length in zip(starts.tolist(), messages.lengths.tolist(), strict=True)
    ]
    places, present = padded(ranges, int(messages.lengths.max()))
    return projected[torch.tensor(places)], torch.tensor(present)


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


def fit_thresholds(
    data: Scored, alpha: float, delta: float, confidence: float | None = None
) -> ThresholdFit:
    """Split-conformal thresholds, the worst over strata.

    Args:
        data: the calibration split, under a probe that was fitted on other prompts.
        alpha: most benign prompts of any stratum to score above τ_hi.
        delta: most harmful prompts to score below τ_lo.
        confidence: that both hold for these calibration prompts; None: on average over such sets.

    Raises:
        InputError: too few prompts for alpha; the message says how many would do.
    """
    scores = data.scores
    counts: dict[str, int] = {}
    upper: list[float] = []
    for stratum in ("ordinary", "hard"):
        chosen = data.mask("benign", stratum)
        counts[f"{stratum} benign"] = int(chosen.sum())
        if bool(chosen.any()):
            upper.append(conformal_upper(scores[chosen], alpha, confidence))
    harmful = data.mask("harmful")
    counts["harmful"] = int(harmful.sum())
    tau_hi = max(upper)
    try:
        tau_lo = conformal_lower(scores[harmful], delta, confidence)
    except InputError as err:
        return ThresholdFit(tau_hi, None, counts, f"lower is not certified: {err}")
    return ThresholdFit(tau_hi, min(tau_lo, tau_hi), counts, "")


def gate_measurements(thresholds: ThresholdFit, test: Scored, seed: int) -> dict[str, Interval]:
    """AUROC and zone rates per stratum on prompts that nothing was fitted on."""
    scores = test.scores
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
        for percent in (1, 5):
            limit = float(benign.quantile(1.0 - percent / 100))
            caught = int((harmful > limit).sum())
            name = f"harmful_caught_at_{percent}_percent_of_{stratum}_benign"
            found[name] = share_interval(caught, len(harmful))
    above = int((harmful > thresholds.raise_above).sum())
    found["harmful_above_raise"] = share_interval(above, len(harmful))
    if thresholds.lower_below is not None:
        below = int((harmful < thresholds.lower_below).sum())
        found["harmful_below_lower"] = share_interval(below, len(harmful))
    return found


def by_category(
    thresholds: ThresholdFit, test: Scored, seed: int, least: int = 10
) -> dict[tuple[str, str], tuple[Interval, Interval]]:
    """What the gate does to each kind of held-out prompt, so that its blind spots show.

    Args:
        thresholds: of the gate.
        test: held-out prompts.
        seed: of the bootstrap.
        least: prompts below which a category is left out.

    Returns:
        (kind, category) → AUROC against the other side (hard benign for harmful, harmful for hard
        benign), and the share on the wrong side: harmful below or at τ_hi, benign above it. Kind is
        "harmful", "hard benign" or "language".
    """
    harmful, hard = test.mask("harmful"), test.mask("benign", "hard")
    kinds: dict[tuple[str, str], Tensor] = {}
    for kind, mask in (("harmful", harmful), ("hard benign", hard)):
        for name in sorted({p.category for p in test.prompts}):
            of_it = torch.tensor([p.category == name for p in test.prompts])
            kinds[kind, name] = mask & of_it
    found = {}
    for (kind, name), mask in kinds.items():
        if int(mask.sum()) < least:
            continue
        scores, is_harm = test.scores[mask], kind == "harmful"
        pair = (scores, test.scores[hard]) if is_harm else (test.scores[harmful], scores)
        wrong = int(((scores > thresholds.raise_above) ^ is_harm).sum())
        found[kind, name] = auroc(*pair, seed), share_interval(wrong, len(scores))
    for language in sorted({p.language for p in test.prompts}):
        of_it = torch.tensor([p.language == language for p in test.prompts])
        ours, theirs = test.scores[harmful & of_it], test.scores[hard & of_it]
        if min(len(ours), len(theirs)) >= least // 2:
            missed = int((ours <= thresholds.raise_above).sum())
            area = auroc(ours, theirs, seed)
            found["language", language] = area, share_interval(missed, len(ours))
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
        return (1, 2)
    return (1,) if n_suffix == 3 else (0,)


def balanced(data: Group, counts: Tensor | None = None) -> np.ndarray:
    """Harmful weighs as much as benign, and ordinary benign as much as hard benign.

    Args:
        data: n prompts.
        counts: (n,) how often each counts among those of its group; default: once.
    """
    weights = torch.zeros(len(data.prompts))
    counts = torch.ones_like(weights) if counts is None else counts.to(weights)
    benign = [data.mask("benign", s) for s in ("ordinary", "hard")]
    present = [m for m in benign if bool(m.any())]
    for mask in present:
        weights[mask] = 0.5 / len(present) * counts[mask] / counts[mask].sum()
    harmful = data.mask("harmful")
    weights[harmful] = 0.5 * counts[harmful] / counts[harmful].sum()
    return (weights * len(data.prompts)).numpy()
