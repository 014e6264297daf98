"""Engines without a model that check what they are told.

A fake engine's cells are a function of everything that it has applied: one record too many, too few or out of order,
and every later line of the log differs.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from benchmarks.simulated_cluster import FACTS, MODULES
from vllm_zo.checkpoint.seed_log.format import StepRecord, encode_record
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.cluster.protocol import Commit, Digested, FromEngine, Join, Joined, Score, Scored, Stop, Stopped, ToEngine
from vllm_zo.commands import ApplyRecord, Publish, ReportDigest
from vllm_zo.engine.load_job import load_job
from vllm_zo.jobs.directory import JobDir


class FakeEngine:
    """Answers in the order in which it is told."""

    def __init__(self) -> None:
        self.epoch = -1
        self.joins: list[int] = []
        """Epochs of the coordinators whose job it has joined."""
        self.records: list[StepRecord] = []
        self.published: list[tuple[int, int]] = []
        """(version, steps of the state that was published under it)."""
        self.scored = 0
        """Shards that it has answered."""

    def tell(self, message: ToEngine) -> list[FromEngine]:
        if isinstance(message, Join) and message.epoch > self.epoch:
            return [self._join(message)]
        if message.epoch != self.epoch:
            return []
        if isinstance(message, Score):
            self.scored += 1
            return [Scored(self.epoch, message.number, self.cells(message))]
        if isinstance(message, Commit):
            return self._commit(message)
        if not isinstance(message, Stop):
            return []
        epoch, self.epoch = self.epoch, -1
        return [Stopped(epoch)]

    def _join(self, join: Join) -> Joined:
        self.epoch, self.directory = join.epoch, JobDir(Path(join.job_dir))
        self.joins.append(join.epoch)
        logged = read_seed_log(self.directory.log).records if self.directory.log.exists() else ()
        assert len(logged) >= join.steps, "the log comes before everything that is said of it"
        self.records = list(logged[: join.steps])
        header = load_job(self.directory, FACTS, None).recorder.header(MODULES)
        return Joined(self.epoch, MODULES, header, "fake 1")

    def _commit(self, commit: Commit) -> list[FromEngine]:
        answers: list[FromEngine] = []
        for command in commit.commands:
            if isinstance(command, ApplyRecord):
                assert command.record.step == len(self.records), "each record once, in order"
                on_disk = read_seed_log(self.directory.log).records
                assert on_disk[command.record.step] == command.record, "first the log"
                self.records.append(command.record)
            elif isinstance(command, Publish):
                self.published.append((command.version, len(self.records)))
            elif isinstance(command, ReportDigest):
                assert command.steps == len(self.records), "the digest is that of the state that was asked for"
                answers.append(Digested(self.epoch, command.steps, self.digest()))
        return answers

    def digest(self) -> int:
        """Of the state; a test puts another one in its place."""
        return zlib.crc32(repr(self.records).encode())

    def cells(self, score: Score) -> list[list[float]]:
        assert score.plan.step == len(self.records), "scored in the state of its step"
        state = 0
        for record in self.records:
            state = zlib.crc32(encode_record(record, None), state)
        return [
            [
                zlib.crc32(repr((probe.key, probe.sign, example, label)).encode(), state) / 2**32
                for example in score.example_ids
                for label in range(2)
            ]
            for probe in score.plan.probes
        ]
