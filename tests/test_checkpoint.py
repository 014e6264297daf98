"""Snapshots, replays and exports: each gives back the state that was trained, or says what is wrong."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.seed_logs import MODULES, header_of, random_log
from vllm_zo import noise
from vllm_zo.checkpoint import snapshot
from vllm_zo.checkpoint.compress import truncate
from vllm_zo.checkpoint.export import export_merged, export_peft, read_peft
from vllm_zo.checkpoint.hf_checkpoint import base_fingerprint
from vllm_zo.checkpoint.replay import fold_key, rebuild_state, replay_weights
from vllm_zo.checkpoint.seed_log.header import SeedLogHeader
from vllm_zo.checkpoint.seed_log.reader import SeedLog, read_seed_log
from vllm_zo.checkpoint.seed_log.writer import SeedLogWriter
from vllm_zo.checkpoint.snapshot import load_snapshot, save_snapshot
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.methods import FactorizedMeZO, LoZO, Method
from vllm_zo.methods.fold import fold_into
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.methods.state import AdapterState
from vllm_zo.methods.targets import select_modules


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def dense_updates(log: SeedLog) -> list[dict[str, Tensor]]:
    """Reference: module -> (out, in) float64 update of each step, from the definition of the direction alone."""
    header, method = log.header, log.header.build_method()
    updates = []
    for record in log.records:
        epoch = method.epoch(record.step)
        basis = epoch % header.num_bases if header.update_space == "bank" else epoch
        plan = method.plan(header.job_seed, record.step, basis)
        update = {}
        for module in header.modules:
            v_IR = draw(noise.derive_key(header.job_seed, "V", basis), module.name, module.in_features, method.rank)
            us = [draw(seed, module.name, module.out_features, method.rank) for seed in plan.keys]
            moves = [c * (u @ v_IR.T) for c, u in zip(record.coefficients, us, strict=True)]
            update[module.name] = -record.learning_rate * method.coordinates.scale * torch.stack(moves).sum(0)
        updates.append(update)
    return updates


def draw(key: int, name: str, rows: int, rank: int) -> Tensor:
    ranges = noise.ElementRanges.of([(name, 0, rows * rank)])
    return noise.normal(key, ranges, torch.device("cpu")).view(rows, rank).double()


def delta_of(state: AdapterState) -> dict[str, Tensor]:
    """Module -> (out, in) float64 sum over the bases held."""
    total = {
        module.name: torch.zeros(module.out_features, module.in_features).double() for module in state.layout.modules
    }
    for basis in range(state.num_bases):
        us = state.layout.split_u(state.acc_BN[basis])
        vs = state.layout.split_v(state.frozen(basis))
        for module, u, v in zip(state.layout.modules, us, vs, strict=True):
            total[module.name] += u.double() @ v.double().T
    return total


# --- replay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bases", [1, 2, 5])
def test_a_rebuilt_bank_is_the_sum_of_the_steps(num_bases: int) -> None:
    log = random_log(header_of(LoZO(rank=2, interval=3, queries=2), "bank", num_bases), 14)
    delta = delta_of(rebuild_state(log))
    updates = dense_updates(log)
    for name, value in delta.items():
        # float32 accumulators: a rounding of 6e-8 a step, relative
        torch.testing.assert_close(value, sum(u[name] for u in updates), rtol=1e-5, atol=1e-6)


def test_a_rebuilt_fold_state_holds_the_current_basis_only() -> None:
    log = random_log(header_of(LoZO(rank=2, interval=5), "fold"), 13)
    state = rebuild_state(log)
    last_basis = dense_updates(log)[10:]
    us, vs = state.layout.split_u(state.acc_BN[0]), state.layout.split_v(state.frozen(2))
    for module, u, v in zip(MODULES, us, vs, strict=True):
        reference = sum(update[module.name] for update in last_basis)
        torch.testing.assert_close(u.double() @ v.double().T, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("space", "num_bases"), [("bank", 2), ("fold", 1)])
def test_a_log_on_disk_rebuilds_the_live_state_bit_for_bit(tmp_path: Path, space: str, num_bases: int) -> None:
    header = header_of(LoZO(rank=2, interval=3, queries=2), space, num_bases)
    log = random_log(header, 10)
    live = header.new_state()
    with_disk = SeedLogWriter(tmp_path / "seeds.log", header)
    for record in log.records:  # what the worker does at each step
        basis = record.step // 3 % num_bases if space == "bank" else record.step // 3
        if space == "fold" and record.step % 3 == 0:
            live.acc_BN.zero_()
        plan = live.method.plan(header.job_seed, record.step, basis)
        live.apply(plan, torch.tensor(record.coefficients), record.learning_rate)
        with_disk.append(record.step, record.learning_rate, record.coefficients, record.finite)
    with_disk.close()
    assert torch.equal(rebuild_state(read_seed_log(tmp_path / "seeds.log")).acc_BN, live.acc_BN)


@pytest.mark.parametrize("snapshot_step", range(9))
@pytest.mark.parametrize(("space", "num_bases"), [("bank", 2), ("fold", 1)])
def test_a_rebuild_from_a_snapshot_is_the_rebuild_from_zero(
    tmp_path: Path, space: str, num_bases: int, snapshot_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = random_log(header_of(LoZO(rank=2, interval=3), space, num_bases), 8)
    expected = rebuild_state(log).acc_BN
    save_snapshot(tmp_path / "s.safetensors", rebuild_state(log, upto=snapshot_step), snapshot_step)
    applied: list[int] = []
    real_apply = AdapterState.apply
    monkeypatch.setattr(AdapterState, "apply", lambda *a: (applied.append(a[1].step), real_apply(*a))[1])
    rebuilt = rebuild_state(log, snapshot=tmp_path / "s.safetensors")
    assert torch.equal(rebuilt.acc_BN, expected)
    assert applied == list(range(snapshot_step, 8)), "the snapshot must save the steps it holds"


def test_a_snapshot_ahead_of_the_log_or_damaged_or_absent_is_not_used(tmp_path: Path) -> None:
    log = random_log(header_of(LoZO(rank=2, interval=3), "bank", 2), 8)
    path = tmp_path / "s.safetensors"
    save_snapshot(path, rebuild_state(log), 8)
    expected = rebuild_state(log, upto=5).acc_BN
    assert torch.equal(rebuild_state(log, upto=5, snapshot=path).acc_BN, expected)
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(rebuild_state(log, upto=5, snapshot=path).acc_BN, expected)
    assert torch.equal(rebuild_state(log, upto=5, snapshot=tmp_path / "none").acc_BN, expected)


def test_replaying_beyond_the_log_is_refused() -> None:
    with pytest.raises(ConfigError, match="upto=9: .* holds 8 intact steps"):
        rebuild_state(random_log(header_of(LoZO(), "bank"), 8), upto=9)


@pytest.mark.parametrize("method", [LoZO(rank=2, interval=4), FactorizedMeZO(rank=3)])
def test_replayed_weights_are_the_sum_of_the_steps(method: Method) -> None:
    log = random_log(header_of(method, "fold"), 10)
    weights = {m.name: torch.randn(m.out_features, m.in_features) for m in MODULES}
    originals = {name: weight.clone() for name, weight in weights.items()}
    folded = replay_weights(weights, log)
    updates = dense_updates(log)
    for name, original in originals.items():
        reference = original.double() + sum(u[name] for u in updates)
        torch.testing.assert_close(folded[name].double(), reference, rtol=1e-5, atol=1e-5)
        assert torch.equal(weights[name], original), "the input was changed"


def test_replayed_bf16_weights_round_with_the_keys_of_the_folds() -> None:
    """Fold by fold as a worker does it, with the keys the engine sends: equal bits, not just close values."""
    log = random_log(header_of(LoZO(rank=2, interval=4), "fold", dtype="bfloat16"), 10)
    weights = {m.name: torch.randn(m.out_features, m.in_features, dtype=torch.bfloat16) for m in MODULES}
    expected = dict(weights)
    for last_step, basis in ((4, 0), (8, 1), (10, 2)):
        state = rebuild_state(log, upto=last_step)
        us, vs = state.layout.split_u(state.acc_BN[0]), state.layout.split_v(state.frozen(basis))
        key = noise.derive_key(11, "fold", last_step)
        for module, u, v in zip(MODULES, us, vs, strict=True):
            expected[module.name] = fold_into(expected[module.name], u, v, key, module.name)
    folded = replay_weights(weights, log)
    assert all(torch.equal(folded[name], expected[name]) for name in weights)
    assert fold_key(11, 4) == noise.derive_key(11, "fold", 4)


def test_replaying_weights_of_a_bank_job_or_without_a_module_is_refused() -> None:
    weights = {m.name: torch.zeros(m.out_features, m.in_features) for m in MODULES}
    with pytest.raises(ConfigError, match="did not change the base; export its adapter"):
        replay_weights(weights, random_log(header_of(LoZO(), "bank"), 3))
    del weights["layers.0.fc2"]
    with pytest.raises(ConfigError, match="no weight of 'layers.0.fc2'"):
        replay_weights(weights, random_log(header_of(LoZO(), "fold"), 3))


# --- snapshots ----------------------------------------------------------------------------------------------------


def test_a_snapshot_of_another_job_names_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_snapshot(path, header_of(LoZO(rank=2), "bank", 2).new_state(), 3)
    assert load_snapshot(path, header_of(LoZO(rank=2), "bank", 2).new_state()) == 3
    cases: list[tuple[SeedLogHeader, str]] = [
        (header_of(LoZO(rank=2, eps=0.5), "bank", 2), r"lozo.eps=0.5 \(written with 0.001\)"),
        (header_of(LoZO(rank=2), "bank", 2, job_seed=12), r"job_seed=12 \(written with 11\)"),
        (header_of(LoZO(rank=2), "bank", 3), r"num_bases=3 \(written with 2\)"),
        (header_of(LoZO(rank=2), "bank", 2, modules=MODULES[:2]), r"modules: 2 target modules \(written with 3\)"),
    ]
    for header, message in cases:
        with pytest.raises(ConfigError, match=message):
            load_snapshot(path, header.new_state())


def test_a_snapshot_that_is_removed_while_it_is_read_is_one_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors opens a file twice, and raises another error where only the second time finds nothing."""
    path, header = tmp_path / "s.safetensors", header_of(LoZO(rank=2), "bank", 2)
    save_snapshot(path, header.new_state(), 3)

    def removed(path: Path, framework: str) -> Any:
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(snapshot, "safe_open", removed)
    assert snapshot.snapshot_step(path) is None
    with pytest.raises(ConfigError, match="cannot be read"):
        load_snapshot(path, header.new_state())


