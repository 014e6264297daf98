"""Last step of `ci/install.sh`: make `import vllm` work, and prove that it does. Runs with the interpreter of .venv.

vLLM requires torchvision, torchaudio and torchcodec. Beside a CPU build of torch, pip may bring their wheels for the
CUDA build from PyPI (their version requirements do not tell the two apart). Those raise at import ("operator
torchvision::nms does not exist", "libc10_cuda.so: cannot open shared object file"), and `import vllm` fails with them,
because transformers and vLLM import whichever is present. Text models need none of the three: what cannot be imported
is removed.
"""

import importlib.util
import subprocess
import sys

TORCH_EXTRAS = ("torchvision", "torchaudio", "torchcodec")


def import_error(module: str) -> str | None:
    """Last line of what `import module` prints when it fails in a fresh process; None when it works."""
    child = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
    return lines[-1] if child.returncode else None


def drop_broken_torch_extras() -> None:
    for module in TORCH_EXTRAS:
        if importlib.util.find_spec(module) is None:
            continue
        if error := import_error(module):
            print(f"install: removing {module}, which does not import beside this torch ({error[:120]})")
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", module], check=True)


def check_vllm() -> None:
    """Import vLLM and load its kernels: with a system library missing vLLM only warns, and the first model fails."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    assert vllm.LLM is not None  # resolves vLLM's lazy imports, transformers among them
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "rms_norm"):
        sys.exit(
            "install: vLLM's compiled kernels did not load; the warning above names the library that is missing. "
            "Where it is libnuma.so.1, on Debian and Ubuntu: apt install libnuma1"
        )
    versions = f"vLLM {vllm.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    print(f"install: {versions} on {current_platform.device_type}")


if __name__ == "__main__":
    drop_broken_torch_extras()
    check_vllm()
