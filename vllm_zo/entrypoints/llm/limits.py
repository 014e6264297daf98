"""Bounds on what one job may ask of an engine.

While a wave is open, every engine step looks at all its members, so their number decides how long other requests wait.
The engine keeps the examples of a job as Python objects for as long as the job runs, so they take its memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_zo.config import JobConfig
from vllm_zo.errors import ConfigError
from vllm_zo.job_memory import check_examples
from vllm_zo.methods.layers import select_layers
from vllm_zo.objectives import Objective, Preference, Reward
from vllm_zo.objectives.base import EncodedExample

ROUNDS = 64
"""A training step may take as many sequences as fill this many engine steps."""
MIN_SEQUENCES = 4096
"""Every engine takes a training step of so many sequences: opening such a group takes 0.1 s."""
MAX_TOKENS = 64 << 20
"""Most tokens in all examples of a job. A prompt counts once for every option or sample. As Python integers they take
about 2.5 GB."""


def max_sequences(max_num_seqs: int) -> int:
    """Sequences that one training step may score, over all its probes.

    Args:
        max_num_seqs: the engine's limit on requests in one step.
    """
    return max(MIN_SEQUENCES, ROUNDS * max_num_seqs)


def check_step(config: JobConfig, per_example: int, max_num_seqs: int) -> None:
    """Refuse a training step of more sequences than the engine takes.

    Args:
        per_example: sequences of one example under one probe, as far as they are known.
        max_num_seqs: the engine's limit on requests in one step.

    Raises:
        ConfigError: the step has too many; the message names the factors and the bound.
    """
    limit = max_sequences(max_num_seqs)
    sequences = config.examples_per_step * per_example
    # The directions first: making a plan of millions of them would itself hold the server up.
    too_many = config.method.queries * sequences > limit
    if too_many or len(config.method.plan(0, 0, 0).probes) * sequences > limit:
        raise ConfigError(
            f"queries={config.method.queries}, batch_size={config.batch_size}, micro_batches={config.micro_batches}, "
            f"{per_example} sequences an example (its options or samples): a step would score more than {limit} "
            "sequences, the most that this engine takes; lower one of them, or raise the engine's max_num_seqs."
        )


def check_layers_exist(config: JobConfig, num_layers: int) -> None:
    """Refuse `target_layers` that the model does not have.

    Args:
        num_layers: of the model.

    Raises:
        ConfigError: the message has the choice and the number of layers.
    """
    if config.target_layers is not None:
        select_layers(config.target_layers, num_layers)


def sequences_known(objective: Objective) -> int:
    """Sequences of one example, as far as the objective alone tells: the completions that a reward samples, the two
    answers of a pair, else 1."""
    if isinstance(objective, Reward):
        return objective.samples
    return 2 if isinstance(objective, Preference) else 1


def check_tokens(examples: Sequence[EncodedExample], source_name: str) -> None:
    """Refuse data that would fill the engine's memory.

    Raises:
        ConfigError: the examples have too many tokens; the message names the data and the bound.
    """
    tokens = sum(example.num_tokens for example in examples)
    check_examples(source_name, len(examples), tokens)
    if tokens > MAX_TOKENS:
        raise ConfigError(
            f"{source_name}: {tokens} tokens, prompts counted once for every option or sample; a job takes at most "
            f"{MAX_TOKENS}. Use fewer rows."
        )
