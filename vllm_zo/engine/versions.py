"""Which states of a job can be served, by their step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_zo.commands import Command, Publish, Unpublish
from vllm_zo.config import JobConfig
from vllm_zo.engine.group import Work
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.records import EvaluationMetrics, given_back


class Versions:
    """The versions of a job that the workers have published.

    Args:
        known: those that are on disk already; a job that goes on has some.
    """

    def __init__(self, directory: JobDir, config: JobConfig, known: Iterable[int]) -> None:
        self._directory, self._config = directory, config
        self._steps = set(known)

    @property
    def steps(self) -> list[int]:
        return sorted(self._steps)

    def due(self, work: Work, steps: int) -> bool:
        """Whether to publish the state after `work`: after an evaluation, and every `publish_interval` steps.

        Args:
            steps: that the state has taken.
        """
        if not work.trains:
            return work.last_of_evaluation
        return bool(self._config.publish_interval and steps % self._config.publish_interval == 0)

    def publish(self, step: int) -> list[Command]:
        """What the workers do to publish the state after `step` steps; nothing if it is published."""
        if step in self._steps:
            return []
        self._steps.add(step)
        return [self._publish(step, measure=self._config.continual), *self._unpublish_oldest()]

    def publish_again(self, step: int) -> list[Command]:
        """How an engine that joins learns of a version of the very state that it joins with: it publishes it, too.

        Older versions it has found on disk.
        """
        return [self._publish(step)] if step in self._steps else []

    def _publish(self, step: int, measure: bool = False) -> Publish:
        return Publish(self._directory.job_id, step, str(self._directory.version(step)), measure)

    def _unpublish_oldest(self) -> list[Command]:
        """A continual job publishes without end: only its newest versions are kept."""
        if not self._config.continual:
            return []
        oldest = self.steps[: -self._config.keep_versions]
        self._steps.difference_update(oldest)
        return [Unpublish(self._directory.job_id, step, str(self._directory.version(step))) for step in oldest]

    def note(self, step: int) -> None:
        """Another object has had the workers publish this version."""
        self._steps.add(step)

    def drop(self, step: int) -> None:
        """Forget a version that the disk has refused: it cannot be served. The log has its steps, so none is lost."""
        self._steps.discard(step)

    def drop_unwritten(self) -> None:
        """Forget versions without a file, after a command of the job failed: later ones may not have been executed."""
        self._steps = {step for step in self._steps if self._directory.version(step).exists()}

    def given_back(self, evaluations: Sequence[EvaluationMetrics]) -> int | None:
        """The version that the run gives back; None before the first one."""
        if not self._steps:
            return None
        # A state is published with its evaluation, but a full disk may have refused the file of one of them.
        served = [record for record in evaluations if record["step"] in self._steps]
        return given_back(served, max(self._steps), keeps_best=self._config.keeps_best)
