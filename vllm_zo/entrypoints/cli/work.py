"""How much a run computes: forward passes and tokens of a step, of an evaluation, and of what comes before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_zo.config import JobConfig
from vllm_zo.data.batches import BatchOrder
from vllm_zo.engine.written_tokens import WrittenTokens
from vllm_zo.objectives.base import EncodedExample, GeneratingObjective, ReferencedObjective


@dataclass(frozen=True)
class Work:
    """The work of a run.

    Attributes:
        steps: None: the job has no end.
        probes: of a step.
        rows: of a step.
        sequences: of a row, on the average.
        epochs: how often the run goes through the data.
        step_tokens: of a step, on the average, with the most that the model may write.
        evaluations: how many there are.
        scored: rows of an evaluation.
        passes, evaluation_tokens: of an evaluation.
        referenced, reference_tokens: rows that the base reads before the first step, and their tokens.
    """

    steps: int | None
    probes: int
    rows: int
    sequences: float
    epochs: float
    step_tokens: float
    evaluations: int
    scored: int
    passes: int
    evaluation_tokens: int
    referenced: int
    reference_tokens: int

    @classmethod
    def of(cls, config: JobConfig, train: Sequence[EncodedExample], validation: Sequence[EncodedExample]) -> Work:
        probes, rows = len(config.method.plan(config.seed, 0, 0).probes), config.examples_per_step
        scored = validation[: config.eval_examples]
        times = 1 + (config.steps > 0)
        if config.eval_interval and config.steps:
            times += (config.steps - 1) // config.eval_interval
        referenced: list[EncodedExample] = []
        compares, coordinates = isinstance(config.objective, ReferencedObjective), config.method.coordinates
        writes = coordinates.measured is not None and isinstance(config.objective, GeneratingObjective)
        if not config.continual and (compares or coordinates.measures_v or writes):
            order = BatchOrder(len(train), min(rows, len(train)), config.seed)
            referenced = [*(train[i] for i in order.first(config.steps)), *(scored if compares else ())]
        if writes:
            referenced = WrittenTokens.read(referenced)
        return cls(
            steps=None if config.continual else config.steps,
            probes=probes,
            rows=rows,
            sequences=_mean([len(example.sequences) for example in train]),
            epochs=config.steps * rows / len(train),
            step_tokens=probes * rows * _mean([_tokens(example) for example in train]),
            evaluations=times if scored else 0,
            scored=len(scored),
            passes=sum(len(example.sequences) for example in scored),
            evaluation_tokens=sum(map(_tokens, scored)),
            referenced=len(referenced),
            reference_tokens=sum(map(_tokens, referenced)),
        )

    def described(self) -> Iterator[str]:
        """A line for each part."""
        yield (
            f"a step: {self.probes} probes x {self.rows} rows x {self.sequences:g} sequence"
            f"{'s' * (self.sequences != 1)} a row = {round(self.probes * self.rows * self.sequences)} forward passes, "
            f"about {_count(self.step_tokens)} tokens"
        )
        if self.steps is None:
            yield "the run: without end"
            return
        yield (
            f"the run: {self.steps} steps, {self.epochs:.1f} times through the data, about "
            f"{_count(self.steps * self.step_tokens)} tokens"
        )
        if self.referenced:
            yield f"before: the base reads {self.referenced} rows, about {_count(self.reference_tokens)} tokens"
        if self.evaluations:
            yield (
                f"evaluations: {self.evaluations} of {self.scored} rows, {self.passes} forward passes and about "
                f"{_count(self.evaluation_tokens)} tokens each"
            )


def _tokens(example: EncodedExample) -> int:
    """Tokens of an example, with the most that the model may write."""
    return sum(len(s.token_ids) + (s.max_new_tokens if s.generation else 0) for s in example.sequences)


def _mean(values: Sequence[int]) -> float:
    return round(sum(values) / len(values), 2)


def _count(number: float) -> str:
    for unit, word in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {word}"
    return f"{round(number):,}"
