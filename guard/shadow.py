"""The base pass and the shadow pass over a transformers model.

    base pass    all layers, writes the KV cache            → base logits z0, resid_pre of the rows
    shadow pass  last token again, from the carrier's layer on, reads the base KV, writes nothing
                                                            → z1 = z0 + (z_steered − z_null)

The *null* row is the same row without a carrier in the same small batch. A row alone is not
bitwise the row it was among others (GEMM tiles differ), so the difference of two rows of one batch
is taken: with no carrier it is exactly zero.

Nothing here imports transformers: models and caches are used by their public shape only.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guard.errors import NumericsError, UnsupportedModelError
from guard.hooks import capture_inputs, enter_at, find_decoder_layers

__all__ = ["BaseStep", "ShadowModel"]


class _Enough(Exception):
    """Leaves a forward pass."""


_EXACT_CACHE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass(frozen=True)
class BaseStep:
    """What one base pass leaves behind.

    Attributes:
        logits: (n_rows, vocab) at the last token, in the model's type.
        resid_pre: layer → (n_rows, n_tokens, d_model), the residual stream before that layer.
        input_ids: (n_rows, n_tokens) of this pass.
        attention_mask: (n_rows, n_seen): 1 for a token, 0 for left padding.
        position_ids: (n_rows, n_tokens).
        cache: the KV cache after the pass.
    """

    logits: Tensor
    resid_pre: dict[int, Tensor]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    cache: Any

    def last_hidden(self, layer: int) -> Tensor:
        """(n_rows, d_model): the residual stream of the last token before `layer`."""
        return self.resid_pre[layer][:, -1]


class ShadowModel:
    """A causal language model that can run base passes and shadow passes.

    Args:
        model: a transformers causal language model in eval mode.
        layers_path: dotted name of its decoder layers, where they cannot be found.

    Raises:
        UnsupportedModelError: no decoder layers, an encoder before them, or a forward without a KV
            cache argument.
    """

    def __init__(self, model: nn.Module, layers_path: str | None = None) -> None:
        self.model = model
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder-decoder model: its prompt is no part of the"
                " decoder's input, so there is no prompt end to read; choose a decoder-only model"
            )
        self.layers = find_decoder_layers(model, layers_path)
        arguments = inspect.signature(model.forward).parameters
        # transformers 5 renamed `past_key_values` to `cache`.
        names = [name for name in ("cache", "past_key_values") if name in arguments]
        if not names:
            raise UnsupportedModelError(
                f"{type(model).__name__}.forward takes no KV cache: no exact shadow pass"
            )
        self._cache_argument = names[0]
        self._in_tuple = False

    @property
    def n_layers(self) -> int:
        """How many decoder layers the model has."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(self.model.parameters()).device

    def base(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        cache: Any,
        capture: Sequence[int] = (),
    ) -> BaseStep:
        """Run the model as it is; the cache grows by the tokens given.

        Args:
            input_ids: (n_rows, n_tokens): a left-padded prompt, or one new token per row.
            attention_mask: (n_rows, n_seen), n_seen = cached + n_tokens.
            cache: a DynamicCache made from the model's config.
            capture: layers whose resid_pre is kept.

        Raises:
            UnsupportedModelError: a cache whose past a shadow pass could not read exactly, or
                layers that pass on something else than one residual stream.
            NumericsError: the logits hold NaN or +inf.
        """
        _check_cache(cache, self.n_layers)
        n_tokens = input_ids.shape[1]
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -n_tokens:]
        _record_sliding_windows(cache)
        with torch.inference_mode(), capture_inputs(self.layers, capture) as seen:
            hook = self.layers[0].register_forward_hook(self._note_return_type)
            try:
                logits = self._forward(input_ids, attention_mask, position_ids, cache)
            finally:
                hook.remove()
        for layer, stream in seen.items():
            if stream.shape[:-1] != input_ids.shape:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: the input of decoder layer {layer} is"
                    f" {tuple(stream.shape)}, not one residual stream (n_rows, n_tokens, d_model):"
                    " there is nowhere to steer; if these are other layers, name the right ones"
                    " with --layers-path"
                )
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise NumericsError("the base pass gave NaN or infinite logits")
        return BaseStep(logits, dict(seen), input_ids, attention_mask, position_ids, cache)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Any, capture: Sequence[int]
    ) -> dict[int, Tensor]:
        """Run the model no further than to the last layer that is read.

        Args:
            input_ids: (n_rows, n_tokens), a left-padded prompt.
            attention_mask: (n_rows, n_seen).
            cache: a DynamicCache, of no use afterwards: the layers behind have not run.
            capture: layers whose resid_pre is kept, at least one.

        Returns:
            layer → (n_rows, n_tokens, d_model), as `base` gives it.
        """
        _check_cache(cache, self.n_layers)
        n_tokens = input_ids.shape[1]
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -n_tokens:]

        def leave(*_: Any) -> None:
            raise _Enough

        with torch.inference_mode(), capture_inputs(self.layers, capture) as seen:
            hook = self.layers[max(capture)].register_forward_pre_hook(leave)
            try:
                self._forward(input_ids, attention_mask, position_ids, cache)
            except _Enough:
                pass
            finally:
                hook.remove()
        return dict(seen)

    @torch.inference_mode()
    def shadow(self, step: BaseStep, rows: Sequence[int], layer: int, steered: Tensor) -> Tensor:
        """Return steered logits z1 for some rows of the step that was just run.

        Args:
            step: the last base pass; its cache must not have grown since.
            rows: n_shadow row indices, repetitions allowed.
            layer: where to enter; `step` must hold its resid_pre.
            steered: (n_shadow, d_model), the last token's hidden state with the carrier applied.

        Returns:
            (n_shadow, vocab) float32.

        Raises:
            UnsupportedModelError: a cache whose past this pass cannot read exactly.
            NumericsError: the shadow logits hold NaN or +inf.
        """
        unique = sorted(set(rows))
        row_of = {row: i for i, row in enumerate(unique)}
        null = step.last_hidden(layer)[unique]
        hidden = torch.cat([null, steered.to(null.dtype)])
        logits = self._last_token_again(step, [*unique, *rows], layer, hidden)
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise NumericsError(f"the shadow pass from layer {layer} gave NaN or infinite logits")
        twin = torch.tensor([row_of[row] for row in rows], device=hidden.device)
        base = step.logits[unique].float()
        # In place: with a vocabulary of 150k each copy would cost more than the pass itself.
        shifted = logits[len(unique) :].sub_(logits[: len(unique)].index_select(0, twin))
        shifted.add_(base.index_select(0, twin))
        # A token that cannot occur (−inf in every pass) has difference NaN: it stays impossible.
        return shifted.nan_to_num_(-torch.inf, torch.inf, -torch.inf)

    def shadow_with_gradient(
        self, step: BaseStep, rows: Sequence[int], layer: int, steered: Tensor
    ) -> Tensor:
        """Return steered logits that pass gradients back to `steered`, for calibration.

        There is no null row: they differ from those of `shadow` by rounding.

        Args:
            step: the last base pass.
            rows: n_shadow row indices.
            layer: where to enter.
            steered: (n_shadow, d_model).

        Returns:
            (n_shadow, vocab) float32.
        """
        with torch.enable_grad():
            hidden = steered.to(step.last_hidden(layer).dtype)
            return self._last_token_again(step, rows, layer, hidden)

    @torch.inference_mode()
    def replay(self, step: BaseStep, rows: Sequence[int], layer: int) -> Tensor:
        """Return the raw logits of a pass that is entered at `layer` and steers nothing.

        They differ from the base logits by rounding only, or this model has no exact shadow pass:
        `shadow` cannot show that, since it takes the difference to such a pass.

        Returns:
            (n_rows, vocab) float32.

        Raises:
            UnsupportedModelError: a cache whose past this pass cannot read exactly.
        """
        return self._last_token_again(step, rows, layer, step.last_hidden(layer)[list(rows)])

    def _last_token_again(
        self, step: BaseStep, rows: Sequence[int], layer: int, hidden: Tensor
    ) -> Tensor:
        """(n_rows, vocab) float32 logits, with `hidden` (n_rows, d_model) entering at `layer`."""
        index = torch.tensor(rows, device=hidden.device)
        cache = _read_only(step.cache, index, self.n_layers, layer)
        with enter_at(self.layers, layer, hidden.unsqueeze(1), self._in_tuple):
            logits = self._forward(
                step.input_ids[index, -1:],
                step.attention_mask[index],
                step.position_ids[index, -1:],
                cache,
            )
            return logits.to(torch.float32, copy=True)

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any
    ) -> Tensor:
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _note_return_type(self, _: nn.Module, __: Any, output: Any) -> None:
        self._in_tuple = isinstance(output, tuple)


