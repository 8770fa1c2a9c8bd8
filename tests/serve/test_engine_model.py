"""The guarded engine on the embedded 0.5B model: budgets, bits and batches of a real chat model."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from guard.artifact import CarrierArtifact, CarrierSpec, GateSpec, Manifest, MessageRead
from guard.errors import GuardError
from guard.gate import Zone, message_positions
from guard.identity import model_identity
from guard.policy import Policy
from guard.probe import Probe
from guard.reading import gate_scores
from guard.session import GuardSession
from guard.shadow import BaseStep, ShadowModel
from guard.steering import Carrier
from serve.engine import GenerationRequest, SamplingOptions, TokenStep
from serve.guarded_batch import GuardedBatch, Observers, Row, left_pad
from serve.transformers_engine import TransformersEngine

pytestmark = pytest.mark.model

OPENING, SUFFIX = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
RAISE_LAYER, LOWER_LAYER, GATE_LAYER, MESSAGE_LAYER = 21, 20, 12, 10
TEMPERATURES = (0.0, 0.3, 0.7, 1.2)
POLICY = Policy(shadow_tokens=16)


def _texts(name: str, n: int) -> list[str]:
    lines = files("calibration").joinpath(f"prompt_sets/{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines[:: len(lines) // n][:n]]


@dataclass(frozen=True)
class Subject:
    """A model and a guard made for it in seconds."""

    model: Any
    tokenizer: Any
    guard: CarrierArtifact

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a chat that asks for a reply."""
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return tuple(self.tokenizer(chat, add_special_tokens=False)["input_ids"])

    def engine(self, policy: Policy = POLICY, **options: Any) -> TransformersEngine:
        """An engine with this model and guard."""
        return TransformersEngine(
            self.model, self.tokenizer, self.guard, policy, model_name="embedded", **options
        )


@pytest.fixture(scope="module")
def subject(embedded_model_dir: Path) -> Subject:
    """The model as saved, bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir, dtype="auto").eval()
    bare = Subject(model, tokenizer, None)  # type: ignore[arg-type]
    return replace(bare, guard=_make_guard(bare))


@pytest.fixture(scope="module")
def wide(embedded_model_dir: Path, subject: Subject) -> Subject:
    """The same model and guard in float32."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir, dtype=torch.float32).eval()
    return Subject(model, subject.tokenizer, subject.guard)


def _make_guard(bare: Subject) -> CarrierArtifact:
    """Differences in means of a few prompts; a third of them is raised and a third lowered."""
    # Before the first forward pass, in which transformers unpacks some quantised weights.
    identity = model_identity(bare.model, bare.tokenizer, "embedded")
    suffix = bare.tokenizer(SUFFIX, add_special_tokens=False)["input_ids"]
    opening = bare.tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    read = {name: _read(bare, _texts(name, 16)) for name in ("harmful", "ordinary_benign")}

    def difference(layer: int, position: int) -> Tensor:
        means = [step.resid_pre[layer][:, position].float().mean(0) for _, step in read.values()]
        return means[0] - means[1]

    def message(name: str) -> Tensor:
        """(n_prompts, d_model): the mean over each message."""
        prompts, step = read[name]
        means = []
        for row, ids in enumerate(prompts):
            places = message_positions(ids, suffix, opening, 64)
            hidden = step.resid_pre[MESSAGE_LAYER][row, [p - len(ids) for p in places]]
            means.append(hidden.float().mean(0))
        return torch.stack(means)

    probe = difference(GATE_LAYER, -1 - len(suffix))
    second = message("harmful").mean(0) - message("ordinary_benign").mean(0)

    def spec(layer: int) -> CarrierSpec:
        return CarrierSpec(
            layer=layer, kind="add", family="difference_in_means", position=-1, norm_share=0.3
        )

    manifest = Manifest(
        created="2026-01-01T00:00:00Z",
        model=identity,
        seed=0,
        safe_kl_nats=0.1,
        datasets={},
        libraries={},
        raise_carrier=spec(RAISE_LAYER),
        lower_carrier=spec(LOWER_LAYER),
        gate=GateSpec(
            layer=GATE_LAYER,
            instruction_suffix_ids=suffix,
            message=MessageRead(
                layer=MESSAGE_LAYER, n_heads=1, suffix_ids=suffix, opening_ids=opening, width=64
            ),
            raise_above=0.0,
            lower_below=0.0,
            raise_if_refusal_below=2.0,
            lower_if_refusal_above=-1.0,
            alpha=0.1,
            delta=0.1,
            n_by_stratum={},
        ),
    )
    first = bare.tokenizer("I", add_special_tokens=False)["input_ids"]
    guard = CarrierArtifact(
        manifest,
        raise_carrier=Carrier.additive(RAISE_LAYER, difference(RAISE_LAYER, -1)),
        lower_carrier=Carrier.additive(LOWER_LAYER, -difference(LOWER_LAYER, -1)),
        probe=Probe(
            template=(probe / probe.norm()).unsqueeze(0),
            out=torch.tensor([1.0, 1.0, 0.0]),
            message=torch.stack([second / second.norm() / 4, second / second.norm()]),
            n_heads=1,
        ),
        refusal_token_ids=torch.tensor(first),
        refusal_token_weights=torch.ones(len(first)),
    )
    scores = [s for prompts, step in read.values() for s in gate_scores(guard, step, prompts)]
    low, high = torch.tensor(scores).quantile(torch.tensor([0.33, 0.67])).tolist()
    limits = {"raise_above": high, "lower_below": low}
    gate = manifest.gate.model_copy(update=limits)
    return replace(guard, manifest=manifest.model_copy(update={"gate": gate}))