def test_a_snapshot_knows_which_bases_hold_an_update(tmp_path: Path) -> None:
    log = random_log(header_of(LoZO(rank=2, interval=2), "bank", 5), 5)
    for step, bases in ((0, []), (1, [0]), (5, [0, 1, 2])):
        save_snapshot(tmp_path / "s.safetensors", rebuild_state(log, upto=step), step)
        loaded = log.header.new_state()
        load_snapshot(tmp_path / "s.safetensors", loaded)
        assert loaded.touched_bases() == bases
        assert loaded.last_basis == (bases[-1] if bases else None)


def test_equal_states_give_equal_bytes_in_any_process(tmp_path: Path) -> None:
    """safetensors alone writes metadata in the order of a hash table, which another process orders otherwise."""
    log = random_log(header_of(LoZO(rank=2, interval=3, optimizer="adam"), "bank", 2), 8)
    save_snapshot(tmp_path / "here", rebuild_state(log), 8)
    save = """
import sys
from tests.seed_logs import header_of, random_log
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.snapshot import save_snapshot
from vllm_zo.methods import LoZO
log = random_log(header_of(LoZO(rank=2, interval=3, optimizer="adam"), "bank", 2), 8)
save_snapshot(sys.argv[1], rebuild_state(log), 8)
"""
    subprocess.run([sys.executable, "-c", save, tmp_path / "there"], cwd=Path(__file__).parents[1], check=True)
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


