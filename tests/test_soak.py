"""Hours of use in minutes: thousands of steps amid traffic, adapters that come and go, aborts and pauses.

Afterwards the engine must be the one it was: every slot and block free, nothing held, no memory lost, and the same job
takes the same steps, bit for bit.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import random
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm.lora.request import LoRARequest

from tests.engines import Engines, reviews, scheduler_of, worker_of
from tests.test_seams import PROMPTS
from tests.test_serving import GREEDY, answers, assert_agree, margin
from tests.trajectories import Trajectory, train

ROUNDS, STEPS_A_ROUND = 14, 300
WARM_UP_ROUNDS = 4
"""Allocators, caches and compiled kernels grow for a while before memory says anything."""
MAX_OBJECTS_A_STEP = 4
"""What a step leaves behind on purpose is its record, a dictionary with a list, for whoever polls."""
MAX_BYTES_A_STEP = 32_000
"""For memory that Python does not count. Arenas of short-lived threads alone took up to 10 KB a step; the hidden states
of one step of one group are 40 KB."""


class Traffic:
    """A callback that sends requests between steps, loses interest in some, pauses the engine, and judges answers.

    Args:
        expected: adapter (None: the base) -> what `answers` says with it, alone.
    """

    def __init__(self, llm: Any, expected: dict[LoRARequest | None, Any], seed: int) -> None:
        self.llm, self.expected = llm, expected
        self.rng = random.Random(seed)
        self.open: dict[str, tuple[int, LoRARequest | None]] = {}
        self.answered = self.aborted = self.pauses = 0
        self._ids = itertools.count()
        self._step = llm.llm_engine.step

    def __enter__(self) -> Traffic:
        self.llm.llm_engine.step = self.step
        return self

    def __exit__(self, *_: object) -> None:
        while self.llm.llm_engine.has_unfinished_requests():
            self.step()
        self.llm.llm_engine.step = self._step

    def __call__(self, run: Any, record: dict[str, Any]) -> None:
        event = self.rng.random()
        if event < 0.2:
            self.send(self.rng.randrange(len(PROMPTS)), self.rng.choice(list(self.expected)))
        elif event < 0.22 and self.open:
            self.abort([self.rng.choice(list(self.open))])
        elif event < 0.23:
            self.pause()

    def send(self, prompt: int, adapter: LoRARequest | None) -> None:
        request_id = f"soak-{id(self)}-{next(self._ids)}"
        self.open[request_id] = prompt, adapter
        self.llm.llm_engine.add_request(request_id, PROMPTS[prompt], GREEDY, lora_request=adapter)

    def abort(self, request_ids: list[str]) -> None:
        self.llm.llm_engine.abort_request(request_ids)
        self.aborted += len(request_ids)
        for request_id in request_ids:
            del self.open[request_id]

    def pause(self) -> None:
        """In the middle of whatever runs. `abort` is for the members: nobody would hear of an aborted request."""
        self.abort(list(self.open))
        core = self.llm.llm_engine.engine_core.engine_core
        core.pause_scheduler(mode=self.rng.choice(["abort", "keep"]))
        for _ in range(3):
            self.step()
        core.resume_scheduler()
        self.pauses += 1

    def step(self) -> Any:
        outputs = self._step()
        for output in outputs:
            if output.finished and output.request_id in self.open:
                prompt, adapter = self.open.pop(output.request_id)
                completion = output.outputs[0]
                margins = [margin([p.logprob for p in step.values()]) for step in completion.logprobs]
                assert_agree([(list(completion.token_ids), margins)], [self.expected[adapter][prompt]])
                self.answered += 1
        return outputs


def assert_nothing_is_left(llm: Any, free_blocks: int) -> None:
    scheduler, trainer = scheduler_of(llm), worker_of(llm).zo
    llm.llm_engine.step()  # tells the worker what has just finished
    assert not scheduler.has_requests() and not scheduler.requests
    assert not scheduler._zo_members
    assert (
        not any(lane.group for lane in scheduler.zo.queue.lanes)
        and not scheduler.zo.queue.unfinished
        and not scheduler.zo._in_flight
    )
    assert not any(len(job.rows) or job._validation for job in scheduler.zo.queue.jobs.values())
    assert scheduler.zo.queue.lanes[0].slots.free == list(range(scheduler.zo_config.slots))
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free_blocks
    assert not trainer.jobs and not trainer.groups and not trainer._pending and not any(trainer.pool._owner)


def held() -> tuple[int, int]:
    """Objects that Python tracks, and bytes of the whole process."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what Python has freed, glibc may keep
    return len(gc.get_objects()), int(psutil.Process().memory_info().rss)


@pytest.mark.slow
def test_thousands_of_steps_amid_traffic_leave_the_engine_as_it_was(engines: Engines, tmp_path: Path) -> None:
    llm = engines.get(max_loras=2, enable_prefix_caching=True, max_num_seqs=16)
    free_blocks = scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()
    base, first = answers(llm), train(llm, steps=60)
    trajectory = Trajectory.of(llm, first)
    first.save(tmp_path / "adapter")
    tuned = answers(llm, lora_request=first.lora_request)
    assert [tokens for tokens, _ in tuned] != [tokens for tokens, _ in base]

    usage, ids = [], itertools.count(100)
    answered = aborted = pauses = 0
    for round_ in range(ROUNDS):
        loaded = [LoRARequest(f"file-{i}", i, str(tmp_path / "adapter")) for i in itertools.islice(ids, 2)]
        expected = {None: base, first.lora_request: tuned} | dict.fromkeys(loaded, tuned)
        with Traffic(llm, expected, seed=round_) as traffic:
            options = {"steps": STEPS_A_ROUND, "seed": round_, "eval_interval": 100, "validation": reviews(8, seed=2)}
            run = train(llm, callbacks=[traffic], divergence_factor=None, **options)
        assert run.status == "succeeded" and len(run.history) == STEPS_A_ROUND
        answered, aborted = answered + traffic.answered, aborted + traffic.aborted
        pauses += traffic.pauses
        for adapter in loaded:
            llm.llm_engine.remove_lora(adapter.lora_int_id)
        if round_ % 4 == 3:
            llm.restore_base(train(llm, "fold", steps=20))
        assert_nothing_is_left(llm, free_blocks)
        usage.append(held())

    assert answered > ROUNDS * STEPS_A_ROUND / 10 and aborted > ROUNDS and pauses > ROUNDS
    steps = STEPS_A_ROUND * (ROUNDS - WARM_UP_ROUNDS)
    objects, used = (
        (after - before) / steps for before, after in zip(usage[WARM_UP_ROUNDS - 1], usage[-1], strict=True)
    )
    assert objects < MAX_OBJECTS_A_STEP and used < MAX_BYTES_A_STEP, (objects, used, usage)
    assert_agree(answers(llm), base)
    assert_agree(answers(llm, lora_request=first.lora_request), tuned)
    assert Trajectory.of(llm, train(llm, steps=60)) == trajectory
