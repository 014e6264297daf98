"""`zo_training` as the engine options it stands for, with everything unsupported refused by name before the engine
starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_zo import compat
from vllm_zo.compat.seams import check_vllm
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cuda_graphs import chosen_by_user, default_sizes
from vllm_zo.errors import ConfigError

logger = logging.getLogger("vllm.zo")

SCHEDULER = "vllm_zo.engine.scheduler.make_scheduler"
WORKERS = {"cpu": "vllm_zo.worker.worker.ZOCPUWorker", "cuda": "vllm_zo.worker.worker.ZOGPUWorker"}

_UNSUPPORTED = {
    "pipeline_parallel_size": "only the last pipeline stage sees the losses",
    "data_parallel_size": "data-parallel engines would train apart from each other",
}


_MODEL_OPTIONS = (
    "tokenizer", "trust_remote_code", "revision", "code_revision", "hf_token", "hf_overrides", "hf_config_path",
    "config_format", "load_format", "model_impl", "dtype", "quantization", "max_model_len",
)  # fmt: skip
"""Engine options that decide which model class is loaded."""


def engine_options(
    model: str, zo_training: bool | Mapping[str, Any] | ZOTrainingConfig, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of `LLM` with training switched on.

    `max_loras` stays what the user set for serving adapters; the ZO slots are reserved on top of it.

    Raises:
        ConfigError: an option or a model that training cannot work with; names it, why, and what to do.
        PatchConflictError: another plugin has replaced what training patches.
    """
    zo = ZOTrainingConfig.from_user(zo_training)
    if zo is None:
        return dict(options)
    check_vllm()
    compat.require()  # here a conflict is an error of the caller's; in the engine it would be a dead process
    _refuse(options)
    from vllm.platforms import current_platform

    device = "cpu" if current_platform.is_cpu() else "cuda"
    if device == "cuda" and not current_platform.is_cuda_alike():
        raise ConfigError(
            f"zo_training: platform {current_platform.device_type!r} has no training worker; use CPU or CUDA."
        )
    check_local_model(model, f"model={model!r}")
    _check_supports_lora(model, options)
    max_loras = options.get("max_loras") or 1
    return {
        **options,
        **(_graphs(zo, options) if device == "cuda" else {}),
        "enable_lora": True,
        "max_loras": max_loras + zo.total_slots,
        "max_cpu_loras": (options.get("max_cpu_loras") or max_loras) + zo.total_slots,
        "max_lora_rank": max(options.get("max_lora_rank") or 1, zo.slot_rank),
        "scheduler_cls": SCHEDULER,
        "worker_cls": WORKERS[device],
        "additional_config": {**(options.get("additional_config") or {}), "zo_training": asdict(zo)},
    }


def _graphs(zo: ZOTrainingConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """CUDA graphs that are large enough for a training group, unless the user has chosen."""
    if chosen_by_user(options):
        return {}
    sizes = default_sizes(zo.total_slots)
    logger.info(
        "CUDA graphs for %d token counts up to %d, so that training groups of %d slots replay one (vLLM's own end at "
        "512 tokens); cudagraph_capture_sizes=[...] chooses others",
        len(sizes), sizes[-1], zo.total_slots,
    )  # fmt: skip
    return {"cudagraph_capture_sizes": sizes}


def check_local_model(model: str, named: str) -> None:
    """Refuse a path that leads nowhere; vLLM would ask the hub for a model of that name.

    Args:
        named: the option and its value as the user wrote them.
    """
    if model.startswith(("/", ".", "~")) and not model.endswith(".gguf") and not Path(model).is_dir():
        raise ConfigError(f"{named}: no such directory; give a checkpoint's directory or a Hugging Face name.")


def _refuse(options: Mapping[str, Any]) -> None:
    for name, why in _UNSUPPORTED.items():
        if (value := options.get(name) or 1) > 1:
            raise ConfigError(f"{name}={value} with zo_training: {why}; set {name}=1.")
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


def _check_supports_lora(model: str, options: Mapping[str, Any]) -> None:
    """Refuse a model without LoRA layers before its weights are loaded; vLLM itself notices after."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import supports_lora

    given = {name: options[name] for name in _MODEL_OPTIONS if name in options}
    model_config = EngineArgs(model=model, **given).create_model_config()
    model_class, _ = model_config.registry.resolve_model_cls(model_config.architectures, model_config)
    if not supports_lora(model_class):
        raise ConfigError(
            f"model={model!r}: {model_class.__name__} has no LoRA support in the installed vLLM, and probes are LoRA "
            "adapters; choose a model of a supported architecture (vLLM's list of supported models has a column LoRA)."
        )
