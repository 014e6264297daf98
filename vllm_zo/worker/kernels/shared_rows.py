"""A CPU forward that computes only the rows of a `RowPlan`: vLLM's, or one of our own that has members only.

The model runs on the kept rows from the embedding on. Where whole sequences of members are all there is, attention runs
on those as well (`whole_attention.py`). Else it sees all T rows, with vLLM's own metadata and KV cache: queries, keys
and values are expanded before it and its output is cut down again. The first linear layer multiplies its base weight
with one of each row that are alike there. Behind the last attention the linear layers multiply the needed rows only and
leave zeros in the others, which nobody reads.

`compat/shared_rows.py` puts these functions where vLLM calls them. Without an active forward they do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode
from vllm.distributed.parallel_state import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_zo.worker.kernels import whole_attention
from vllm_zo.worker.kernels.cpu_lora import GroupedPunicaWrapper, Span
from vllm_zo.worker.rows import Chunk, RowPlan, plan_rows

logger = init_logger("vllm.zo.worker")

_active: list[Forward] = []
"""The forward that is running, if it leaves rows out. One thread runs the model."""


class SharedRows:
    """What a worker knows about leaving rows out. Lives on the model runner as `zo_shared_rows`."""

    def __init__(self, runner: Any, wrappers: Sequence[Any]) -> None:
        self.runner = runner
        self.wrappers = wrappers
        self.chunks: Callable[[Sequence[str]], list[Chunk]] | None = None
        """Set while a step with members runs: its rows, for the request ids of the batch in their order."""
        self.last_attention: Tensor | None = None
        """Output of the last attention of the last such forward, all kept rows."""
        self.wrote_kv = True
        """Whether the last forward wrote keys and values to the KV cache."""
        self.layers = len(runner.compilation_config.static_forward_context)
        self.refused = self._why_not()
        if self.refused:
            logger.info("every row of a training step is computed: %s", self.refused)
        self.needs_cache = self.refused or self._why_not_whole()
        if self.needs_cache and not self.refused:
            logger.info("attention of training steps goes through the KV cache: %s", self.needs_cache)
        self.not_alone = self.needs_cache or self._why_not_alone()
        if self.not_alone and not self.needs_cache:
            logger.info("members are requests of vLLM's in every step: %s", self.not_alone)

    def _why_not(self) -> str | None:
        runner = self.runner
        if not isinstance(runner, GPUModelRunner):
            return "the V2 model runner calls the model elsewhere"
        if not all(isinstance(wrapper, GroupedPunicaWrapper) for wrapper in self.wrappers):
            return "another LoRA implementation is in use"
        if runner.lora_config.fully_sharded_loras:
            return "fully_sharded_loras takes another road through the LoRA layers"
        if runner.speculative_config is not None or runner.uses_mrope or get_pp_group().world_size > 1:
            return "speculative decoding, multimodal positions and pipeline parallelism are not written for it"
        if runner.compilation_config.mode != CompilationMode.NONE:
            return "the model is compiled"
        for name, layer in runner.compilation_config.static_forward_context.items():
            if (
                type(layer) is not Attention
                or layer.attn_type != AttentionType.DECODER
                or layer.kv_sharing_target_layer_name is not None
            ):
                return f"{name} ({type(layer).__name__}) is not plain causal attention"
        return None

    def _why_not_whole(self) -> str | None:
        if self.runner.vllm_config.kv_transfer_config is not None:
            return "a KV connector reads it"
        for name, layer in self.runner.compilation_config.static_forward_context.items():
            if (reason := whole_attention.why_not(layer)) is not None:
                return f"{name}: {reason}"
        return None

    def _why_not_alone(self) -> str | None:
        if self.runner.supports_mm_inputs:
            return "the model takes more than token ids"
        if self.runner.parallel_config.data_parallel_size > 1:
            return "data-parallel engines agree on every forward"
        return None

    def forward_alone(self, chunks: Sequence[Chunk], slots: Sequence[int]) -> Tensor:
        """Final hidden states (T, D) of whole sequences, in a forward that vLLM's batch and KV cache have no part in.

        Args:
            slots: of each chunk, where its adapter lies among all slots.
        """
        plan = plan_rows(chunks)
        token_ids = torch.tensor([token for chunk in chunks for token in chunk.token_ids])
        positions = torch.cat([torch.arange(chunk.rows) for chunk in chunks])
        slot_of_row = torch.tensor(slots).repeat_interleave(torch.tensor([chunk.rows for chunk in chunks]))
        manager = self.runner.lora_manager._adapter_manager
        for wrapper in self.wrappers:
            wrapper.take_rows(slot_of_row[plan.keep_U], manager.vocab_size)
        manager._last_mapping = None  # vLLM makes its own mapping anew in the next step
        context = set_forward_context(None, self.runner.vllm_config, num_tokens=len(plan.keep_U))
        with context, Forward(self, plan, alone=True) as running:
            hidden = self.runner.model(token_ids[plan.keep_U], positions[plan.keep_U], None)
        return running.expand(hidden)

    def plan(self, rows: int) -> RowPlan | None:
        """The plan of the step that is about to run; None where all of its `rows` rows are to be computed."""
        if self.refused or self.chunks is None:
            return None
        chunks = self.chunks(self.runner.input_batch.req_ids)
        if sum(chunk.rows for chunk in chunks) != rows:  # padded
            return None
        plan = plan_rows(chunks)
        if self.needs_cache:
            plan = replace(plan, buckets=None)
        return plan if plan.shares or plan.prunes or plan.repeats or plan.buckets else None


class Forward:
    """One forward on the rows of a plan.

    Args:
        alone: of no batch of vLLM's; the LoRA wrappers have the plan's rows already.
    """

    def __init__(self, shared: SharedRows, plan: RowPlan, *, alone: bool = False) -> None:
        self.shared = shared
        self.plan = plan
        self.alone = alone
        self.attentions = 0
        self.linears = 0
        self.needed_spans: dict[int, list[Span]] = {}
        """By wrapper: which slots the needed rows use."""

    @property
    def past_attention(self) -> bool:
        return self.attentions == self.shared.layers

    def expand(self, x: Tensor) -> Tensor:
        """(U, ...) -> (T, ...)."""
        return x.index_select(0, self.plan.expand_T) if self.plan.shares else x

    def cut(self, attended: Tensor) -> Tensor:
        """(T, ...) -> (U, ...), and `past`."""
        return self.past(attended.index_select(0, self.plan.keep_U) if self.plan.shares else attended)

    def past(self, attended: Tensor) -> Tensor:
        """(U, ...) output of a layer's attention, as it is; to be called once a layer."""
        self.attentions += 1
        if self.past_attention:
            self.shared.last_attention = attended
        return attended

    def __enter__(self) -> Forward:
        for wrapper in self.shared.wrappers:
            if not self.alone:
                wrapper.restrict(self.plan.keep_U)
            self.needed_spans[id(wrapper)] = wrapper.spans_of_rows(self.plan.needed_P)
        _active.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _active.remove(self)
        if not self.alone:
            for wrapper in self.shared.wrappers:
                wrapper.restore()


