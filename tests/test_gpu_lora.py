"""The low-rank product of CUDA engines: its tiles, its metadata, and the product itself against float64, through the
wrapper that vLLM calls. Without a GPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.children import Child, in_interpreter
from tests.engines import Engines
from vllm_zo.worker.cuda.lora_tiles import ROWS, DeviceTiles, most_tiles, plan

SLOTS = 5
IDS = [11, 12, 13, 14, 15]

batches = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 80)), max_size=8)
owners = st.lists(st.integers(0, SLOTS - 1), min_size=SLOTS, max_size=SLOTS).map(
    lambda groups: [groups.index(group) for group in groups]  # the first slot of each group owns its A
)


@settings(max_examples=100, deadline=None)
@given(batch=batches, owner=owners)
def test_every_row_with_an_adapter_is_in_one_tile_of_each_kind(batch: list[tuple[int, int]], owner: list[int]) -> None:
    slot_of_row = np.array([slot for slot, count in batch for _ in range(count)], np.int64)
    ranks = [3, 1, 4, 2, 5]
    made = plan(slot_of_row, owner, ranks)
    own, of_owner = slot_of_row.tolist(), [owner[slot] for slot in slot_of_row]
    for tiles, slot_of in ((made.expand, own), (made.shrink, of_owner)):
        seen = []
        for slot, first, count, rank in tiles.tolist():
            rows = made.rows[first : first + count].tolist()
            assert 1 <= len(rows) <= ROWS and rank == ranks[slot]
            assert {slot_of[row] for row in rows} == {slot}
            seen += rows
        assert sorted(seen) == np.flatnonzero(slot_of_row >= 0).tolist()
        assert len(tiles) <= most_tiles(len(slot_of_row), SLOTS)


def test_slots_that_share_a_share_tiles_of_the_shrink() -> None:
    """The example of `plan`, and one shrink tile instead of eight for eight short members of one basis."""
    made = plan(np.array([0] * 40 + [1] * 3), [0, 0], [4, 4])
    assert made.shrink.tolist() == [[0, 0, 32, 4], [0, 32, 11, 4]]
    assert made.expand.tolist() == [[0, 0, 32, 4], [0, 32, 8, 4], [1, 40, 3, 4]]
    slots = np.repeat(np.arange(8), 4)
    assert len(plan(slots, [0] * 8, [4] * 8).shrink) == 1
    assert len(plan(slots, range(8), [4] * 8).shrink) == 8


def test_tiles_on_the_device_are_replaced_where_they_are() -> None:
    tiles = DeviceTiles(100, SLOTS, "cpu")
    where = [tensor.data_ptr() for tensor in (tiles.rows, tiles.shrink, tiles.expand)]
    for slots in ([0] * 90, [3, -1, 3], []):
        made = plan(np.array(slots, np.int64), range(SLOTS), [1] * SLOTS)
        tiles.update(made)
        assert tiles.rows[: len(made.rows)].tolist() == made.rows.tolist()
        for held, tile in ((tiles.shrink, made.shrink), (tiles.expand, made.expand)):
            assert held[: len(tile)].tolist() == tile.tolist()
            assert (held[len(tile) :, 2] == 0).all(), "a tile of the batch before"
    assert where == [tensor.data_ptr() for tensor in (tiles.rows, tiles.shrink, tiles.expand)]


# --- the product ------------------------------------------------------------------------------------------------------


class Pool:
    """Slots that hold the same A have the same letter; the ranks in use."""

    def __init__(self, bases: str, used: Sequence[int]) -> None:
        self.bases, self.used = bases, used

    def shares_a(self, slot: int, other: int) -> bool:
        return self.bases[slot] == self.bases[other]

    def used_rank(self, slot: int) -> int:
        return self.used[slot]


def make_wrapper(rank: int, device: str) -> Any:
    from vllm_zo.worker.cuda.lora import SharedShrinkPunicaWrapper

    config = SimpleNamespace(max_loras=SLOTS, max_lora_rank=rank, specialize_active_lora=False)
    return SharedShrinkPunicaWrapper(256, 16, device, lora_config=config)


def set_batch(wrapper: Any, lora_ids: Sequence[int]) -> None:
    from vllm.lora.layers import LoRAMapping

    wrapper.update_metadata(LoRAMapping(tuple(lora_ids), tuple(lora_ids), is_prefill=True), IDS, SLOTS + 1, 100)


def check_product(
    device: str,
    dtype: torch.dtype,
    *,
    inputs: int,
    outs: tuple[int, ...],
    rank: int,
    bases: str = "abcde",
    used: Sequence[int] | None = None,
    add_inputs: bool = True,
) -> None:
    """A random mix of all slots and plain rows, in runs of 1 to 45, followed by rows of padding.

    Rank rows beyond those in use are NaN, and so is A where another slot's is to be read.
    """
    torch.manual_seed(inputs + rank)
    used = used or [rank] * SLOTS
    lora_ids = [lora_id for lora_id in (11, 0, 12, 13, 11, 15, 14, 12) for _ in range(int(torch.randint(1, 46, ())))]
    wrapper = make_wrapper(rank, device)
    wrapper.pool = Pool(bases, used)
    set_batch(wrapper, lora_ids)
    tokens = len(lora_ids) + 5
    a = [torch.randn(SLOTS, 1, rank, inputs).to(dtype) for _ in outs]
    b = [torch.randn(SLOTS, 1, out, rank).to(dtype) for out in outs]
    true_a = [part.clone() for part in a]
    for slot in range(SLOTS):
        owner = bases.index(bases[slot])
        for part, true, b_part in zip(a, true_a, b, strict=True):
            true[slot] = true[owner]
            part[slot] = true[owner] if slot == owner else torch.nan
            part[slot, :, used[slot] :] = torch.nan
            b_part[slot, ..., used[slot] :] = torch.nan
    x, y = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, sum(outs)).to(dtype)
    out = y.clone().to(device)
    on_device = [tuple(part.to(device) for part in parts) for parts in (a, b)]
    wrapper.add_lora_linear(out, x.to(device), *on_device, 0.5, outs, add_inputs=add_inputs)

    expected = y.double() if add_inputs else torch.zeros(y.shape, dtype=torch.float64)
    pairs = list(zip(true_a, b, strict=True))
    size = expected.abs()  # of what is rounded on the way
    for row, lora_id in enumerate(lora_ids):
        if lora_id == 0:
            continue
        slot = IDS.index(lora_id)
        factors = [(p[slot, 0, : used[slot]].double(), q[slot, 0, :, : used[slot]].double()) for p, q in pairs]
        expected[row] += torch.cat([0.5 * (x[row].double() @ p.T) @ q.T for p, q in factors])
        size[row] += torch.cat([(x[row].double().abs() @ p.abs().T) @ q.abs().T for p, q in factors])
    # The shrunk row and the sum are rounded once each, by half an eps; Triton's interpreter cuts bfloat16 off instead,
    # twice the error. In float32 the rounding of the sums themselves, which mostly cancels, counts as much.
    error = (out.cpu().double() - expected).abs() / size.clamp_min(1e-30)
    assert not error.isnan().any() and error.max() <= 2.0 * torch.finfo(dtype).eps, (error.max(), dtype)
    assert torch.equal(out.cpu()[len(lora_ids) :].double(), expected[len(lora_ids) :]), "rows of padding"


def check_all(device: str) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:  # + and - of two directions with one A, and a user's adapter
        check_product(device, dtype, inputs=1100, outs=(130, 66, 7), rank=16, bases="aaaae", used=[4, 4, 4, 4, 16])
        check_product(device, dtype, inputs=48, outs=(32,), rank=8)
    check_product(device, torch.float16, inputs=40, outs=(24, 24), rank=1, bases="aabbc")
    check_product(device, torch.float16, inputs=130, outs=(140,), rank=64, bases="aabbc", used=[20, 20, 64, 64, 3])
    check_product(device, torch.float32, inputs=64, outs=(20, 30), rank=128, bases="aabcd", used=[70, 70, 64, 128, 1])
    check_product(device, torch.float32, inputs=64, outs=(20, 30), rank=8, bases="aabcd", add_inputs=False)


def check_no_adapter(device: str) -> None:
    """Nothing is launched, and the metadata of the batch before do not matter."""
    wrapper = make_wrapper(8, device)
    a, b = torch.randn(SLOTS, 1, 8, 16, device=device), torch.randn(SLOTS, 1, 12, 8, device=device)
    x, y = torch.randn(3, 16, device=device), torch.ones(3, 12, device=device)
    for lora_ids, same in (((11, 12, 11), False), ((0, 0, 0), True)):
        set_batch(wrapper, lora_ids)
        before = y.clone()
        wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (12,))
        assert torch.equal(y, before) == same
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (12,), add_inputs=False)
    assert not y.any()


def check_metadata(device: str) -> None:
    """What we write on the host is what vLLM derives on the device."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    from vllm_zo.worker.cuda.lora import fill_metadata

    for captured in ([], [1, 2, 4, 6]):
        ours, theirs = (LoRAKernelMeta.make(SLOTS, 64, device, captured_lora_counts=captured) for _ in range(2))
        for slots in ([3, 3, -1, 0, 3, 4], [-1, -1], [2], [0, 1, 2, 3, 4, -1]):
            slot_of_row = torch.tensor(slots, device=device)
            theirs.prepare_tensors(slot_of_row)
            fill_metadata(ours, np.array(slots))
            for name, tensor in vars(theirs).items():
                if isinstance(tensor, Tensor):
                    count = len(slots) if len(tensor) == 64 else len(tensor)
                    same = (-1 in slots and set(slots) == {-1} and len(tensor) == 64) or torch.equal(
                        tensor[:count], getattr(ours, name)[:count]
                    )
                    assert same, name


