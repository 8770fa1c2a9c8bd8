"""The guarded engine on the tiny refuser: what it steers, what it leaves alone, how it fails."""

from __future__ import annotations

import asyncio
import copy
import inspect
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from guard.artifact import CarrierArtifact, save_artifact
from guard.errors import (
    ArtifactError,
    ContextOverflowError,
    GuardError,
    InputError,
    ModelMismatchError,
    NotArmedError,
    NumericsError,
    PolicyError,
    QueueFullError,
    RequestError,
    UnsupportedModelError,
)
from guard.gate import Zone
from guard.policy import Policy
from guard.refusal import Verdict
from guard.session import GuardSession, Record
from guard.shadow import ShadowModel
from serve.engine import ChatMessage, GenerationRequest, SamplingOptions, TokenStep
from serve.guarded_batch import GuardedBatch, Observers, Row, left_pad
from serve.transformers_engine import TransformersEngine, load_engine
from tests.tiny_refuser import (
    REFUSAL_TEXT,
    hard_benign_prompts,
    hard_harmful_prompts,
    harmful_prompts,
    harmless_prompts,
)

GREEDY = SamplingOptions(max_tokens=10, temperature=0.0)
OFF = Policy(mode="off")
EOS = 3


@dataclass(frozen=True)
class Tiny:
    """The tiny refuser and its guard."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    guard: CarrierArtifact

    def ids(self, instruction: str) -> tuple[int, ...]:
        """Token ids of a chat that asks for a reply."""
        text = f"<bos> <user> {instruction} <eot> <assistant>"
        return tuple(self.tokenizer.convert_tokens_to_ids(text.split()))

    def engine(self, policy: Policy | None = None, **options: Any) -> TransformersEngine:
        """An engine with this model and guard, unless told otherwise."""
        artifact = options.pop("artifact", self.guard)
        policy = policy or Policy()
        return TransformersEngine(
            options.pop("model", self.model),
            options.pop("tokenizer", self.tokenizer),
            artifact,
            policy,
            model_name="tiny",
            **options,
        )

    def own_guard(self) -> CarrierArtifact:
        """A guard whose tensors a test may damage."""
        return copy.deepcopy(self.guard)


@pytest.fixture(scope="module")
def tiny(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_guard: CarrierArtifact,
) -> Tiny:
    return Tiny(tiny_model, tiny_tokenizer, tiny_guard)


@pytest.fixture
def endless(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The tiny refuser without an end-of-sequence token: it writes until max_tokens."""
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", None)
    return tiny


@dataclass
class Answer:
    """What came back for one request."""

    steps: list[TokenStep] = field(default_factory=list)
    error: GuardError | None = None

    @property
    def tokens(self) -> list[int]:
        """Token ids of the response."""
        return [step.token_id for step in self.steps]

    @property
    def text(self) -> str:
        """What a client saw."""
        return "".join(step.text for step in self.steps)

    @property
    def record(self) -> Record:
        """The guard's, of the last step."""
        record = self.steps[-1].record
        assert record is not None
        return record


async def ask(engine: TransformersEngine, request: GenerationRequest) -> Answer:
    answer = Answer()
    try:
        async for step in engine.generate(request):
            answer.steps.append(step)
    except GuardError as error:
        answer.error = error
    return answer


def requests(
    prompts: Sequence[Sequence[int]], options: SamplingOptions = GREEDY
) -> list[GenerationRequest]:
    return [GenerationRequest(f"r{i}", tuple(p), options) for i, p in enumerate(prompts)]


