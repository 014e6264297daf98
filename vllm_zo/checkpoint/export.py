"""Exports a run as a PEFT adapter (`bank` space), or as the whole model with the update merged (both spaces)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import AutoConfig

from vllm_zo import noise
from vllm_zo.checkpoint.adapter_files import CONFIG, WEIGHTS
from vllm_zo.checkpoint.compress import truncate
from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.hf_checkpoint import (
    check_weight,
    locate,
    resolve_model_dir,
    rewrite_checkpoint,
    tensors_of,
    weight_files,
)
from vllm_zo.checkpoint.replay import rebuild_state, replay_weights
from vllm_zo.checkpoint.seed_log.reader import SeedLog
from vllm_zo.errors import ConfigError
from vllm_zo.methods.adapter import whole_adapter
from vllm_zo.methods.fold import fold_into
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.methods.state import AdapterState
from vllm_zo.methods.targets import EMBEDDINGS, LINEAR, kind_of
from vllm_zo.slot_fit import SLOT_RANKS
from vllm_zo.validation import check_int

MERGE_STREAM = "merge"
PEFT_PREFIX = "base_model.model."
"""What `peft` puts before the name of a module."""


@dataclass(frozen=True)
class AdapterReport:
    """What `export_peft` wrote.

    Attributes:
        rank: rank of the adapter.
        bases: bases that hold an update.
        discarded_energy: share of the update's squared Frobenius norm that compression dropped; 0.0 when exact.
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

    The adapter has no columns for bases without an update, so that an early export is narrow. Without `rank` it is
    exact in float32.

    Args:
        state: the state of a `bank` job (in `fold` space most of the update is in the base: use `export_merged`).
        base_model: the model that users load the adapter onto; named in the adapter's configuration.
        rank: compress to this rank by a truncated SVD of each module's update; the report says how much that loses.

    Raises:
        ConfigError: `rank` is not from 1 to the exact rank.
        JobError: the directory cannot be written.
    """
    directory = Path(directory)
    bases = tuple(state.touched_bases()) or (0,)  # before the first step: one basis of zeros, as `whole_adapter` has it
    exact_rank = len(bases) * state.layout.rank
    if rank is not None:
        check_int("rank", rank, 1, exact_rank, fix=f"the adapter is exact at rank {exact_rank}")
    tensors: dict[str, Tensor] = {}
    dropped = total = 0.0
    for module, u_OR, v_IR in whole_adapter(state):
        u_OR, v_IR = u_OR.cpu(), v_IR.cpu()
        if rank is not None:
            u_OR, v_IR, module_dropped, module_total = truncate(u_OR, v_IR, rank)
            dropped, total = dropped + module_dropped, total + module_total
        a, b = (f"{PEFT_PREFIX}{module.name}.{key}" for key in _peft_keys(module))
        tensors[a], tensors[b] = v_IR.T.to(dtype).contiguous(), u_OR.to(dtype).contiguous()
    width = exact_rank if rank is None else rank
    warnings = _rank_warnings(width)
    report = AdapterReport(directory, width, bases, dropped / total if total else 0.0, warnings)
    write_atomically(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomically(directory / "README.md", _model_card(state, base_model, report).encode())
    # Last: without it neither peft nor vLLM takes the directory for an adapter, so an interrupted export does not load.
    write_atomically(directory / CONFIG, _adapter_config(state, base_model, width).encode())
    return report


def read_peft(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read back what `export_peft` wrote: module -> U (O, R) and V (I, R)."""
    found: dict[str, dict[str, Tensor]] = {}
    # From bytes: each tensor of a file that safetensors 0.8 opens for torch loses two objects, and a job without end
    # reads many files.
    for key, tensor in load((directory / WEIGHTS).read_bytes()).items():
        module, _, factor = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        found.setdefault(module, {})["A" if "A" in factor else "B"] = tensor
    return {module: (factors["B"], factors["A"].T) for module, factors in found.items()}


def _peft_keys(module: ModuleShape) -> tuple[str, str]:
    """The names that `peft` gives to the factors of a module: A, then B."""
    if kind_of(module.name) == EMBEDDINGS:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


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

    From the state or the log of a `bank` job, it adds the update in float32 and rounds it to the weights' dtype
    stochastically. The noise comes from the job's seed, so that two exports have the same bytes. From the log of a
    `fold` job, it replays the folds in the engine's dtype, which the whole checkpoint then has. On the engine's kind of
    device the replay gives the weights that the engine had.

    It works on the CPU, file by file; a `fold` replay also holds the target weights in memory.

    Args:
        base_model: directory, or Hub name in the local cache.
        upto: with a log, use its first `upto` steps.

    Raises:
        ConfigError: the base is not the one in the log, lacks a module, is quantised, has embeddings and head in one
            matrix of which the job trained one, or is `directory` itself; or `upto` is beyond the log.
        JobError: the directory cannot be written.
    """
    base, target = resolve_model_dir(base_model), Path(directory)
    if isinstance(source, SeedLog):
        source.header.check_base(base_model, fix="give the directory of that model")
        if source.header.update_space == "fold":
            return _merge_folds(base, source, target, upto)
        source = rebuild_state(source, upto)
    elif upto is not None:
        raise ConfigError(f"upto={upto}: only a seed log can be cut; a state has no steps.")
    return _merge_state(base, source, target)


def _merge_state(base: Path, state: AdapterState, target: Path) -> None:
    _check_untied(base, state)
    located = locate(state.layout.modules, base)
    factors = {module.name: (u.cpu(), v.cpu()) for module, u, v in whole_adapter(state)}
    key = noise.derive_key(state.job_seed, MERGE_STREAM)

    def add(name: str, weight: Tensor) -> Tensor:
        if (module := located.get(name)) is None:
            return weight
        check_weight(module, weight, base)
        u, v = factors[module.name]
        if kind_of(module.name) == EMBEDDINGS:  # its weight is (tokens, dim): (in, out), not (out, in)
            u, v = v, u
        return fold_into(weight, u, v, key, module.name)

    rewrite_checkpoint(base, target, add)


def _check_untied(base: Path, state: AdapterState) -> None:
    """Refuse a base whose embeddings and head are one matrix, if the job trained one of them: the merged matrix would
    change the other as well."""
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
                # In the engine's dtype before the first fold: each fold rounds the value that it finds.
                weights[module.name] = weight.to(header.torch_dtype)
    folded = replay_weights(weights, log, upto)
    rewrite_checkpoint(
        base, target, lambda name, old: folded[located[name].name] if name in located else old, header.torch_dtype
    )
