"""A Hugging Face checkpoint on disk: finds it, takes a cheap fingerprint, and rewrites its weights file by file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_zo.checkpoint.files import replacing, write_atomically
from vllm_zo.errors import ConfigError
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.methods.targets import EMBEDDINGS, kind_of

SAFETENSORS_INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx"}
"""Suffixes of weights in any format: a merged model must hold only the weights that were rewritten."""
SAMPLES, SAMPLE_BYTES = 16, 4096
"""Samples of a weight file for the fingerprint: fine-tuning that moves most weights shows in any 64 KB of them."""
CONFIG_NOISE = ("_name_or_path", "transformers_version")
"""Fields of `config.json` that differ between copies of one model."""
PACKED_WEIGHTS = ("qweight", "weight_packed")
"""What GPTQ and AWQ, and compressed-tensors, call the quantised weights of a module."""
QUANTISED = "a quantised base cannot be merged into, export the adapter instead"


def resolve_model_dir(name: str) -> Path:
    """Directory of a model, from a directory or the name of a Hub model in the local cache. It downloads nothing.

    Raises:
        ConfigError: `name` is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (ValueError, OSError) as error:  # not a valid Hub name, or not in the cache
        raise ConfigError(
            f"base model {name!r}: neither a directory nor a model in the Hugging Face cache; fetch it first "
            "(`hf download`) or give the directory."
        ) from error


def weight_files(directory: Path) -> list[Path]:
    """The files from which `transformers` would load the weights (it prefers safetensors); empty if there are none."""
    for index, single in zip((SAFETENSORS_INDEX, BIN_INDEX), SINGLE_FILES, strict=True):
        if (directory / single).exists():
            return [directory / single]
        if (directory / index).exists():
            names = set(json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values())
            return [directory / name for name in sorted(names)]
    return []


def base_fingerprint(name: str) -> str:
    """16 hexadecimal digits from the config of a base model, and from the sizes and samples of its weight files.

    It reads 64 KB a file, which takes milliseconds. Copies in other places have the same fingerprint. A model that is
    not on this disk (loaded from object storage) has the fingerprint of its name.
    """
    digest = hashlib.sha256()
    try:
        directory = resolve_model_dir(name)
    except ConfigError:
        digest.update(f"name:{name}".encode())
        return digest.hexdigest()[:16]
    if (directory / "config.json").exists():
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in CONFIG_NOISE}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    for path in weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                # Evenly spread, from the first byte to the last.
                file.seek(max(size - SAMPLE_BYTES, 0) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of a weight file, one at a time, on the CPU."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict: it has no iterator)
                yield key, file.get_tensor(key)
    else:
        # `weights_only`: a .bin file is a pickle, which could run code. `mmap`: the whole file need not fit in memory.
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()


def keys_of(path: Path) -> list[str]:
    """The keys of a weight file, in its order."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    return [key for key, _ in tensors_of(path)]


def locate(modules: Iterable[ModuleShape], directory: Path) -> dict[str, ModuleShape]:
    """Checkpoint key -> module, for every module.

    The keys of some checkpoints lack the first part of the name ("decoder..." for "model.decoder..."), because they
    were saved from the model without its head.

    Raises:
        ConfigError: the directory holds no weights, none for a module, or quantised ones (GPTQ, AWQ).
    """
    files = weight_files(directory)
    if not files:
        raise ConfigError(
            f"{directory}: no {' or '.join(SINGLE_FILES)} (or their index); expected a model in that form."
        )
    keys = {key for path in files for key in keys_of(path)}
    located = {}
    for module in modules:
        full = f"{module.name}.weight"
        found = next((key for key in (full, full.partition(".")[2]) if key in keys), None)
        if found is None and (packed := {f"{module.name}.{end}" for end in PACKED_WEIGHTS} & keys):
            raise ConfigError(f"{directory}: it has {packed.pop()} in place of a weight; {QUANTISED}.")
        if found is None:
            raise ConfigError(
                f"{directory}: no weight of module {module.name!r} among keys such as {min(keys)!r}; expected the "
                "model that was trained."
            )
        located[found] = module
    return located


def check_modules(names: Iterable[str], model: str) -> None:
    """Check that the checkpoint has a module of each name: `peft` could not load the adapter of another.

    It does nothing if the checkpoint is not on this disk in files of `transformers`.

    Args:
        model: directory, or Hub name in the local cache.

    Raises:
        ConfigError: it lacks one; the message names it.
    """
    held = _modules_of(model)
    for name in names if held else ():
        if not held & {name, name.partition(".")[2]}:  # see `locate`
            raise ConfigError(
                f"{name} is no module of the checkpoint {model}, which has it in another form (perhaps merged with "
                "others), and peft could not load an adapter for it: choose target_modules without it."
            )


@lru_cache(maxsize=4)
def _modules_of(model: str) -> frozenset[str]:
    """The names of the modules that the checkpoint has weights of; empty if it is not on this disk."""
    try:
        files = weight_files(resolve_model_dir(model))
    except ConfigError:
        return frozenset()
    return frozenset(key.rpartition(".")[0] for path in files for key in keys_of(path))


def check_weight(module: ModuleShape, weight: Tensor, directory: Path) -> None:
    """Raise ConfigError unless a weight is the floating-point matrix that was trained: (out, in), or for an embedding
    (in, out), tokens by dimensions."""
    expected = (module.out_features, module.in_features)
    if kind_of(module.name) == EMBEDDINGS:
        expected = expected[::-1]
    if tuple(weight.shape) != expected or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"{directory}: {module.name} is {tuple(weight.shape)} {weight.dtype}, expected {expected} in float32, "
            f"bfloat16 or float16; {QUANTISED}."
        )


def rewrite_checkpoint(
    source: Path, target: Path, edit: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None
) -> None:
    """Copy a checkpoint, passing every tensor through `edit(key, tensor)`; one file in memory at a time.

    It copies tokenizer, configuration and code too, and writes the weights as safetensors. The index comes last, so
    that an interrupted copy of several files does not load.

    Args:
        dtype: cast every floating-point tensor to it, and name it in `config.json`; None keeps the dtypes.

    Raises:
        ConfigError: `target` is `source`.
        JobError: `target` cannot be written.
    """
    if target.exists() and target.samefile(source):
        raise ConfigError(f"directory={str(target)!r} is the base model itself; choose another directory.")
    for stale in [*target.glob("model*.safetensors"), target / SAFETENSORS_INDEX]:
        stale.unlink(missing_ok=True)  # shards of an earlier export would be loaded in place of ours
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for path in weight_files(source):
        name = path.with_suffix(".safetensors").name.replace("pytorch_model", "model")
        tensors = {key: _cast(edit(key, tensor), dtype) for key, tensor in tensors_of(path)}
        with replacing(target / name) as temporary:
            save_file(_unshared(tensors), temporary, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    _copy_others(source, target, dtype)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_atomically(target / SAFETENSORS_INDEX, json.dumps(index, indent=2, sort_keys=True).encode())


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors requires. It copies the tied weights of a .bin file."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone().contiguous() if address in seen else tensor.contiguous()
        seen.add(address)
    return result


def _copy_others(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    for path in source.iterdir():
        skip = path.suffix in NOT_COPIED or path.name.endswith(".index.json") or path.name.startswith((".", "README"))
        if not path.is_file() or skip:
            continue
        with replacing(target / path.name) as temporary:
            shutil.copyfile(path, temporary)
    if dtype is not None:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)  # the name of the field before transformers 4.56
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_atomically(target / "config.json", json.dumps(config, indent=2).encode())