def _record_sliding_windows(cache: Any) -> None:
    """Let sliding-window layers remember what their last `update` returned.

    Such a layer drops its oldest key while it takes the newest in, so after a base pass it no
    longer holds all that the last token attended to.
    """
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False) and "update" not in layer.__dict__:
            layer.update = _remembering(layer, layer.update)


def _remembering(layer: Any, update: Any) -> Any:
    def remember(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layer.last_returned = keys, values = update(*args, **kwargs)
        return keys, values

    return remember


def _read_only(cache: Any, rows: Tensor, n_layers: int, first: int) -> Any:
    """A view of the cache as it was before the last token, whose `update` gives the base K/V."""
    _check_cache(cache, n_layers)
    view = copy.copy(cache)
    view.layers = [
        _read_only_layer(layer, rows if i >= first else rows[:1])
        for i, layer in enumerate(cache.layers)
    ]
    return view


def _check_cache(cache: Any, n_layers: int) -> None:
    """Refuse a cache that no view can be made of; one without layers has not begun."""
    for layer in cache.layers:
        if type(layer).__name__ not in _EXACT_CACHE_LAYERS:
            raise UnsupportedModelError(
                f"a {type(layer).__name__} cache layer (recurrent, hybrid, shared, quantised or"
                f" static) has no exact shadow pass; supported: {', '.join(_EXACT_CACHE_LAYERS)}"
            )
    if cache.layers and len(cache.layers) != n_layers:
        raise UnsupportedModelError(
            f"the KV cache has {len(cache.layers)} layers, the model {n_layers}: layers that share"
            " keys and values have no exact shadow pass; if those are other layers, name the right"
            " ones with --layers-path"
        )


def _read_only_layer(layer: Any, rows: Tensor) -> Any:
    view = copy.copy(layer)
    keys, values = layer.keys, layer.values
    if getattr(layer, "is_sliding", False):
        keys, values = (t[..., -layer.sliding_window :, :] for t in layer.last_returned)
        view.cumulative_length = layer.cumulative_length - 1
    keys, values = keys[rows], values[rows]
    view.keys, view.values = keys[..., :-1, :], values[..., :-1, :]
    view.update = lambda *_, **__: (keys, values)
    return view
