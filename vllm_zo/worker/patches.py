"""Patches that a training worker puts on objects of its own engine, on every platform.

The functions that replace vLLM's are in slots.py, published.py, serving_logits.py and head_adapters.py, beside what
they use.
"""

from __future__ import annotations

from vllm_zo.compat.registry import Patch

REMOVE_ALL_ADAPTERS = Patch(
    target="vllm.lora.model_manager:LoRAModelManager.remove_all_adapters",
    why="it frees every slot of the stacked tensors, the ZO slots too, and vLLM would load users' adapters into them",
    how="afterwards the ZO slots are reserved again, and empty",
    upstream="vllm#48297 (LoRA adapter lifecycle for RL)",
    remove_when="slots can be reserved outside the LRU",
    series="0003-adapter-sources.patch",
    built_in="vllm.lora.model_manager:LoRAModelManager.reserve_slots",
)
APPLY_ADAPTERS = Patch(
    target="vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters",
    why="it loads the adapter of every request in a step from a file; those of members are written in place",
    how="passes the adapters of members by, and raises where their slot holds nothing",
    upstream="vllm#48297 (LoRA adapter lifecycle for RL)",
    remove_when="slots can be reserved outside the LRU",
    series="0003-adapter-sources.patch",
    built_in="vllm.lora.model_manager:LoRAModelManager.reserve_slots",
)
LOAD_ADAPTER = Patch(
    target="vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
    why="it knows adapters in files only; a published version is made in memory, from accumulators and keys",
    how="paths zo://<job>/<version> are answered by the version store, and the path of a ZO slot is refused",
    upstream="vllm#4068 (adapters as in-memory tensors)",
    remove_when="an adapter can come from a callable on the worker",
    series="0003-adapter-sources.patch",
    built_in="vllm.lora.worker_manager:WorkerLoRAManager.register_adapter_source",
)
HEAD_ADAPTERS = Patch(
    target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model",
    why="a head gets adapters only where the model's class lists it in `embedding_modules`, which half of those with "
    "LoRA do not: a job could not train the head of OPT, Qwen2 or Gemma",
    how="lists `lm_head` for a model whose head vLLM's layer with adapters fits; on a training engine's model",
    upstream="none yet",
    remove_when="vLLM looks at the head instead of a list",
    series="0010-head-adapters.patch",
    built_in="vllm.lora.utils:embedding_modules_of",
)
LARGE_VOCABULARY = Patch(
    target="vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA.create_lora_weights",
    why="it refuses heads of more than 258,048 entries, a limit of kernels that vLLM no longer has: Gemma has 262,144",
    how="makes the B of such a head in its whole size",
    upstream="none yet: the line says that the limit is to be looked at again",
    remove_when="the limit is gone",
    series="0010-head-adapters.patch",
    built_in="vllm.lora.utils:embedding_modules_of",
)
COMPUTE_LOGITS = Patch(
    target="vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration.compute_logits",
    why="logits over the whole vocabulary are computed for the last token of every request, and members need none",
    how="computes those of the other requests and leaves zeros in the rows of members; on a training engine's model",
    upstream="none yet",
    remove_when="a request can ask for no logits",
    series="none: of use only to requests that a scheduler makes for itself, so 0004 has to be there first",
)
