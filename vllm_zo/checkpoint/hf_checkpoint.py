"""A Hugging Face checkpoint on disk: where it is, a cheap fingerprint of it, and rewriting its weights file by file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_zo.checkpoint.files import replacing, write_atomically
from vllm_zo.errors import ConfigError
from vllm_zo.methods.base import ModuleShape
from vllm_zo.methods.targets import EMBEDDINGS, kind_of

SAFETENSORS_INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx"}
"""Weights in any format: only the rewritten ones belong to a merged model."""
SAMPLES, SAMPLE_BYTES = 16, 4096
"""Per weight file, for the fingerprint: any fine-tuning that moves most weights shows in 64 KB."""
CONFIG_NOISE = ("_name_or_path", "transformers_version")


def resolve_model_dir(name: str) -> Path:
    """Directory of a model given as a directory or as a Hub name that is in the local cache. Downloads nothing.

    Raises:
        ConfigError: neither.
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
    """The files `transformers` would load the weights from, safetensors first; empty when there are none."""
    for index, single in zip((SAFETENSORS_INDEX, BIN_INDEX), SINGLE_FILES, strict=True):
        if (directory / single).exists():
            return [directory / single]
        if (directory / index).exists():
            names = set(json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values())
            return [directory / name for name in sorted(names)]
    return []


def base_fingerprint(name: str) -> str:
    """16 hexadecimal digits of a base model: its config, and size and samples of its weight files.

    Reads 64 KB a file, so it costs milliseconds; equal for copies in other places. A model that is not on this disk
    (loaded from object storage) is known by its name only.
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
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()


def keys_of(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    return [key for key, _ in tensors_of(path)]


def locate(modules: Iterable[ModuleShape], directory: Path) -> dict[str, ModuleShape]:
    """Checkpoint key -> module, for every module.

    Some checkpoints were saved from the model without its head: their keys lack the first part of the name
    ("decoder..." for "model.decoder...").

    Raises:
        ConfigError: the directory holds no weights, or none for a module.
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
        if found is None:
            raise ConfigError(
                f"{directory}: no weight of module {module.name!r} among keys such as {min(keys)!r}; expected the "
                "model that was trained."
            )
        located[found] = module
    return located


def check_weight(module: ModuleShape, weight: Tensor, directory: Path) -> None:
    """Raise ConfigError when a weight is not the (out, in) floating-point matrix that was trained; (in, out) if it is
    an embedding, which has a row a token."""
    expected = (module.out_features, module.in_features)
    if kind_of(module.name) == EMBEDDINGS:
        expected = expected[::-1]
    if tuple(weight.shape) != expected or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"{directory}: {module.name} is {tuple(weight.shape)} {weight.dtype}, expected {expected} in float32, "
            "bfloat16 or float16; a quantised base cannot be merged into, export the adapter instead."
        )


def rewrite_checkpoint(
    source: Path, target: Path, edit: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None
) -> None:
    """Copy a checkpoint, passing every tensor through `edit(key, tensor)`; one file in memory at a time.

    Tokenizer, configuration and code come along; weights are written as safetensors; the index comes last, so an
    interrupted copy does not load.

    Args:
        dtype: also cast every floating-point tensor, and say so in `config.json`; None keeps what is there.

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
    """Contiguous tensors of which no two share memory (tied weights in .bin files do): safetensors refuses others."""
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
