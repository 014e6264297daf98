"""The V2 model runner, which CUDA uses, takes the steps that the V1 runner takes.

Its Triton kernels need a GPU or, here, Triton's interpreter: a child process runs vLLM's own V2 runner on the CPU that
way. What the two runners share is the model; batch preparation, sampling and the states between them are different
code, and all that our worker reads of a step comes from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.children import Child
from tests.engines import SENTIMENT, Engines, reviews
from tests.test_seams import job_in_progress
from vllm_zo import LoZO

ENGINE: dict[str, Any] = {"max_num_batched_tokens": 96, "max_num_seqs": 16, "enable_prefix_caching": True}
"""Small: some members are prefilled in chunks, and a group takes several engine steps."""
LOSS_TOLERANCE = 2e-5
PROMPTS = ["the story is dull", "a quiet , clever and moving story with a great ending"]


def results(llm: Any) -> Iterator[tuple[str, Any]]:
    """What an engine does that both runners must do alike, by name."""
    assert type(llm.llm_engine.engine_core.engine_core.scheduler).__name__.startswith("ZO")
    rows = [*reviews(12, longest=60), {"sentence": "a great film " * 25, "label": 1}]
    job: dict[str, Any] = {
        "objective": SENTIMENT, "batch_size": 4, "steps": 7, "learning_rate": 1e-3, "eval_interval": 3,
        "method": LoZO(eps=2e-2, interval=3, queries=2), "progress": False,
    }  # fmt: skip
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
    fold = llm.finetune(rows, update_space="fold", **job)
    yield "losses in fold", [record["loss"] for record in fold.history]
    yield "folded", answers(llm)
    llm.restore_base(fold)
    yield "restored", answers(llm)


def answers(llm: Any, **options: Any) -> list[float]:
    """Log-probability of the best first token of each prompt."""
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=1, logprobs=1), use_tqdm=False, **options)
    return [max(p.logprob for p in output.outputs[0].logprobs[0].values()) for output in outputs]


def prompt_logprobs(llm: Any) -> list[float]:
    """Of prompts of every length up to 9 words: one has as many rows as the step has requests, whose members leave
    theirs empty."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    found = []
    for length in range(1, 10):
        (output,) = llm.generate([" ".join(["story"] * length)], params, use_tqdm=False)
        for token, step in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            found.append(step[token].logprob)
    return found


@pytest.fixture(scope="module")
def both(engines: Engines) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results of the V1 runner (here) and of the V2 runner (in a child)."""
    model: Path = engines.model("opt")
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    child = Child("train_in_the_v2_runner", str(model), **environment)
    v1 = dict(results(engines.get("opt", **ENGINE)))
    return v1, {report["name"]: report["result"] for report in child.finish()}


@pytest.mark.parametrize(
    "name",
    [
        "losses", "evaluations", "tuned", "losses beside traffic", "prompt logprobs beside a job", "losses in fold",
        "folded", "restored",
    ],
)  # fmt: skip
def test_both_runners_agree(both: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    v1, v2 = both
    assert len(v1[name]) >= 2 and v2[name] == pytest.approx(v1[name], abs=LOSS_TOLERANCE)


def test_the_results_that_should_differ_do(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Else agreeing would mean little."""
    _, v2 = both
    for name in ("tuned", "folded"):
        assert max(abs(a - b) for a, b in zip(v2[name], v2["restored"], strict=True)) > 50 * LOSS_TOLERANCE
    assert len({round(loss, 4) for loss in v2["losses"]}) == len(v2["losses"])
