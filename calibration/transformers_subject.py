"""A transformers model in this process as the subject of a calibration."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from calibration.config import CalibrationConfig
from guard.artifact import ModelIdentity
from guard.errors import InputError, PromptSetError
from guard.identity import model_identity
from guard.session import GuardSession
from guard.shadow import BaseStep, ShadowModel
from guard.step import guarded_logits, layers_wanted
from guard.template import (
    Chat,
    chat_ids,
    check_template,
    common_start,
    distinct_instructions,
    instruction_suffix,
    message_opening,
    whole_chat_ids,
)

__all__ = ["TransformersSubject", "load_subject"]


def load_subject(config: CalibrationConfig) -> TransformersSubject:
    """Load model and tokenizer as the config says.

    Raises:
        InputError: no such model, revision or device.
        UnsupportedModelError: no chat template, or layers that cannot be found.
    """
    options: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, **options)
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype, **options)
        model = model.to(config.device).eval()
    except (OSError, ValueError, RuntimeError) as err:
        raise InputError(
            f"{config.model}: cannot load the model: {err}; give a local folder or a hub id"
            " as transformers understands it"
        ) from err
    name = config.model_name or config.model
    return TransformersSubject(
        model,
        tokenizer,
        name,
        config.revision,
        config.layers_path,
        config.answer_opening,
        config.message_width,
    )


class TransformersSubject:
    """Implements `Subject` with the same base and shadow passes that serving uses.

    Args:
        model: causal language model in eval mode.
        tokenizer: its tokenizer, with a chat template.
        model_id: how the user named the model.
        revision: of the hub, if any.
        layers_path: dotted name of the decoder layers, where they are not found.
        answer_opening: put behind every prompt; see `CalibrationConfig`.
        message_width: tokens of a message over which the gate averages; 0: it does not read them.

    Raises:
        UnsupportedModelError: no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        model_id: str,
        revision: str | None = None,
        layers_path: str | None = None,
        answer_opening: str = "",
        message_width: int = 512,
    ) -> None:
        check_template(tokenizer, model_id)
        self._tokenizer = tokenizer
        opening = tokenizer(answer_opening, add_special_tokens=False)["input_ids"]
        self._opening_ids: list[int] = list(opening)
        self._message_width = message_width
        self._runner = ShadowModel(model, layers_path)
        self._config = model.config.get_text_config()
        self._identity = model_identity(model, tokenizer, model_id, revision)
        self._samples = distinct_instructions(tokenizer)
        self._suffix_ids = instruction_suffix(self._template, self._samples) + self._opening_ids
        eos = model.generation_config.eos_token_id
        self._eos = set(eos) if isinstance(eos, list) else {eos}
        self._message_opening_ids = message_opening(self._tokenizer, self._samples, TemplateError)
        self._prefix, self._prefix_cache = self._shared_prefix()

    @property
    def identity(self) -> ModelIdentity:
        """What the guard will be bound to."""
        return self._identity

    @property
    def suffix_ids(self) -> list[int]:
        """Template tokens between the instruction and the response."""
        return self._suffix_ids

    @property
    def tokenizer(self) -> Any:
        """The model's, chat template included."""
        return self._tokenizer

    @property
    def message_width(self) -> int:
        """Tokens of a message, the last, over which the gate averages."""
        return self._message_width

    @property
    def message_opening_ids(self) -> list[int]:
        """Template tokens that stand right before every user message."""
        return self._message_opening_ids

    @property
    def n_opening(self) -> int:
        """How many of them, the last, are no template's but the answer's opening."""
        return len(self._opening_ids)

    @property
    def runner(self) -> ShadowModel:
        """The model with its base and shadow passes."""
        return self._runner

    def encode(self, text: str) -> list[int]:
        """Token ids of a single-turn chat, template included.

        Raises:
            PromptSetError: the prompt does not fit the model's context.
        """
        return self._fitting(self._template(text), text)

    def encode_chats(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Token ids of chats with a system prompt or earlier turns, template included.

        Raises:
            PromptSetError: one does not fit the model's context, or the chat template takes no such
                chat.
        """
        found = []
        for chat in chats:
            ids = whole_chat_ids(self._tokenizer, chat, TemplateError)
            if ids is None:
                raise PromptSetError("the chat template takes no such chat")
            found.append(self._fitting(ids, chat[-1]["content"]))
        return found

    def _fitting(self, ids: list[int], text: str) -> list[int]:
        """A templated prompt with the answer's opening, if it fits the context."""
        ids = ids + self._opening_ids
        limit = getattr(self._config, "max_position_embeddings", None)
        if limit is not None and len(ids) + 64 > limit:
            raise PromptSetError(
                f"prompt {text[:40]!r}…: {len(ids)} tokens do not fit the model's {limit}"
            )
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response, without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        capture: Sequence[int],
        n_last: int | None = None,  # noqa: ARG002 - all tokens behind the shared prefix are kept
    ) -> BaseStep:
        """Run prompts once, left-padded, over the cached template prefix that they share.

        Args:
            prompts: n_rows lists of token ids.
            capture: layers whose resid_pre is kept.
            n_last: tokens that are needed; they are there.

        Returns:
            A step whose `input_ids` are what follows the shared prefix.
        """
        ids, mask, cache = self._inputs(prompts)
        return self._runner.base(ids, mask, cache, capture)

    def states(
        self,
        prompts: Sequence[Sequence[int]],
        capture: Sequence[int],
        n_last: int,  # noqa: ARG002 - all tokens behind the shared prefix are at hand
    ) -> dict[int, Tensor]:
        """`prefill(prompts, capture).resid_pre`, without what lies behind the last of them."""
        return self._runner.states(*self._inputs(prompts), capture)

    def _inputs(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Any]:
        """Padded tokens behind the shared prefix, their mask, and its KV cache."""
        prefix = self._prefix
        shared = all(list(p[: len(prefix)]) == prefix and len(p) > len(prefix) for p in prompts)
        skip = len(prefix) if shared else 0
        tails = [list(p[skip:]) for p in prompts]
        width = max(map(len, tails))
        device = self._runner.device
        ids = torch.tensor([[0] * (width - len(t)) + t for t in tails], device=device)
        mask = torch.tensor(
            [[1] * skip + [0] * (width - len(t)) + [1] * len(t) for t in tails], device=device
        )
        return ids, mask, self.prefix_cache(len(prompts), skip)

    def prefix_cache(self, n_rows: int, n_tokens: int) -> Any:
        """A fresh KV cache for `n_rows` that holds the shared prefix, or nothing (0 tokens)."""
        if n_tokens == 0:
            return DynamicCache(config=self._config)
        cache = copy.deepcopy(self._prefix_cache)
        cache.batch_repeat_interleave(n_rows)
        return cache

    def shadow(self, step: BaseStep, rows: Sequence[int], layer: int, steered: Tensor) -> Tensor:
        """Steered logits of some rows of a step, (len(rows), vocab) float32."""
        return self._runner.shadow(step, rows, layer, steered)

    def shadow_with_gradient(
        self, step: BaseStep, rows: Sequence[int], layer: int, steered: Tensor
    ) -> Tensor:
        """Steered logits, (len(rows), vocab) float32, differentiable in `steered`."""
        return self._runner.shadow_with_gradient(step, rows, layer, steered)

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sessions: Sequence[GuardSession | None] | None = None,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Responses, the end-of-turn token left out; open sessions steer theirs.

        Args:
            prompts: n_rows lists of token ids.
            max_tokens: longest response.
            sessions: one per row, opened; None leaves a row as it is.
            temperature: 0 is greedy.
            seeds: one per row, for sampling. The noise of a row depends on its seed alone, so two
                runs that differ in how they steer share it, and what is not steered stays the same.
        """
        noise = _Noise(seeds or range(len(prompts)), temperature, self._runner.device)
        guards: list[GuardSession | None] = list(sessions or [None] * len(prompts))
        responses: list[list[int]] = [[] for _ in prompts]
        running = [True] * len(prompts)
        step = self.prefill(prompts, layers_wanted(guards, 0))
        mask = step.attention_mask
        for position in range(max_tokens):
            active = [g if on else None for g, on in zip(guards, running, strict=True)]
            logits = guarded_logits(
                self._runner, step, active, position, [temperature] * len(prompts)
            )
            chosen = noise.choose(logits)
            for row, token in enumerate(chosen.tolist()):
                running[row] = running[row] and token not in self._eos
                if running[row]:
                    responses[row].append(token)
            if not any(running) or position + 1 == max_tokens:
                break
            active = [g if on else None for g, on in zip(guards, running, strict=True)]
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            step = self._runner.base(
                chosen.unsqueeze(1), mask, step.cache, layers_wanted(active, position + 1)
            )
        return responses

    def _template(self, text: str) -> list[int]:
        return chat_ids(self._tokenizer, [text])

    def _shared_prefix(self) -> tuple[list[int], Any]:
        """What the template puts before every instruction, and its KV cache.

        Nothing for a model with sliding windows: a window counts the padding that stands between
        the prefix and a short prompt, and would no longer reach as far back as it should. Nothing
        where no opening marks the messages, either: the gate then reads the template's first tokens
        as part of a short one, so their hidden states are needed.
        """
        cache = DynamicCache(config=self._config)
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            return [], cache
        if not self._message_opening_ids:
            return [], cache
        prefix = common_start([self._template(text) for text in self._samples])
        if prefix:
            ids = torch.tensor([prefix], device=self._runner.device)
            self._runner.base(ids, torch.ones_like(ids), cache)
        return prefix, cache


class _Noise:
    """Samples by the Gumbel-max rule: argmax(logits / T + g) is distributed as softmax(logits / T).

    Args:
        seeds: n_rows seeds.
        temperature: 0 is greedy.
        device: where the logits are.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def choose(self, logits: Tensor) -> Tensor:
        """(n_rows,) tokens from (n_rows, vocab) logits."""
        if self._temperature == 0:
            return logits.argmax(-1)
        waits = torch.empty_like(logits, dtype=torch.float32)
        for row, generator in zip(waits, self._generators, strict=True):
            row.exponential_(generator=generator)
        return (logits.float() / self._temperature - waits.log()).argmax(-1)
