"""Reward(steps_per_generation=M): the state writes, M steps score what it wrote, and a resumed job has the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engines import Engines, reviews, scheduler_of, worker_of
from tests.test_concurrent_jobs import step
from tests.test_measured_v import check_refused
from tests.test_written_tokens import interrupted
from tests.trajectories import steps_of
from vllm_zo import ConfigError, LoZO, Reward, noise
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.config import JobConfig
from vllm_zo.engine import written_tokens
from vllm_zo.engine.load_job import load_job
from vllm_zo.entrypoints.llm.prepare import prepare_job
from vllm_zo.jobs.directory import JobDir
from vllm_zo.methods.written import row_sizes
from vllm_zo.objectives import EncodedExample, ScoringSequence
from vllm_zo.objectives.base import Trust
from vllm_zo.objectives.written import advantages, likelihood_loss, scored

ROWS, BATCH, SAMPLES, TOKENS, EACH, STEPS = 12, 3, 4, 6, 5, 15
asked: list[list[str]] = []
"""The completions of each call of the reward."""


def early(completions: list[str], **columns: Any) -> list[float]:
    """Earns more the earlier the letters of a text are in the alphabet."""
    asked.append(completions)
    return [sum(ord("z") - ord(c) for c in text if c.isalpha()) / (25 * max(len(text), 1)) for text in completions]


def objective(**options: Any) -> Reward:
    return Reward(
        "{sentence}", reward=early, max_tokens=TOKENS, temperature=1.0, top_p=1.0,
        **{"samples": SAMPLES, "steps_per_generation": EACH} | options,
    )  # fmt: skip


OPTIONS: dict[str, Any] = {
    "objective": objective(), "method": LoZO(rank=2, interval=2, eps=1e-2), "bases": 2, "learning_rate": 1e-3,
    "batch_size": BATCH, "steps": STEPS, "seed": 3, "progress": False,
}  # fmt: skip
HEAD: dict[str, Any] = {
    "target_modules": "lm_head", "method": LoZO(rank=2, interval=2, eps=1e-3, v="activations", u="written")
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(engines: Engines) -> Any:
    return engines.get("llama")


def train(llm: Any, **options: Any) -> Any:
    asked.clear()
    return llm.finetune(options.pop("rows", reviews(ROWS, seed=4)), **(OPTIONS | options))


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_advantages_are_what_a_prompts_completions_earn_above_its_others() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.2, 0.2, 0.2, 0.6]], dtype=torch.float64)
    centred = [[r - sum(of_prompt) / 4 for r in of_prompt] for of_prompt in rewards.tolist()]
    spread = math.sqrt(sum(c * c for row in centred for c in row) / 8)
    torch.testing.assert_close(advantages(rewards), torch.tensor(centred, dtype=torch.float64) / spread)
    one_each = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    assert advantages(one_each).tolist() == [[1.0], [-1.0]]
    assert advantages(torch.full((2, 3), 0.7, dtype=torch.float64)).abs().max() < 1e-12


def test_the_loss_is_minus_the_advantage_times_the_log_probability() -> None:
    generator = torch.Generator().manual_seed(1)
    prompt = objective(samples=2).encode({"sentence": "a film"}, _Letters(), "row")
    rewards, lengths = [[0.1, 0.9], [0.5, 0.3]], [[3, 1], [2, 4]]
    examples = [
        scored(prompt, [tuple(range(7, 7 + n)) for n in of_one], earned)
        for of_one, earned in zip(lengths, rewards, strict=True)
    ]
    first, second = examples[0].sequences
    stem = prompt.sequences[0].token_ids
    assert first.token_ids == (*stem, 7, 8) and first.label_ids == (7, 8, 9)
    assert first.positions == (len(stem) - 1, len(stem), len(stem) + 1)
    assert second.token_ids == stem and second.positions == (len(stem) - 1,)
    cells = -torch.rand(3, sum(2 * n for of_one in lengths for n in of_one), generator=generator)
    advantage = advantages(torch.tensor(rewards, dtype=torch.float64)).tolist()
    for probe in range(3):
        at, expected = 0, []
        for of_one, earned in zip(lengths, advantage, strict=True):
            total = 0.0
            for n, a in zip(of_one, earned, strict=True):
                total -= a * sum(cells[probe, at : at + n].tolist())
                at += 2 * n
            expected.append(total / 2 / TOKENS)
        # The cells are float32, and the sums of both sides float64.
        assert likelihood_loss(cells, examples, TOKENS)[probe].tolist() == pytest.approx(expected, rel=1e-12)
    losses, misses = objective(pass_reward=0.5).loss(cells, examples)
    assert losses.dtype == torch.float32 and misses.tolist() == [[0, 1]] * 3


class _Letters:
    """A tokenizer of one token a letter."""

    bos_token_id = None

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        ids = [[ord(c) for c in one] for one in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def test_its_slope_is_that_of_the_mean_reward() -> None:
    """Of a model of one token: with every token written as often as it is likely, to the last bits of float64."""
    logits = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64, requires_grad=True)
    shares, rewards = torch.tensor([2, 1, 5], dtype=torch.float64) / 8, torch.tensor([0.2, 1.0, 0.4])
    with torch.no_grad():
        logits.copy_(shares.log())
    written = [0, 0, 1, 2, 2, 2, 2, 2]
    (mean_reward,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    prompt = EncodedExample((ScoringSequence((1,), (0,), (0,), "logprobs"),) * len(written))
    example = scored(prompt, [(token,) for token in written], [rewards[token].item() for token in written])
    logp = logits.log_softmax(0)
    cells = torch.stack([logp[token] for token in written for _ in range(2)])[None]
    (slope,) = torch.autograd.grad(likelihood_loss(cells, [example], 1).sum(), logits)
    spread = torch.tensor([rewards[token] for token in written], dtype=torch.float64).std(correction=0)
    torch.testing.assert_close(-slope * spread, mean_reward, rtol=1e-6, atol=0)


# --- in the engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [{}, HEAD], ids=["layers", "head"])
def test_the_state_writes_and_the_steps_score_it(llm: Any, scope: dict[str, Any]) -> None:
    """At learning rate 0 the state is the base: it writes what `generate` samples, and scores it as prompts."""
    run = train(llm, **{"method": LoZO(rank=2, interval=2, eps=1e-4)} | scope, learning_rate=0.0)
    assert len(asked) == STEPS // EACH and {len(texts) for texts in asked} == {BATCH * SAMPLES}
    for generation, texts in enumerate(asked):
        records = run.history[generation * EACH : (generation + 1) * EACH]
        ids = _written_for(run, generation)
        seeds = [
            noise.derive_seed(3, "completion", generation * EACH, i, sample) for i in ids for sample in range(SAMPLES)
        ]
        prompts = [_prompt(llm, i) for i in ids for _ in range(SAMPLES)]
        params = [SamplingParams(max_tokens=TOKENS, temperature=1.0, top_p=1.0, seed=seed) for seed in seeds]
        outputs = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]
        assert texts == [out.text for out in outputs]
        rewards = torch.tensor(early(texts), dtype=torch.float64).view(BATCH, SAMPLES)
        asked.pop()
        logprobs = [_logprob(llm, p["prompt_token_ids"], o.token_ids) for p, o in zip(prompts, outputs, strict=True)]
        loss = -(advantages(rewards) * torch.tensor(logprobs).view(BATCH, SAMPLES)).mean() / TOKENS
        for record in records:
            assert record["reward"] == pytest.approx(rewards.mean().item())
            # Both probes together: the base, but for the curvature.
            assert record["loss"] == pytest.approx(loss.item(), abs=1e-3)
        assert len({tuple(record["coefficients"]) for record in records}) == EACH, "each step has its own direction"


def _written_for(run: Any, generation: int) -> tuple[int, ...]:
    from vllm_zo.data import BatchOrder

    return BatchOrder(ROWS, BATCH, run.config.seed).batch(generation)


def _prompt(llm: Any, row: int) -> dict[str, Any]:
    return {"prompt_token_ids": llm.get_tokenizer()(reviews(ROWS, seed=4)[row]["sentence"].strip())["input_ids"]}


def _logprob(llm: Any, prompt: list[int], completion: Any) -> float:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    (out,) = llm.generate([{"prompt_token_ids": [*prompt, *completion]}], params, use_tqdm=False)
    return sum(next(iter(at.values())).logprob for at in out.prompt_logprobs[len(prompt) :])


def test_it_learns_and_writes_with_what_it_has_learnt(llm: Any) -> None:
    run = train(llm, **HEAD, steps=40 * 12, learning_rate=2e-3, objective=objective(steps_per_generation=40))
    earned = [sum(early(texts)) / len(texts) for texts in list(asked)]
    assert sum(earned[-3:]) / 3 > sum(earned[:3]) / 3 + 0.1, earned
    assert run.history[0]["reward"] == pytest.approx(earned[0])


@pytest.mark.parametrize("space", [{}, {"update_space": "fold", "bases": None}], ids=["bank", "fold"])
@pytest.mark.parametrize("stop_at", [EACH + 2, EACH * 2])
def test_a_resumed_run_is_the_unbroken_one(llm: Any, tmp_path: Path, space: dict[str, Any], stop_at: int) -> None:
    whole = train(llm, **space)
    _restore(llm, whole)
    stopped = train(
        llm, **space, output_dir=str(tmp_path / "job"),
        callbacks=[lambda run, record: run.stop() if record["step"] == stop_at else None],
    )  # fmt: skip
    _restore(llm, stopped)
    assert stop_at <= len(steps_of(tmp_path / "job")) < STEPS
    resumed = train(llm, **space, resume_from=tmp_path / "job")
    _restore(llm, resumed)
    assert steps_of(resumed.directory) == steps_of(whole.directory) and len(steps_of(whole.directory)) == STEPS
    assert any(any(record.coefficients) for record in steps_of(whole.directory))
    log = read_seed_log(whole.directory / "seeds.log")
    assert rebuild_state(log, log.num_steps).acc_BN.abs().max() > 0, "the log alone rebuilds the state"


def _restore(llm: Any, run: Any) -> None:
    if run.config.space == "fold":
        llm.restore_base(run)


def test_without_its_file_a_resumed_job_writes_again(llm: Any, tmp_path: Path) -> None:
    train(
        llm, output_dir=str(tmp_path / "job"),
        callbacks=[lambda run, record: run.stop() if record["step"] == EACH + 2 else None],
    )  # fmt: skip
    (tmp_path / "job" / "generation.json").unlink()
    run = train(llm, resume_from=tmp_path / "job")
    assert len(steps_of(run.directory)) == STEPS and len(asked) == 2, "the rest of that generation, and the last one"


def test_a_group_that_is_interrupted_is_written_again(llm: Any, tmp_path: Path) -> None:
    whole = train(llm)
    job = interrupted(llm, OPTIONS, reviews(ROWS, seed=4), 4)
    scheduler = scheduler_of(llm)
    while scheduler.zo.has_work():
        step(llm, 1)
    assert steps_of(job.directory) == steps_of(whole.directory)


def test_steps_score_without_requests_and_keep_the_rows_of_one_generation(llm: Any) -> None:
    kept, seen = worker_of(llm).zo.platform.rows.kept, []
    worker_of(llm).zo.platform.forget_states()
    requests: list[int] = []

    def look(run: Any, record: dict[str, Any]) -> None:
        seen.append(kept.used)
        requests.append(len(scheduler_of(llm)._zo_members))

    train(llm, **HEAD, callbacks=[look])
    assert 0 < max(seen) <= BATCH * SAMPLES + written_tokens.MOST_ROWS
    assert all(later <= BATCH * SAMPLES for later in seen[EACH:]), "those of an earlier generation are let go"
    assert min(requests) == 0


def test_sizes_and_directions_are_those_of_what_the_base_writes(llm: Any) -> None:
    run = train(llm, **HEAD)
    state = rebuild_state(read_seed_log(run.directory / "seeds.log"), 0)
    assert state.sizes_N is not None and state.measured_BN is not None
    seeds = [noise.derive_seed(3, written_tokens.STREAM, i) for i in range(ROWS)]
    params = [SamplingParams(max_tokens=TOKENS, temperature=1.0, top_p=1.0, seed=seed) for seed in seeds]
    outputs = llm.generate([_prompt(llm, i) for i in range(ROWS)], params, use_tqdm=False)
    counts: dict[int, int] = {}
    for token in (token for out in outputs for token in out.outputs[0].token_ids):
        counts[token] = counts.get(token, 0) + 1
    (sizes_OR,) = state.layout.split_u(state.sizes_N)
    torch.testing.assert_close(sizes_OR[:, 0], row_sizes(sorted(counts.items()), len(sizes_OR)))
    assert state.measured_BN.abs().min(1).values.max() > 0


# --- what it refuses --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "continual": ({"continual": True, "steps": None}, "continual=True: steps_per_generation=5 needs rows"),
    "probes that write": (HEAD | {"objective": objective(steps_per_generation=None)}, "use v='normal'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_cannot_be_it_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    check_refused(OPTIONS | options, message)


def test_shaping_and_wrong_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shaping='zscore': .* steps_per_generation=5 they write nothing"):
        objective(shaping="zscore")
    with pytest.raises(ConfigError, match="steps_per_generation"):
        objective(steps_per_generation=0)


def test_several_engines_are_refused(llm: Any) -> None:
    config = JobConfig.from_options({name: value for name, value in OPTIONS.items() if name != "progress"})
    job = prepare_job(llm.llm_engine, reviews(ROWS, seed=4), None, None, config, trust=Trust.IMPORTS)
    with pytest.raises(ConfigError, match="with steps_per_generation one engine writes and scores"):
        load_job(JobDir(job.directory), scheduler_of(llm).zo_facts, None)
