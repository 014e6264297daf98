"""A forward on CPU that leaves out the rows nobody needs; `worker/kernels/shared_rows.py` has the code."""

from __future__ import annotations

from vllm_zo.compat.registry import Patch

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


def install() -> None:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_zo.worker.kernels import shared_rows

    MODEL_FORWARD.apply(GPUModelRunner, "_model_forward", shared_rows.model_forward(GPUModelRunner._model_forward))
    ATTENTION.apply(Attention, "forward", shared_rows.attention_forward(Attention.forward))
    LORA_LINEAR.apply(BaseLinearLayerWithLoRA, "apply", shared_rows.lora_linear_apply(BaseLinearLayerWithLoRA.apply))
