"""The shadow pass is exact on many architectures; what it cannot guard it refuses by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from calibration.transformers_subject import TransformersSubject
from guard.artifact import CarrierArtifact
from guard.errors import UnsupportedModelError
from guard.gate import Zone
from guard.hooks import find_decoder_layers
from guard.identity import model_identity
from guard.policy import Policy
from guard.probe import linear_probe
from guard.session import Record
from guard.shadow import BaseStep, ShadowModel
from guard.steering import Carrier
from serve.engine import GenerationRequest, SamplingOptions
from serve.transformers_engine import TransformersEngine
from tests.architectures import BUILDERS, N_LAYERS, TINY, VOCAB, WINDOW, build
from tests.tiny_refuser import NOUNS

LENGTHS = (3 * WINDOW + 2, WINDOW + 1, WINDOW - 2)
"""Prompts of one batch: two are longer than a sliding window, and two are padded."""
every_architecture = pytest.mark.parametrize("name", BUILDERS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """At this size threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prompts() -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (n_rows, n_tokens) each, padded left."""
    width = max(LENGTHS)
    ids = torch.randint(4, VOCAB - 8, (len(LENGTHS), width), generator=_seeded(1))
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in LENGTHS])
    return ids, mask


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps(model: ShadowModel, n_steps: int = 4) -> Iterator[tuple[BaseStep, Tensor]]:
    """Prefill and greedy decoding: each base step, and all tokens so far (n_rows, n_seen)."""
    ids, mask = prompts()
    cache = DynamicCache(config=model.model.config)
    step = model.base(ids, mask, cache, range(N_LAYERS))
    for _ in range(n_steps):
        yield step, ids
        chosen = step.logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, chosen], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        step = model.base(chosen, mask, cache, range(N_LAYERS))


# ------------------------------------------------------------------ the reference


@contextmanager
def projections(model: nn.Module, hook: Any) -> Iterator[None]:
    """Call `hook(name, n_query, _, _, output)` after every projection that makes keys or values."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith((".k_proj", ".v_proj", ".qkv_proj")):
                n_query = 0
                if name.endswith(".qkv_proj"):
                    n_query = model.config.hidden_size  # queries stand first
                handle = module.register_forward_hook(partial(hook, name, n_query))
                stack.callback(handle.remove)
        yield


