"""`patience`, as a job decides it: no engine, the test answers what the job issues. (On an engine: test_serving.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.test_rewarder import Recorder
from vllm_zo import Classification, JobConfig, LoZO
from vllm_zo.commands import GroupResult, StartJob
from vllm_zo.engine.job import Job
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives.base import EncodedExample, ScoringSequence

EXAMPLE = EncodedExample((ScoringSequence((1, 2), (1,), (3, 4), "labels"),), gold=1)


def make(tmp_path: Path, **options: Any) -> tuple[Job, Recorder]:
    objective = Classification("{q}", [" a", " b"])
    config = JobConfig(
        objective=objective, method=LoZO(), learning_rate=1e-3, batch_size=2, steps=12, eval_interval=2, **options
    )
    directory, recorder = JobDir(tmp_path / "job"), Recorder()
    directory.path.mkdir()
    for path, count in ((directory.train, 4), (directory.validation, 3)):
        path.write_bytes((msgspec.json.encode(EXAMPLE) + b"\n") * count)
    start = StartJob("job", 0, config.method, objective, "bank", 1, "all-linear")
    job = Job(directory, config, 1, start=start, eval_batch=2, recorder=recorder)  # type: ignore[arg-type]
    job.enter()
    return job, recorder


def run(job: Job, recorder: Recorder, losses: list[float]) -> list[int]:
    """Answer all that the job issues, evaluations with the given losses. Returns the steps that it evaluated at."""
    answers = iter(losses)
    evaluated: list[int] = []
    while (work := job.next_work()) is not None:
        if not work.trains and (not evaluated or evaluated[-1] != work.plan.step):
            evaluated.append(work.plan.step)
            loss = next(answers)
        shape = [1.0 if work.trains else loss] * len(work.examples)
        probes = len(work.plan.probes)
        coefficients = [0.1] if work.trains else []
        result = GroupResult("g", [shape] * probes, [[1] * len(shape)] * probes, coefficients, True)
        job.on_result(work, result, 0.0)
    return evaluated


@pytest.mark.parametrize(
    ("patience", "losses", "evaluated"),
    [
        (1, [2.0, 2.0], [0, 2]),
        (2, [2.0, 1.0, 1.5, 1.5], [0, 2, 4, 6]),
        (2, [2.0, 3.0, 1.0, 3.0, 0.5, 3.0, 3.0], [0, 2, 4, 6, 8, 10, 12]),
        (3, [2.0, 3.0, 3.0, 2.0], [0, 2, 4, 6]),
        (None, [2.0] * 7, [0, 2, 4, 6, 8, 10, 12]),
    ],
)
def test_a_job_stops_at_the_evaluation_that_ends_its_patience(
    patience: int | None, losses: list[float], evaluated: list[int], tmp_path: Path
) -> None:
    job, recorder = make(tmp_path, patience=patience)
    assert run(job, recorder, losses) == evaluated
    assert len(recorder.steps) == evaluated[-1] and job.is_complete()


def test_no_step_is_taken_while_the_evaluation_that_may_end_the_job_is_under_way(tmp_path: Path) -> None:
    for patience, waits in ((2, True), (None, False)):
        (tmp_path / str(patience)).mkdir()
        job, _ = make(tmp_path / str(patience), patience=patience)
        pieces = [job.next_work(), job.next_work()]  # of three examples, two a piece
        assert not any(piece.trains for piece in pieces if piece)
        assert (job.next_work() is None) == waits