@pytest.mark.parametrize("what", ["snapshot", "adapter"])
def test_reading_a_file_many_times_leaves_nothing_in_memory(tmp_path: Path, what: str) -> None:
    state = rebuild_state(random_log(header_of(LoZO(rank=2, interval=3), "bank", 3), 8))
    save_snapshot(tmp_path / "snapshot", state, 8)
    export_peft(state, "no/model", tmp_path / "adapter")
    read: Any = (lambda path: load_snapshot(path, state)) if what == "snapshot" else read_peft
    calls, blocks = 500, []
    for _ in range(4):  # in the first calls Python and numpy fill their stores of free objects
        for _ in range(calls):
            read(tmp_path / what)
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    assert blocks[-1] - blocks[-2] < calls / 4


def test_a_failed_snapshot_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = random_log(header_of(LoZO(rank=2, interval=3), "bank", 2), 8)
    path = tmp_path / "s.safetensors"
    save_snapshot(path, rebuild_state(log, upto=4), 4)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        JobError, match=r"cannot write .*s.safetensors: No space left on device; nothing there was changed"
    ):
        save_snapshot(path, rebuild_state(log), 8)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


# --- models -------------------------------------------------------------------------------------------------------


def candidates_of(model: torch.nn.Module) -> list[tuple[str, tuple[int, int]]]:
    """What the worker passes: every linear module, head included, in the order of the model."""
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    return [(name, (m.out_features, m.in_features)) for name, m in linears]


