"""vLLM's model runners as the guard sees them: V1 (CPU, and where vLLM chooses it) and V2 (GPU).

The base pass is vLLM's own, compiled or in CUDA graphs, and only asked to return the residual
stream before a few layers beside its output: the auxiliary hidden states that EAGLE-3 uses, so
nothing of ours is traced, and no hook runs inside a graph. After it, while the step's inputs are
still in place, the shadow pass calls the decoder layers from the carrier's on for flagged rows:
eagerly, or on GPUs as a CUDA graph of its own (`vllm_graphs`).

Nothing of it reaches the KV cache: with an empty slot mapping vLLM skips the update in every
backend whose forward does not include it, and other backends are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from guard import kl
from guard.errors import UnsupportedModelError
from guard.kl import Moved
from guard.policy import POLICY_FIELD
from guard.steering import Carrier
from serve.vllm_graphs import SteeringGraphs
from serve.vllm_guard import (
    MAX_STEERED,
    Runner,
    SamplingRow,
    Steering,
    has_triton,
    on_device,
)

__all__ = ["ModelRunner", "Note", "StepWork", "attach", "is_v1"]

_GREEDY_BELOW = 1e-5  # vLLM's own limit

Note = Callable[[int, Tensor], None]
"""Called with a layer's number and what enters it, (n_tokens, d_model); not to be kept as it is."""


class StepWork(Protocol):
    """What is done between a step's forward pass and its sampler; see `StepGuard`."""

    @property
    def layers(self) -> Sequence[int]:
        """Layers whose input the compiled model returns, rising."""

    @property
    def gate_layer(self) -> int | None:
        """The one of them at which the gate is read; None: there is no gate."""

    def renew(self, request_id: str, n_prompt: int) -> None:
        """A request is announced, perhaps again."""

    def end(self, request_ids: Sequence[str]) -> None:
        """Requests that vLLM has forgotten."""

    def copy_blocks(self, copies: Sequence[tuple[int, int]], n_blocks: int) -> None:
        """Follow a copy of whole KV blocks."""

    def keep(self, runner: Runner, hidden: Callable[[int], Tensor], slots: Tensor) -> None:
        """Keep what the gate needs of tokens, by KV slot; inside the CUDA graphs of decoding."""

    def begin(self, runner: Runner) -> bool:
        """True if `step` has to see the logits of this step."""

    def step(self, runner: Runner, logits: Tensor) -> Tensor:
        """Return the logits to sample from."""


