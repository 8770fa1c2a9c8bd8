"""The gate's probe: how harmful a prompt reads, from hidden states the base pass has. Pure.

    message tokens   h ─► q·h, V h ─► Σ softmax(q·h) · V h, a sum for each head ─┐
    template tokens  h ─► W h ──────► mean ────────────────────────────────────┴─► f
                                                        s = out [gelu(H [f, 1]), 1]

What is kept of a token is its few projections, so a score is a pure function of the tokens before
it, wherever and whenever they were computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Probe", "linear_probe", "pool_message", "probe_scores", "project"]


@dataclass(frozen=True)
class Probe:
    """Weights of the gate's probe.

    Attributes:
        template: (n_template, d_model), W: of the template tokens behind the message.
        out: (n_hidden + 1,) or, without a hidden layer, (n_features + 1,); the bias comes last.
        message: (n_heads + n_values, d_model), q and V stacked; None: the message is not read.
        n_heads: attention heads over the message; 0 without `message`.
        hidden: (n_hidden, n_features + 1), H with its bias last; None: the probe is linear.
            The features are the heads' values, n_heads · n_values, and then the template's.
    """

    template: Tensor
    out: Tensor
    message: Tensor | None = None
    n_heads: int = 0
    hidden: Tensor | None = None

    @property
    def n_features(self) -> int:
        """What is left of a prompt before the hidden layer."""
        values = 0 if self.message is None else len(self.message) - self.n_heads
        return self.n_heads * values + len(self.template)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, those that there are."""
        named = {
            "template": self.template,
            "out": self.out,
            "message": self.message,
            "hidden": self.hidden,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Probe:
        """The same probe with every tensor changed, such as moved to a device."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors.items()}
        return replace(self, **changed)

    def fault(self, d_model: int) -> str | None:
        """What does not fit together, or None."""
        if self.template.dim() != 2 or self.template.shape[1] != d_model or not len(self.template):
            return f"probe.template: {tuple(self.template.shape)}, expected (≥ 1, {d_model})"
        if self.message is not None:
            shape = tuple(self.message.shape)
            if len(shape) != 2 or shape[1] != d_model or not 0 < self.n_heads < shape[0]:
                return f"probe.message: {shape}, expected (> {self.n_heads} heads, {d_model})"
        elif self.n_heads:
            return f"probe.message: absent, expected one for {self.n_heads} heads"
        width = self.n_features + 1
        if self.hidden is not None:
            if self.hidden.dim() != 2 or self.hidden.shape[1] != width:
                return f"probe.hidden: {tuple(self.hidden.shape)}, expected (n_hidden, {width})"
            width = len(self.hidden) + 1
        if self.out.shape != (width,):
            return f"probe.out: {tuple(self.out.shape)}, expected ({width},)"
        return None


def linear_probe(weight: Tensor, bias: float = 0.0) -> Probe:
    """A probe s = hidden · weight + bias of the template tokens alone, weight (d_model,)."""
    return Probe(weight.unsqueeze(0), torch.tensor([1.0, bias]))


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden · weightᵀ in float32: what is kept of a token.

    Args:
        hidden: (…, d_model) residual stream.
        weight: (width, d_model) float32.
    """
    return hidden.float() @ weight.float().T


def pool_message(projected: Tensor, present: Tensor, n_heads: int) -> Tensor:
    """Attend over the tokens of each message.

    Args:
        projected: (n, width, n_heads + n_values), of the message's tokens and of padding.
        present: (n, width) bool: what is no padding; at least one of each row.
        n_heads: heads.

    Returns:
        (n, n_heads · n_values), the heads one after another.
    """
    query, value = projected[..., :n_heads], projected[..., n_heads:]
    query = query.masked_fill(~present.unsqueeze(-1), float("-inf"))
    value = value.masked_fill(~present.unsqueeze(-1), 0.0)  # not 0 · NaN
    # (n, n_heads, width) · (n, width, n_values)
    return (query.softmax(1).transpose(1, 2) @ value).flatten(1)


def probe_scores(probe: Probe, template: Tensor, message: Tensor | None) -> Tensor:
    """Return (n,) float32 logits, higher is more harmful.

    Args:
        probe: the weights.
        template: (n, n_template), the mean of the template tokens' projections.
        message: (n, n_heads · n_values) from `pool_message`, if the probe reads the message.
    """
    features = template if message is None else torch.cat([message, template], 1)
    if probe.hidden is not None:
        features = torch.nn.functional.gelu(_with_bias(features, probe.hidden))
    return _with_bias(features, probe.out.unsqueeze(0)).squeeze(1)


def _with_bias(features: Tensor, weight: Tensor) -> Tensor:
    return features @ weight[:, :-1].T + weight[:, -1]
