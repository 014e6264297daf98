"""Which pass of the base comes before a job's first step, if one does."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_zo.config import JobConfig
from vllm_zo.engine.base_pass import BasePass
from vllm_zo.engine.measured_v import Measured
from vllm_zo.engine.references import References
from vllm_zo.engine.training_rows import FixedRows, TrainingRows
from vllm_zo.engine.written_tokens import WrittenTokens
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives import ReferencedObjective
from vllm_zo.objectives.base import EncodedExample, GeneratingObjective


def pass_before(
    directory: JobDir,
    config: JobConfig,
    rows: TrainingRows,
    validation: Sequence[EncodedExample],
    *,
    trains: bool,
    first_step: int,
    piece: int,
) -> BasePass | None:
    """The pass, less what an earlier start of the job has kept in its directory.

    Args:
        trains: whether the job takes steps.
        first_step: steps that are in the log.
        piece: examples in a group.

    Raises:
        ConfigError: a resumed `fold` job would ask a base that it has changed.
    """
    objective, coordinates = config.objective, config.method.coordinates
    measures = coordinates.measured and trains and config.steps > 0 and not directory.start.exists()
    if not measures and not isinstance(objective, ReferencedObjective):
        return None
    assert isinstance(rows, FixedRows), "JobConfig refuses both in a continual job"
    used = rows.used(config.steps)
    if isinstance(objective, ReferencedObjective):
        references = References(objective, directory, rows.examples, used, validation, piece)
        references.check_base(folded=config.space == "fold" and first_step > 0)
        return references
    read = {i: rows.examples[i] for i in used}
    if isinstance(objective, GeneratingObjective):
        return WrittenTokens(directory, coordinates, read, config.seed, piece)
    return Measured(directory, coordinates, read, piece)
