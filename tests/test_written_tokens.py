"""LoZO(u="written"): each row of U is as large as its token is common, and a replay has the same rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engines import SENTIMENT, Engines, client_of, reviews, scheduler_of
from tests.test_concurrent_jobs import step
from tests.test_measured_v import check_refused
from vllm_zo import LanguageModeling, LoZO, Preference, Reward, noise
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.config import JobConfig
from vllm_zo.data import BatchOrder, encode_examples
from vllm_zo.engine import written_tokens
from vllm_zo.entrypoints.llm.prepare import prepare_job
from vllm_zo.methods.written import row_sizes
from vllm_zo.objectives.base import Trust
from vllm_zo.registry import settings

ROWS, STEPS, BATCH, RANK, TOKENS = 24, 6, 4, 2, 5
asked: list[list[str]] = []
"""The completions of each call of the reward."""


def length(completions: list[str], **columns: Any) -> list[float]:
    asked.append(completions)
    return [float(len(text)) for text in completions]


OBJECTIVE = Reward("{sentence}", reward=length, max_tokens=TOKENS, temperature=0.7, samples=2, top_p=1.0)
OPTIONS: dict[str, Any] = {
    "objective": OBJECTIVE, "method": LoZO(rank=RANK, interval=2, eps=0.1, u="written"), "target_modules": "lm_head",
    "bases": 2, "learning_rate": 1e-2, "batch_size": BATCH, "steps": STEPS, "checkpoint_interval": 4,
    "divergence_factor": None, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(engines: Engines) -> Any:
    return engines.get("llama")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_tokens, "MOST_ROWS", 20)


def train(llm: Any, **options: Any) -> Any:
    asked.clear()
    return llm.finetune(options.pop("rows", reviews(ROWS, seed=4)), **(OPTIONS | options))


def sizes(run: Any) -> torch.Tensor:
    """(O, R) of the state before the first step."""
    state = rebuild_state(read_seed_log(run.directory / "seeds.log"), 0)
    assert state.sizes_N is not None
    return state.layout.split_u(state.sizes_N)[0]


def test_sizes_are_roots_of_shares() -> None:
    expected = torch.tensor([0.0, 1.0, 0.5, 0.0, 0.5**0.5])
    torch.testing.assert_close(row_sizes([(1, 4), (2, 1), (4, 2)], 5), expected)


def test_the_sizes_are_those_of_what_the_base_writes(llm: Any) -> None:
    run = train(llm)
    assert len(asked) == STEPS, "nobody rewards what the base writes"
    rows, read = reviews(ROWS, seed=4), list(BatchOrder(ROWS, BATCH, 0).first(STEPS))[:20]
    seeds = [noise.derive_key(0, written_tokens.STREAM, i) >> 1 for i in read]
    prompts = [{"prompt_token_ids": llm.get_tokenizer()(rows[i]["sentence"])["input_ids"]} for i in read]
    params = [SamplingParams(max_tokens=TOKENS, temperature=0.7, top_p=1.0, seed=seed) for seed in seeds]
    written = llm.generate(prompts, params, use_tqdm=False)
    counts = Counter(token for output in written for token in output.outputs[0].token_ids)
    found = sizes(run)
    torch.testing.assert_close(found[:, 0], row_sizes(sorted(counts.items()), len(found)))
    assert torch.equal(found[:, 0], found[:, 1])
    # Rows of tokens that were not written never move.
    state = rebuild_state(read_seed_log(run.directory / "seeds.log"))
    moved = sum(u_OR.abs().sum(1) for u_OR in (state.layout.split_u(acc)[0] for acc in state.acc_BN))
    assert torch.equal(moved > 0, found[:, 0] > 0)


def test_a_resumed_job_and_a_replay_have_the_same_sizes(llm: Any, tmp_path: Path) -> None:
    whole = train(llm, output_dir=str(tmp_path / "whole"))
    train(
        llm, output_dir=str(tmp_path / "stopped"),
        callbacks=[lambda run, record: run.stop() if record["step"] == 3 else None],
    )  # fmt: skip
    resumed = train(llm, resume_from=tmp_path / "stopped")
    assert (resumed.directory / "start.safetensors").read_bytes() == (
        whole.directory / "start.safetensors"
    ).read_bytes()
    logs = [read_seed_log(run.directory / "seeds.log").records for run in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == STEPS
    log = read_seed_log(whole.directory / "seeds.log")
    assert log.header.method_fields["u"] == "written" and "u" not in settings(LoZO()), "older logs still agree"
    from_zero, from_snapshot = rebuild_state(log, 5), rebuild_state(log, 5, whole.directory / "snapshot.safetensors")
    for name, tensor in from_zero.tensors().items():
        assert torch.equal(tensor, from_snapshot.tensors()[name]), name


def interrupted(llm: Any, options: dict[str, Any], rows: Any, times: int) -> Any:
    """A job that was started, and whose open group was dropped so many times, after three engine steps each."""
    config = JobConfig.from_options({name: value for name, value in options.items() if name != "progress"})
    job = prepare_job(llm.llm_engine, rows, None, None, config, trust=Trust.IMPORTS)
    client_of(llm).call("zo_start", str(job.directory))
    for _ in range(times):
        step(llm, 3)
        scheduler_of(llm)._forget_members()  # as a pause does
    return job


def test_a_pass_that_is_interrupted_counts_each_completion_once(llm: Any, tmp_path: Path) -> None:
    whole = train(llm, output_dir=str(tmp_path / "whole"))
    job = interrupted(llm, OPTIONS, reviews(ROWS, seed=4), 5)
    scheduler = scheduler_of(llm)
    assert not (job.directory / "start.safetensors").exists(), "or nothing was interrupted"
    while scheduler.zo.has_work():
        step(llm, 1)
    assert (job.directory / "start.safetensors").read_bytes() == (whole.directory / "start.safetensors").read_bytes()


@pytest.mark.parametrize("v", ["normal", "activations"])
def test_labels_have_size_one_and_no_other_word_moves(llm: Any, v: str) -> None:
    options: dict[str, Any] = {"objective": SENTIMENT, "learning_rate": 0.1}
    runs = [
        train(llm, **options, method=LoZO(rank=RANK, interval=2, eps=0.1, v=v, u=u))  # type: ignore[arg-type]
        for u in ("normal", "written")
    ]
    assert runs[0].history and [r["loss"] for r in runs[0].history] == [r["loss"] for r in runs[1].history]
    labels = [llm.get_tokenizer()(option)["input_ids"][-1] for option in SENTIMENT.options]
    assert sizes(runs[1]).nonzero()[:, 0].unique().tolist() == sorted(labels)
    assert sizes(runs[1])[labels].unique().tolist() == [1.0]
    state = rebuild_state(read_seed_log(runs[1].directory / "seeds.log"))
    assert state.acc_BN[0].count_nonzero() == len(labels) * RANK


def test_texts_have_the_sizes_of_their_tokens(llm: Any) -> None:
    rows = [{"prompt": "the film is", "completion": text} for text in (" good good", " dull", " good")] * 2
    run = train(llm, rows=rows, objective=LanguageModeling(), batch_size=6)
    counts: Counter[int] = Counter()
    for example in encode_examples(rows, LanguageModeling(), llm.get_tokenizer(), 128, "rows"):
        counts.update(example.sequences[0].label_ids)
    torch.testing.assert_close(sizes(run)[:, 0], row_sizes(sorted(counts.items()), len(sizes(run))))
    assert 0 < counts.total() / len(rows) < 8


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"target_modules": "all-linear"}, r"lozo\.u='written' measures the tokens .*; train 'lm_head' alone"),
    "preference": ({"objective": Preference()}, "objective='preference': .*; use u='normal'"),
    "continual": ({"continual": True, "steps": None}, "continual=True"),
    "both": ({"method": {"name": "lozo", "u": "written", "v": "activations"}}, "objective='reward': .* use v='normal'"),
    "another word": ({"method": {"name": "lozo", "u": "often"}}, "unknown lozo.u 'often'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_means_nothing_it_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    check_refused(OPTIONS | options, message)
