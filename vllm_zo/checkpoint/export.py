"""What a run gives away: a PEFT adapter (`bank` space), or the whole model with the update merged (both spaces)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoConfig

from vllm_zo import noise
from vllm_zo.checkpoint.compress import truncate
from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.hf_checkpoint import (
    base_fingerprint,
    check_weight,
    locate,
    resolve_model_dir,
    rewrite_checkpoint,
    tensors_of,
    weight_files,
)
from vllm_zo.checkpoint.replay import rebuild_state, replay_weights
from vllm_zo.checkpoint.seed_log import SeedLog
from vllm_zo.errors import ConfigError
from vllm_zo.methods.base import ModuleShape
from vllm_zo.methods.fold import fold_into
from vllm_zo.methods.spaces import SLOT_RANKS
from vllm_zo.methods.state import AdapterState
from vllm_zo.methods.targets import EMBEDDINGS, LINEAR, kind_of
from vllm_zo.validation import check_int

MERGE_STREAM = "merge"
_PEFT_KEYS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}
"""What `peft` calls the factors of an embedding, and of anything else."""


@dataclass(frozen=True)
class AdapterReport:
    """What was written by `export_peft`.

    Attributes:
        rank: of the adapter.
        bases: bases with an update in them.
        discarded_energy: squared Frobenius norm of the update that compression dropped, as a share of the whole; 0.0
            when exact.
        warnings: sentences for the user.
    """

    directory: Path
    rank: int
    bases: tuple[int, ...]
    discarded_energy: float
    warnings: tuple[str, ...]


def export_peft(
    state: AdapterState,
    base_model: str,
    directory: Path | str,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> AdapterReport:
    """Write the update as an adapter that `peft` and vLLM load: `A = [V_b^T; ...]`, `B = [U_b, ...]`, scaling 1.

    Bases without an update are left out, so an early export is narrow. Without `rank` the adapter is exact in float32.

    Args:
        state: of a `bank` job (in `fold` space most of the update is in the base: use `export_merged`); whole modules.
        base_model: what users load the adapter onto; goes into the adapter's configuration.
        rank: compress to this rank by a truncated SVD of each module's update; loses what the report says.

    Raises:
        ConfigError: `rank` is not from 1 to the exact rank.
        JobError: the directory cannot be written.
    """
    directory = Path(directory)
    bases = tuple(state.acc_BN.any(dim=1).nonzero().flatten().tolist()) or (0,)
    exact_rank = len(bases) * state.layout.rank
    if rank is not None:
        check_int("rank", rank, 1, exact_rank, fix=f"the adapter is exact at rank {exact_rank}")
    tensors: dict[str, Tensor] = {}
    dropped = total = 0.0
    for module, u_OR, v_IR in _factors(state, bases):
        if rank is not None:
            u_OR, v_IR, module_dropped, module_total = truncate(u_OR, v_IR, rank)
            dropped, total = dropped + module_dropped, total + module_total
        a, b = (f"base_model.model.{module.name}.{key}" for key in _PEFT_KEYS[kind_of(module.name) == EMBEDDINGS])
        tensors[a], tensors[b] = v_IR.T.to(dtype).contiguous(), u_OR.to(dtype).contiguous()
    width = exact_rank if rank is None else rank
    warnings = _rank_warnings(width)
    report = AdapterReport(directory, width, bases, dropped / total if total else 0.0, warnings)
    write_atomically(directory / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_atomically(directory / "README.md", _model_card(state, base_model, report).encode())
    write_atomically(directory / "adapter_config.json", _adapter_config(state, base_model, width).encode())
    return report


def _factors(state: AdapterState, bases: tuple[int, ...]) -> Iterator[tuple[ModuleShape, Tensor, Tensor]]:
    """Per module (module, U (out, b*r), V (in, b*r)) on the CPU, with U V^T the whole update."""
    assert state.layout.out_slices is None and state.layout.in_slices is None, "gather the shards before exporting"
    parts = [state.factors(basis, state.acc_BN[state.row(basis)]) for basis in bases]
    for index, module in enumerate(state.layout.modules):
        u_OK = torch.cat([u[index] for u, _ in parts], dim=1)
        v_IK = torch.cat([v[index] for _, v in parts], dim=1)
        yield module, u_OK.cpu(), v_IK.cpu()


def _rank_warnings(rank: int) -> tuple[str, ...]:
    if rank <= SLOT_RANKS[-1]:
        return ()
    return (
        f"the adapter has rank {rank}, vLLM serves at most {SLOT_RANKS[-1]}: export with rank={SLOT_RANKS[-1]} "
        "(lossy), merge it, or train with fewer bases.",
    )


def _adapter_config(state: AdapterState, base_model: str, rank: int) -> str:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,  # scaling = lora_alpha / r = 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Whole names: a list of last parts ("q_proj") would also name layers outside a narrower scope.
        "target_modules": [module.name for module in state.layout.modules],
    }
    return json.dumps(config, indent=2) + "\n"


def _model_card(state: AdapterState, base_model: str, report: AdapterReport) -> str:
    lossy = f"\n- compressed: {report.discarded_energy:.2%} of the update's energy was discarded"
    return f"""---