def check_traced(device: str) -> None:
    """torch.compile sees one node, and a batch that comes later is computed with its own metadata."""
    wrapper = make_wrapper(8, device)
    a, b = torch.randn(SLOTS, 1, 8, 16, device=device), torch.randn(SLOTS, 1, 12, 8, device=device)
    nodes: list[str] = []

    def backend(graph: Any, example: Any) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def layer(x: Tensor) -> Tensor:
        y = x[:, :12] * 1.0
        wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (12,))
        return y

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for lora_ids in ((11, 12, 11), (0, 13, 13), (15,) * 40, (0,) * 6):
        set_batch(wrapper, lora_ids)
        x = torch.randn(len(lora_ids), 16, device=device)
        torch.testing.assert_close(compiled(x), layer(x))
    assert [node for node in nodes if "lora" in node] == ["vllm_zo.lora_linear"], nodes
    assert not any("triton" in node for node in nodes)


CHECKS = ("check_all", "check_no_adapter", "check_metadata", "check_traced")
IN_A_CHILD = """
import sys
from tests.children import _interpret_triton, widen_products
_interpret_triton()  # before vLLM is imported
from tests import test_gpu_lora
widen_products()
for check in sys.argv[1:]:
    getattr(test_gpu_lora, check)("cpu")
"""


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    in_interpreter(IN_A_CHILD, *CHECKS, VLLM_USE_V2_MODEL_RUNNER="1")


