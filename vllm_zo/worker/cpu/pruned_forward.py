"""A CPU forward that computes only the rows of a `RowPlan`: vLLM's own forward, or one of ours that has only members.

The model runs on the kept rows from the embedding on. If the step consists of whole sequences of members, attention
runs on the kept rows too (`attention.py`). Otherwise attention gets all T rows, with vLLM's own metadata and KV cache:
queries, keys and values are expanded before it, and its output is cut down again. The first linear layer multiplies its
base weight once for rows that are equal there. After the last attention the linear layers multiply only the needed
rows, and leave zeros in the others, which are never read.

Where members train only layers l and above, the layers below l get the rows that are distinct whatever their state, and
none of a sequence whose states are kept. What enters layer l is then spread out to the kept rows (`Forward.layer`). For
members that train the LM head only, that is what comes out of the last layer (`Forward.final_hidden`).

Shape suffixes are those of `row_plan.py`: T rows of the step, U kept rows, B rows below the first trained layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode
from vllm.distributed.parallel_state import get_pp_group
from vllm.logger import init_logger
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.v1.attention.backend import AttentionType
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_zo.worker.cpu import attention as whole_attention
from vllm_zo.worker.cpu.decoder_layers import DecoderLayers, find_decoder_layers
from vllm_zo.worker.cpu.fused_linear import FusedLinear
from vllm_zo.worker.cpu.lora import GroupedPunicaWrapper, Spans
from vllm_zo.worker.cpu.patches import ATTENTION, DECODER_LAYER, LORA_LINEAR, MODEL_FORWARD
from vllm_zo.worker.cpu.row_plan import Below, RowPlan, WholeSequences, plan_rows
from vllm_zo.worker.kept_states import KeptStates
from vllm_zo.worker.platform import Chunk, Chunks

logger = init_logger("vllm.zo.worker")

FINAL = "final"
"""Name of the final hidden states among what is kept of a sequence."""


class RowPruner:
    """Leaves rows out of a CPU worker's forwards. The platform owns it. One thread runs the model, so it has no lock.

    Unless the model or the engine forbids it (`refused`), the runner's `_model_forward`, each attention layer's
    `forward` and each LoRA layer's `apply` are replaced by functions of this module. Outside a pruned forward they do
    what vLLM's do.

    Args:
        runner: vLLM's model runner.
        wrappers: vLLM's LoRA kernels, one for each part of the model.
        kept: takes the hidden states that enter the first trained layer, from step to step.

    Attributes:
        refused: why no rows can be left out; None if they can.
        needs_cache: why attention has to go through the KV cache; None if it need not.
        not_alone: why members cannot run in a forward of their own; None if they can.
        decoder: the numbered layers, if rows can be changed between them; else None.
    """

    def __init__(self, runner: Any, wrappers: Sequence[Any], kept: KeptStates) -> None:
        self.runner = runner
        self.wrappers = wrappers
        self.kept = kept
        self.chunks: Chunks | None = None
        """Gives the rows of the current step. None outside a step with members."""
        self.last_attention: Tensor | None = None
        """(U, ...) output of the last attention layer, until `take_last_attention`. It has all kept rows, which the
        final hidden states may lack."""
        self.wrote_kv = True
        """Whether the last forward wrote keys and values to the KV cache."""
        self.running: Forward | None = None
        """The pruned forward that is running, or None."""
        self.layers = len(runner.compilation_config.static_forward_context)  # vLLM's registry of attention layers
        self.refused = self._why_not()
        if self.refused:
            logger.info("every row of a training step is computed: %s", self.refused)
        self.needs_cache = self.refused or self._why_not_whole()
        if self.needs_cache and not self.refused:
            logger.info("attention of training steps goes through the KV cache: %s", self.needs_cache)
        self.not_alone = self.needs_cache or self._why_not_alone()
        if self.not_alone and not self.needs_cache:
            logger.info("members are requests of vLLM's in every step: %s", self.not_alone)
        self.decoder: DecoderLayers | None = None
        if not self.refused:
            self._put_in()

    def _put_in(self) -> None:
        runner, manager = self.runner, self.runner.lora_manager._adapter_manager
        found = find_decoder_layers(
            manager.model, list(manager.modules), list(runner.compilation_config.static_forward_context)
        )
        if isinstance(found, str):
            logger.info("layers below the first trained one run for every probe: %s", found)
        else:
            self.decoder = found
            for index, layer in enumerate(found.layers):
                DECODER_LAYER.on(layer, "forward", _decoder_layer(self, index, layer.forward))
        MODEL_FORWARD.on(runner, "_model_forward", _model_forward(self, runner._model_forward))
        for layer in runner.compilation_config.static_forward_context.values():
            ATTENTION.on(layer, "forward", _attention(self, layer, layer.forward))
        for layer in set(manager.modules.values()):  # a tied module is registered under two names
            # A layer with a product of its own keeps it, and computes every kept row.
            if _multiplies_plainly(layer):
                LORA_LINEAR.on(layer, "apply", _lora_linear(self, layer, layer.apply))

    def _why_not(self) -> str | None:
        """Names the reason why rows cannot be left out; None if they can."""
        runner = self.runner
        if not isinstance(runner, GPUModelRunner):
            return "the V2 model runner does not call the model through _model_forward"
        if not all(isinstance(wrapper, GroupedPunicaWrapper) for wrapper in self.wrappers):
            return "another LoRA implementation is in use"
        if runner.lora_config.fully_sharded_loras:
            return "fully_sharded_loras uses LoRA layers with products of their own"
        if runner.speculative_config is not None or runner.uses_mrope or get_pp_group().world_size > 1:
            return "it is not written for speculative decoding, multimodal positions and pipeline parallelism"
        if runner.compilation_config.mode != CompilationMode.NONE:
            return "the model is compiled"
        # vLLM registers every layer here that needs to know the batch. `_attention` gives all rows to plain causal
        # attention; any other layer could miss the ones that are left out.
        for name, layer in runner.compilation_config.static_forward_context.items():
            if (
                type(layer) is not Attention
                or layer.attn_type != AttentionType.DECODER
                or layer.kv_sharing_target_layer_name is not None
            ):
                return f"{name} ({type(layer).__name__}) is not plain causal attention"
        return None

    def _why_not_whole(self) -> str | None:
        """Names the reason why attention cannot run without the KV cache; None if it can."""
        if self.runner.vllm_config.kv_transfer_config is not None:
            return "a KV connector reads it"
        for name, layer in self.runner.compilation_config.static_forward_context.items():
            if (reason := whole_attention.why_not(layer)) is not None:
                return f"{name}: {reason}"
        return None

    def _why_not_alone(self) -> str | None:
        """Names the reason why members cannot run in a forward of their own; None if they can."""
        if self.runner.supports_mm_inputs:
            return "the model takes more than token ids"
        if self.runner.parallel_config.data_parallel_size > 1:
            return "data-parallel engines agree on every forward"
        return None

    @contextmanager
    def step(self, chunks: Chunks) -> Iterator[None]:
        """In the block, vLLM's forward runs a step whose rows `chunks` gives."""
        self.chunks = chunks
        try:
            yield
        finally:
            self.chunks = None

    def take_last_attention(self) -> list[Tensor]:
        """The (U, ...) output of the last attention layer in the last forward, if it was not taken yet."""
        taken, self.last_attention = self.last_attention, None
        return [] if taken is None else [taken]

    def plan(self, rows: int) -> RowPlan | None:
        """The plan of the step that is about to run; None if all its rows have to be computed.

        Args:
            rows: number of rows that vLLM passes to the model.
        """
        if self.refused or self.chunks is None:
            return None
        chunks = self.chunks(self.runner.input_batch.req_ids)
        if sum(chunk.rows for chunk in chunks) != rows:  # vLLM has padded the batch: rows may lie elsewhere
            return None
        plan = self.plan_of(chunks)
        if self.needs_cache:
            plan = plan.through_cache()
        return plan if plan.shares or plan.prunes or plan.repeats or plan.whole or plan.below else None

    def plan_of(self, chunks: Sequence[Chunk]) -> RowPlan:
        """The plan of a forward with these rows."""
        return plan_rows(chunks, self.decoder_layers, self.kept.claim)

    @property
    def decoder_layers(self) -> int:
        """How many layers there are between which rows can be changed."""
        return 0 if self.decoder is None else len(self.decoder.layers)


