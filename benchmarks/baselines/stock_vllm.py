"""What a user can do with vLLM as it is: a trainer outside the engine asks it for losses.

    FileAdapters    writes both probes as LoRA adapters into files, which vLLM loads at every step
    InPlace         a worker extension adds eps U V^T to the weights, takes it away twice, and updates, by RPC

Both score prompts only, as generation of one token out of the two options. vLLM's processed log-probabilities are then
normalised over the two options. The engine core runs in this process, which saves a socket.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import gpu
from benchmarks.baselines.common import Directions, Layout, Step, linears_of, load_model
from benchmarks.shapes import Shape

SLOT_RANK = 16
"""Rank of an adapter slot, as in ours: one block for the perturbation, the others for the update of each V."""


class StockVLLM(Step):
    """A step whose losses come from `LLM.generate`."""

    engine: ClassVar[dict[str, Any]] = {}

    def load(self, model_dir: str | Path) -> None:
        self.model_dir = model_dir
        if self.device == "cpu":
            self.start({"max_num_seqs": 256})

    def prepare(self, batches: list[list[list[int]]]) -> int:
        tokens = [2 * sum(map(len, batch)) for batch in batches]
        options = gpu.engine_options(str(self.model_dir), tokens, 2 * max(map(len, batches)))
        self.start(options)
        return len(options["compilation_config"]["cudagraph_capture_sizes"])

    def start(self, options: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            str(self.model_dir), dtype=str(self.dtype).removeprefix("torch."), logprobs_mode="processed_logprobs",
            enable_prefix_caching=False, **self.engine, **options,
        )  # fmt: skip
        self.params = SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=2, allowed_token_ids=self.options, detokenize=False
        )

    def mean_losses(self, batch: list[list[int]], labels: Tensor, adapters: list[Any]) -> list[float]:
        """The mean nats of the batch under each of the adapters (None stands for no adapter), from one call."""
        prompts = [{"prompt_token_ids": ids} for _ in adapters for ids in batch]
        requests = [adapter for adapter in adapters for _ in batch]
        outputs = self.llm.generate(prompts, self.params, lora_request=requests, use_tqdm=False)
        right = [self.options[label] for label in labels.tolist()] * len(adapters)
        nats = [-o.outputs[0].logprobs[0][token].logprob for o, token in zip(outputs, right, strict=True)]
        return torch.tensor(nats).view(len(adapters), -1).mean(1).tolist()


def write_adapter(directory: Path, shape: Shape, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Write a LoRA adapter in the format of PEFT.

    Args:
        a, b: (I, R) and (O, R) of each linear weight, layer by layer, in the order of `Shape.linears`.
    """
    tensors, names, rank = {}, list(shape.linears), a[0].shape[1]
    for i, (a_IR, b_OR) in enumerate(zip(a, b, strict=True)):
        layer, module = divmod(i, len(names))
        name = f"base_model.model.{shape.layers_path}.{layer}.{names[module]}"
        tensors[f"{name}.lora_A.weight"] = a_IR.T.contiguous()
        tensors[f"{name}.lora_B.weight"] = b_OR.contiguous()
    targets = [name.rpartition(".")[2] for name in names]
    # vLLM scales an adapter by alpha / r: equal numbers make that 1.
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")


