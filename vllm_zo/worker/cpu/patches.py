"""Patches of vLLM for CPU workers. `install` is for every process, the rest for a training worker."""

from __future__ import annotations

import builtins
from typing import Any

import torch

from vllm_zo.compat.registry import Patch

CPU_LINEAR = Patch(
    target="vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
    why="without AVX512-BF16 or AMX a 16-bit layer is multiplied by emulation, 3 to 8 times slower than in float32; "
    "with AMX, oneDNN builds a kernel for each row count, and at some it leaves a product to one thread; in float32 it "
    "waits for weights to come from memory",
    how="16-bit layers get a product of ours: one that widens the weight block by block, or one with AMX's tiles; "
    "float32 ones one for AVX-512; all others are left to vLLM",
    upstream="none yet",
    remove_when="vLLM's CPU backend chooses by instructions, splits products among all threads, and fetches weights",
    series="none: a choice of kernel for some CPUs; upstream would want numbers from more of them first",
)
GROUPED_LORA = Patch(
    target="vllm.platforms.cpu:CpuPlatform.get_punica_wrapper",
    why="stock CPU LoRA gathers A and B per token (lora_ops.py), which dominates a step of a few hundred tokens",
    how="names our wrapper, a subclass of PunicaWrapperCPU with one GEMM per run of tokens that share an adapter",
    upstream="none yet",
    remove_when="vLLM's CPU backend groups tokens by adapter",
    series="0005-cpu-grouped-lora.patch",
    built_in="vllm.lora.punica_wrapper.punica_selector:choose_punica_wrapper",
)
ONE_PROCESS = Patch(
    target="vllm.platforms.cpu:CpuPlatform.check_and_update_config",
    why="an engine in a process of its own starts another for its only worker, since OpenMP reads only when it starts "
    "which cores its threads are bound to: six seconds of each start, 0.4 GiB, a message there and back a step",
    how="where VLLM_CPU_OMP_THREADS_BIND=nobind says that nothing is bound, the worker stays in the engine's process",
    upstream="none yet",
    remove_when="vLLM keeps the worker there if nothing is bound",
    series="none: a line for a report of its own, it has nothing to do with training",
)
SAFE_VARS = Patch(
    target="vllm.triton_utils.dispatcher:vars",
    why="every new CPU engine scans all modules for Triton kernels; once llvmlite is loaded (numba loads it), the scan "
    "trips over its library object, whose __dict__ is not a dictionary ("
    "AttributeError: '_lib_fn_wrapper' object has no attribute 'get')",
    how="gives that module a `vars` that answers {} for such objects",
    upstream="none yet: _rebind_kernels should check isinstance(vars(value), dict)",
    remove_when="the scan skips objects whose __dict__ is not a dictionary",
    series="0007-kernel-scan.patch",
    built_in="vllm.triton_utils.dispatcher:_instance_dict",
    optional=True,  # there is no such scan in 0.30
)
PACKED_WEIGHT = Patch(
    target="vllm.model_executor.kernels.linear.scaled_mm.cpu:CPUInt8ScaledMMLinearKernel.process_weights_for_onednn",
    why="LoRA asks a layer's weight for its device, and an int8 layer has none once oneDNN has packed it ("
    "AttributeError: 'NoneType' object has no attribute 'device'): no int8 model starts with LoRA",
    how="leaves an empty weight there, as vLLM does where it packs unquantised weights",
    upstream="none yet",
    remove_when="the kernel leaves a weight that has a device",
    series="none: a line for a report of its own, it has nothing to do with training",
    optional=True,  # releases before 0.32 have the kernel elsewhere
)
INTEGER_KERNEL = Patch(
    target="vllm.model_executor.kernels.linear.scaled_mm.cpu:check_cpu_sgl_kernel",
    why="with AMX a small int8 layer gets a kernel that takes 16-bit activations only: a model in float32 ends at its "
    "first forward (int8_scaled_mm_with_quant: expect A to be bfloat16 or half)",
    how="in a model of another type such a layer gets oneDNN's product, as large ones do",
    upstream="none yet",
    remove_when="vLLM asks for the type of the activations before it chooses that kernel",
    series="none: a line for a report of its own, it has nothing to do with training",
    optional=True,  # releases before 0.32 have the kernel elsewhere
)
_WHY = "members of a probe that begin alike are computed alike again and again, and the last layer runs for every token"
_SERIES = "none: of use only to requests that a scheduler makes for itself, so 0004 has to be there first"
_REMOVE = "vLLM shares prefixes inside a batch and prunes the last layer to the rows that are read"
MODEL_FORWARD = Patch(
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
    why=_WHY,
    how="in a step with members, the model gets the distinct rows only; what it returns is expanded again",
    upstream="none yet",
    remove_when=_REMOVE,
    series=_SERIES,
)
ATTENTION = Patch(
    target="vllm.model_executor.layers.attention.attention:Attention.forward",
    why=_WHY,
    how="inside such a forward, query, key and value are expanded to all rows and the output is cut down again",
    upstream="none yet",
    remove_when=_REMOVE,
    series=_SERIES,
)
LORA_LINEAR = Patch(
    target="vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.apply",
    why=_WHY,
    how="inside such a forward and past its last attention, only the needed rows are multiplied",
    upstream="none yet",
    remove_when=_REMOVE,
    series=_SERIES,
)
DECODER_LAYER = Patch(
    target="vllm.model_executor.models.llama:LlamaDecoderLayer.forward",
    why="the layers below the first one that a job trains compute the same for all its probes, and at every step",
    how=(
        "of every numbered layer, of whatever class: inside such a forward it gets the rows that differ there, and a "
        "layer whose rows are all kept from an earlier step is left out"
    ),
    upstream="none yet",
    remove_when="vLLM shares the layers below an adapter's first module between adapters",
    series=_SERIES,
)

