"""LoZO(v="activations"): V is measured from what enters the LM head, and everything that rebuilds a job rebuilds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams

from tests.engines import SENTIMENT, Engines, members_as_requests, reviews, scheduler_of, worker_of
from tests.reference import ReferenceTrainer
from tests.test_concurrent_jobs import start, step
from vllm_zo import ConfigError, LoZO, Momentum, Preference, Reward
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot
from vllm_zo.config import JobConfig
from vllm_zo.data import BatchOrder, encode_examples
from vllm_zo.engine.load_job import load_job
from vllm_zo.entrypoints.llm.prepare import prepare_job
from vllm_zo.errors import JobError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.methods.leading import OUTPUT, Inputs
from vllm_zo.registry import settings

BASES, RANK, BATCH, ROWS, STEPS, RATE = 3, 2, 4, 16, 11, 4e-4
METHOD = LoZO(rank=RANK, interval=3, eps=4e-3, v="activations")
OPTIONS: dict[str, Any] = {
    "objective": SENTIMENT, "method": METHOD, "target_modules": "lm_head", "bases": BASES, "learning_rate": RATE,
    "batch_size": BATCH, "steps": STEPS, "progress": False, "checkpoint_interval": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(engines: Engines) -> Any:
    return engines.get("llama")


def train(llm: Any, **options: Any) -> Any:
    worker_of(llm).zo.platform.forget_states()
    return llm.finetune(options.pop("rows", reviews(ROWS, seed=4)), **(OPTIONS | options))


def measured(run: Any) -> torch.Tensor:
    """(B * R, D) the columns of V of every basis."""
    state = rebuild_state(read_seed_log(run.directory / "seeds.log"), 0)
    return torch.cat([state.layout.split_v(state.frozen(basis))[0].T for basis in range(BASES)])


# --- the directions ---------------------------------------------------------------------------------------------------


def test_directions_are_uncorrelated_and_as_large_whatever_the_inputs_are() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(2, -2, 12)
    rows = torch.randn(200, 12, generator=generator) * scales + torch.randn(12, generator=generator) * scales
    inputs = Inputs(12, torch.device("cpu"))
    for part in rows.split(17):
        inputs.add(part)
    v_IC = inputs.leading(5, key=3)
    features = rows.double() @ v_IC.double()
    moment = features.T @ features / len(rows)
    torch.testing.assert_close(moment / OUTPUT**2, torch.eye(5, dtype=torch.float64), atol=1e-4, rtol=0)
    # They span the leading five: what they leave of the rows is what the best five directions leave.
    kept = torch.linalg.qr(v_IC.double())[0]
    left = (rows.double() - rows.double() @ kept @ kept.T).square().sum()
    best = torch.linalg.svdvals(rows.double())[5:].square().sum()
    assert left.item() == pytest.approx(best.item(), rel=1e-4)
    assert torch.equal(inputs.leading(5, key=3), v_IC) and not torch.equal(inputs.leading(5, key=4), v_IC)


@pytest.mark.parametrize("rows", [0, 3])
def test_fewer_directions_than_columns_are_refused(rows: int) -> None:
    inputs = Inputs(8, torch.device("cpu"))
    inputs.add(torch.randn(rows, 8))
    with pytest.raises(JobError, match=f"bases \\* rank = 4, and the {rows} inputs .* have {rows} directions"):
        inputs.leading(4, key=0)


# --- a job ------------------------------------------------------------------------------------------------------------


def test_v_is_that_of_the_rows_and_the_steps_follow_the_reference(llm: Any, engines: Engines) -> None:
    run = train(llm)
    model = AutoModelForCausalLM.from_pretrained(engines.model("llama"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(engines.model("llama"))
    examples = encode_examples(reviews(ROWS, seed=4), SENTIMENT, tokenizer, 128, "rows")
    sequences = [example.sequences[0] for example in examples]
    with torch.no_grad():
        hidden = torch.stack(
            [model.model(torch.tensor([s.token_ids])).last_hidden_state[0, s.positions[0]] for s in sequences]
        ).double()
    features = hidden @ measured(run).double().T
    moment = features.T @ features / (ROWS * OUTPUT**2)
    # The least of the six directions has a thousandth of the largest one's size: float32's rounding grows by that.
    torch.testing.assert_close(moment, torch.eye(BASES * RANK, dtype=torch.float64), atol=1e-2, rtol=0)

    oracle = ReferenceTrainer(
        model, METHOD, SENTIMENT, job_seed=0, update_space="bank", num_bases=BASES, target_modules="lm_head"
    )
    load_snapshot(run.directory / "start.safetensors", oracle.state)
    order = BatchOrder(ROWS, BATCH, 0)
    for number, record in enumerate(run.history):
        expected, _ = oracle.step(number, [examples[i] for i in order.batch(number)], RATE)
        assert record["loss"] == pytest.approx(expected.mean().item(), abs=2e-5), f"step {number}"
    assert oracle.state.acc_BN.abs().max() > 1e-4, "or this test shows nothing"


def test_it_learns_the_same_on_every_road(llm: Any) -> None:
    alone = train(llm)
    with members_as_requests(llm):
        as_requests = train(llm)
    worker_of(llm).zo.platform.forget_states()
    given = {name: value for name, value in OPTIONS.items() if name not in ("objective", "progress")}
    beside = start(llm, reviews(ROWS, seed=4), **given)
    step(llm, 2)  # into the pass that measures
    llm.generate("a dull film", SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
    while scheduler_of(llm).zo.has_work():
        step(llm, 1)
    beside.poll()
    for other in (as_requests, beside):
        torch.testing.assert_close(measured(other), measured(alone), rtol=1e-3, atol=1e-5)
        assert [r["loss"] for r in other.history] == pytest.approx([r["loss"] for r in alone.history], abs=2e-5)
    again = train(llm)
    for name in ("start.safetensors", "seeds.log"):
        assert (again.directory / name).read_bytes() == (alone.directory / name).read_bytes()


def test_a_resumed_job_and_a_replay_have_the_same_v(llm: Any, tmp_path: Path) -> None:
    whole = train(llm, output_dir=str(tmp_path / "whole"))
    stopped = train(
        llm, output_dir=str(tmp_path / "stopped"),
        callbacks=[lambda run, record: run.stop() if record["step"] == 5 else None],
    )  # fmt: skip
    assert len(stopped.history) < STEPS
    resumed = train(llm, resume_from=tmp_path / "stopped")
    assert (resumed.directory / "start.safetensors").read_bytes() == (
        whole.directory / "start.safetensors"
    ).read_bytes()
    # Not bit for bit: what the whole run has kept from its first pass, the resumed one computes in other batches.
    assert [r["loss"] for r in resumed.history] == pytest.approx(
        [r["loss"] for r in whole.history[-len(resumed.history) :]], abs=2e-5
    )
    log = read_seed_log(whole.directory / "seeds.log")
    assert log.header.method_fields["v"] == "activations" and "v" not in settings(LoZO()), "older logs still agree"
    from_zero, from_snapshot = rebuild_state(log, 9), rebuild_state(log, 9, whole.directory / "snapshot.safetensors")
    for name, tensor in from_zero.tensors().items():
        assert torch.equal(tensor, from_snapshot.tensors()[name]), name
    (whole.directory / "start.safetensors").write_bytes(b"half a file")
    with pytest.raises(ConfigError, match="cannot be read .*put the job's own beside its log, which does not have it"):
        rebuild_state(log, 9)
    (whole.directory / "start.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"start\.safetensors: is missing\. It holds what the job measured"):
        rebuild_state(log, 9)


def test_what_it_serves_is_what_it_saves(llm: Any, engines: Engines, tmp_path: Path) -> None:
    from peft import PeftModel

    run = train(llm, learning_rate=0.3)
    run.save(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(engines.model("llama"))
    base = AutoModelForCausalLM.from_pretrained(engines.model("llama"), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    examples = encode_examples(reviews(8, seed=9), SENTIMENT, tokenizer, 128, "rows")
    with torch.no_grad():
        cells = [
            adapted(torch.tensor([e.sequences[0].token_ids])).logits[0, -1, list(e.sequences[0].label_ids)]
            for e in examples
        ]
    loss = SENTIMENT.loss(torch.cat(cells)[None], examples)[0].mean().item()
    scored = llm.evaluate(reviews(8, seed=9), SENTIMENT, run=run)["loss"]
    assert scored == pytest.approx(loss, abs=1e-4)
    assert scored != pytest.approx(llm.evaluate(reviews(8, seed=9), SENTIMENT)["loss"], abs=1e-3), "it has learnt"


def test_momentum_moves_between_measured_bases(llm: Any) -> None:
    run = train(llm, method=LoZO(rank=RANK, interval=3, eps=4e-3, v="activations", optimizer=Momentum(beta=0.9)))
    state = rebuild_state(read_seed_log(run.directory / "seeds.log"))
    assert all(tensor.isfinite().all() for tensor in state.tensors().values())


def test_rows_with_too_few_directions_end_the_job_with_the_reason(llm: Any) -> None:
    same = [{"sentence": "a fine film", "label": 1}] * 8
    with pytest.raises(JobError, match="the 8 inputs that were measured have 1 directions"):
        train(llm, rows=same)


def test_fewer_rows_than_columns_are_refused_before_the_job_is_made(llm: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bases=3: .* = 6 directions, and the training data has 5 rows"):
        train(llm, rows=reviews(5), output_dir=str(tmp_path / "job"))
    assert not (tmp_path / "job" / "job.json").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"target_modules": "all-linear"}, "measures what enters the LM head"),
    "fold": ({"update_space": "fold"}, "update_space='fold'"),
    "continual": ({"continual": True, "steps": None}, "continual=True"),
    "preference": ({"objective": Preference()}, "objective='preference'"),
    "reward": ({"objective": Reward("{sentence}", reward="token_f1")}, "objective='reward'"),
    "another word": ({"method": {"name": "lozo", "v": "gradients"}}, "unknown lozo.v 'gradients'"),
}


def check_refused(options: dict[str, Any], message: str) -> None:
    """That a job with these options of `finetune` is refused; None leaves one out."""
    given = {k: v for k, v in options.items() if k != "progress" and v is not None}
    with pytest.raises(ConfigError, match=message):
        JobConfig.from_options(given)


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_means_nothing_it_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    check_refused(OPTIONS | options, message)


def test_with_several_workers_or_engines_it_is_refused(llm: Any) -> None:
    given = {name: value for name, value in OPTIONS.items() if name != "progress"}
    job = prepare_job(llm.llm_engine, reviews(ROWS), None, None, JobConfig.from_options(given))
    facts, read = scheduler_of(llm).zo_facts, scheduler_of(llm).zo_read
    load_job(JobDir(job.directory), facts, read)
    with pytest.raises(ConfigError, match="v='activations' is measured by one worker"):
        load_job(JobDir(job.directory), replace(facts, workers=2), read)
    with pytest.raises(ConfigError, match="v='activations' is measured by one worker"):
        load_job(JobDir(job.directory), facts, None)  # as a coordinator of several engines does