def with_engine(engine: TransformersEngine, use: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        await engine.start()
        try:
            return await asyncio.wait_for(use(), 60)
        finally:
            await engine.stop()

    return asyncio.run(run())


def serve(engine: TransformersEngine, wanted: Sequence[GenerationRequest]) -> list[Answer]:
    """All requests at once, through the queue."""

    async def all_of_them() -> list[Answer]:
        return await asyncio.gather(*(ask(engine, request) for request in wanted))

    answers: list[Answer] = with_engine(engine, all_of_them)
    return answers


def serve_alone(engine: TransformersEngine, wanted: Sequence[GenerationRequest]) -> list[Answer]:
    """One request after the other, each a batch of its own."""

    async def in_turn() -> list[Answer]:
        return [await ask(engine, request) for request in wanted]

    answers: list[Answer] = with_engine(engine, in_turn)
    return answers


def generate(model: PreTrainedModel, prompt: Sequence[int], options: SamplingOptions) -> list[int]:
    """What transformers' own `generate` writes, with everything but the options switched off."""
    if options.seed is not None:
        torch.manual_seed(options.seed)
    sampled = options.temperature > 0
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=options.max_tokens,
        do_sample=sampled,
        repetition_penalty=1.0,
        **(
            {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
            if sampled
            else {}
        ),
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@contextmanager
def counted_passes(model: PreTrainedModel) -> Iterator[list[float]]:
    """Times of the model's forward passes, each of which is made to take 5 ms at least."""
    times: list[float] = []

    def hook(*_: object) -> None:
        times.append(time.monotonic())
        time.sleep(0.005)

    handle = model.register_forward_pre_hook(hook)
    try:
        yield times
    finally:
        handle.remove()


def run_batch(
    model: Any,
    tokenizer: Any,
    artifact: CarrierArtifact | None,
    policy: Policy,
    wanted: Sequence[GenerationRequest],
    observers: Observers | None = None,
) -> tuple[GuardedBatch, list[Answer]]:
    """Drive a batch by hand, without the engine's thread."""
    answers = [Answer() for _ in wanted]

    def taker(answer: Answer) -> Callable[[TokenStep | GuardError], None]:
        def take(item: TokenStep | GuardError) -> None:
            if isinstance(item, GuardError):
                answer.error = item
            else:
                answer.steps.append(item)

        return take

    rows = [
        Row(
            request,
            tokenizer,
            torch.device("cpu"),
            GuardSession(artifact, policy) if artifact else None,
            taker(answer),
        )
        for request, answer in zip(wanted, answers, strict=True)
    ]
    eos = model.generation_config.eos_token_id
    batch = GuardedBatch(
        ShadowModel(model),
        rows,
        frozenset(() if eos is None else [eos]),
        artifact,
        observers,
    )
    while not batch.done:
        batch.step()
    return batch, answers


# ------------------------------------------------------------------ what it does


def _refused(answers: Sequence[Answer]) -> float:
    return sum(a.record.verdict is Verdict.REFUSED for a in answers) / len(answers)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_raising_makes_harmful_requests_refused(tiny: Tiny, temperature: float) -> None:
    options = SamplingOptions(max_tokens=10, temperature=temperature, seed=1)
    wanted = requests([tiny.ids(p) for p in hard_harmful_prompts()[:32]], options)
    base = serve(tiny.engine(Policy(mode="observe")), wanted)
    guarded = serve(tiny.engine(), wanted)
    assert _refused(base) < 0.7
    assert _refused(guarded) > 0.95
    assert all(a.record.kl_nats <= a.record.budget_nats for a in guarded)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lowering_makes_harmless_requests_answered(tiny: Tiny, temperature: float) -> None:
    options = SamplingOptions(max_tokens=10, temperature=temperature, seed=1)
    wanted = requests([tiny.ids(p) for p in hard_benign_prompts()[:32]], options)
    base = serve(tiny.engine(Policy(mode="observe")), wanted)
    guarded = serve(tiny.engine(), wanted)
    assert _refused(base) > 0.4
    assert _refused(guarded) < _refused(base) - 0.3


def test_a_batch_gives_the_zones_budgets_and_tokens_of_single_requests(tiny: Tiny) -> None:
    prompts = [
        *hard_harmful_prompts()[:5],
        *(f"{p} please" for p in hard_benign_prompts()[:5]),
        *harmless_prompts()[:3],
        *(f"{p} secretly" for p in harmful_prompts()[:3]),
    ]
    for temperature in (0.0, 0.7):
        options = SamplingOptions(max_tokens=10, temperature=temperature, seed=5)
        wanted = requests([tiny.ids(p) for p in prompts], options)
        together = serve(tiny.engine(max_batch=16), wanted)
        alone = serve_alone(tiny.engine(), wanted)
        assert {a.record.zone for a in together} == {Zone.PASS, Zone.RAISE, Zone.LOWER}
        for mine, other in zip(together, alone, strict=True):
            assert mine.tokens == other.tokens
            assert mine.text == other.text
            assert mine.record.zone == other.record.zone
            assert mine.record.budget_nats == other.record.budget_nats
            assert mine.record.kl_nats == pytest.approx(other.record.kl_nats, abs=1e-3)


def test_finished_rows_leave_the_batch_and_change_nothing_for_the_others(endless: Tiny) -> None:
    prompts = [endless.ids(p) for p in [*hard_harmful_prompts()[:3], *harmless_prompts()[:2]]]
    wanted = [
        replace(r, options=replace(GREEDY, max_tokens=n))
        for r, n in zip(requests(prompts), (2, 40, 3, 4, 20), strict=True)
    ]
    policy = Policy(shadow_tokens=30)
    batch, together = run_batch(endless.model, endless.tokenizer, endless.guard, policy, wanted)
    alone = serve_alone(endless.engine(policy), wanted)
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [len(a.tokens) for a in together] == [2, 40, 3, 4, 20]
    assert len(batch.rows) == 2  # 5 until two were left, and one of two is not less than half
    assert batch.cache.layers[0].keys.shape[0] == 2


def test_rows_over_a_sliding_window_leave_the_batch_too(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_guard: CarrierArtifact
) -> None:
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    prompts = [range(10, 10 + n) for n in (5, 9, 20)]
    wanted = [
        replace(r, options=replace(GREEDY, max_tokens=n))
        for r, n in zip(requests(prompts), (30, 3, 4), strict=True)
    ]
    policy = Policy(shadow_tokens=20, raise_budget_nats=40.0, lower_budget_nats=40.0)
    guard = _always_raising(tiny_guard)
    batch, together = run_batch(model, tiny_tokenizer, guard, policy, wanted)
    assert len(batch.rows) == 1
    for request, answer in zip(wanted, together, strict=True):
        _, [alone] = run_batch(model, tiny_tokenizer, guard, policy, [request])
        assert answer.tokens == alone.tokens
        assert answer.record.kl_nats == pytest.approx(alone.record.kl_nats, abs=1e-3)
        assert answer.record.shadow_passes == min(20, request.options.max_tokens)


def _always_raising(guard: CarrierArtifact) -> CarrierArtifact:
    gate = guard.manifest.gate.model_copy(
        update={"raise_above": -1e9, "lower_below": -2e9, "raise_if_refusal_below": 2.0}
    )
    return replace(guard, manifest=guard.manifest.model_copy(update={"gate": gate}))


# ------------------------------------------------------------------ what it leaves alone


SAMPLED = SamplingOptions(max_tokens=12, temperature=0.7, seed=11)


@pytest.mark.parametrize(
    "options", [GREEDY, SAMPLED, replace(SAMPLED, top_k=5), replace(SAMPLED, top_p=0.8)]
)
def test_observe_off_and_unflagged_give_what_generate_gives(
    tiny: Tiny, options: SamplingOptions
) -> None:
    flagged = [*hard_harmful_prompts()[:4], *hard_benign_prompts()[:4]]
    unflagged = [*harmless_prompts()[:4], *harmful_prompts()[:4]]
    for prompts, policies in (
        (flagged, [OFF, Policy(mode="observe"), Policy(raise_budget_nats=0, lower_budget_nats=0)]),
        (unflagged, [OFF, Policy(mode="observe"), Policy()]),
    ):
        ids = [tiny.ids(p) for p in prompts]
        stock = [generate(tiny.model, prompt, options) for prompt in ids]
        for policy in policies:
            answers = serve_alone(tiny.engine(policy), requests(ids, options))
            assert [a.tokens for a in answers] == stock, policy


def test_observing_computes_what_would_have_been_spent(tiny: Tiny) -> None:
    wanted = requests([tiny.ids(hard_harmful_prompts()[0])])
    [answer] = serve(tiny.engine(Policy(mode="observe")), wanted)
    assert answer.record.zone is Zone.RAISE
    assert answer.record.kl_nats > 0
    assert not answer.record.applied


def test_without_a_mode_there_is_no_record(tiny: Tiny) -> None:
    engine = tiny.engine(OFF, artifact=None)
    [answer] = serve(engine, requests([tiny.ids("ask paint car")]))
    assert answer.steps[-1].record is None
    assert engine.info.artifact_id is None


def test_flagged_requests_change_no_bit_of_their_batchmates(endless: Tiny) -> None:
    prompts = [endless.ids(p) for p in [*hard_harmful_prompts()[:2], *harmless_prompts()[:3]]]
    wanted = requests(prompts, replace(GREEDY, logprobs=5))
    _, guarded = run_batch(endless.model, endless.tokenizer, endless.guard, Policy(), wanted)
    _, stock = run_batch(endless.model, endless.tokenizer, None, OFF, wanted)
    for i, (mine, other) in enumerate(zip(guarded, stock, strict=True)):
        same = [(s.token_id, s.logprob, s.top_logprobs) for s in mine.steps] == [
            (s.token_id, s.logprob, s.top_logprobs) for s in other.steps
        ]
        assert same == (i >= 2)


def test_the_cache_after_a_guarded_run_is_the_base_models(endless: Tiny) -> None:
    prompts = [endless.ids(p) for p in [*hard_harmful_prompts()[:3], "ask paint car please"]]
    wanted = requests(prompts)
    batch, answers = run_batch(endless.model, endless.tokenizer, endless.guard, Policy(), wanted)
    cache = DynamicCache(config=endless.model.config)
    ids, mask = left_pad(prompts, torch.device("cpu"))
    with torch.inference_mode():
        for position in range(GREEDY.max_tokens):
            places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            endless.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places,
                use_cache=True,
                **{_cache_argument(endless.model): cache},
            )
            ids = torch.tensor([[answer.tokens[position]] for answer in answers])
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    for mine, stock in zip(batch.cache.layers, cache.layers, strict=True):
        assert torch.equal(mine.keys, stock.keys)
        assert torch.equal(mine.values, stock.values)


def _cache_argument(model: Any) -> str:
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


# ------------------------------------------------------------------ the budget


@dataclass
class Audit:
    """Σ KL(p_t ‖ p0) of every request, recomputed from the stored logits."""

    temperature: float
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __call__(self, name: str, _position: int, mixed: Tensor, base: Tensor, _: float) -> None:
        """Take one mixture."""
        p = torch.softmax(mixed.double() / self.temperature, dim=-1)
        q = torch.softmax(base.double() / self.temperature, dim=-1)
        self.spent[name] += float(torch.special.xlogy(p, p / q).sum())


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7, 1.2])
@pytest.mark.parametrize("budget", [0.05, 1.0, 4.0])
def test_the_sum_of_kl_stays_inside_the_budget(
    tiny: Tiny, temperature: float, budget: float
) -> None:
    audit = Audit(temperature or 1.0)
    policy = Policy(raise_budget_nats=budget, lower_budget_nats=budget, token_cap_nats=budget / 2)
    prompts = [*hard_harmful_prompts()[:8], *hard_benign_prompts()[:8], *harmless_prompts()[:8]]
    options = SamplingOptions(max_tokens=10, temperature=temperature, seed=3)
    wanted = requests([tiny.ids(p) for p in prompts], options)
    answers = serve(tiny.engine(policy, on_mixture=audit), wanted)
    for request, answer in zip(wanted, answers, strict=True):
        recomputed = audit.spent[request.request_id]
        assert recomputed <= answer.record.budget_nats + 1e-9
        assert recomputed == pytest.approx(answer.record.kl_nats, abs=1e-9)
    assert max(audit.spent.values()) > 0.9 * budget