def model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `GPUModelRunner._model_forward`."""

    @functools.wraps(original)
    def _model_forward(
        self: Any, input_ids: Any = None, positions: Any = None, *args: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        shared: SharedRows | None = getattr(self, "zo_shared_rows", None)
        plan = None
        if shared is not None and inputs_embeds is None and input_ids is not None and positions.ndim == 1:
            plan = shared.plan(len(input_ids))
        if shared is None or plan is None:
            if shared is not None:
                shared.wrote_kv = True
            return original(self, input_ids, positions, *args, inputs_embeds=inputs_embeds, **kwargs)
        shared.wrote_kv = False
        with Forward(shared, plan) as running:
            hidden = original(self, input_ids[plan.keep_U], positions[plan.keep_U], *args, **kwargs)
        return running.expand(hidden)

    return _model_forward


def attention_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For `Attention.forward`."""

    @functools.wraps(original)
    def forward(
        self: Any, query: Tensor, key: Any, value: Any, output_shape: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not _active:
            return original(self, query, key, value, output_shape, *args, **kwargs)
        (running,) = _active
        if (buckets := running.plan.buckets) is not None and not args and not kwargs:
            return running.past(whole_attention.attend(self, query, key, value, buckets))
        if running.alone:  # vLLM would return zeros: there are no metadata of its own
            raise RuntimeError(f"{self.layer_name}: an attention call with further arguments {args} {sorted(kwargs)}")
        running.shared.wrote_kv = True
        if output_shape is not None and running.plan.shares:
            output_shape = torch.Size((len(running.plan.expand_T), *output_shape[1:]))
        expanded = (x if x is None else running.expand(x) for x in (query, key, value))
        attended = original(self, *expanded, output_shape, *args, **kwargs)
        return running.cut(attended)

    return forward


def lora_linear_apply(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For `BaseLinearLayerWithLoRA.apply`."""

    @functools.wraps(original)
    def apply(self: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        running = _active[-1] if _active else None
        if running is None or x.ndim != 2:
            return original(self, x, bias)
        running.linears += 1
        if running.linears == 1 and running.attentions == 0 and running.plan.repeats:
            return _first_linear(self, x, bias, running.plan)
        if not running.past_attention or not running.plan.prunes:
            return original(self, x, bias)
        needed = running.plan.needed_P
        wrapper = self.punica_wrapper
        with wrapper.linears_on(running.needed_spans[id(wrapper)]):
            part = original(self, x.index_select(0, needed), bias)
        return part.new_zeros(len(x), part.shape[1]).index_copy_(0, needed, part)

    return apply


def _first_linear(layer: Any, x: Tensor, bias: Tensor | None, plan: RowPlan) -> Tensor:
    """The first perturbed layer, whose input is not perturbed yet: the base weight meets rows that are alike once."""
    base = layer.base_layer
    alike = base.quant_method.apply(base, x.index_select(0, plan.first_D), bias)
    y = alike.index_select(0, plan.spread_U)
    layer.punica_wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)
    return y