base_model: {base_model}
library_name: peft
tags: [lora, zeroth-order, vllm-zo]
---

# Adapter for {base_model}

Trained without gradients inside vLLM (vllm_zo).

- method: {state.method}
- seed: {state.job_seed}
- rank {report.rank}, scaling 1, {len(state.layout.modules)} target modules{lossy if report.discarded_energy else ""}

Serve it with `--enable-lora --max-lora-rank` at least {report.rank}, or load it with `peft`.
"""


def export_merged(
    base_model: str, source: AdapterState | SeedLog, directory: Path | str, upto: int | None = None
) -> None:
    """Write a Hugging Face checkpoint of the base with the update merged into its weights, tokenizer included.

    From a state (of a `bank` job) or the log of one: the update is added in float32 and rounded to the weights' dtype
    stochastically, with noise from the job's seed: the same export twice gives the same bytes. From the log of a `fold`
    job: the folds are replayed in the dtype the engine ran with, which the whole checkpoint then has; the weights are
    those the engine had (on the same kind of device).

    Works on the CPU, file by file; a `fold` replay holds the target weights in memory beside that.

    Args:
        base_model: directory, or Hub name in the local cache.
        upto: with a log, use its first `upto` steps.

    Raises:
        ConfigError: the base is not the one in the log, lacks a module, is quantised, or is `directory` itself.
        JobError: the directory cannot be written.
    """
    base, target = resolve_model_dir(base_model), Path(directory)
    if isinstance(source, SeedLog):
        _check_base(base_model, source)
        if source.header.update_space == "fold":
            return _merge_folds(base, source, target, upto)
        source = rebuild_state(source, upto)
    elif upto is not None:
        raise ConfigError(f"upto={upto}: only a seed log can be cut; a state has no steps.")
    return _merge_state(base, source, target)


def _check_base(base_model: str, log: SeedLog) -> None:
    fingerprint = base_fingerprint(base_model)
    if fingerprint != log.header.base_fingerprint:
        raise ConfigError(
            f"base_model={base_model!r} (fingerprint {fingerprint}) is not the model the job trained: expected "
            f"{log.header.base_model!r} (fingerprint {log.header.base_fingerprint})."
        )


def _merge_state(base: Path, state: AdapterState, target: Path) -> None:
    _check_untied(base, state)
    located = locate(state.layout.modules, base)
    factors = {module.name: (u, v) for module, u, v in _factors(state, tuple(range(state.num_bases)))}
    key = noise.derive_key(state.job_seed, MERGE_STREAM)

    def add(name: str, weight: Tensor) -> Tensor:
        if (module := located.get(name)) is None:
            return weight
        check_weight(module, weight, base)
        u, v = factors[module.name]
        if kind_of(module.name) == EMBEDDINGS:  # a row a token: the transpose of what a linear layer would have
            u, v = v, u
        return fold_into(weight, u, v, key, module.name)

    rewrite_checkpoint(base, target, add)


def _check_untied(base: Path, state: AdapterState) -> None:
    """One matrix for embeddings and head cannot hold two updates."""
    changed = [module.name for module in state.layout.modules if kind_of(module.name) != LINEAR]
    if changed and AutoConfig.from_pretrained(base).tie_word_embeddings:
        raise ConfigError(
            f"{base}: embeddings and LM head are one matrix in it, and {changed[0]!r} was trained alone: export the "
            "adapter instead."
        )


def _merge_folds(base: Path, log: SeedLog, target: Path, upto: int | None) -> None:
    header = log.header
    located = locate(header.modules, base)
    weights: dict[str, Tensor] = {}
    for path in weight_files(base):
        for name, weight in tensors_of(path):
            if (module := located.get(name)) is not None:
                check_weight(module, weight, base)
                weights[module.name] = weight.to(header.torch_dtype)
    folded = replay_weights(weights, log, upto)
    rewrite_checkpoint(
        base, target, lambda name, old: folded[located[name].name] if name in located else old, header.torch_dtype
    )