class FileAdapters(StockVLLM):
    """An adapter holds [V, V_0, V_1, ...] and [+/- eps U, U_acc of each V]. When the slot's rank has no room for
    another V, the first returns, as in ours."""

    engine: ClassVar[dict[str, Any]] = {
        "enable_lora": True,
        "max_loras": 2,
        "max_cpu_loras": 2,
        "max_lora_rank": SLOT_RANK,
    }

    def load(self, model_dir: str | Path) -> None:
        memory = Path("/dev/shm")  # a file system in memory: the fastest place for the files
        self.files = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
        self.bases = SLOT_RANK // self.rank - 1
        self.learnt: dict[int, tuple[Tensor, Tensor]] = {}
        """V (sum I, R) and U_acc (sum O, R) of each basis."""
        super().load(model_dir)

    def _step(self, batch: list[list[int]], labels: Tensor) -> tuple[float, float]:
        from vllm.lora.request import LoRARequest

        basis = self.step_index // self.interval % self.bases
        if basis not in self.learnt:
            v = self.directions.v(basis)
            self.learnt[basis] = v, torch.zeros(sum(self.layout.out_features), self.rank, device=self.device)
        v, acc = self.learnt[basis]
        u = self.directions.u(self.step_index)
        requests = []
        for probe, sign in enumerate((1, -1)):
            # A number that vLLM has not seen: with a known one it would use the adapter in its cache.
            number = 1 + 2 * self.step_index + probe
            self.write(Path(self.files.name) / str(probe), v, sign * self.eps * u)
            requests.append(LoRARequest(f"probe-{number}", number, f"{self.files.name}/{probe}"))
        plus, minus = self.mean_losses(batch, labels, requests)
        acc.sub_(u, alpha=self.lr * self.coefficient(plus, minus))
        return plus, minus

    def write(self, directory: Path, v: Tensor, u: Tensor) -> None:
        """Write an adapter in the format of PEFT."""
        pairs = [(v, u), *self.learnt.values()]
        a = self.layout.split_v(torch.cat([v for v, _ in pairs], 1).to(self.dtype))
        b = self.layout.split_u(torch.cat([u for _, u in pairs], 1).to(self.dtype))
        write_adapter(directory, self.shape, a, b)

    def effective_weights(self) -> list[Tensor]:
        model = load_model(self.model_dir, torch.float32, self.device)
        weights = [linear.weight for linear in linears_of(model, self.shape)]
        for v, acc in self.learnt.values():
            factors = zip(self.layout.split_u(acc), self.layout.split_v(v), strict=True)
            weights = [w.addmm(u, v.T) for w, (u, v) in zip(weights, factors, strict=True)]
        return weights


class InPlace(StockVLLM):
    """A step makes three sweeps over the weights: +eps, -2 eps, and +eps together with the update."""

    engine: ClassVar[dict[str, Any]] = {"worker_extension_cls": "benchmarks.baselines.stock_vllm.AddsDirections"}

    def start(self, options: dict[str, Any]) -> None:
        with plain_weights() if self.device == "cpu" else nullcontext():
            super().start(options)
        self.llm.collective_rpc("set_directions", args=(self.directions, self.layout))

    def _step(self, batch: list[list[int]], labels: Tensor) -> tuple[float, float]:
        step, epoch = self.step_index, self.step_index // self.interval
        self.llm.collective_rpc("add_direction", args=(step, epoch, self.eps))
        (plus,) = self.mean_losses(batch, labels, [None])
        self.llm.collective_rpc("add_direction", args=(step, epoch, -2 * self.eps))
        (minus,) = self.mean_losses(batch, labels, [None])
        change = self.eps - self.lr * self.coefficient(plus, minus)
        self.llm.collective_rpc("add_direction", args=(step, epoch, change))
        return plus, minus

    def effective_weights(self) -> list[Tensor]:
        (weights,) = self.llm.collective_rpc("weights_in_scope")
        return [weight.float().clone() for weight in weights]


class AddsDirections:
    """The extension that vLLM mixes into its worker (`worker_extension_cls`)."""

    model_runner: Any

    def set_directions(self, directions: Directions, layout: Layout) -> None:
        self.directions, self.layout = directions, layout

    def weights_in_scope(self) -> list[Tensor]:
        """Views of the trained weights, in the order of `Layout`. In vLLM q, k and v are one weight."""
        views: list[Tensor] = []
        for layer in self.model_runner.get_model().model.decoder.layers:
            attention = layer.self_attn
            views += attention.qkv_proj.weight.data.chunk(3)
            views += [attention.out_proj.weight.data, layer.fc1.weight.data, layer.fc2.weight.data]
        return views

    @torch.inference_mode()
    def add_direction(self, step: int, epoch: int, factor: float) -> None:
        us, vs = self.layout.split_u(self.directions.u(step)), self.layout.split_v(self.directions.v(epoch))
        for weight, u, v in zip(self.weights_in_scope(), us, vs, strict=True):
            weight.addmm_(u.to(weight.dtype), v.T.to(weight.dtype), alpha=factor)


@contextmanager
def plain_weights() -> Iterator[None]:
    """Make models that load in the block multiply with plain weights. By default vLLM packs them on a CPU, and
    `AddsDirections` could not write into the packed form."""
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    pack, utils.dispatch_cpu_unquantized_gemm = utils.dispatch_cpu_unquantized_gemm, plain
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack
