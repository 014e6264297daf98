"""Our CPU kernels (`native.cpp`, `tiles.cpp`, `panels.cpp`): compiled once for a machine, kept in vLLM's cache.

They do in one pass each what torch does in many operators, a third to a half of a small model's step
(docs/performance.md). Where they cannot be compiled, and for 16-bit types other than bfloat16, torch's operators do the
same. `ZO_NATIVE_KERNELS=0` turns them off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler
from vllm import envs
from vllm.logger import init_logger

from vllm_zo import noise
from vllm_zo.methods import fold

logger = init_logger("vllm.zo.worker")

SOURCES = [Path(__file__).with_name(name) for name in ("native.cpp", "tiles.cpp", "panels.cpp")]
HEADERS = [Path(__file__).with_name(name) for name in ("low_rank.h", "parts.h", "tile_packing.h", "transpose.h")]
SWITCH = "ZO_NATIVE_KERNELS"
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""By torch's name for what the CPU has. Nothing for others: a compiler's own choice runs everywhere."""
COMPILE_SECONDS = 120
FAILURES = (OSError, RuntimeError, subprocess.SubprocessError)
"""Of a compilation, and of loading what it has made."""
DTYPES = (torch.float32, torch.bfloat16)
MAX_SLICES = 4


class Factors(ctypes.Structure):
    """See native.cpp."""

    _fields_ = (
        ("slices", ctypes.c_int64), ("inputs", ctypes.c_int64), ("ranks", ctypes.c_int64),
        ("outputs", ctypes.c_int64 * MAX_SLICES),
        ("a", ctypes.c_void_p * MAX_SLICES), ("b", ctypes.c_void_p * MAX_SLICES),
    )  # fmt: skip


class Piece(ctypes.Structure):
    """See native.cpp."""

    _fields_ = (
        ("slots", ctypes.c_void_p), ("slot_stride", ctypes.c_int64), ("feature_stride", ctypes.c_int64),
        ("rank_stride", ctypes.c_int64), ("features", ctypes.c_int64), ("offset", ctypes.c_int64),
    )  # fmt: skip


class Heads(ctypes.Structure):
    """See native.cpp."""

    _fields_ = (
        ("heads", ctypes.c_int64), ("kv_heads", ctypes.c_int64), ("width", ctypes.c_int64),
        ("window", ctypes.c_int64), ("scale", ctypes.c_float),
    )  # fmt: skip


class Sequences(ctypes.Structure):
    """See native.cpp."""

    _fields_ = (
        ("count", ctypes.c_int64), ("starts", ctypes.c_void_p), ("rows", ctypes.c_void_p), ("writes", ctypes.c_void_p),
    )  # fmt: skip