# --- in an engine -----------------------------------------------------------------------------------------------------

ENGINE: dict[str, Any] = {
    "zo_training": {"slots": 4}, "max_num_batched_tokens": 128, "max_num_seqs": 16, "num_gpu_blocks_override": 256,
}  # fmt: skip


def results(llm: Any) -> Iterator[tuple[str, list[float]]]:
    """Losses of a job with two directions, on which a plain request is answered, and what it has made."""
    from vllm import SamplingParams

    from tests.engines import SENTIMENT, reviews
    from tests.test_seams import top_logprob
    from vllm_zo import LoZO

    def ask(_: Any, record: dict[str, Any]) -> None:
        llm.llm_engine.add_request(f"ask-{record['step']}", "the story is dull", SamplingParams(max_tokens=2))

    run = llm.finetune(
        reviews(6), objective=SENTIMENT, method=LoZO(eps=2e-2, interval=2, queries=2), batch_size=2, steps=3,
        learning_rate=2e-3, progress=False, callbacks=[ask],
    )  # fmt: skip
    yield "losses", [record["loss"] for record in run.history]
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    yield "answers", [top_logprob(llm), top_logprob(llm, lora_request=run.lora_request)]


@pytest.mark.slow
def test_an_engine_takes_the_steps_it_takes_on_a_cpu(engines: Engines) -> None:
    pytest.importorskip("triton", reason="triton is not installed (it is no dependency of vLLM on a CPU)")
    roads = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    child = Child("train_with_gpu_lora", str(engines.model("opt")), **roads)
    usual = dict(results(engines.get("opt", **ENGINE)))
    theirs = {report["name"]: report["result"] for report in child.finish()}
    assert theirs.pop("wrapper") == "SharedShrinkPunicaWrapper"
    for name, expected in usual.items():
        assert theirs[name] == pytest.approx(expected, abs=2e-5), name  # as tests/test_runners_and_ranks.py
    assert abs(usual["answers"][0] - usual["answers"][1]) > 1e-3, "the job changed nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: str) -> None:
    globals()[check]("cuda")
