"""Other roads through vLLM take the steps that one process with the V1 model runner takes.

V2 runner: what CUDA uses. Its Triton kernels need a GPU or, here, Triton's interpreter: a child process runs vLLM's own
V2 runner on the CPU that way. Batch preparation, sampling and the states between them are other code than the V1
runner's, and all that our worker reads of a step comes from there.

Tensor parallel: two workers, each with half of every matrix and of the vocabulary. Noise is a function of the global
element index, so both write their shard of the same directions; label logits are summed over the ranks.

Pipeline parallel: two stages, each with half of the layers. Both hold the whole state and write the slots of their own
layers. Only the last one has losses, so steps take the log path; and what the base is, no stage may change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.children import Child
from tests.engines import SENTIMENT, Engines, reviews
from tests.openai_server import Server, create, upload_reviews, wait_for
from tests.test_seams import job_in_progress
from vllm_zo import ConfigError, LoZO, Reward
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot
from vllm_zo.jobs.directory import JobDir

ENGINE: dict[str, Any] = {"max_num_batched_tokens": 96, "max_num_seqs": 16, "enable_prefix_caching": True}
"""Small: some members are prefilled in chunks, and a group takes several engine steps."""
LOSS_TOLERANCE = 2e-5
PROMPTS = ["the story is dull", "a quiet , clever and moving story with a great ending"]


def results(llm: Any) -> Iterator[tuple[str, Any]]:
    """What an engine does that all must do alike, by name."""
    stages = llm.llm_engine.vllm_config.parallel_config.pipeline_parallel_size
    assert type(llm.llm_engine.engine_core.engine_core.scheduler).__name__.startswith("ZO")
    rows = [*reviews(12, longest=60), {"sentence": "a great film " * 25, "label": 1}]
    job: dict[str, Any] = {
        "objective": SENTIMENT, "batch_size": 4, "steps": 5, "learning_rate": 2e-3, "eval_interval": 2,
        "method": LoZO(eps=2e-2, interval=2, queries=2), "progress": False,
    }  # fmt: skip
    yield "base", answers(llm)
    run = llm.finetune(rows, reviews(6, seed=2), **job)
    yield "losses", [record["loss"] for record in run.history]
    yield "evaluations", [record["eval_loss"] for record in run.evaluations]
    yield "tuned", answers(llm, lora_request=run.lora_request)

    def ask(_: Any, record: dict[str, Any]) -> None:
        params = SamplingParams(max_tokens=3, temperature=0.0)
        llm.llm_engine.add_request(f"ask-{record.get('step')}", PROMPTS[record["step"] % 2], params)

    busy = llm.finetune(rows, callbacks=[ask], **job)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    yield "losses beside traffic", [record["loss"] for record in busy.history]
    with job_in_progress(llm, batch_size=2):
        yield "prompt logprobs beside a job", prompt_logprobs(llm)
    if stages > 1:
        with pytest.raises(ConfigError, match="update_space='fold' with pipeline_parallel_size=2: every stage would"):
            llm.finetune(rows, update_space="fold", **job)
    else:
        fold = llm.finetune(rows, update_space="fold", **job)
        yield "losses in fold", [record["loss"] for record in fold.history]
        yield "folded", answers(llm)
        llm.restore_base(fold)
        yield "restored", answers(llm)
    written = Reward("{sentence} It was", reward=letters, max_tokens=6, temperature=0.0)
    job |= {"objective": written, "method": LoZO(eps=0.5, interval=2), "learning_rate": 1e-2}
    rewarded = llm.finetune(rows, reviews(6, seed=2), **job)
    yield "rewards", [loss for record in rewarded.history for loss in (record["loss_plus"], record["loss_minus"])]


def letters(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text)) / 10 for text in completions]


def answers(llm: Any, **options: Any) -> list[float]:
    """Log-probability of the best first token of each prompt."""
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=1, logprobs=1), use_tqdm=False, **options)
    return [max(p.logprob for p in output.outputs[0].logprobs[0].values()) for output in outputs]


def prompt_logprobs(llm: Any) -> list[float]:
    """Of prompts of every length from 2 to 7 words: one has as many rows as the step has requests, whose members leave
    theirs empty."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    found = []
    for length in range(2, 8):
        (output,) = llm.generate([" ".join(["story"] * length)], params, use_tqdm=False)
        for token, step in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            found.append(step[token].logprob)
    return found