_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "zo_gate": (_POINTER, _POINTER, _INT64, _INT64, ctypes.c_int, ctypes.c_int),
    "zo_low_rank": (
        _POINTER, _INT64, _POINTER, _INT64, ctypes.POINTER(Factors), _POINTER, _INT64, ctypes.c_float, ctypes.c_int,
    ),
    "zo_write_slots": (
        _POINTER, _POINTER, _INT64, _INT64, _INT64, _INT64, ctypes.c_float, ctypes.c_int,
    ),
    "zo_round": (
        _POINTER, _POINTER, _INT64, _INT64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64,
    ),
    "zo_attend": (
        _POINTER, _INT64, _POINTER, _INT64, _POINTER, _INT64, _POINTER, ctypes.POINTER(Sequences),
        ctypes.POINTER(Heads), ctypes.c_int,
    ),
}  # fmt: skip
_PACKING = (_POINTER, _POINTER, _INT64, _INT64)
_PRODUCT = (
    _POINTER, _INT64, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _INT64, ctypes.POINTER(Factors), _POINTER,
    _INT64,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A product of ours, for one type of weight. A packed weight has multiples of `outputs` and `inputs`."""

    name: str
    dtype: torch.dtype
    outputs: int
    inputs: int
    here: Callable[[], bool]
    """Whether this CPU has its instructions."""
    flags: tuple[str, ...] = ()
    """For the compiler, beside INSTRUCTIONS and those of other products that this CPU can run."""

    @property
    def pack(self) -> str:
        return f"zo_pack_{self.name}s"

    @property
    def unpack(self) -> str:
        return f"zo_unpack_{self.name}s"

    @property
    def product(self) -> str:
        return f"zo_{self.name}_product"

    def arguments(self) -> dict[str, tuple[Any, ...]]:
        return {self.pack: _PACKING, self.unpack: _PACKING, self.product: _PRODUCT}


def uses_avx512() -> bool:
    """Whether this CPU has AVX-512 and torch uses it, which its user can forbid. (With AVX2 oneDNN's products of many
    rows are faster than those of `panels.cpp`.)"""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def has_pairs() -> bool:
    """Whether this CPU has AVX-512's instructions for bfloat16."""
    return uses_avx512() and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def has_tiles() -> bool:
    """Whether this CPU has the tiles of AMX, and the system lets this process use them."""
    return has_pairs() and bool(torch.cpu.get_capabilities().get("amx_bf16", False)) and bool(torch.cpu._init_amx())


TILES = Kind("tile", torch.bfloat16, 32, 32, has_tiles, ("-mprfchw", "-mamx-tile", "-mamx-bf16"))
PAIRS = Kind("pair", torch.bfloat16, 48, 2, has_pairs, ("-mavx512bf16",))
PANELS = Kind("panel", torch.float32, 48, 1, uses_avx512)
KINDS = (TILES, PAIRS, PANELS)
"""Of one type, the fastest first."""


@functools.cache
def kind_of(dtype: torch.dtype) -> Kind | None:
    """The product of ours for layers whose weight has this type, on this machine."""
    return next((kind for kind in _kinds_here() if kind.dtype == dtype and library() is not None), None)


def _kinds_here() -> list[Kind]:
    return [kind for kind in KINDS if kind.here()]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if this machine has none, with a line in the log that says why."""
    if os.environ.get(SWITCH, "1") == "0":
        logger.info("torch's operators take the place of our CPU kernels: %s=0", SWITCH)
        return None
    try:
        return load()
    except FAILURES as e:
        logger.warning("torch's operators take the place of our CPU kernels, which are faster: %s", e)
        return None


def load() -> ctypes.CDLL:
    """The kernels, compiled if need be.

    Raises:
        FAILURES: see `compiled`; or the file cannot be loaded, or not beside torch.
    """
    loaded = ctypes.CDLL(str(compiled()))
    here = _ARGUMENTS.copy()
    for kind in _kinds_here():
        here |= kind.arguments()
    for name, arguments in here.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    if not _shares_threads(loaded):
        raise RuntimeError("they use another OpenMP library than torch: both sets of threads would fight for the cores")
    return loaded


def _shares_threads(loaded: ctypes.CDLL) -> bool:
    """Whether torch's number of threads is the kernels' too."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        return bool(loaded.zo_threads() == threads + 1)
    finally:
        torch.set_num_threads(threads)


def compiled() -> Path:
    """Compile the kernels, unless the cache has them. Processes may do so at the same time: the last one's file stays.

    Raises:
        OSError: there is no compiler, or the cache cannot be written.
        RuntimeError: the compiler refused.
        subprocess.TimeoutExpired: it did not end.
    """
    flags = [*FLAGS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())]
    for kind in _kinds_here():
        flags += kind.flags
    compiler = get_cxx_compiler()
    text = b"".join(source.read_bytes() for source in (*SOURCES, *HEADERS))
    key = hashlib.sha256(text + repr((compiler, flags, platform.machine())).encode()).hexdigest()[:16]
    directory = Path(envs.VLLM_CACHE_ROOT) / "zo_cpu_kernels"
    target = directory / f"{key}.so"
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *flags, "-shared", "-fPIC", *map(str, SOURCES), "-o", str(made)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {run.stderr.strip()[-1000:]}")
        made.replace(target)
    return target


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: all of one type that they know, their rows without gaps."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(t.dtype == dtype and t.stride(-1) == 1 for t in tensors) and library() is not None


def gate(x: Tensor, *, gelu: bool) -> Tensor:
    """SiLU, or GELU by tanh, of the first half of each row, times the second. (..., 2 d), contiguous -> (..., d)."""
    d = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], d)
    _call("zo_gate", x.data_ptr(), out.data_ptr(), out.numel() // d, d, gelu, x.dtype == torch.bfloat16)
    return out


def factors(a: Sequence[Tensor], b: Sequence[Tensor]) -> Factors | None:
    """Where a layer's factors lie. a: for each slice (slots, 1, R, I), b: (slots, 1, O_i, R). None: the kernel cannot
    take them. The tensors have to outlive the result."""
    contiguous = all(t.is_contiguous() for t in (*a, *b))
    if len(a) > MAX_SLICES or not contiguous or not fits(*a, *b) or len({t.shape for t in a}) > 1:
        return None
    made = Factors(slices=len(a), inputs=a[0].shape[3], ranks=a[0].shape[2])
    for i, (one_a, one_b) in enumerate(zip(a, b, strict=True)):
        made.outputs[i], made.a[i], made.b[i] = one_b.shape[2], one_a.data_ptr(), one_b.data_ptr()
    return made


def low_rank(y: Tensor, x: Tensor, factors: Factors, runs: Tensor, scale: float) -> None:
    """`y += scale x A^T B^T` in place.

    Args:
        y: (T, sum of outputs or more).
        x: (T, I).
        runs: (runs, 4) int64, each (start, stop, slot, ranks in use or -1 for all), ascending within the T rows.

    Raises:
        ValueError: the factors are of another layer, or y has other rows than x.
    """
    _check_factors(factors, x.shape[1], y.shape[1])
    if len(y) != len(x):
        raise ValueError(f"{len(x)} rows cannot be added to {len(y)}")
    _call(
        "zo_low_rank", y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), factors, runs.data_ptr(), len(runs),
        scale, y.dtype == torch.bfloat16,
    )  # fmt: skip