WRAPPER = "vllm_zo.worker.cpu.lora.GroupedPunicaWrapper"


def install() -> None:
    """Apply the patches of classes and modules. They have to be there before vLLM makes an engine or loads a model.

    Raises:
        PatchConflictError: a patch does not fit the installed vLLM.
    """
    _choose_products()
    _group_lora()
    _keep_worker_in_engine()
    _survive_kernel_scan()


def choose_wrapper() -> None:
    """Make a vLLM that groups tokens by itself, where GROUPED_LORA steps aside, use our LoRA wrapper all the same: only
    ours knows what the slots of a probe share. To be called before the model is loaded, which makes the wrappers."""
    if GROUPED_LORA.unneeded():
        from vllm.lora.punica_wrapper.punica_selector import choose_punica_wrapper

        choose_punica_wrapper(WRAPPER)


def mend_int8_layers() -> None:
    """Let LoRA find the device of int8 layers, and float32 models run small ones.

    To be called before the model is loaded, and in its process only: vLLM's kernels take more than half a second to
    import.

    Raises:
        PatchConflictError: the patch does not fit the installed vLLM.
    """
    if PACKED_WEIGHT.unneeded():
        return
    from vllm.model_executor.kernels.linear.scaled_mm import cpu as kernels

    Kernel, original_check = kernels.CPUInt8ScaledMMLinearKernel, kernels.check_cpu_sgl_kernel
    original = Kernel.process_weights_for_onednn

    def process_weights_for_onednn(self: Any, layer: Any) -> None:
        original(self, layer)
        name = self.layer_param_names[0]
        if getattr(layer, name) is None:
            setattr(layer, name, torch.nn.Parameter(torch.empty(0, dtype=torch.int8), requires_grad=False))

    def check_cpu_sgl_kernel(n: int, k: int, dtype: torch.dtype) -> bool:
        # While vLLM loads a model, torch's default type is the model's.
        fits = torch.get_default_dtype() in (torch.bfloat16, torch.float16)
        return fits and original_check(n, k, dtype)

    PACKED_WEIGHT.apply(Kernel, "process_weights_for_onednn", process_weights_for_onednn)
    INTEGER_KERNEL.apply(kernels, "check_cpu_sgl_kernel", check_cpu_sgl_kernel)


def _choose_products() -> None:
    from vllm.model_executor.layers import utils

    from vllm_zo.worker.cpu import fused_linear
    from vllm_zo.worker.cpu.linear import is_emulated, widened_linear

    original = utils.dispatch_cpu_unquantized_gemm

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        if weight.is_meta or weight.ndim != 2:
            original(layer, remove_weight)
        elif is_emulated(weight.dtype):
            layer.cpu_linear = widened_linear
        elif fused_linear.fits(weight):
            layer.cpu_linear = fused_linear.FusedLinear(weight)
            if remove_weight:
                layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
        else:
            original(layer, remove_weight)

    CPU_LINEAR.apply(utils, "dispatch_cpu_unquantized_gemm", dispatch_cpu_unquantized_gemm)


def _group_lora() -> None:
    from vllm.platforms.cpu import CpuPlatform

    def get_punica_wrapper(cls: type) -> str:
        return WRAPPER

    GROUPED_LORA.apply(CpuPlatform, "get_punica_wrapper", classmethod(get_punica_wrapper))


def _keep_worker_in_engine() -> None:
    from vllm import envs
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        parallel = vllm_config.parallel_config
        asked = parallel.distributed_executor_backend
        original(cls, vllm_config)
        if asked == "uni" and envs.VLLM_CPU_OMP_THREADS_BIND == "nobind":
            parallel.distributed_executor_backend = "uni"

    ONE_PROCESS.apply(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))


def _survive_kernel_scan() -> None:
    if SAFE_VARS.unneeded():
        return
    from vllm.triton_utils import dispatcher

    def safe_vars(value: Any) -> dict[str, Any]:
        found = builtins.vars(value)
        # vars() of a class is a mappingproxy: no dict, but it has what the scan needs.
        return found if isinstance(found, dict) or hasattr(found, "items") else {}

    # Python looks in the module before the builtins, so this `vars` is found by the module's own functions only.
    SAFE_VARS.apply(dispatcher, "vars", safe_vars, adds=True)
