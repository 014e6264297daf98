"""Starting a CPU engine after numba was imported: a second engine in one process, or a replay before the first."""

from __future__ import annotations

import builtins
from typing import Any

from vllm_zo.compat.registry import Patch

SAFE_VARS = Patch(
    target="vllm.triton_utils.dispatcher:vars",
    why="every new CPU engine scans all modules for Triton kernels; once llvmlite is loaded, the scan trips over its "
    "library object, whose __dict__ is not a dictionary ("
    "AttributeError: '_lib_fn_wrapper' object has no attribute 'get')",
    how="gives that module a `vars` that answers {} for such objects",
    upstream="none yet: _rebind_kernels should check isinstance(vars(value), dict)",
    remove_when="the scan skips objects whose __dict__ is not a dictionary",
    series="0007-kernel-scan.patch",
    built_in="vllm.triton_utils.dispatcher:_instance_dict",
    optional=True,  # there is no such scan in 0.30
)


def install() -> None:
    if SAFE_VARS.unneeded():
        return
    from vllm.triton_utils import dispatcher

    def safe_vars(value: Any) -> dict[str, Any]:
        found = builtins.vars(value)
        return found if isinstance(found, dict) or hasattr(found, "items") else {}

    SAFE_VARS.apply(dispatcher, "vars", safe_vars, adds=True)