def _read(bare: Subject, texts: Sequence[str]) -> tuple[list[tuple[int, ...]], BaseStep]:
    """Prompts, and a base pass over them that keeps what the guard is made of."""
    prompts = [bare.ids(text) for text in texts]
    layers = (MESSAGE_LAYER, GATE_LAYER, LOWER_LAYER, RAISE_LAYER)
    ids, mask = left_pad(prompts, torch.device("cpu"))
    cache = DynamicCache(config=bare.model.config)
    return prompts, ShadowModel(bare.model).base(ids, mask, cache, layers)


# ------------------------------------------------------------------ running


@dataclass
class Answer:
    """What came back for one request."""

    request: GenerationRequest
    steps: list[TokenStep] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Token ids of the response."""
        return [step.token_id for step in self.steps]

    @property
    def record(self) -> Any:
        """The guard's, of the last step."""
        assert self.steps[-1].record is not None
        return self.steps[-1].record


def serve(
    engine: TransformersEngine, wanted: Sequence[GenerationRequest], together: bool = True
) -> list[Answer]:
    async def ask(request: GenerationRequest) -> Answer:
        return Answer(request, [step async for step in engine.generate(request)])

    async def run() -> list[Answer]:
        await engine.start()
        try:
            if together:
                return list(await asyncio.gather(*map(ask, wanted)))
            return [await ask(request) for request in wanted]
        finally:
            await engine.stop()

    return asyncio.run(run())


def requests(
    subject: Subject, texts: Sequence[str], options: SamplingOptions
) -> list[GenerationRequest]:
    return [GenerationRequest(f"r{i}", subject.ids(text), options) for i, text in enumerate(texts)]


def generate(subject: Subject, prompt: Sequence[int], options: SamplingOptions) -> list[int]:
    """What transformers' own `generate` writes, with everything but the options switched off."""
    torch.manual_seed(options.seed or 0)
    sampled = options.temperature > 0
    chosen = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    output = subject.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=options.max_tokens,
        do_sample=sampled,
        repetition_penalty=1.0,
        **(chosen if sampled else {}),
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def in_thirds(subject: Subject, texts: Sequence[str]) -> Subject:
    """The same with thresholds that raise a third of these texts and lower another."""
    observing = subject.engine(Policy(mode="observe"))
    answers = serve(observing, requests(subject, texts, SamplingOptions(max_tokens=1)))
    scores = sorted(answer.record.gate_score for answer in answers)
    third = len(scores) // 3
    cuts = {
        "lower_below": sum(scores[third - 1 : third + 1]) / 2,
        "raise_above": sum(scores[-third - 1 : len(scores) - third + 1]) / 2,
    }
    manifest = subject.guard.manifest
    gate = manifest.gate.model_copy(update=cuts)
    changed = replace(subject.guard, manifest=manifest.model_copy(update={"gate": gate}))
    return replace(subject, guard=changed)


# ------------------------------------------------------------------ what must hold


def test_forty_mixed_prompts_stay_inside_their_budgets(subject: Subject) -> None:
    """Σ KL(p_t ‖ p0), recomputed in float64 from the stored logits, at four temperatures."""
    texts = [*_texts("harmful", 16), *_texts("ordinary_benign", 12), *_texts("hard_benign", 12)]
    wanted = [
        replace(request, options=replace(request.options, temperature=TEMPERATURES[i % 4], seed=i))
        for i, request in enumerate(requests(subject, texts, SamplingOptions(max_tokens=18)))
    ]
    temperature = {r.request_id: r.options.temperature or 1.0 for r in wanted}
    spent: dict[str, float] = defaultdict(float)

    def audit(name: str, _position: int, mixed: Tensor, base: Tensor, _nats: float) -> None:
        p = torch.softmax(mixed.double() / temperature[name], dim=-1)
        q = torch.softmax(base.double() / temperature[name], dim=-1)
        spent[name] += float(torch.special.xlogy(p, p / q).nan_to_num(0.0).sum())

    answers = serve(subject.engine(on_mixture=audit), wanted)
    assert {a.record.zone for a in answers} == {Zone.PASS, Zone.RAISE, Zone.LOWER}
    for answer in answers:
        recomputed, record = spent[answer.request.request_id], answer.record
        assert recomputed <= record.budget_nats + 1e-4
        assert recomputed == pytest.approx(record.kl_nats, abs=1e-6)
        assert (record.zone is Zone.PASS) == (record.shadow_passes == 0)
    for value in TEMPERATURES:
        chosen = [a.record for a in answers if a.request.options.temperature == value]
        assert max(record.kl_nats for record in chosen) > 0.5