# ------------------------------------------------------------------ sampling and text


def test_the_same_seed_gives_the_same_tokens_and_others_differ(tiny: Tiny) -> None:
    prompt = tiny.ids(hard_benign_prompts()[0])
    hot = SamplingOptions(max_tokens=12, temperature=3.0)
    wanted = [
        GenerationRequest(f"r{i}", prompt, replace(hot, seed=seed))
        for i, seed in enumerate([7, 7, 8, None, None, -1, 2**63])
    ]
    tokens = [a.tokens for a in serve(tiny.engine(OFF), wanted)]
    assert tokens[0] == tokens[1]
    assert len({tuple(t) for t in tokens[1:]}) == 6


def test_the_best_token_alone_is_greedy_at_any_temperature(tiny: Tiny) -> None:
    prompts = [tiny.ids(p) for p in [*hard_harmful_prompts()[:3], *harmless_prompts()[:3]]]
    greedy = serve(tiny.engine(OFF), requests(prompts))
    top_k = serve(tiny.engine(OFF), requests(prompts, replace(GREEDY, temperature=2.0, top_k=1)))
    nearly = serve(tiny.engine(), requests(prompts, replace(GREEDY, temperature=1e-30)))
    steered = serve(tiny.engine(), requests(prompts))
    assert [a.tokens for a in top_k] == [a.tokens for a in greedy]
    assert [a.tokens for a in nearly] == [a.tokens for a in steered]


