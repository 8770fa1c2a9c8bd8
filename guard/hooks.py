"""Find a model's decoder layers; read and replace their inputs with plain torch hooks.

A hook lives inside a `with` block and is gone after it, whatever is raised in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from guard.errors import UnsupportedModelError

__all__ = ["capture_inputs", "enter_at", "find_decoder_layers"]

_OTHER_TOWERS = ("vision", "visual", "audio", "encoder")


def find_decoder_layers(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """Return the decoder layers of a causal language model, first to last.

    Args:
        model: a transformers model with `config.num_hidden_layers`, or any module when `path` is
            given.
        path: dotted name of the `nn.ModuleList`, for models that are laid out otherwise.

    Raises:
        UnsupportedModelError: no such list, or more than one that could be meant.
    """
    if path is not None:
        try:
            named = model.get_submodule(path)
        except AttributeError as err:
            raise UnsupportedModelError(f"no decoder layers at {path!r}: {err}") from err
        if not isinstance(named, nn.ModuleList) or not len(named):
            raise UnsupportedModelError(f"{path!r} is a {type(named).__name__}, not a layer list")
        return named
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers = getattr(text, "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and not any(word in name for word in _OTHER_TOWERS)
    }
    # Inside a layer there may be lists of the same length: experts, for one.
    outermost = [name for name in lists if not any(name.startswith(f"{n}.") for n in lists)]
    if len(outermost) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one list of {n_layers} decoder layers, found"
            f" {', '.join(outermost) or 'none'}; name it with --layers-path, e.g."
            f" --layers-path {outermost[0] if outermost else 'model.layers'}"
        )
    return lists[outermost[0]]


@contextmanager
def capture_inputs(layers: nn.ModuleList, which: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the residual stream before layers (resid_pre) while the model runs.

    Args:
        layers: the decoder layers.
        which: indices of the layers to read.

    Yields:
        A dict filled by each forward pass: layer → (n_rows, n_tokens, d_model), not copied; read
        it before the next pass.
    """
    seen: dict[int, Tensor] = {}

    def reader(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    with ExitStack() as stack:
        for index in which:
            handle = layers[index].register_forward_pre_hook(reader(index), with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


@contextmanager
def enter_at(
    layers: nn.ModuleList, index: int, hidden: Tensor, in_tuple: bool = False
) -> Iterator[None]:
    """Make a forward pass begin at a decoder layer: what stands before it is skipped.

    Args:
        layers: the decoder layers.
        index: the first layer that runs.
        hidden: (n_rows, n_tokens, d_model), its input.
        in_tuple: this transformers version lets decoder layers return a tuple.
    """

    def skipped(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if in_tuple else hidden_states

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    with ExitStack() as stack:
        for layer in layers[:index]:
            # On the instance, so that the class and every other model stay as they are.
            stack.callback(_restore, layer, layer.__dict__.get("forward"))
            layer.forward = skipped
        handle = layers[index].register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        stack.callback(handle.remove)
        yield


def _restore(layer: nn.Module, own_forward: Any) -> None:
    """Undo `layer.forward = …`; accelerate puts a forward of its own on the instance."""
    if own_forward is None:
        del layer.__dict__["forward"]
    else:
        layer.__dict__["forward"] = own_forward