@torch.no_grad()
def steered_in_full(
    model: PreTrainedModel, layers: nn.ModuleList, ids: Tensor, mask: Tensor, layer: int, by: Tensor
) -> Tensor:
    """Logits of a forward without any cache that differs from a plain one in one thing.

    The last token's hidden state is moved by `by` before `layer`. Keys and values, the last
    token's own included, stay those of the plain forward: that is what a shadow pass reads.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str, _n_query: int, _: nn.Module, __: Any, output: Tensor) -> None:
        kept[name] = output

    def put_back(name: str, n_query: int, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.cat([output[..., :n_query], kept[name][..., n_query:]], dim=-1)

    def steer(_: nn.Module, args: tuple[Tensor, ...], kwargs: Any) -> Any:
        hidden = args[0].clone()
        hidden[:, -1] += by
        return (hidden, *args[1:]), kwargs

    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    forward = partial(
        model, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    )
    with projections(model, keep):
        forward()
    handle = layers[layer].register_forward_pre_hook(steer, with_kwargs=True)
    try:
        with projections(model, put_back):
            return forward().logits[:, -1]
    finally:
        handle.remove()


# ------------------------------------------------------------------ what is exact


@every_architecture
def test_the_decoder_layers_are_found_and_their_inputs_are_the_hidden_states(name: str) -> None:
    model = build(name)
    shadow_model = ShadowModel(model)
    assert len(shadow_model.layers) == N_LAYERS
    step, ids = next(steps(shadow_model))
    with torch.no_grad():
        output = model(
            input_ids=ids,
            attention_mask=step.attention_mask,
            position_ids=step.position_ids,
            output_hidden_states=True,
            use_cache=False,
        )
    real = step.attention_mask.bool()
    for layer in range(N_LAYERS):
        assert torch.equal(step.resid_pre[layer][real], output.hidden_states[layer][real])
    torch.testing.assert_close(step.logits, output.logits[:, -1], rtol=1e-4, atol=1e-4)


@every_architecture
def test_a_pass_that_stops_early_reads_what_a_whole_one_reads_and_leaves_no_trace(
    name: str,
) -> None:
    model = build(name)
    shadow_model = ShadowModel(model)
    step, ids = next(steps(shadow_model))
    for last in range(N_LAYERS):
        cache = DynamicCache(config=model.config)
        found = shadow_model.states(ids, step.attention_mask, cache, range(last + 1))
        assert list(found) == list(range(last + 1))
        for layer, states in found.items():
            assert torch.equal(states, step.resid_pre[layer])
    again, _ = next(steps(shadow_model))
    assert torch.equal(again.logits, step.logits)


@every_architecture
def test_a_shadow_pass_is_the_full_forward_with_the_last_token_steered(name: str) -> None:
    model = build(name)
    shadow_model = ShadowModel(model)
    for n, (step, ids) in enumerate(steps(shadow_model)):
        layer = n % N_LAYERS
        before = [(kv.keys.clone(), kv.values.clone()) for kv in step.cache.layers]
        hidden = step.last_hidden(layer)
        by = torch.randn(hidden.shape[-1], generator=_seeded(2)) * hidden.std()
        rows = [2, 0, 1]
        steered = shadow_model.shadow(step, rows, layer, (hidden + by)[rows])
        expected = steered_in_full(model, shadow_model.layers, ids, step.attention_mask, layer, by)
        spread = float(step.logits.std())
        assert (steered - expected[rows]).abs().max() < 1e-4 * spread
        assert (steered - step.logits[rows]).abs().max() > 0.1 * spread
        for kv, (keys, values) in zip(step.cache.layers, before, strict=True):
            assert torch.equal(kv.keys, keys)
            assert torch.equal(kv.values, values)


@every_architecture
def test_a_shadow_pass_that_steers_nothing_gives_the_base_logits(name: str) -> None:
    shadow_model = ShadowModel(build(name))
    for step, _ in steps(shadow_model, 2):
        for layer in range(N_LAYERS):
            rows = [1, 2]
            same = shadow_model.shadow(step, rows, layer, step.last_hidden(layer)[rows])
            assert torch.equal(same, step.logits[rows])
            again = shadow_model.replay(step, rows, layer)
            assert (again - step.logits[rows]).abs().max() < 1e-4 * float(step.logits.std())


@every_architecture
def test_a_padded_row_decodes_as_it_does_alone(name: str) -> None:
    shadow_model = ShadowModel(build(name))
    ids, mask = prompts()
    together = list(steps(shadow_model))
    for row, length in enumerate(LENGTHS):
        cache = DynamicCache(config=shadow_model.model.config)
        tokens, seen = ids[row : row + 1, -length:], mask[row : row + 1, -length:]
        for step, _ in together:
            alone = shadow_model.base(tokens, seen, cache)
            torch.testing.assert_close(alone.logits[0], step.logits[row], rtol=1e-3, atol=1e-3)
            tokens = step.logits[row].argmax().reshape(1, 1)
            seen = torch.cat([seen, seen.new_ones(1, 1)], dim=1)


@every_architecture
def test_calibration_over_a_cached_prefix_sees_what_whole_prompts_show(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(name)
    subject = TransformersSubject(model, tiny_tokenizer, name)
    wanted = [subject.encode(" ".join(NOUNS[:n])) for n in (1, WINDOW - 1, 3 * WINDOW)]
    step = subject.prefill(wanted, range(N_LAYERS))
    windows = any(layer.is_sliding for layer in step.cache.layers)
    assert step.input_ids.shape[1] == len(wanted[-1]) - (0 if windows else len(["<bos>", "<user>"]))
    for row, prompt in enumerate(wanted):
        with torch.no_grad():
            alone = model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(step.logits[row], alone, rtol=1e-3, atol=1e-3)
        nothing = step.last_hidden(1)[row : row + 1]
        assert torch.equal(subject.shadow(step, [row], 1, nothing)[0], step.logits[row])


@every_architecture
def test_the_embedded_engine_arms_and_steers_inside_the_budget(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tiny_guard: CarrierArtifact
) -> None:
    model = build(name)
    guard = always_raising(tiny_guard, model, tiny_tokenizer)
    policy = Policy(raise_budget_nats=2.0, token_cap_nats=0.5)
    engine = TransformersEngine(model, tiny_tokenizer, guard, policy, model_name=name)
    record = asyncio.run(last_record(engine, range(4, 4 + 3 * WINDOW)))
    assert record.zone is Zone.RAISE
    assert 0.5 < record.kl_nats <= 2.0


def always_raising(
    guard: CarrierArtifact, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> CarrierArtifact:
    """A guard for any tiny model, with a random carrier."""
    d_model = TINY["hidden_size"]
    gate = guard.manifest.gate.model_copy(
        update={"raise_above": -1e9, "lower_below": None, "raise_if_refusal_below": 2.0}
    )
    identity = model_identity(model, tokenizer, "tiny")
    manifest = guard.manifest.model_copy(
        update={"model": identity, "gate": gate, "lower_carrier": None}
    )
    return replace(
        guard,
        manifest=manifest,
        raise_carrier=Carrier.additive(2, 5 * torch.randn(d_model, generator=_seeded(3))),
        lower_carrier=None,
        probe=linear_probe(torch.zeros(d_model)),
    )


async def last_record(engine: TransformersEngine, prompt: Sequence[int]) -> Record:
    await engine.start()
    try:
        options = SamplingOptions(max_tokens=8, temperature=1.0, seed=0)
        request = GenerationRequest("r", tuple(prompt), options)
        records = [step.record async for step in engine.generate(request)]
    finally:
        await engine.stop()
    assert records[-1] is not None
    return records[-1]


# ------------------------------------------------------------------ what is refused


UNSUPPORTED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "attention-free": (
        lambda: MambaForCausalLM(
            MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, state_size=4)
        ),
        "LinearAttentionLayer cache layer .* has no exact shadow pass",
    ),
    "hybrid": (
        lambda: Qwen3NextForCausalLM(
            Qwen3NextConfig(
                **TINY,
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
            )
        ),
        "LinearAttentionLayer cache layer .* has no exact shadow pass",
    ),
    "shared keys and values": (
        lambda: Gemma4ForCausalLM(
            Gemma4TextConfig(
                **TINY,
                head_dim=8,
                sliding_window=WINDOW,
                layer_types=["sliding_attention", "full_attention"] * 2,
                num_kv_shared_layers=2,
                vocab_size_per_layer_input=VOCAB,
                hidden_size_per_layer_input=8,
            )
        ),
        "DummyLayer cache layer .* has no exact shadow pass",
    ),
    "several residual streams": (
        lambda: Gemma3nForCausalLM(
            Gemma3nTextConfig(
                **TINY,
                head_dim=8,
                sliding_window=WINDOW,
                num_kv_shared_layers=0,
                activation_sparsity_pattern=[0.0] * N_LAYERS,
                vocab_size_per_layer_input=VOCAB,
                hidden_size_per_layer_input=8,
            )
        ),
        "not one residual stream",
    ),
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=4, num_heads=4)
        ),
        "choose a decoder-only model",
    ),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_has_no_exact_shadow_pass_is_refused_in_the_first_pass(kind: str) -> None:
    make, message = UNSUPPORTED[kind]
    model = make().eval()
    ids, mask = prompts()
    with pytest.raises(UnsupportedModelError, match=message):
        ShadowModel(model).base(ids, mask, DynamicCache(config=model.config), range(N_LAYERS))


def test_calibration_refuses_an_attention_free_model_before_it_captures_anything(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    make, message = UNSUPPORTED["attention-free"]
    with pytest.raises(UnsupportedModelError, match=message):
        TransformersSubject(make().eval(), tiny_tokenizer, "mamba")


class LaidOutOtherwise(nn.Module):
    """A model whose layers are split over two lists, or stand in one too many."""

    def __init__(self, *lengths: int) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=4)
        self.parts = nn.ModuleDict(
            {
                f"part{i}": nn.ModuleList(nn.Identity() for _ in range(n))
                for i, n in enumerate(lengths)
            }
        )


@pytest.mark.parametrize(
    ("lengths", "found", "example"),
    [((2, 2), "none", "model.layers"), ((4, 4), "parts.part0, parts.part1", "parts.part0")],
)
def test_layers_that_cannot_be_told_are_asked_for_by_name(
    lengths: tuple[int, ...], found: str, example: str
) -> None:
    model = LaidOutOtherwise(*lengths)
    with pytest.raises(UnsupportedModelError, match=f"found {found};.*--layers-path {example}"):
        find_decoder_layers(model)
    assert len(find_decoder_layers(model, "parts.part1")) == lengths[1]
    with pytest.raises(UnsupportedModelError, match=r"no decoder layers at 'parts\.part9'"):
        find_decoder_layers(model, "parts.part9")


def test_a_list_inside_a_layer_is_never_taken_for_the_layers() -> None:
    model = LaidOutOtherwise(4)
    model.parts["part0"][1] = nn.ModuleDict(
        {"experts": nn.ModuleList(nn.Identity() for _ in "abcd")}
    )
    assert find_decoder_layers(model) is model.parts["part0"]
