"""Turns `zo_training` into engine options, and refuses what training does not support before the engine starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_zo.checkpoint.adapter_files import refuse_adapter
from vllm_zo.compat.seams import check_vllm
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.llm.cpu_defaults import apply_cpu_defaults
from vllm_zo.entrypoints.llm.cuda_graphs import chosen_by_user, default_sizes
from vllm_zo.entrypoints.llm.requirements import require_patches
from vllm_zo.errors import ConfigError

logger = logging.getLogger("vllm.zo")

# Names, not classes: importing them imports vLLM's engine, and the engine's processes import them by name anyway.
SCHEDULER = "vllm_zo.engine.scheduler.make_scheduler"
WORKERS = {"cpu": "vllm_zo.worker.cpu.worker.ZOCPUWorker", "cuda": "vllm_zo.worker.cuda.worker.ZOCUDAWorker"}


_MODEL_OPTIONS = (
    "tokenizer", "trust_remote_code", "revision", "code_revision", "hf_token", "hf_overrides", "hf_config_path",
    "config_format", "load_format", "model_impl", "dtype", "quantization", "max_model_len",
)  # fmt: skip
"""Engine options that decide which model class vLLM loads."""


def engine_options(
    model: str,
    zo_training: bool | Mapping[str, Any] | ZOTrainingConfig,
    options: Mapping[str, Any],
    scheduler: str = SCHEDULER,
) -> dict[str, Any]:
    """The keyword arguments of `LLM` with training switched on.

    The user's `max_loras` adapters for serving stay available: the ZO slots are added to it.

    Args:
        scheduler: another one for engines that take part in jobs of a coordinator. These may be data-parallel.

    Raises:
        ConfigError: training cannot work with an option or with the model. The message names it, why, and the fix.
        PatchConflictError: another plugin has replaced what training patches.
    """
    zo = ZOTrainingConfig.from_user(zo_training)
    if zo is None:
        return dict(options)
    check_vllm()
    require_patches()  # a conflict raises here; in the engine it would end the process with a traceback only
    _refuse(options, many_engines=scheduler != SCHEDULER)
    from vllm.platforms import current_platform

    device = "cpu" if current_platform.is_cpu() else "cuda"
    if device == "cuda" and not current_platform.is_cuda_alike():
        raise ConfigError(
            f"zo_training: platform {current_platform.device_type!r} has no training worker; use CPU or CUDA."
        )
    if device == "cuda" and (stages := options.get("pipeline_parallel_size") or 1) > 1:
        raise ConfigError(
            f"pipeline_parallel_size={stages} with zo_training: it was tried on CPU builds only; use "
            "tensor_parallel_size."
        )
    check_local_model(model, f"model={model!r}")
    if device == "cpu":
        _set_cpu_defaults(options)
    # Last of the checks: it reads the model's configuration, from the hub where the model is not a directory.
    _check_architecture(model, options, device)
    max_loras = options.get("max_loras") or 1
    return {
        **options,
        **(_graphs(zo, options) if device == "cuda" else {}),
        "enable_lora": True,
        "max_loras": max_loras + zo.total_slots,
        # vLLM refuses a cache in main memory that holds fewer adapters than the device does.
        "max_cpu_loras": (options.get("max_cpu_loras") or max_loras) + zo.total_slots,
        "max_lora_rank": max(options.get("max_lora_rank") or 1, zo.slot_rank),
        "scheduler_cls": scheduler,
        "worker_cls": WORKERS[device],
        # vLLM's field for settings that are not its own: it reaches every process of the engine, as plain JSON values.
        "additional_config": {**(options.get("additional_config") or {}), "zo_training": asdict(zo)},
    }


def world_size_of(options: Mapping[str, Any]) -> int:
    """Workers of an engine: tensor-parallel ranks times pipeline stages."""
    ranks, stages = (int(options.get(f"{kind}_parallel_size") or 1) for kind in ("tensor", "pipeline"))
    return ranks * stages


def _set_cpu_defaults(options: Mapping[str, Any]) -> None:
    """Set those of vLLM's CPU settings that the user has left open.

    This is safe for a program that does not ask for it. It sets only variables that are unset, vLLM reads them when it
    makes the next engine, and the engine stays in the process that vLLM chooses. Without it the KV cache would take
    92 % of all memory (vLLM's default), and the engine does not start where less is free.
    """
    world_size, engines = world_size_of(options), int(options.get("data_parallel_size") or 1)
    kv_cache = not sizes_kv_cache(options)
    if chosen := apply_cpu_defaults(world_size, in_process=False, kv_cache=kv_cache, engines=engines):
        logger.info("on CPU, chosen: %s", ", ".join(f"{name}={value}" for name, value in chosen.items()))


def sizes_kv_cache(options: Mapping[str, Any]) -> bool:
    """Whether engine options say how large the KV cache is."""
    return any(options.get(name) is not None for name in ("kv_cache_memory_bytes", "gpu_memory_utilization"))


def _graphs(zo: ZOTrainingConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """The option that makes CUDA graphs large enough for a training group; nothing if the user has chosen graphs."""
    if chosen_by_user(options):
        return {}
    sizes = default_sizes(zo.total_slots)
    logger.info(
        "CUDA graphs for %d token counts up to %d, so that a training group of %d slots replays one (vLLM alone makes "
        "them up to 512 tokens); cudagraph_capture_sizes=[...] chooses others",
        len(sizes), sizes[-1], zo.total_slots,
    )  # fmt: skip
    return {"cudagraph_capture_sizes": sizes}


def check_local_model(model: str, named: str) -> None:
    """Refuse a path that does not exist, for which vLLM would ask the hub, and an adapter without its base.

    Args:
        named: the option and its value as the user wrote them.

    Raises:
        ConfigError: there is no such directory, or it holds an adapter alone.
    """
    refuse_adapter(Path(model), named)
    if model.startswith(("/", ".", "~")) and not model.endswith(".gguf") and not Path(model).is_dir():
        raise ConfigError(f"{named}: no such directory; give a checkpoint's directory or a Hugging Face name.")


def _refuse(options: Mapping[str, Any], *, many_engines: bool) -> None:
    engines, stages = (options.get(f"{kind}_parallel_size") or 1 for kind in ("data", "pipeline"))
    if engines > 1 and not many_engines:
        raise ConfigError(
            f"data_parallel_size={engines} with zo_training: several engines train one job with "
            "vllm_zo.Cluster(engines=...) or in `vllm-zo serve`; set data_parallel_size=1."
        )
    if engines > 1 and stages > 1:
        raise ConfigError(
            f"data_parallel_size={engines} with pipeline_parallel_size={stages} and zo_training: it was not tried; set "
            "one of the two to 1."
        )
    if options.get("max_num_seqs") == 1:
        raise ConfigError("max_num_seqs=1 with zo_training: a pair of probes runs together; set max_num_seqs >= 2.")
    for name in ("scheduler_cls", "worker_cls"):
        if options.get(name):
            raise ConfigError(
                f"{name}={options[name]!r} with zo_training: training brings its own; leave {name} unset."
            )
    if options.get("fully_sharded_loras"):
        raise ConfigError("fully_sharded_loras=True with zo_training: probes write whole A factors; set it to False.")
    if options.get("speculative_config") or options.get("spec_model"):
        raise ConfigError("speculative decoding with zo_training: members have no draft tokens; start without it.")
    if options.get("enable_lora") is False:
        raise ConfigError("enable_lora=False with zo_training: probes are LoRA adapters; leave enable_lora unset.")


def _check_architecture(model: str, options: Mapping[str, Any], device: str) -> None:
    """Refuse a model whose layers cannot carry probes. vLLM itself would notice only after it has loaded the weights.

    Raises:
        ConfigError: vLLM's class of the model has no LoRA support, takes more than text, or is a mixture of
            experts on a CPU; or the CPU has no right product for its weights.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import supports_lora

    from vllm_zo.worker.cpu.linear import has_avx512

    given = {name: options[name] for name in _MODEL_OPTIONS if name in options}
    model_config = EngineArgs(model=model, **given).create_model_config()
    model_class, _ = model_config.registry.resolve_model_cls(model_config.architectures, model_config)
    if model_config.is_multimodal_model:
        raise ConfigError(
            f"model={model!r}: {model_class.__name__} reads more than text, and training knows the modules of text "
            "models only; choose a text model."
        )
    if not supports_lora(model_class):
        raise ConfigError(
            f"model={model!r}: {model_class.__name__} has no LoRA support in the installed vLLM, and probes are LoRA "
            "adapters; choose a model of a supported architecture (vLLM's list of supported models has a column LoRA)."
        )
    if (engines := options.get("data_parallel_size") or 1) > 1 and model_config.get_num_experts() > 0:
        raise ConfigError(
            f"data_parallel_size={engines} with zo_training: {model_class.__name__} is a mixture of experts, whose "
            "engines share every forward; choose a dense model, or set data_parallel_size=1."
        )
    # Without AVX-512 vLLM's build for the CPU lacks the 4-bit product, and sums overflow in its int8 one.
    if device == "cpu" and model_config.quantization and not has_avx512():
        raise ConfigError(
            f"model={model!r}: its weights are quantised ({model_config.quantization}), and vLLM has no right product "
            "for them on an x86 CPU without AVX-512; choose a plain checkpoint, or another machine."
        )
    if device == "cpu" and model_config.get_num_experts() > 0:
        raise ConfigError(
            f"model={model!r}: {model_class.__name__} is a mixture of experts, whose LoRA layers are Triton kernels "
            "that a CPU cannot run; choose a dense model, or a CUDA device."
        )