def two_workers() -> str:
    """One core for each worker, in vLLM's notation."""
    cores = sorted(os.sched_getaffinity(0))
    return f"{cores[0]}|{cores[-1]}"


ROADS: dict[str, dict[str, str]] = {
    "v2-runner": {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"},
    "tensor-parallel": {"VLLM_CPU_OMP_THREADS_BIND": two_workers()},
    "pipeline": {"VLLM_CPU_OMP_THREADS_BIND": two_workers()},
}
"""How the child is told which way to go; `tests.children.train_another_way` reads it."""
IN_FOLD = ("losses in fold", "folded", "restored")
NAMES = (
    "base", "losses", "evaluations", "tuned", "losses beside traffic", "prompt logprobs beside a job", *IN_FOLD,
    "rewards",
)  # fmt: skip


@pytest.fixture(scope="module")
def usual(engines: Engines) -> dict[str, Any]:
    return dict(results(engines.get("opt", **ENGINE)))


@pytest.fixture(scope="module", params=[pytest.param(road, marks=pytest.mark.slow) for road in ROADS])
def other(request: pytest.FixtureRequest, engines: Engines) -> dict[str, Any]:
    child = Child("train_another_way", str(engines.model("opt")), request.param, **ROADS[request.param])
    return {report["name"]: report["result"] for report in child.finish()}


@pytest.mark.parametrize("name", NAMES)
def test_every_road_leads_to_the_same_results(usual: dict[str, Any], other: dict[str, Any], name: str) -> None:
    if name in IN_FOLD and name not in other:
        return  # stages refuse it, as `results` has seen
    assert len(usual[name]) >= 2 and other[name] == pytest.approx(usual[name], abs=LOSS_TOLERANCE)


def test_the_results_that_should_differ_do(other: dict[str, Any]) -> None:
    """Else agreeing would mean little."""
    for name in {"tuned", "folded"} & other.keys():
        assert max(abs(a - b) for a, b in zip(other[name], other["base"], strict=True)) > 50 * LOSS_TOLERANCE
    assert len({round(loss, 4) for loss in other["losses"]}) == len(other["losses"])
    assert len({round(loss, 4) for loss in other["rewards"]}) > len(other["rewards"]) // 2


@pytest.mark.slow
def test_a_server_with_two_stages_trains_and_serves(engines: Engines, tmp_path: Path) -> None:
    """Its versions are what its log says; a job that it cannot run fails with the reason."""
    flags = ("--pipeline-parallel-size", "2", "--num-gpu-blocks-override", "512")
    server = Server(str(engines.model("opt")), tmp_path / "state", *flags, **ROADS["pipeline"])
    try:
        client = server.wait_until_ready().client()
        data = upload_reviews(client, 24)
        job = create(client, data, hyperparameters={"steps": 20, "eval_interval": 10})
        fold = create(client, data, hyperparameters={"update_space": "fold", "bases": None})
        job = wait_for(client, job.id, "succeeded")
        asked: dict[str, Any] = {"prompt": PROMPTS[0], "max_tokens": 1, "temperature": 0, "logprobs": 1}
        base, tuned = (client.completions.create(model=m, **asked) for m in ("tiny", job.fine_tuned_model))
        assert base.choices[0].logprobs != tuned.choices[0].logprobs
        directory = JobDir(tmp_path / "state" / "jobs" / job.id)
        log = read_seed_log(directory.log)
        state = log.header.new_state()
        assert log.num_steps == 20 and load_snapshot(directory.version(20), state) == 20
        assert torch.equal(state.acc_BN, rebuild_state(log).acc_BN)
        assert "pipeline_parallel_size=2: every stage" in wait_for(client, fold.id, "failed").error.message
    finally:
        server.kill()