def _check_factors(factors: Factors, inputs: int, outputs: int) -> None:
    if inputs != factors.inputs or outputs < sum(factors.outputs):
        raise ValueError(
            f"rows of {inputs} numbers to {outputs}: the factors are for {factors.inputs} to {list(factors.outputs)}"
        )


def pieces(slots: Sequence[Tensor], offsets: Sequence[int]) -> ctypes.Array[Piece] | None:
    """Where the factors of modules lie. slots: of each (slots, features, LoRA ranks), of any strides; offsets: of each,
    its first number in a flat vector. None: the kernel cannot take them. The tensors have to outlive the result."""
    dtypes = {part.dtype for part in slots}
    if len(dtypes) != 1 or not dtypes <= {*DTYPES} or library() is None:
        return None
    made = [
        Piece(part.data_ptr(), *part.stride(), part.shape[1], offset)
        for part, offset in zip(slots, offsets, strict=True)
    ]
    return (Piece * len(made))(*made)


def write_slots(
    flat: Tensor, pieces: ctypes.Array[Piece], slot: int, ranks: range, factor: float, dtype: torch.dtype
) -> None:
    """`slots[slot, i, ranks[j]] = factor * flat[offset + i * len(ranks) + j]`, for every module. flat: (N,) float32,
    contiguous; dtype: of the slots."""
    _call(
        "zo_write_slots", flat.data_ptr(), pieces, len(pieces), slot, ranks.start, len(ranks), factor,
        dtype == torch.bfloat16,
    )  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, rows: Tensor, writes: Tensor, heads: Heads) -> Tensor:
    """Causal attention. q: (U, heads * width), k and v: (U, kv_heads * width) -> (U, heads * width).

    Args:
        starts: (N + 1,) int64: sequence i has the places [starts[i], starts[i + 1]).
        rows: (places,) int64: which of the U rows a place holds.
        writes: (places,) uint8: of the places with one row, 1 for the one that writes its output.
    """
    out = q.new_empty(q.shape)
    sequences = Sequences(len(starts) - 1, starts.data_ptr(), rows.data_ptr(), writes.data_ptr())
    _call(
        "zo_attend", q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), out.data_ptr(),
        sequences, heads, q.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


def pack(weight: Tensor) -> Tensor:
    """A weight (O, I) as `product` wants it: blocks of outputs and inputs, filled up with zeros. A flat tensor."""
    outputs, inputs = weight.shape
    kind = _kind_of(weight)
    packed = weight.new_empty(-(-outputs // kind.outputs) * kind.outputs * -(-inputs // kind.inputs) * kind.inputs)
    _call(kind.pack, weight.contiguous().data_ptr(), packed.data_ptr(), outputs, inputs)
    return packed


def unpack(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight (O, I) that `pack` has packed."""
    weight = packed.new_empty(outputs, inputs)
    _call(_kind_of(packed).unpack, packed.data_ptr(), weight.data_ptr(), outputs, inputs)
    return weight


def product(
    x: Tensor,
    packed: Tensor,
    outputs: int,
    bias: Tensor | None,
    factors: Factors | None = None,
    runs: Tensor | None = None,
) -> Tensor:
    """`x W^T + bias + x A^T B^T`. (T, I) -> (T, O), all of one type.

    Args:
        packed: `pack` of W, (O, I).
        bias: (O,).
        factors, runs: of the low-rank part, as in `low_rank`; without runs there is none.

    Raises:
        ValueError: x or the bias is of another type, or the factors are of another layer.
    """
    types = [t.dtype for t in (x, bias) if t is not None]
    if {*types} != {packed.dtype}:
        raise ValueError(f"a layer in {packed.dtype} got {' and '.join(map(str, types))}")
    rows, inputs = x.shape
    if factors is not None:
        _check_factors(factors, inputs, outputs)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(rows, outputs)
    _call(
        _kind_of(packed).product,
        x.data_ptr(), x.stride(0), packed.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        outputs, rows, inputs, outputs, factors, None if runs is None else runs.data_ptr(),
        0 if runs is None else len(runs),
    )  # fmt: skip
    return out


def _kind_of(weight: Tensor) -> Kind:
    kind = kind_of(weight.dtype)
    assert kind is not None, "callers ask `kind_of` first"
    return kind


def stochastic_round(
    value: Tensor, dtype: torch.dtype, key: int, module: str, first_element: int = 0, stride: int | None = None
) -> Tensor:
    """`stochastic_round` of vllm_zo/methods/fold.py, with the same bits."""
    if dtype != torch.bfloat16 or not fits(value):
        return fold.stochastic_round(value, dtype, key, module, first_element, stride)
    value = value.contiguous()
    # Without a stride the elements follow each other: lines then serve to share them among threads.
    lines, length = value.shape if value.ndim == 2 else (1, value.numel())
    out = torch.empty_like(value, dtype=dtype)
    _call(
        "zo_round", value.data_ptr(), out.data_ptr(), lines, length, key, noise.module_id(module), first_element,
        length if stride is None else stride,
    )  # fmt: skip
    return out


def _call(name: str, *arguments: Any) -> None:
    loaded = library()
    assert loaded is not None, "callers ask `fits` first"
    getattr(loaded, name)(*arguments)