def test_logprobs_are_those_of_the_distribution_at_the_requests_temperature(tiny: Tiny) -> None:
    prompt = tiny.ids("ask paint car")
    options = SamplingOptions(max_tokens=1, temperature=2.0, top_p=0.5, seed=1, logprobs=3)
    [answer] = serve(tiny.engine(), requests([prompt], options))
    with torch.no_grad():
        logits = tiny.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = torch.log_softmax(logits.double() / 2.0, dim=-1)
    step = answer.steps[0]
    assert step.logprob is not None
    assert step.logprob.logprob == pytest.approx(float(expected[step.token_id]), abs=1e-5)
    assert step.logprob.token == tiny.tokenizer.decode([step.token_id])
    best = expected.topk(3)
    assert [t.token_id for t in step.top_logprobs] == best.indices.tolist()
    assert [t.logprob for t in step.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_response_ends_with_its_end_token_or_at_max_tokens(tiny: Tiny) -> None:
    prompt = tiny.ids("ask paint car")
    whole, short = serve(
        tiny.engine(),
        [
            GenerationRequest("whole", prompt, GREEDY),
            GenerationRequest("short", prompt, replace(GREEDY, max_tokens=3)),
        ],
    )
    assert whole.text == "sure here is car for you"
    assert (whole.tokens[-1], whole.steps[-1].finish_reason) == (EOS, "stop")
    assert (short.text, short.steps[-1].finish_reason) == ("sure here is", "length")
    assert all(s.finish_reason is None for s in [*whole.steps[:-1], *short.steps[:-1]])


def test_a_stop_string_across_tokens_ends_the_response_and_is_cut_off(tiny: Tiny) -> None:
    options = replace(GREEDY, stop=("re is c", "nothing"))
    [answer] = serve(tiny.engine(), requests([tiny.ids("ask paint car")], options))
    assert answer.text == "sure he"
    assert answer.steps[-1].finish_reason == "stop"
    assert len(answer.tokens) == 4


def test_streamed_text_joins_to_the_plain_decode(tiny: Tiny) -> None:
    options = SamplingOptions(max_tokens=20, temperature=5.0, seed=2)
    wanted = requests([tiny.ids(p) for p in harmless_prompts()[:8]], options)
    for answer in serve(tiny.engine(OFF), wanted):
        assert answer.text == tiny.tokenizer.decode(answer.tokens, skip_special_tokens=True)


# ------------------------------------------------------------------ requests that cannot be


def _refusal_of(tiny: Tiny, request: GenerationRequest, **limits: Any) -> GuardError:
    engine = tiny.engine(**limits)

    async def run() -> GuardError:
        with pytest.raises(GuardError) as caught:
            engine.generate(request)  # at the call, before any step
        return caught.value

    error: GuardError = with_engine(engine, run)
    return error


def test_a_request_that_does_not_fit_the_context_is_refused_at_once(tiny: Tiny) -> None:
    prompt = tiny.ids("ask paint car")
    error = _refusal_of(tiny, GenerationRequest("r", prompt, replace(GREEDY, max_tokens=250)))
    assert isinstance(error, ContextOverflowError)
    assert "256" in str(error)
    limited = _refusal_of(tiny, GenerationRequest("r", prompt, GREEDY), max_model_len=16)
    assert isinstance(limited, ContextOverflowError)


@pytest.mark.parametrize("prompt", [(), (-1,), (10**6,)])
def test_an_empty_prompt_and_unknown_tokens_are_refused(tiny: Tiny, prompt: Any) -> None:
    assert isinstance(_refusal_of(tiny, GenerationRequest("r", prompt, GREEDY)), RequestError)


def test_a_full_queue_refuses_with_a_time_to_come_back(endless: Tiny) -> None:
    engine = endless.engine(max_batch=1, max_queue=2)
    options = replace(GREEDY, max_tokens=40)

    async def run() -> tuple[list[Answer], list[QueueFullError]]:
        streams, refused = [], []
        for request in requests([endless.ids("ask paint car")] * 10, options):
            try:
                streams.append(engine.generate(request))
            except QueueFullError as error:
                refused.append(error)
        return [Answer([step async for step in stream]) for stream in streams], refused

    with counted_passes(endless.model):
        answers, refused = with_engine(engine, run)
    assert 2 <= len(answers) <= 4
    assert len(answers) + len(refused) == 10
    assert all(len(a.tokens) == 40 for a in answers)
    assert all(error.retry_after_seconds >= 1 for error in refused)


def test_messages_that_the_template_rejects_are_a_request_error(tiny: Tiny) -> None:
    engine = tiny.engine()
    with pytest.raises(RequestError, match="unknown role tool"):
        engine.encode_chat([ChatMessage("tool", "x")])
    assert engine.encode_chat([ChatMessage("user", "ask paint car")]) == tiny.ids("ask paint car")


# ------------------------------------------------------------------ clients that go away


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 5 seconds")


def test_a_client_that_leaves_stops_the_work_and_its_record_is_kept(endless: Tiny) -> None:
    records: list[Record] = []
    engine = endless.engine(on_record=records.append)
    request = GenerationRequest(
        "gone", endless.ids(hard_harmful_prompts()[0]), replace(GREEDY, max_tokens=200)
    )

    async def run() -> None:
        stream = engine.generate(request)
        for _ in range(4):
            await anext(stream)
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await _until(lambda: bool(records))
        again = await ask(engine, replace(request, options=GREEDY))
        assert again.error is None

    with counted_passes(endless.model) as passes:
        with_engine(engine, run)
    assert len(passes) < 120
    assert len(records) == 2
    assert records[0].zone is Zone.RAISE
    assert records[0].kl_nats > 0
    assert records[0].verdict is None


def test_a_cancelled_reader_stops_the_work(endless: Tiny) -> None:
    records: list[Record] = []
    engine = endless.engine(on_record=records.append)
    request = GenerationRequest(
        "gone", endless.ids("ask paint car"), replace(GREEDY, max_tokens=200)
    )

    async def run() -> None:
        task = asyncio.create_task(ask(engine, request))
        await asyncio.sleep(0.05)
        task.cancel()
        await _until(lambda: bool(records))

    with counted_passes(endless.model) as passes:
        with_engine(engine, run)
    assert len(passes) < 190
    assert len(records) == 1


def test_a_request_dropped_while_it_waits_is_never_run_but_recorded(endless: Tiny) -> None:
    records: list[Record] = []
    engine = endless.engine(max_batch=1, on_record=records.append)
    prompt = endless.ids("ask paint car")

    async def run() -> Answer:
        first = asyncio.create_task(
            ask(engine, GenerationRequest("first", prompt, replace(GREEDY, max_tokens=60)))
        )
        await asyncio.sleep(0.02)
        second = engine.generate(GenerationRequest("second", prompt, GREEDY))
        await second.aclose()
        answer = await first
        await _until(lambda: len(records) == 2)
        return answer

    with counted_passes(endless.model):
        answer = with_engine(engine, run)
    assert len(answer.tokens) == 60
    assert [r.zone for r in records] == [Zone.PASS, None]


def test_stopping_ends_running_and_waiting_requests_with_an_error(endless: Tiny) -> None:
    records: list[Record] = []
    engine = endless.engine(max_batch=1, on_record=records.append)
    wanted = requests([endless.ids("ask paint car")] * 3, replace(GREEDY, max_tokens=240))

    async def run() -> list[Answer]:
        await engine.start()
        tasks = [asyncio.create_task(ask(engine, request)) for request in wanted]
        await asyncio.sleep(0.1)
        await engine.stop()
        return await asyncio.gather(*tasks)

    with counted_passes(endless.model):
        answers = asyncio.run(run())
    assert all(isinstance(a.error, NotArmedError) for a in answers)
    assert len(records) == 3
    assert not engine.armed


# ------------------------------------------------------------------ when the guard fails


def test_closed_a_guard_that_cannot_compute_fails_its_requests_alone(tiny: Tiny) -> None:
    guard = tiny.own_guard()
    records: list[Record] = []
    engine = tiny.engine(artifact=guard, on_record=records.append)
    prompts = [hard_harmful_prompts()[0], "ask paint car", hard_benign_prompts()[0]]
    wanted = requests([tiny.ids(p) for p in prompts])

    async def run() -> list[Answer]:
        guard.raise_carrier.basis.fill_(float("nan"))  # after the canary
        answers = await asyncio.gather(*(ask(engine, request) for request in wanted))
        assert engine.armed
        return answers

    raised, passed, lowered = with_engine(engine, run)
    assert isinstance(raised.error, NumericsError)
    assert raised.steps == []
    assert passed.text == "sure here is car for you"
    assert lowered.error is None
    assert lowered.record.kl_nats > 0
    assert len(records) == 3


def test_open_a_guard_that_cannot_compute_leaves_the_base_model(tiny: Tiny) -> None:
    guard = tiny.own_guard()
    unguarded: list[bool] = []
    engine = tiny.engine(
        Policy(on_failure="open"), artifact=guard, on_unguarded=lambda: unguarded.append(True)
    )
    prompt = tiny.ids(hard_harmful_prompts()[0])

    async def run() -> Answer:
        guard.raise_carrier.basis.fill_(float("nan"))
        return await ask(engine, GenerationRequest("r", prompt, GREEDY))

    answer = with_engine(engine, run)
    assert answer.tokens == generate(tiny.model, prompt, GREEDY)
    assert answer.record.kl_nats == 0
    assert unguarded == [True]


def test_a_gate_that_cannot_compute_does_not_pass_for_harmless(tiny: Tiny) -> None:
    guard = tiny.own_guard()
    engine = tiny.engine(artifact=guard)

    async def run() -> Answer:
        guard.probe.out.fill_(float("nan"))
        return await ask(engine, GenerationRequest("r", tiny.ids("ask paint car"), GREEDY))

    answer = with_engine(engine, run)
    assert isinstance(answer.error, NumericsError)
    assert answer.steps == []


def test_observing_never_fails_a_request(tiny: Tiny) -> None:
    guard = tiny.own_guard()
    engine = tiny.engine(Policy(mode="observe"), artifact=guard)
    prompt = tiny.ids(hard_harmful_prompts()[0])

    async def run() -> Answer:
        guard.raise_carrier.basis.fill_(float("nan"))
        return await ask(engine, GenerationRequest("r", prompt, GREEDY))

    assert with_engine(engine, run).tokens == generate(tiny.model, prompt, GREEDY)


@contextmanager
def failing_layer(model: PreTrainedModel, after: int, error: Exception) -> Iterator[None]:
    """Raise inside the third layer, once it ran `after` times."""
    left = [after]

    def hook(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error

    handle = model.model.layers[2].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("policy", [Policy(), Policy(on_failure="open"), Policy(mode="observe")])
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_fault_in_a_pass_ends_everything_unserved(tiny: Tiny, policy: Policy, after: int) -> None:
    """Base and shadow passes take turns: an even `after` breaks a base pass."""
    records: list[Record] = []
    engine = tiny.engine(policy, on_record=records.append)
    wanted = requests([tiny.ids(p) for p in [hard_harmful_prompts()[0], "ask paint car"]])

    async def run() -> list[Answer]:
        with failing_layer(tiny.model, after, RuntimeError("a bug")):
            answers = await asyncio.gather(*(ask(engine, request) for request in wanted))
            await _until(lambda: not engine.armed)
        later = await ask(engine, wanted[1])
        return [*answers, later]

    answers = with_engine(engine, run)
    assert all(isinstance(a.error, NotArmedError) for a in answers)
    assert all(step.finish_reason is None for a in answers for step in a.steps)
    assert len(records) == 2


def test_a_fault_leaves_no_trace_in_the_model(tiny: Tiny) -> None:
    def traces() -> list[object]:
        layers = tiny.model.model.layers
        return [
            (sorted(layer.__dict__), len(layer._forward_pre_hooks), len(layer._forward_hooks))
            for layer in layers
        ]

    serve(tiny.engine(), requests([tiny.ids("ask paint car")]))  # transformers adds its own, once
    before = traces()
    for after in (0, 1):
        test_a_fault_in_a_pass_ends_everything_unserved(tiny, Policy(), after)
        assert traces() == before


def test_a_broken_base_model_fails_the_batch_and_no_other(tiny: Tiny) -> None:
    engine = tiny.engine()
    request = GenerationRequest("r", tiny.ids("ask paint car"), GREEDY)

    async def run() -> tuple[Answer, Answer]:
        handle = tiny.model.lm_head.register_forward_hook(lambda _m, _a, out: out * float("nan"))
        broken = await ask(engine, request)
        handle.remove()
        return broken, await ask(engine, request)

    broken, later = with_engine(engine, run)
    assert isinstance(broken.error, NumericsError)
    assert later.error is None


# ------------------------------------------------------------------ arming


def _start(engine: TransformersEngine) -> None:
    """Start it, and see that nothing is served if that fails."""

    async def run() -> None:
        try:
            await engine.start()
        except GuardError:
            assert not engine.armed
            with pytest.raises(NotArmedError):
                engine.generate(GenerationRequest("r", (2, 4), GREEDY))
            raise
        await engine.stop()

    asyncio.run(run())


def test_an_engine_that_was_not_started_serves_nothing(tiny: Tiny) -> None:
    engine = tiny.engine()
    assert not engine.armed

    async def run() -> None:
        engine.generate(GenerationRequest("r", tiny.ids("ask paint car"), GREEDY))

    with pytest.raises(NotArmedError):
        asyncio.run(run())


def test_an_engine_starts_again_after_it_was_stopped(tiny: Tiny) -> None:
    engine = tiny.engine()
    wanted = requests([tiny.ids("ask paint car")])
    assert serve(engine, wanted)[0].text == serve(engine, wanted)[0].text


def test_another_models_guard_does_not_arm(tiny: Tiny) -> None:
    other = copy.deepcopy(tiny.model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ModelMismatchError, match="weights_sha256"):
        _start(tiny.engine(model=other))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_carrier_that_does_nothing_or_is_not_finite_does_not_arm(
    tiny: Tiny, value: float
) -> None:
    basis = torch.full_like(tiny.guard.raise_carrier.basis, value)
    carrier = replace(tiny.guard.raise_carrier, basis=basis)
    with pytest.raises(NotArmedError):
        _start(tiny.engine(artifact=replace(tiny.guard, raise_carrier=carrier)))


def test_a_model_changed_after_loading_does_not_arm(tiny: Tiny) -> None:
    """A layer that answers differently each time has no exact shadow pass."""
    calls = [0]

    def drift(_module: object, _args: object, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * (1 + 0.01 * calls[0])

    handle = tiny.model.model.layers[-1].mlp.register_forward_hook(drift)
    try:
        with pytest.raises(NotArmedError, match="does not reproduce the base logits"):
            _start(tiny.engine())
    finally:
        handle.remove()
    _start(tiny.engine())


def test_the_canary_tells_what_it_saw(tiny: Tiny) -> None:
    readings = tiny.engine().canary()
    assert [r.carrier for r in readings] == ["raise", "lower"]
    assert all(r.gap <= r.tolerance < r.change for r in readings)


def test_the_engine_runs_in_one_thread_that_ends_with_it(tiny: Tiny) -> None:
    serve(tiny.engine(), requests([tiny.ids("ask paint car")]))
    assert not [t for t in threading.enumerate() if t.name == "trimtab-engine"]


# ------------------------------------------------------------------ loading


def test_a_saved_guard_and_model_folder_load_into_a_working_engine(
    tiny: Tiny, tiny_refuser_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "guard.safetensors"
    artifact_id = save_artifact(tiny.guard, file)
    engine = load_engine(str(tiny_refuser_dir), file, Policy(), served_model_name="tiny")
    assert engine.info.artifact_id == artifact_id
    assert (engine.info.model_name, engine.info.max_model_len) == ("tiny", 256)
    [answer] = serve(engine, requests([tiny.ids(hard_harmful_prompts()[0])]))
    assert answer.text == REFUSAL_TEXT


def test_bad_input_names_what_is_wrong(tiny: Tiny, tiny_refuser_dir: Path, tmp_path: Path) -> None:
    folder = str(tiny_refuser_dir)
    with pytest.raises(InputError, match="nowhere: cannot load this model"):
        load_engine(str(tmp_path / "nowhere"), None, OFF)
    with pytest.raises(ArtifactError, match="cannot read the guard"):
        load_engine(folder, tmp_path / "no.safetensors", Policy())
    with pytest.raises(InputError, match="mode enforce needs a guard"):
        load_engine(folder, None, Policy())
    with pytest.raises(InputError, match="dtype 'int3'"):
        load_engine(folder, None, OFF, dtype="int3")
    with pytest.raises(InputError, match="device 'nonsense'"):
        load_engine(folder, None, OFF, device="nonsense")
    with pytest.raises(InputError, match="max_model_len 1000"):
        load_engine(folder, None, OFF, max_model_len=1000)
    with pytest.raises(InputError, match="max_batch 0"):
        load_engine(folder, None, OFF, max_batch=0)
    bare = copy.deepcopy(tiny.tokenizer)
    bare.chat_template = None
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        tiny.engine(tokenizer=bare)
    (tmp_path / "broken").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "broken" / name).write_bytes((tiny_refuser_dir / name).read_bytes())
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x08damaged")
    with pytest.raises(InputError, match="broken: cannot load this model"):
        load_engine(str(tmp_path / "broken"), None, OFF)


# ------------------------------------------------------------------ where an answer starts


SAMPLE_OF_ALL = [
    *hard_harmful_prompts()[:6],
    *hard_benign_prompts()[:6],
    *harmless_prompts()[:2],
    *harmful_prompts()[:2],
]


def seeded_requests(prompts: Sequence[str], tiny: Tiny) -> list[GenerationRequest]:
    """Sampled at temperature 1, each with a seed of its own."""
    return [
        GenerationRequest(f"r{i}", tiny.ids(prompt), SamplingOptions(10, 1.0, seed=i))
        for i, prompt in enumerate(prompts)
    ]


def from_answer(marker: str, **settings: Any) -> Policy:
    return Policy(steer_from="answer", answer_marker=marker, **settings)


def test_a_response_whose_marker_never_comes_is_the_unguarded_one(tiny: Tiny) -> None:
    wanted = requests([tiny.ids(p) for p in SAMPLE_OF_ALL], SAMPLED)
    stock = serve(tiny.engine(OFF), wanted)
    answers = serve(tiny.engine(from_answer("secretly")), wanted)
    assert [a.tokens for a in answers] == [a.tokens for a in stock]
    for answer in answers:
        assert (answer.record.zone, answer.record.kl_nats) == (None, 0.0)
        assert answer.record.gate_says in ("harmful", "benign")  # what monitoring goes by
        assert answer.record.verdict is Verdict.UNCLEAR  # there is no answer to judge


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_a_template_that_closes_the_thinking_block_is_steered_as_by_default(
    tiny: Tiny, options: SamplingOptions
) -> None:
    wanted = requests([tiny.ids(p) for p in SAMPLE_OF_ALL], options)
    plain = serve(tiny.engine(), wanted)
    answers = serve(tiny.engine(from_answer("<assistant>")), wanted)
    assert [a.tokens for a in answers] == [a.tokens for a in plain]
    assert [a.record for a in answers] == [a.record for a in plain]
    assert {a.record.zone for a in plain} == set(Zone)


def test_steering_and_the_gate_begin_behind_the_marker(tiny: Tiny) -> None:
    """The tiny refuser does not think, so a word of its answers has to end its thinking."""
    wanted = seeded_requests(hard_harmful_prompts()[:12], tiny)
    moved: defaultdict[str, list[int]] = defaultdict(list)

    def on_mixture(name: str, position: int, *_: object) -> None:
        moved[name].append(position)

    policy = from_answer("here", shadow_tokens=2, raise_budget_nats=3.0)
    answers = serve(tiny.engine(policy, on_mixture=on_mixture), wanted)
    begun = 0
    here = tiny.tokenizer.convert_tokens_to_ids("here")
    for request, answer in zip(wanted, answers, strict=True):
        record, positions = answer.record, moved[request.request_id]
        if here not in answer.tokens:
            assert (positions, record.zone) == ([], None)
            continue
        begun += 1
        start = answer.tokens.index(here) + 1
        so_far = torch.tensor([[*request.prompt_ids, *answer.tokens[:start]]])
        with torch.no_grad():
            logits = tiny.model(so_far).logits[0, -1]
        expected = logits.softmax(-1)[tiny.guard.refusal_token_ids].sum()
        assert record.refusal_prob == pytest.approx(float(expected), abs=1e-5)
        assert record.zone is Zone.RAISE
        assert positions == [start, start + 1]
        assert 0 < record.kl_nats <= 3.0
    assert 0 < begun < len(wanted)


def test_rows_whose_answers_begin_apart_decode_together_as_alone(tiny: Tiny) -> None:
    wanted = seeded_requests(SAMPLE_OF_ALL, tiny)
    engine = partial(tiny.engine, from_answer("he", raise_budget_nats=8.0))  # here, help
    together = serve(engine(), wanted)
    alone = serve_alone(engine(), wanted)
    assert {a.text.index("he") for a in together} == {len("sure "), len("i cannot ")}
    assert Zone.RAISE in {a.record.zone for a in together}
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.record.zone is other.record.zone
        assert one.record.shadow_passes == other.record.shadow_passes
        assert one.record.kl_nats == pytest.approx(other.record.kl_nats, abs=1e-4)


def test_what_is_judged_is_the_answer_and_not_the_thinking(tiny: Tiny) -> None:
    # "i cannot" ends the thinking, so "help with that" is the answer, which refuses nothing.
    wanted = requests([tiny.ids(p) for p in harmful_prompts()[:3]])
    policy = from_answer("i cannot", raise_budget_nats=0.0)
    for answer in serve(tiny.engine(policy), wanted):
        assert answer.text.strip() == REFUSAL_TEXT
        assert answer.record.verdict is not Verdict.REFUSED
    for answer in serve(tiny.engine(), wanted):
        assert answer.record.verdict is Verdict.REFUSED


def test_a_marker_that_the_tokenizer_does_not_tell_stops_the_start(tiny: Tiny) -> None:
    with pytest.raises(PolicyError, match="set answer_marker"):
        tiny.engine(Policy(steer_from="answer"))
    thinker = copy.deepcopy(tiny.tokenizer)
    thinker.add_tokens(["</think>"])
    assert not tiny.engine(Policy(steer_from="answer"), tokenizer=thinker).armed


def test_a_score_that_is_not_finite_fails_before_any_thinking(tiny: Tiny) -> None:
    guard = tiny.own_guard()
    guard.probe.template[0, 0] = float("nan")
    _, [answer] = run_batch(
        tiny.model, tiny.tokenizer, guard, Policy(), requests([tiny.ids("ask paint car")])
    )
    assert isinstance(answer.error, NumericsError)
    assert answer.steps == []
