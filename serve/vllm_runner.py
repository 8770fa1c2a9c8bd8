"""vLLM's V1 model runner (CPU, and GPUs without the V2 runner) as the guard sees it.

The base pass is vLLM's own, compiled or in CUDA graphs, and only asked to return the residual
stream before a few layers beside its output: the auxiliary hidden states that EAGLE-3 uses, so
nothing of ours is traced, and no hook runs inside a graph. After it, while the step's inputs are
still in place, the shadow pass calls the decoder layers from the carrier's on, eagerly, over the
flagged rows alone.

Nothing of it reaches the KV cache: with an empty slot mapping vLLM skips the update in every
backend whose forward does not include it, and other backends are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guard.errors import UnsupportedModelError
from serve.vllm_guard import SamplingRow, StepGuard

__all__ = ["V1Runner", "attach_v1"]

_GREEDY_BELOW = 1e-5  # vLLM's own limit


class V1Runner:
    """One step of a `GPUModelRunner` or `CPUModelRunner`, between its forward and its sampler.

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
        _ask_for_hidden_states(runner, self._model, layers)
        self._state: Any = None

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

    def begin(self, state: Any) -> None:
        """Take the step that has just run, an `ExecuteModelState`."""
        self._state = state

    def sampling_rows(self) -> list[SamplingRow]:
        """The rows that sample; prompts that are not finished do not."""
        runner = self._runner
        batch = runner.input_batch
        seen = runner.optimistic_seq_lens_cpu[: batch.num_reqs].tolist()
        skipped = runner.discard_request_mask.np
        rows = []
        for row, request_id in enumerate(batch.req_ids):
            if skipped[row]:
                continue
            request = runner.requests[request_id]
            temperature = float(request.sampling_params.temperature)
            rows.append(
                SamplingRow(
                    row=row,
                    request_id=request_id,
                    position=seen[row] - request.num_prompt_tokens,
                    n_prompt=request.num_prompt_tokens,
                    temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
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

    def slot_of(self, row: int, place: int) -> int:
        """The KV slot of a row's token at `place`, from 0."""
        table = self._runner.input_batch.block_table[0]
        block = int(table.block_table.np[row, place // table.block_size])
        return block * int(table.block_size) + place % int(table.block_size)

    def hidden(self, layer: int) -> Tensor:
        """(n_tokens, d_model): the residual stream before `layer`, of every token of this step."""
        stream: Tensor = self._state.aux_hidden_states[self._index[layer]]
        return stream[: self._n_tokens]

    def last_hidden(self, layer: int) -> Tensor:
        """(n_rows, d_model): likewise, of the last token of each row."""
        runner = self._runner
        ends = runner.query_start_loc.gpu[1 : runner.input_batch.num_reqs + 1].long() - 1
        return self.hidden(layer)[ends]

    def last_token_again(self, rows: Sequence[int], layer: int, hidden: Tensor) -> Tensor:
        """(len(rows), vocab) logits of the rows' last tokens, entered at `layer` with `hidden`."""
        from vllm.forward_context import set_forward_context

        runner = self._runner
        index = torch.tensor(rows, device=hidden.device)
        positions = runner.seq_lens[index].long() - 1
        metadata = self._attention_metadata(rows, index, positions)
        with set_forward_context(
            metadata, runner.vllm_config, num_tokens=len(rows), slot_mapping={}
        ):
            stream, residual = hidden, None
            for decoder in self._body.layers[layer:]:
                stream, residual = decoder(positions, stream, residual)
            stream, _ = self._body.norm(stream, residual)
            logits: Tensor = self._model.compute_logits(stream)
        return logits

    def agree(self, readings: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """The first tensor-parallel rank's readings, on every rank."""
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        if group.world_size == 1:
            return readings
        agreed: list[tuple[float, float]] = group.broadcast_object(readings, src=0)
        return agreed

    @property
    def _n_tokens(self) -> int:
        return int(self._state.scheduler_output.total_num_scheduled_tokens)

    def _attention_metadata(
        self, rows: Sequence[int], index: Tensor, positions: Tensor
    ) -> dict[str, Any]:
        """One query token per row, over the row's own blocks; as vLLM builds it for a decode."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        runner, n = self._runner, len(rows)
        seen = runner.optimistic_seq_lens_cpu[list(rows)]
        table = runner.input_batch.block_table[0].get_device_tensor(runner.input_batch.num_reqs)
        starts = torch.arange(n + 1, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(index.device),
            query_start_loc_cpu=starts,
            seq_lens=runner.seq_lens[index],
            num_reqs=n,
            num_actual_tokens=n,
            max_query_len=1,
            max_seq_len=int(seen.max()),
            block_table_tensor=table[index].contiguous(),
            slot_mapping=torch.full((n,), -1, dtype=torch.int64, device=index.device),
            causal=True,
            positions=positions,
            is_prefilling=torch.zeros(n, dtype=torch.bool),
            seq_lens_cpu_upper_bound=seen,
        )
        metadata = {}
        for group in runner.attn_groups[0]:
            if hasattr(group, "build_metadata"):
                built = group.build_metadata(common, 0)
            else:  # before 0.32 every group has blocks of the cache's own size
                built = group.get_metadata_builder(0).build(0, common)
            metadata.update(dict.fromkeys(group.layer_names, built))
        return metadata


def attach_v1(runner: Any, guard: StepGuard) -> V1Runner:
    """Put the guard between a V1 runner's forward pass and its sampler.

    Raises:
        UnsupportedModelError: this model cannot be guarded.
    """
    view = V1Runner(runner, guard.layers)
    execute_model = runner.execute_model

    def guarded_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        guard.end(list(scheduler_output.finished_req_ids))
        copies = getattr(scheduler_output, "kv_cache_block_copies", None)
        if copies:
            guard.copy_blocks([(c.src_block_id, c.dst_block_id) for c in copies], view.n_blocks)
        output = execute_model(scheduler_output, *args, **kwargs)
        state = runner.execute_model_state
        if output is None and state is not None:
            view.begin(state)
            runner.execute_model_state = state._replace(logits=guard.step(view, state.logits))
        return output

    runner.execute_model = guarded_execute_model
    return view


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


def _ask_for_hidden_states(runner: Any, model: Any, layers: Sequence[int]) -> None:
    """Let the base pass return resid_pre of some layers; before its first forward."""
    if not hasattr(model, "set_aux_hidden_state_layers"):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot return hidden states in vLLM (it has no EAGLE-3"
            " interface), so its gate cannot be read"
        )
    runner.use_aux_hidden_state_outputs = True
    model.set_aux_hidden_state_layers(tuple(layers))