class Forward:
    """One forward on the rows of a plan, as a context manager.

    It begins on the rows of the layers below the first trained one, if the plan has such, and goes over to the kept
    rows where that layer begins.

    Args:
        alone: the slots of the T rows for a forward of ours. None: vLLM has a batch, and the LoRA wrappers its rows.

    Attributes:
        keep: of the T rows, those that the layers get now.
    """

    def __init__(self, pruner: RowPruner, plan: RowPlan, alone: Tensor | None = None) -> None:
        self.pruner = pruner
        self.plan = plan
        self.alone = alone is not None
        self.attentions = 0
        self.below: Below | None = plan.below
        """The rows of the layers below the first trained one, until that layer begins."""
        self.keep = plan.keep_U if plan.below is None else plan.below.rows_B
        self.needed_spans: dict[int, Spans] = {}
        """id of a wrapper -> the spans of the needed rows there."""
        self._slots: list[tuple[Any, Tensor]] = [] if alone is None else [(w, alone) for w in pruner.wrappers]
        """(wrapper, slots of the T rows)."""
        self._entered: dict[int, tuple[Tensor, Tensor]] = {}
        """id of a tensor that the model passes to its layers -> that tensor, and it on the kept rows."""
        self.first_attentions: int | None = None if plan.below else 0
        self._attentions_before = self.first_attentions
        """Attention layers before the first linear layer that is on the kept rows; None when that has run, or is not
        yet next."""

    @property
    def past_attention(self) -> bool:
        """Whether the last attention layer has run."""
        return self.attentions == self.pruner.layers

    @property
    def whole(self) -> WholeSequences | None:
        return (self.below or self.plan).whole

    def expand(self, x: Tensor) -> Tensor:
        """The rows that layers get now to all rows: (U or B, ...) -> (T, ...)."""
        shares = self.below is not None or self.plan.shares
        return x.index_select(0, (self.below or self.plan).expand_T) if shares else x

    def cut(self, attended: Tensor) -> Tensor:
        """All rows of a layer's attention to those that layers get now, (T, ...) -> (U or B, ...); counts the layer
        (`past`)."""
        shares = self.below is not None or self.plan.shares
        return self.past(attended.index_select(0, self.keep) if shares else attended)

    def past(self, attended: Tensor) -> Tensor:
        """Count a layer's attention, and return its output as it is. To be called once for each layer."""
        self.attentions += 1
        if self.past_attention:
            self.pruner.last_attention = attended
        return attended

    def final_hidden(self, model: Callable[[], Tensor]) -> Tensor:
        """The final hidden states of the T rows.

        Args:
            model: computes those of the rows that layers get now. It is not called if all of them are kept, which can
                be where members train the LM head only.
        """
        below = self.below
        if below is None or below.layer < self.pruner.decoder_layers:
            return self.expand(model())
        computed = [model()] if len(below.rows_B) else []
        if computed:
            self._keep(below, {FINAL: computed[0]})
        final_U = self._entering(below, FINAL, computed)
        self.below = None
        return self.expand(final_U)

    def is_first_linear(self) -> bool:
        """Whether the linear layer that asks is the first one on the kept rows, before their first attention. After it,
        the perturbed weights make equal rows of different states differ."""
        before, self._attentions_before = self._attentions_before, None
        return before == self.attentions

    # --- from the rows below the first trained layer to the kept rows -------------------------------------------------

    def layer(self, index: int, original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The forward of decoder layer number `index`, from the first one on."""
        if self.below is not None and index == self.below.layer:
            self._enter(self.below, {**dict(enumerate(args)), **kwargs})
        elif self.below is not None and not len(self.below.rows_B):
            assert self.pruner.decoder is not None
            self.attentions += self.pruner.decoder.attentions[index]
            return self.pruner.decoder.of_no_rows
        # Hidden states come from the layer before, but positions from the model, for the rows that it began with.
        args = [self._on_kept_rows(value) for value in args]
        kwargs = {name: self._on_kept_rows(value) for name, value in kwargs.items()}
        return self.run_layer(index, original, args, kwargs)

    def run_layer(
        self, index: int, original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run a layer on the rows that layers get now."""
        output = original(*args, **kwargs)
        return output if self.pruner.decoder is None else self.pruner.decoder.note(output)

    def _enter(self, below: Below, arguments: Mapping[Any, Any]) -> None:
        """Go over to the kept rows. arguments: of the first trained layer, by place or name."""
        states = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        self._keep(below, states)
        for name, value in states.items():
            self._entered[id(value)] = value, self._entering(below, name, [value])
        self.below = None
        self._attentions_before = self.attentions
        self._take_rows(self.plan.keep_U)

    def _keep(self, below: Below, states: Mapping[Any, Tensor]) -> None:
        for sequence, rows in below.to_keep.items():
            self.pruner.kept.keep(sequence, states, rows)

    def _entering(self, below: Below, name: Any, computed: Sequence[Tensor]) -> Tensor:
        """What the U rows have of a state, from the B rows that were computed, if any were, and the kept ones."""
        parts = [*computed, *(self.pruner.kept[sequence][name][start:] for sequence, start in below.kept)]
        entering_D = torch.cat(parts) if len(parts) > 1 else parts[0]
        return entering_D.index_select(0, self.plan.spread_U)

    def _on_kept_rows(self, value: Any) -> Any:
        return self._entered[id(value)][1] if id(value) in self._entered else value

    # --- LoRA's rows --------------------------------------------------------------------------------------------------

    def _take_rows(self, keep: Tensor) -> None:
        """Let the layers get these of the T rows from now on."""
        self.keep = keep
        vocab_size = self.pruner.runner.lora_manager._adapter_manager.vocab_size
        for wrapper, slots_T in self._slots:
            slots = slots_T[keep]
            if self.below is not None:
                slots[self.below.loaded_B] = -1
            wrapper.take_rows(slots, vocab_size)
            if self.below is None:
                self.needed_spans[id(wrapper)] = wrapper.spans_of_rows(self.plan.needed_P)

    def __enter__(self) -> Forward:
        if not self.alone:
            self._slots = [(wrapper, wrapper.save_batch()) for wrapper in self.pruner.wrappers]
        self._take_rows(self.keep)
        self.pruner.running = self
        return self

    def __exit__(self, *exc: object) -> None:
        self.pruner.running = None
        if not self.alone:
            for wrapper in self.pruner.wrappers:
                wrapper.restore_batch()


def _model_forward(pruner: RowPruner, original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of `GPUModelRunner._model_forward`. The CPU runner inherits it."""

    @functools.wraps(original)
    def forward(
        input_ids: Any = None, positions: Any = None, *args: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        # Embeddings in place of tokens, or positions of several dimensions, are inputs that the plan knows nothing of.
        plan = None
        if inputs_embeds is None and input_ids is not None and positions.ndim == 1:
            plan = pruner.plan(len(input_ids))
        # With a plan, `_attention` sets this when it lets vLLM's attention write to the cache.
        pruner.wrote_kv = plan is None
        if plan is None:
            return original(input_ids, positions, *args, inputs_embeds=inputs_embeds, **kwargs)
        with Forward(pruner, plan) as running:
            return running.final_hidden(
                lambda: original(input_ids[running.keep], positions[running.keep], *args, **kwargs)
            )

    return forward


def _decoder_layer(pruner: RowPruner, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of `forward` of one decoder layer."""

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        running = pruner.running
        if running is None:
            return original(*args, **kwargs)
        return running.layer(index, original, args, kwargs)

    return forward


def _attention(pruner: RowPruner, layer: Any, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The replacement of `Attention.forward` of one layer."""

    @functools.wraps(original)
    def forward(query: Tensor, key: Any, value: Any, output_shape: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        running = pruner.running
        if running is None:
            return original(query, key, value, output_shape, *args, **kwargs)
        if (whole := running.whole) is not None and not args and not kwargs:
            return running.past(whole_attention.attend(layer, query, key, value, whole))
        if running.alone:  # without metadata vLLM's attention returns a tensor that it never wrote to
            raise RuntimeError(f"{layer.layer_name}: an attention call with further arguments {args} {sorted(kwargs)}")
        pruner.wrote_kv = True
        if output_shape is not None:
            output_shape = torch.Size((len(running.plan.expand_T), *output_shape[1:]))
        expanded = (x if x is None else running.expand(x) for x in (query, key, value))
        attended = original(*expanded, output_shape, *args, **kwargs)
        return running.cut(attended)

    return forward


def _multiplies_plainly(layer: Any) -> bool:
    """Whether `apply` of this layer with LoRA is `BaseLinearLayerWithLoRA.apply`, in the end."""
    apply = getattr(type(layer), "apply", None)
    if apply is MergedColumnParallelLinearWithLoRA.apply:
        # From vLLM 0.32 on it asks first whether the layer below has a `forward` of its own.
        return type(layer.base_layer).forward is ColumnParallelLinear.forward
    return apply is BaseLinearLayerWithLoRA.apply


def _lora_linear(pruner: RowPruner, layer: Any, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The replacement of `BaseLinearLayerWithLoRA.apply` of one layer."""
    multiply = functools.partial(_linear, layer, original)

    @functools.wraps(original)
    def apply(x: Tensor, bias: Tensor | None = None) -> Tensor:
        running = pruner.running
        if running is None or x.ndim != 2:
            return multiply(x, bias)
        if running.is_first_linear() and running.plan.repeats:
            return _first_linear(layer, x, bias, running.plan)
        if not running.past_attention or running.below is not None or not running.plan.prunes:
            return multiply(x, bias)
        needed = running.plan.needed_P
        wrapper = layer.punica_wrapper
        with wrapper.linears_on(running.needed_spans[id(wrapper)]):
            part = multiply(x.index_select(0, needed), bias)
        # As many rows as came in: the model adds the result to its residual stream.
        return part.new_zeros(len(x), part.shape[1]).index_copy_(0, needed, part)

    return apply


def _linear(layer: Any, original: Callable[..., Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """`BaseLinearLayerWithLoRA.apply` of one layer; in one pass where the base product is ours."""
    product, wrapper = getattr(layer.base_layer, "cpu_linear", None), layer.punica_wrapper
    if isinstance(product, FusedLinear) and x.ndim == 2:
        factors = wrapper.factors(layer.lora_a_stacked, layer.lora_b_stacked, x)
        if factors is not None:
            return product.with_low_rank(x, bias, factors, wrapper.spans.runs)
    return original(x, bias)


def _first_linear(layer: Any, x: Tensor, bias: Tensor | None, plan: RowPlan) -> Tensor:
    """`apply` of the first layer with LoRA: x (U, I) -> (U, O). The base product is computed once for equal rows, and
    copied. Only trained embeddings can have perturbed its input; `Chunk.embedded_by` keeps their rows apart."""
    base = layer.base_layer
    alike = base.quant_method.apply(base, x.index_select(0, plan.first_D), bias)
    y = alike.index_select(0, plan.spread_U)
    layer.punica_wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)
    return y