@pytest.fixture(scope="module", params=["opt", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = {"opt": tiny.make_opt, "llama": tiny.make_llama}[request.param]
    return make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_opt(tmp_path_factory.mktemp("opt-only"))


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def model_log(
    base: Path, space: str = "bank", num_bases: int = 4, steps: int = 8, scope: str = "all-linear", **fields: Any
) -> SeedLog:
    shapes = dict(candidates_of(load(base)))
    modules = [ModuleShape(name, *shapes[name]) for name in select_modules(scope, shapes)]
    header = header_of(LoZO(rank=2, interval=3), space, num_bases, str(base), modules=modules, **fields)
    return random_log(header, steps)


@torch.no_grad()
def logits(model: Any, seed: int = 0) -> Tensor:
    tokens = torch.randint(4, tiny.VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=tokens).logits


@torch.no_grad()
def with_delta(base: Path, state: AdapterState) -> Any:
    """Reference: the model with dense `W + delta`, the delta formed in float64."""
    model = load(base)
    for name, delta in delta_of(state).items():
        model.get_submodule(name).weight += delta.float()
    return model


# Two orders of summation in float32 over at most 128 products of size 1: a few 1e-6 of logits of size 10.
LOGIT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def test_an_exported_adapter_in_peft_gives_the_logits_of_the_dense_update(base: Path, tmp_path: Path) -> None:
    state = rebuild_state(model_log(base))
    report = export_peft(state, str(base), tmp_path / "adapter")
    expected = logits(with_delta(base, state))
    assert (expected - logits(load(base))).abs().max() > 0.1, "the update must be visible"
    model = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, **LOGIT_TOLERANCE)
    assert report.bases == (0, 1, 2) and report.rank == 6, "8 steps at interval 3 touch 3 of the 4 bases"
    assert report.discarded_energy == 0.0 and report.warnings == ()
    assert str(base) in (tmp_path / "adapter" / "README.md").read_text()


def test_an_adapter_of_a_narrow_scope_touches_only_that_scope(opt: Path, tmp_path: Path) -> None:
    state = rebuild_state(model_log(opt, scope=r".*\.layers\.1\.self_attn\.[qv]_proj"))
    export_peft(state, str(opt), tmp_path)
    model = PeftModel.from_pretrained(load(opt), tmp_path)
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    prefix = "base_model.model.model.decoder.layers.1.self_attn"
    assert adapted == {f"{prefix}.q_proj", f"{prefix}.v_proj"}
    torch.testing.assert_close(logits(model), logits(with_delta(opt, state)), **LOGIT_TOLERANCE)


def test_an_adapter_before_the_first_step_loads_and_changes_nothing(opt: Path, tmp_path: Path) -> None:
    report = export_peft(rebuild_state(model_log(opt), upto=0), str(opt), tmp_path)
    assert report.rank == 2
    assert torch.equal(logits(PeftModel.from_pretrained(load(opt), tmp_path)), logits(load(opt)))


def test_saving_again_replaces_the_adapter(opt: Path, tmp_path: Path) -> None:
    log = model_log(opt)
    export_peft(rebuild_state(log, upto=2), str(opt), tmp_path)
    export_peft(rebuild_state(log), str(opt), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_compressed_adapter_reports_what_it_discards(opt: Path, tmp_path: Path) -> None:
    state = rebuild_state(model_log(opt))
    report = export_peft(state, str(opt), tmp_path, rank=3)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    dropped = total = 0.0
    for name, delta in delta_of(state).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
        assert a.shape[0] == b.shape[1] == 3
        dropped += float((delta - b @ a).square().sum())
        total += float(delta.square().sum())
    assert report.discarded_energy == pytest.approx(dropped / total, rel=1e-3)
    assert 0.0 < report.discarded_energy < 0.5
    assert export_peft(state, str(opt), tmp_path, rank=6).discarded_energy == pytest.approx(0.0, abs=1e-12)
    for rank in (0, 7):
        with pytest.raises(ConfigError, match=f"rank={rank}: expected an integer from 1 to 6"):
            export_peft(state, str(opt), tmp_path, rank=rank)


@pytest.mark.parametrize(("rows", "columns", "width", "rank"), [(20, 30, 6, 4), (5, 30, 8, 6), (30, 5, 8, 2)])
def test_truncation_is_the_best_of_its_rank(rows: int, columns: int, width: int, rank: int) -> None:
    u, v = torch.randn(rows, width), torch.randn(columns, width)
    truncated_u, truncated_v, dropped, total = truncate(u, v, rank)
    singular = torch.linalg.svdvals(u.double() @ v.double().T)
    assert truncated_u.shape == (rows, rank) and truncated_v.shape == (columns, rank)
    assert dropped == pytest.approx(float(singular[rank:].square().sum()), abs=1e-6)
    assert total == pytest.approx(float(singular.square().sum()), rel=1e-6)
    error = (u.double() @ v.double().T - truncated_u.double() @ truncated_v.double().T).square().sum()
    assert float(error) == pytest.approx(dropped, rel=1e-4, abs=1e-4)


def test_a_rank_vllm_cannot_serve_is_reported(tmp_path: Path) -> None:
    state = header_of(LoZO(rank=300), "bank", 2).new_state()
    state.mark_touched([0, 1])
    report = export_peft(state, "no/model", tmp_path)
    assert report.rank == 600
    assert "rank 600, vLLM serves at most 512" in report.warnings[0]


def test_a_merged_bank_gives_the_logits_of_the_dense_update_and_keeps_its_tokenizer(base: Path, tmp_path: Path) -> None:
    log = model_log(base)
    state = rebuild_state(log)
    export_merged(str(base), state, tmp_path / "from-state")
    export_merged(str(base), log, tmp_path / "from-log")
    merged = load(tmp_path / "from-state")
    torch.testing.assert_close(logits(merged), logits(with_delta(base, state)), **LOGIT_TOLERANCE)
    assert torch.equal(logits(load(tmp_path / "from-log")), logits(merged))
    text = "one long string of cliches . It was"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (base, tmp_path / "from-state")]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids


def test_a_merged_bf16_base_is_right_on_average_although_each_update_is_below_its_resolution(tmp_path: Path) -> None:
    base = tiny.make_opt(tmp_path / "base", dtype=torch.bfloat16)
    log = model_log(base)
    small = dataclasses.replace(log, records=tuple(dataclasses.replace(r, learning_rate=3e-5) for r in log.records))
    state = rebuild_state(small)
    export_merged(str(base), state, tmp_path / "merged")
    export_merged(str(base), state, tmp_path / "again")
    before, after = load(base).state_dict(), load(tmp_path / "merged").state_dict()
    again = load(tmp_path / "again").state_dict()
    deltas, moves, ulps = [], [], []
    for name, delta in delta_of(state).items():
        key = f"{name}.weight"
        assert after[key].dtype == torch.bfloat16 and torch.equal(after[key], again[key])
        deltas.append(delta.flatten())
        moves.append((after[key].double() - before[key].double()).flatten())
        ulps.append(before[key].double().abs().flatten() * 2**-7)
    delta, moved, ulp = torch.cat(deltas), torch.cat(moves), torch.cat(ulps)
    assert (delta.abs() < ulp / 2).double().mean() > 0.7, "rounding to nearest would lose most of this update"
    # moved = delta + unbiased noise of standard deviation <= ulp / 2, so its projection on delta is 1 +- this:
    slope = float(moved @ delta / (delta @ delta))
    deviation = float((ulp / 2 * delta).norm() / (delta @ delta))
    assert abs(slope - 1.0) < 4 * deviation < 0.3
    untouched = "model.decoder.embed_tokens.weight"
    assert torch.equal(before[untouched], after[untouched])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_fold_job_is_the_replayed_weights_in_the_dtype_of_the_engine(
    opt: Path, tmp_path: Path, dtype: str
) -> None:
    """The base is float32 on disk: what the engine cast when it loaded it, the export must cast too."""
    log = model_log(opt, "fold", 1, dtype=dtype)
    export_merged(str(opt), log, tmp_path / "merged", upto=7)
    merged = load(tmp_path / "merged")
    torch_dtype = getattr(torch, dtype)
    original = load(opt).state_dict()
    weights = {m.name: original[f"{m.name}.weight"].to(torch_dtype) for m in log.header.modules}
    expected = replay_weights(weights, log, upto=7)
    state = merged.state_dict()
    assert all(torch.equal(state[f"{name}.weight"], weight) for name, weight in expected.items())
    assert merged.dtype == torch_dtype and all(tensor.dtype == torch_dtype for tensor in state.values())
    assert torch.equal(
        state["model.decoder.embed_tokens.weight"], original["model.decoder.embed_tokens.weight"].to(torch_dtype)
    )


def test_a_sharded_base_stays_sharded_and_a_stale_export_is_not_loaded(opt: Path, tmp_path: Path) -> None:
    sharded, target = tmp_path / "sharded", tmp_path / "merged"
    shutil.copytree(opt, sharded)
    (sharded / "model.safetensors").unlink()
    load(opt).save_pretrained(sharded, max_shard_size="100KB")
    state = rebuild_state(model_log(opt))
    export_merged(str(opt), rebuild_state(model_log(opt), upto=1), target)  # an earlier export, in one file
    export_merged(str(sharded), state, target)
    assert len(list(target.glob("model-*.safetensors"))) == len(list(sharded.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(logits(load(target)), logits(with_delta(opt, state)), **LOGIT_TOLERANCE)


def test_a_pytorch_bin_base_without_the_model_prefix_and_with_a_tied_head_is_merged(opt: Path, tmp_path: Path) -> None:
    """facebook/opt-* on the Hub are such files."""
    old = tmp_path / "bin"
    shutil.copytree(opt, old)
    tensors = {key.removeprefix("model."): tensor for key, tensor in load_file(old / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"]
    torch.save(tensors, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    state = rebuild_state(model_log(opt))
    export_merged(str(old), state, tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        merged = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert merged.keys() == tensors.keys()
    expected = with_delta(opt, state).state_dict()
    for key, tensor in merged.items():
        name = key if key == "lm_head.weight" else f"model.{key}"
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_embeddings_and_head_that_are_one_matrix_are_not_merged(opt: Path, tmp_path: Path) -> None:
    module = ModuleShape("model.decoder.embed_tokens", 64, tiny.VOCAB_SIZE)
    header = header_of(LoZO(rank=2, interval=3), "bank", 2, str(opt), modules=[module])
    with pytest.raises(ConfigError, match="are one matrix in it, and 'model.decoder.embed_tokens' was trained alone"):
        export_merged(str(opt), rebuild_state(random_log(header, 4)), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_into_another_model_is_refused(opt: Path, tmp_path: Path) -> None:
    log = model_log(opt)
    other = tiny.make_opt(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"base_model=.*other.* is not the model the job trained"):
        export_merged(str(other), log, tmp_path / "merged")
    wide = tiny.make_opt(tmp_path / "wide", ffn=192)
    with pytest.raises(ConfigError, match=r"fc1 is \(192, 64\) torch.float32, expected \(128, 64\)"):
        export_merged(str(wide), rebuild_state(log), tmp_path / "merged")
    llama = tiny.make_llama(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"no weight of module 'model.decoder.layers.0.self_attn.k_proj'"):
        export_merged(str(llama), rebuild_state(log), tmp_path / "merged")
    with pytest.raises(ConfigError, match="neither a directory nor a model in the Hugging Face cache"):
        export_merged("no-such-org/model", rebuild_state(log), tmp_path / "merged")
    with pytest.raises(ConfigError, match="is the base model itself"):
        export_merged(str(opt), rebuild_state(log), opt)
    assert not (tmp_path / "merged").exists()


def test_a_quantised_weight_is_refused(opt: Path, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(opt, quantised)
    tensors = {
        k: t.to(torch.float8_e4m3fn) if "fc1.w" in k else t for k, t in load_file(opt / "model.safetensors").items()
    }
    from safetensors.torch import save_file

    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(ConfigError, match="float8_e4m3fn, expected .* a quantised base cannot be merged into"):
        export_merged(str(quantised), rebuild_state(model_log(opt)), tmp_path / "merged")


def test_the_fingerprint_follows_the_contents_and_not_the_place(opt: Path, tmp_path: Path) -> None:
    fingerprint = base_fingerprint(str(opt))
    copied = tmp_path / "copy"
    shutil.copytree(opt, copied)
    assert base_fingerprint(str(copied)) == fingerprint
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    assert base_fingerprint(str(copied)) != fingerprint
    assert base_fingerprint(str(tiny.make_opt(tmp_path / "other", seed=1))) != fingerprint
    assert base_fingerprint("no-such-org/model") == base_fingerprint("no-such-org/model") != fingerprint


# --- scope --------------------------------------------------------------------------------------------------------


def leaves(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_presets_choose_the_modules_their_names_promise(base: Path) -> None:
    names = [name for name, _ in candidates_of(load(base))]
    attention, mlp = select_modules("attention", names), select_modules("mlp", names)
    is_opt = "opt" in base.name
    assert leaves(attention) == {"q_proj", "k_proj", "v_proj", "out_proj" if is_opt else "o_proj"}
    assert leaves(mlp) == ({"fc1", "fc2"} if is_opt else {"gate_proj", "up_proj", "down_proj"})
    assert set(select_modules("all-linear", names)) == {*attention, *mlp} == set(names) - {"lm_head"}


@pytest.mark.parametrize("pattern", ["q_proj", "atention", "embeddings"])
def test_a_scope_that_matches_nothing_is_an_error(pattern: str) -> None:
    names = ["model.layers.0.self_attn.q_proj", "lm_head"]
    with pytest.raises(ConfigError, match=f"target_modules='{pattern}'"):
        select_modules(pattern, names)
    with pytest.raises(ConfigError, match="not a regular expression"):
        select_modules("(q_proj", names)