def test_the_cache_after_a_guarded_run_is_the_base_models(subject: Subject) -> None:
    model = subject.model
    texts = [*_texts("harmful", 3), *_texts("hard_benign", 3)]
    subject = in_thirds(subject, texts)
    wanted = requests(subject, texts, SamplingOptions(max_tokens=8, temperature=0.0))
    batch, answers = _run_batch(subject, wanted)
    assert {a.record.zone for a in answers} == {Zone.PASS, Zone.RAISE, Zone.LOWER}
    cache = DynamicCache(config=model.config)
    ids, mask = left_pad([r.prompt_ids for r in wanted], torch.device("cpu"))
    arguments = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in arguments else "past_key_values"
    with torch.inference_mode():
        for position in range(8):
            places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places,
                use_cache=True,
                **{name: cache},
            )
            ids = torch.tensor([[answer.tokens[position]] for answer in answers])
            mask = torch.cat([mask, mask.new_ones(len(wanted), 1)], dim=1)
    for mine, stock in zip(batch.cache.layers, cache.layers, strict=True):
        assert torch.equal(mine.keys, stock.keys)
        assert torch.equal(mine.values, stock.values)


def _run_batch(
    subject: Subject, wanted: Sequence[GenerationRequest]
) -> tuple[GuardedBatch, list[Answer]]:
    """Drive a batch by hand, without the engine's thread; no response may end early."""
    answers = [Answer(request) for request in wanted]

    def taker(answer: Answer) -> Callable[[TokenStep | GuardError], None]:
        def take(item: TokenStep | GuardError) -> None:
            assert isinstance(item, TokenStep)
            answer.steps.append(item)

        return take

    rows = [
        Row(
            answer.request,
            subject.tokenizer,
            torch.device("cpu"),
            GuardSession(subject.guard, POLICY),
            taker(answer),
        )
        for answer in answers
    ]
    batch = GuardedBatch(ShadowModel(subject.model), rows, frozenset(), subject.guard, Observers())
    while not batch.done:
        batch.step()
    return batch, answers


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(max_tokens=12, temperature=0.0),
        SamplingOptions(max_tokens=12, temperature=0.7, top_p=0.9, top_k=50, seed=4),
    ],
)
def test_observed_and_unflagged_responses_are_what_generate_gives(
    subject: Subject, options: SamplingOptions
) -> None:
    texts = [*_texts("harmful", 3), *_texts("ordinary_benign", 3)]
    subject = in_thirds(subject, texts)
    wanted = requests(subject, texts, options)
    stock = [generate(subject, request.prompt_ids, options) for request in wanted]
    observed = serve(subject.engine(Policy(mode="observe")), wanted, together=False)
    assert [a.tokens for a in observed] == stock
    passed = [i for i, a in enumerate(observed) if a.record.zone is Zone.PASS]
    assert len(passed) == 2
    guarded = serve(subject.engine(), [wanted[i] for i in passed], together=False)
    assert [a.tokens for a in guarded] == [stock[i] for i in passed]


def test_a_batch_gives_the_zones_budgets_and_tokens_of_single_requests(wide: Subject) -> None:
    texts = [*_texts("harmful", 2), *_texts("ordinary_benign", 2), *_texts("hard_benign", 2)]
    wide = in_thirds(wide, texts)
    wanted = requests(wide, texts, SamplingOptions(max_tokens=8, temperature=0.0))
    together = serve(wide.engine(), wanted)
    alone = serve(wide.engine(), wanted, together=False)
    assert {a.record.zone for a in together} == {Zone.PASS, Zone.RAISE, Zone.LOWER}
    for mine, other in zip(together, alone, strict=True):
        assert mine.tokens == other.tokens
        assert mine.record.zone == other.record.zone
        assert mine.record.budget_nats == other.record.budget_nats
        assert mine.record.kl_nats == pytest.approx(other.record.kl_nats, abs=1e-2)