class ModelRunner:
    """What both runners have in common.

    Args:
        runner: the model runner.
        layers: whose inputs are returned, rising.

    Raises:
        UnsupportedModelError: the model cannot return hidden states, or is laid out otherwise.
    """

    def __init__(self, runner: Any, layers: Sequence[int]) -> None:
        self._runner = runner
        self._index = {layer: i for i, layer in enumerate(layers)}
        self._model: Any = runner.get_model()
        self._body = _decoder(self._model)
        self._compute_logits = self._model.compute_logits
        self._linear = _is_linear(self._model)
        self._starts = torch.arange(2 * MAX_STEERED + 1, dtype=torch.int32)
        self._starts_device = self._starts.to(runner.device)
        self._kernels: Any = None
        if torch.device(runner.device).type == "cuda" and has_triton():
            from serve import vllm_kernels

            self._kernels = vllm_kernels
        self._mix: Callable[..., Moved] = self._kernels.mix_rows if self._kernels else kl.mix_rows
        if layers:
            _ask_for_hidden_states(runner, self._model, layers)

    @property
    def n_slots(self) -> int:
        """How many KV slots there are."""
        config = self._runner.kv_cache_config
        return int(config.num_blocks * config.kv_cache_groups[0].kv_cache_spec.block_size)

    @property
    def n_blocks(self) -> int:
        """How many KV blocks there are."""
        return int(self._runner.kv_cache_config.num_blocks)

    @property
    def max_rows(self) -> int:
        """How many rows a pass of ours may have: attention backends keep buffers for so many."""
        return 2 * min(MAX_STEERED, int(self._runner.max_num_reqs))

    @property
    def n_ranks(self) -> int:
        """How many tensor-parallel ranks take this step together."""
        return int(self._runner.parallel_config.tensor_parallel_size)

    @property
    def end_token_ids(self) -> Sequence[int]:
        """Tokens that end a response."""
        config = self._runner.model_config
        ids = config.try_get_generation_config().get("eos_token_id")
        if ids is None:
            ids = config.hf_text_config.eos_token_id
        return [ids] if isinstance(ids, int) else list(ids)

    def check_cache(self) -> None:
        """Refuse a KV cache that the shadow pass cannot read without writing it.

        Raises:
            UnsupportedModelError: names what stands in the way.
        """
        groups = self._runner.kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise UnsupportedModelError(
                f"this model has {len(groups)} KV cache groups (sliding windows beside full"
                " attention); start vLLM with --disable-hybrid-kv-cache-manager"
            )
        for group in self._runner.attn_groups[0]:
            if group.backend.forward_includes_kv_cache_update:
                raise UnsupportedModelError(
                    f"attention backend {group.backend.get_name()} writes the KV cache inside its"
                    " forward; choose another with --attention-backend, such as FLASH_ATTN"
                )
        spec = groups[0].kv_cache_spec
        if getattr(spec, "sliding_window", None) is not None:
            raise UnsupportedModelError(
                "a sliding window frees the blocks behind it, and the gate's score with them;"
                " start vLLM with --disable-sliding-window"
            )

    def agree(self, readings: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """The first tensor-parallel rank's readings, on every rank."""
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        if group.world_size == 1:
            return readings
        agreed: list[tuple[float, float]] = group.broadcast_object(readings, src=0)
        return agreed

    @property
    def kept(self) -> bool:
        """True if `StepWork.keep` ran inside this step's CUDA graph."""
        return False

    @property
    def nearly_done(self) -> bool:
        """True if the device is known to be at the end of this step's forward pass."""
        return False

    def at_gate(self) -> AbstractContextManager[None]:
        """Device work as soon as the gate's layer has run; here, in the order of the calls."""
        return nullcontext()

    def capture(self, carriers: Sequence[Carrier]) -> int:
        """Prepare the steering of these carriers; return the bytes of device memory it takes."""
        del carriers
        return 0

    def graph_gap(self, carrier: Carrier, rows: Sequence[int], logits: Tensor) -> float:
        """How far captured steering is from the same without graphs, in standard deviations."""
        del carrier, rows, logits
        return 0.0

    def last_hidden(self, layer: int) -> Tensor:
        """(n_rows, d_model): the residual stream of the last token of each row before `layer`."""
        raise NotImplementedError

    def last_token_again(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        """(len(rows), vocab) logits of the rows' last tokens, entered at `layer` with `hidden`."""
        logits: Tensor = self._compute_logits(self._last(rows, layer, hidden))
        return logits

    def _last(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        """(len(rows), d_model): the normed states that these logits are computed from."""
        raise NotImplementedError

    def block_table(self) -> tuple[Tensor, int]:
        """(n_rows, n_blocks) int32, on the device: the step's KV blocks; and tokens a block."""
        raise NotImplementedError

    def rerun(
        self,
        rows: Sequence[int],
        seen: Sequence[int],
        layer: int,
        hidden: Tensor,
        note: Note | None = None,
    ) -> Tensor:
        """Run any tokens of this step's rows again, reading the KV cache and writing nothing.

        Args:
            rows: of the step, one for each token; a row may be named for several of its tokens.
            seen: how many tokens of its row each attends to, itself included.
            layer: the first to run.
            hidden: (len(rows), d_model) entering it; it may be overwritten.
            note: told what enters each layer.

        Returns:
            (len(rows), d_model): normed last states.
        """
        index = on_device(list(rows), torch.int64, hidden.device)
        lengths = torch.tensor(seen, dtype=torch.int32)
        tables = self.block_table()[0][index].contiguous()
        return self._run(layer, hidden, lengths.to(hidden.device), lengths, tables, note=note)

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """(len(token_ids), d_model): what enters the first layer."""
        ids = on_device(list(token_ids), torch.int64, torch.device(self._runner.device))
        embedded: Tensor = self._body.embed_tokens(ids)
        return embedded

    def logits_of(self, last: Tensor) -> Tensor:
        """(n_rows, vocab) logits of normed last states."""
        logits: Tensor = self._compute_logits(last)
        return logits

    def steer(self, work: Steering, logits: Tensor) -> tuple[Tensor, Moved]:
        """Shadow pass, null rows beside steered ones, and mixture of some rows."""
        device, rows = logits.device, list(work.rows)
        index = on_device(rows, torch.int64, device)
        limits = on_device([work.budgets_nats, work.temperatures], torch.float64, device)
        if work.only_if is not None:
            limits[0] *= work.only_if
        null = self.last_hidden(work.carrier.layer)[index]
        steered = work.carrier.apply(null.float()).to(null.dtype)
        apart = self._apart(rows + rows, work.carrier.layer, torch.cat([null, steered]))
        return index, self._mix(logits[index], apart, *limits, work.spare)

    def _apart(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        """(n, vocab) steered − null logits; `rows` and `hidden` are n null, then n steered rows."""
        return self.difference(self._last(rows, layer, hidden))

    def difference(self, last: Tensor) -> Tensor:
        """(n, vocab) steered − null logits, of (2n, d_model) normed null and steered states.

        Where the output layer is linear, it is applied to the difference: one row for two, and
        exact to the rounding of the difference, not to that of the logits.
        """
        null, steered = last.chunk(2)
        if self._linear:
            difference: Tensor = self._compute_logits(steered - null)
            return difference
        return _halves_apart(self._compute_logits(last))

    def _run(
        self,
        layer: int,
        hidden: Tensor,
        seq_lens: Tensor,
        seen: Tensor,
        table: Tensor,
        groups: Sequence[Any] | None = None,
        note: Note | None = None,
    ) -> Tensor:
        """Normed last states of one query token per row, entered at `layer`, over its KV blocks.

        Args:
            layer: the first to run.
            hidden: (n_rows, d_model) entering it; it may be overwritten.
            seq_lens: (n_rows,) int32 on the device, the query token included.
            seen: the same on the host, or an upper bound.
            table: (n_rows, n_blocks) int32.
            groups: attention groups, with the builders to use; the runner's own by default.
            note: told what enters each layer.
        """
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        n, device = len(hidden), hidden.device
        positions = seq_lens.long() - 1
        starts, starts_device = self._starts[: n + 1], self._starts_device[: n + 1]
        if len(starts) <= n:  # the canary takes every row
            starts = torch.arange(n + 1, dtype=torch.int32)
            starts_device = starts.to(device)
        common = CommonAttentionMetadata(
            query_start_loc=starts_device,
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            num_reqs=n,
            num_actual_tokens=n,
            max_query_len=1,
            max_seq_len=int(seen.max()),
            block_table_tensor=table,
            slot_mapping=torch.full((n,), -1, dtype=torch.int64, device=device),
            causal=True,
            positions=positions,
            is_prefilling=torch.zeros(n, dtype=torch.bool),
            seq_lens_cpu_upper_bound=seen,
        )
        metadata: dict[str, Any] = {}
        for group in groups or self._runner.attn_groups[0]:
            if hasattr(group, "build_metadata"):
                built = group.build_metadata(common, 0)
            else:  # before 0.32 every group has blocks of the cache's own size
                built = group.get_metadata_builder(0).build(0, common)
            metadata.update(dict.fromkeys(group.layer_names, built))
        config = self._runner.vllm_config
        with (
            set_forward_context(metadata, config, num_tokens=n, slot_mapping={}),
            _fused_kernels(self._body.layers[layer:]),
        ):
            stream, residual = hidden, None
            for number, decoder in enumerate(self._body.layers[layer:], layer):
                if note is not None:
                    note(number, stream if residual is None else stream + residual)
                stream, residual = decoder(positions, stream, residual)
            last: Tensor = self._body.norm(stream, residual)[0]
        return last


class _V1(ModelRunner):
    """One step of a `GPUModelRunner` or `CPUModelRunner`, between its forward and its sampler."""

    state: Any = None  # the ExecuteModelState of the step that has just run

    @property
    def request_ids(self) -> Sequence[str]:
        """All requests of this step, in the order of the rows."""
        ids: Sequence[str] = self._runner.input_batch.req_ids
        return ids

    def sampling_rows(self, wanted: Container[str]) -> list[SamplingRow]:
        """Their rows that sample; prompts that are not finished do not."""
        runner = self._runner
        batch = runner.input_batch
        seen = runner.optimistic_seq_lens_cpu[: batch.num_reqs].tolist()
        skipped = runner.discard_request_mask.np
        rows = []
        for row, request_id in enumerate(batch.req_ids):
            if request_id not in wanted or skipped[row]:
                continue
            request = runner.requests[request_id]
            rows.append(
                SamplingRow(
                    row=row,
                    request_id=request_id,
                    position=seen[row] - request.num_prompt_tokens,
                    n_prompt=request.num_prompt_tokens,
                    temperature=_temperature(request.sampling_params),
                    policy=_policy(request.sampling_params),
                )
            )
        return rows

    def prompt_ids(self, request_id: str) -> Sequence[int]:
        """Token ids of a request's prompt."""
        ids: Sequence[int] = self._runner.requests[request_id].prompt_token_ids
        return ids

    def slots_written(self) -> Tensor:
        """(n_tokens,) int64: the KV slot of every token of this step."""
        table = self._runner.input_batch.block_table[0]
        slots: Tensor = table.slot_mapping.gpu[: self._n_tokens]
        return slots

    def block_table(self) -> tuple[Tensor, int]:
        """(n_rows, n_blocks) int32: the step's KV blocks; and tokens a block."""
        batch = self._runner.input_batch
        table = batch.block_table[0]
        return table.get_device_tensor(batch.num_reqs), int(table.block_size)

    def hidden(self, layer: int) -> Tensor:
        """(n_tokens, d_model): the residual stream before `layer`, of every token of this step."""
        stream: Tensor = self.state.aux_hidden_states[self._index[layer]]
        return stream[: self._n_tokens]

    def last_hidden(self, layer: int) -> Tensor:
        """(n_rows, d_model): likewise, of the last token of each row."""
        runner = self._runner
        ends = runner.query_start_loc.gpu[1 : runner.input_batch.num_reqs + 1].long() - 1
        return self.hidden(layer)[ends]

    def last_token_again(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        """(len(rows), vocab) logits of the rows' last tokens, entered at `layer` with `hidden`."""
        if self._runner.lora_config is not None:
            return self._again_with_adapters(rows, layer, hidden)
        return super().last_token_again(rows, layer, hidden)

    def _apart(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        if self._runner.lora_config is not None:
            return _halves_apart(self._again_with_adapters(rows, layer, hidden))
        return super()._apart(rows, layer, hidden)

    def _last(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        """(len(rows), d_model): normed last states of the rows' last tokens, entered at `layer`."""
        runner = self._runner
        index = on_device(list(rows), torch.int64, hidden.device)
        table = self.block_table()[0][index].contiguous()
        seen = runner.optimistic_seq_lens_cpu[list(rows)]
        return self._run(layer, hidden, runner.seq_lens[index], seen, table)

    def _again_with_adapters(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        """Likewise, each row with its own LoRA adapter.

        vLLM looks adapters up by a token's place in the step, and some of its kernels have room for
        only `max_num_seqs` changes from one adapter to another: rows are sorted by adapter.
        """
        runner, batch = self._runner, self._runner.input_batch
        adapters = batch.request_lora_mapping[list(rows)]
        order = adapters.argsort(kind="stable")
        mapping = tuple(adapters[order].tolist())
        runner._set_active_loras(mapping, mapping, set(batch.lora_id_to_lora_request.values()))
        try:
            ordered = [rows[i] for i in order]
            sorted_hidden = hidden[torch.from_numpy(order).to(hidden.device)]
            logits = super().last_token_again(ordered, layer, sorted_hidden)
        finally:  # log-probabilities of prompts are computed after this
            step = self.state.scheduler_output.num_scheduled_tokens
            scheduled = np.array([step[name] for name in batch.req_ids], dtype=np.int32)
            runner.set_active_loras(batch, scheduled)
        return logits[torch.from_numpy(order.argsort()).to(logits.device)]

    @property
    def _n_tokens(self) -> int:
        return int(self.state.scheduler_output.total_num_scheduled_tokens)


class _Passing:
    """Says when the device has come to a layer's attention.

    Attention is called from Python between the pieces of the compiled model, whenever a step holds
    a prompt. Steps of decoding alone are one CUDA graph: there nothing is noted.

    Args:
        layer: the decoder layer.
        runner: who runs it, and remembers its stream, which takes a while to find.

    Attributes:
        event: recorded there in this step; None where Python did not come by.
    """

    def __init__(self, layer: nn.Module, runner: Any) -> None:
        self.event: torch.cuda.Event | None = None
        attention = getattr(getattr(layer, "self_attn", None), "attn", None)
        if attention is None:
            return
        forward, event = attention.impl.forward, torch.cuda.Event()  # type: ignore[no-untyped-call]

        def noting_forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.cuda.is_current_stream_capturing():
                event.record(vars(runner).get("main_stream"))
                self.event = event
            return forward(*args, **kwargs)

        attention.impl.forward = noting_forward


class _V2(ModelRunner):
    """One step of the V2 `GPUModelRunner`, inside its `sample`."""

    batch: Any = None  # the InputBatch
    aux: Any = None  # auxiliary hidden states
    tables: Any = None  # per KV cache group: (n_rows, n_blocks)
    slots: Any = None  # (n_groups, n_tokens)
    last: Any = None  # (n_rows, d_model): the normed states that the logits are computed from

    def __init__(self, runner: Any, guard: StepWork) -> None:
        super().__init__(runner, guard.layers)
        self.prompts: dict[str, tuple[Sequence[int], float, str | None]] = {}
        self.graphs: SteeringGraphs | None = None
        self._side = torch.cuda.Stream(runner.device)  # type: ignore[no-untyped-call]
        self._gate: _Passing | None = None
        self._end: _Passing | None = None
        self._in_python = False  # this step's forward pass
        self._n_keeping = 0  # CUDA graphs of the model that keep what the gate needs
        if guard.gate_layer is not None:
            layers = self._body.layers
            self._gate = _Passing(layers[guard.gate_layer], runner)
            self._end = _Passing(layers[max(len(layers) - 2, guard.gate_layer)], runner)
            self._keep_in_graphs(guard)

    def _keep_in_graphs(self, guard: StepWork) -> None:
        """Let the CUDA graphs of decoding keep what the gate needs: no launch, no Python."""
        forward, warm = self._model.forward, False

        def keeping_forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal warm
            output = forward(*args, **kwargs)
            self._in_python = True
            capturing = torch.cuda.is_current_stream_capturing()
            due = self._kernels is not None and (capturing or not warm)
            if due and (slots := _slots_of_forward()) is not None:
                aux = output[1]
                guard.keep(self, lambda layer: aux[self._index[layer]], slots)
                self._n_keeping += capturing
                warm = True  # the kernel is compiled: before the first capture
            return output

        self._model.forward = keeping_forward

    def forget_step(self) -> None:
        """A step begins."""
        self._in_python = False
        for passing in (self._gate, self._end):
            if passing is not None:
                passing.event = None

    @property
    def kept(self) -> bool:
        """True if `StepWork.keep` ran inside this step's CUDA graph."""
        graphs = getattr(getattr(self._runner, "cudagraph_manager", None), "graphs", ())
        return not self._in_python and 0 < len(graphs) == self._n_keeping

    @property
    def nearly_done(self) -> bool:
        """True if the device is known to be at the end of this step's forward pass."""
        event = self._end.event if self._end is not None else None
        return event is not None and bool(event.query())  # type: ignore[no-untyped-call]

    @contextmanager
    def at_gate(self) -> Iterator[None]:
        """Device work as soon as the gate's layer has run, beside the layers behind it."""
        event = self._gate.event if self._gate is not None else None
        if event is None:
            yield
            return
        main = torch.cuda.current_stream()
        self._side.wait_event(event)
        with torch.cuda.stream(self._side):
            yield
        main.wait_stream(self._side)

    @property
    def request_ids(self) -> Sequence[str]:
        """All requests of this step, in the order of the rows."""
        ids: Sequence[str] = self.batch.req_ids
        return ids

    def sampling_rows(self, wanted: Container[str]) -> list[SamplingRow]:
        """Their rows that sample; prompts that are not finished do not."""
        batch = self.batch
        seen = (batch.num_computed_tokens_np + batch.num_scheduled_tokens).tolist()
        due = batch.prefill_len_np.tolist()
        rows = []
        for row, request_id in enumerate(batch.req_ids):
            if request_id not in wanted or seen[row] < due[row]:
                continue
            prompt, temperature, policy = self.prompts[request_id]
            n_prompt = len(prompt)
            rows.append(
                SamplingRow(row, request_id, seen[row] - n_prompt, n_prompt, temperature, policy)
            )
        return rows

    def capture(self, carriers: Sequence[Carrier]) -> int:
        """Capture the steering of each carrier as CUDA graphs; return the bytes they take.

        Left to eager calls: tensor parallelism, whose collectives have graphs of their own, and
        engines told to use none.
        """
        runner = self._runner
        if self.n_ranks > 1 or runner.model_config.enforce_eager or not has_triton():
            return 0
        # FlashAttention 3 schedules into one buffer per builder: the base pass keeps its own.
        groups = [replace(group, metadata_builders=[]) for group in runner.attn_groups[0]]
        for group in groups:
            group.create_metadata_builders(
                runner.vllm_config, runner.device, runner.kernel_block_sizes[0], 1
            )
        longest = torch.full((2 * MAX_STEERED,), runner.max_model_len, dtype=torch.int32)

        def run(layer: int, hidden: Tensor, seq_lens: Tensor, table: Tensor) -> Tensor:
            return self._run(layer, hidden, seq_lens, longest[: len(hidden)], table, groups)

        free = torch.cuda.mem_get_info()[0]
        graphs = SteeringGraphs(
            run,
            self.difference,
            self._kernels,
            max_rows=min(MAX_STEERED, runner.max_num_reqs),
            d_model=runner.model_config.get_hidden_size(),
            n_blocks=runner.block_tables.input_block_tables[0].shape[1],
            dtype=runner.model_config.dtype,
            device=torch.device(runner.device),
        )
        for carrier in carriers:
            graphs.capture(carrier)
        self.graphs = graphs
        return free - torch.cuda.mem_get_info()[0]

    def steer(self, work: Steering, logits: Tensor) -> tuple[Tensor, Moved]:
        """Shadow pass, null rows beside steered ones, and mixture of some rows."""
        if self.graphs is None or not self.graphs.can(work):
            return super().steer(work, logits)
        step = self._kernels.StepRows(
            self.hidden(work.carrier.layer),
            logits,
            self.last,
            self.batch.seq_lens,
            self.tables[0],
        )
        return self.graphs.steer(work, step, self.batch.logits_indices)

    def graph_gap(self, carrier: Carrier, rows: Sequence[int], logits: Tensor) -> float:
        """How far captured steering is from the same without graphs, in standard deviations."""
        ones = [1.0] * len(rows)
        work = Steering(carrier, rows, ones, ones, None)
        captured = self.steer(work, logits)[1].logits.clone()
        return float(
            (captured - super().steer(work, logits)[1].logits).abs().max() / captured.std()
        )

    def prompt_ids(self, request_id: str) -> Sequence[int]:
        """Token ids of a request's prompt."""
        return self.prompts[request_id][0]

    def slots_written(self) -> Tensor:
        """(n_tokens,) int64: the KV slot of every token of this step."""
        slots: Tensor = self.slots[0][: self.batch.num_tokens]
        return slots.long()

    def block_table(self) -> tuple[Tensor, int]:
        """(n_rows, n_blocks) int32: the step's KV blocks; and tokens a block."""
        return self.tables[0], int(self._runner.block_tables.kernel_block_sizes[0])

    def hidden(self, layer: int) -> Tensor:
        """(n_tokens, d_model): the residual stream before `layer`, of every token of this step."""
        stream: Tensor = self.aux[self._index[layer]]
        return stream[: self.batch.num_tokens]

    def last_hidden(self, layer: int) -> Tensor:
        """(n_rows, d_model): likewise, of the last token of each row."""
        return self.hidden(layer)[self.batch.logits_indices.long()]

    def _last(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        """(len(rows), d_model): normed last states of the rows' last tokens, entered at `layer`."""
        index = on_device(list(rows), torch.int64, hidden.device)
        seen = self.batch.seq_lens_cpu_upper_bound[list(rows)]
        table = self.tables[0][index].contiguous()
        return self._run(layer, hidden, self.batch.seq_lens[index], seen, table)


def attach(runner: Any, guard: StepWork) -> ModelRunner:
    """Put the guard between a runner's forward pass and its sampler.

    Raises:
        UnsupportedModelError: this model cannot be guarded.
    """
    return (_attach_v1 if is_v1(runner) else _attach_v2)(runner, guard)


def is_v1(runner: Any) -> bool:
    """True for vLLM's older model runner."""
    return hasattr(runner, "discard_request_mask")


def _attach_v1(runner: Any, guard: StepWork) -> ModelRunner:
    """Between `execute_model` and `sample_tokens`."""
    view = _V1(runner, guard.layers)
    execute_model = runner.execute_model

    def guarded_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        _follow(guard, view, scheduler_output)
        output = execute_model(scheduler_output, *args, **kwargs)
        state = runner.execute_model_state
        if output is None and state is not None:
            view.state = state
            if guard.begin(view):
                runner.execute_model_state = state._replace(logits=guard.step(view, state.logits))
        return output

    runner.execute_model = guarded_execute_model
    return view


def _attach_v2(runner: Any, guard: StepWork) -> ModelRunner:
    """Into the V2 runner's `sample`, between logits and grammar."""
    if runner.lora_config is not None:
        raise UnsupportedModelError(
            "--enable-lora is guarded on the V1 model runner only: set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    view = _V2(runner, guard)
    model = runner.get_model()
    execute_model, prepare_attn = runner.execute_model, runner.prepare_attn
    sample_tokens, sample = runner.sample_tokens, runner.sample

    def guarded_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        _follow(guard, view, scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            view.prompts.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params is not None:
                params = new.sampling_params
                view.prompts[new.req_id] = (
                    new.prompt_token_ids,
                    _temperature(params),
                    _policy(params),
                )
        view.forget_step()
        return execute_model(scheduler_output, *args, **kwargs)

    def noting_prepare_attn(input_batch: Any) -> Any:
        view.tables, view.slots = found = prepare_attn(input_batch)
        return found

    def noting_sample_tokens(*args: Any, **kwargs: Any) -> Any:
        state = runner.execute_model_state
        if state is not None:
            view.batch, view.aux = state.input_batch, state.aux_hidden_states
        return sample_tokens(*args, **kwargs)

    def guarded_sample(*args: Any, **kwargs: Any) -> Any:
        if not guard.begin(view):
            return sample(*args, **kwargs)
        # `compute_logits` also serves prompt logprobs and dummy runs: it is ours only in here.
        compute_logits = model.compute_logits

        def guarded_logits(hidden: Tensor) -> Tensor:
            view.last = hidden
            return guard.step(view, compute_logits(hidden))

        model.compute_logits = guarded_logits
        try:
            return sample(*args, **kwargs)
        finally:
            view.last = None
            del model.compute_logits

    runner.execute_model = guarded_execute_model
    runner.prepare_attn = noting_prepare_attn
    runner.sample_tokens = noting_sample_tokens
    runner.sample = guarded_sample
    return view


def _follow(guard: StepWork, view: ModelRunner, scheduler_output: Any) -> None:
    """What the scheduler says before a step: requests that come and go, blocks that are copied."""
    guard.end(list(scheduler_output.finished_req_ids))
    for new in scheduler_output.scheduled_new_reqs:
        guard.renew(new.req_id, len(new.prompt_token_ids or ()))
    copies = getattr(scheduler_output, "kv_cache_block_copies", None)
    if copies:
        guard.copy_blocks([(c.src_block_id, c.dst_block_id) for c in copies], view.n_blocks)


def _slots_of_forward() -> Tensor | None:
    """(n_tokens,) KV slots of the forward pass that runs; None: it has none, as in profiling."""
    from vllm.forward_context import get_forward_context

    slots = get_forward_context().slot_mapping
    found: Tensor | None = next(iter(slots.values()), None) if isinstance(slots, dict) else None
    return found


@contextmanager
def _fused_kernels(modules: Any) -> Iterator[None]:
    """Let layers that are called outside the compiled model use vLLM's own fused kernels.

    vLLM tells them to be plain PyTorch, for a compiler to fuse: six kernels for each norm.
    """
    with ExitStack() as stack:
        if next(modules.parameters()).is_cuda:
            try:
                from vllm import ir

                for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
                    stack.enter_context(op.set_priority(["vllm_c", "native"]))
            except (ImportError, AttributeError):
                pass  # another version: slower, and right
            for module in modules.modules():
                method = module.__dict__.get("_forward_method")
                if method is not None and hasattr(module, "forward_cuda"):
                    module.__dict__["_forward_method"] = module.forward_cuda
                    stack.callback(module.__dict__.__setitem__, "_forward_method", method)
        yield


def _temperature(params: Any) -> float:
    return 0.0 if params.temperature < _GREEDY_BELOW else float(params.temperature)


def _policy(params: Any) -> str | None:
    wanted = (params.extra_args or {}).get(POLICY_FIELD)
    return None if wanted is None else str(wanted)


def _decoder(model: nn.Module) -> Any:
    """The part of a model that holds its decoder layers and the final norm.

    Raises:
        UnsupportedModelError: it is laid out otherwise.
    """
    body: Any = getattr(model, "model", None)
    layers, norm = getattr(body, "layers", None), getattr(body, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or norm is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected `model.layers` and `model.norm`; this layout has no"
            " shadow pass yet"
        )
    wanted = ["positions", "hidden_states", "residual"]
    found = list(inspect.signature(layers[0].forward).parameters)
    if found != wanted:
        raise UnsupportedModelError(
            f"{type(layers[0]).__name__}.forward takes {', '.join(found)}, expected"
            f" {', '.join(wanted)}: this layer has no shadow pass yet"
        )
    return body


def _halves_apart(logits: Tensor) -> Tensor:
    """(n, vocab) float32: the second half of the rows minus the first."""
    null, steered = logits.float().chunk(2)
    # A token that cannot occur is −inf in both, and stays as it is.
    return torch.where((null == steered) & torch.isinf(null), 0.0, steered - null)


def _is_linear(model: nn.Module) -> bool:
    """True if logits are the output matrix times the normed state, and nothing else."""
    head: Any = getattr(model, "lm_head", None)
    processor: Any = getattr(model, "logits_processor", None)
    if head is None or processor is None or getattr(head, "bias", None) is not None:
        return False
    return getattr(processor, "soft_cap", None) is None


def _ask_for_hidden_states(runner: Any, model: Any, layers: Sequence[int]) -> None:
    """Let the base pass return resid_pre of some layers; before its first forward."""
    if not hasattr(model, "set_aux_hidden_state_layers"):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot return hidden states in vLLM (it has no EAGLE-3"
            " interface), so its gate cannot be read"
        )
    runner.use_aux_hidden_state_outputs = True
    model.set_aux_hidden_state_layers(tuple(layers))
