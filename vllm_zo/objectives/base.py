"""What a loss is: examples become sequences to score, and scored sequences become one loss per example.

An objective encodes an example into one or more *sequences* of tokens. Each sequence names positions and, for every
position, the token ids to score there. The worker scores a sequence into float32 *cells*, in order:

    kind "labels"    There is one position. The cells are the raw logits of `label_ids` there. This is valid because
                     softmax over the candidates of one position does not depend on the vocabulary's normaliser.
    kind "logprobs"  Cell i of the first n is log p(label_ids[i] | tokens up to positions[i]), normalised over the whole
                     vocabulary. Cell n + i is the largest log p of any token there. If the two are equal, greedy
                     decoding would choose label_ids[i].
    kind "generate"  The sequence is a prompt that the engine continues under the probe. Its only cell is the reward of
                     that completion.
    kind "rollout"   There are no tokens. A program of the user talks to the probe, and the only cell is its reward.

The cells of all sequences of a mini-batch lie one after another in a table, which `Objective.loss` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from enum import IntEnum
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """How the engine continues a sequence of kind "generate".

    It stops after `max_tokens`, at one of `stop_token_ids` (which is then the last token), or at an end that the model
    has by itself. Training samples with `temperature` and `top_p`; None stands for what a request to the server gets
    that does not set them. An evaluation takes the likeliest token (temperature 0).
    """

    max_tokens: int
    temperature: float | None
    top_p: float | None
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    """Texts that end a completion. The reader of the completion cuts them off."""


@dataclass(frozen=True)
class ScoringSequence:
    """One sequence to run through the model.

    Attributes:
        token_ids: the tokens, with a leading BOS if the tokenizer wants one.
        positions: indices into `token_ids` of the tokens whose *next-token* scores the worker reads.
        label_ids: the token ids to score: all at the single position (kind "labels"), or one per position ("logprobs").
        generation: set for kind "generate" alone, whose positions and labels are empty.

    A sequence of kind "rollout" has none of these.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    label_ids: tuple[int, ...]
    kind: Literal["labels", "logprobs", "generate", "rollout"]
    generation: Generation | None = None

    @property
    def num_cells(self) -> int:
        of_scored = {"labels": len(self.label_ids), "logprobs": 2 * len(self.label_ids)}
        return of_scored.get(self.kind, 1)

    @property
    def max_new_tokens(self) -> int:
        """How many tokens vLLM adds to the sequence. vLLM must sample one even of a sequence that is only scored."""
        return 1 if self.generation is None else self.generation.max_tokens

    def __post_init__(self) -> None:
        assert (self.generation is None) == (self.kind != "generate")
        if self.kind in ("generate", "rollout"):
            return
        assert self.positions and self.label_ids, "a sequence without anything to score"
        assert self.kind == "labels" or len(self.positions) == len(self.label_ids)
        assert self.kind == "logprobs" or len(self.positions) == 1


@dataclass(frozen=True)
class EncodedExample:
    """An example that is ready to score.

    Attributes:
        gold: index of the right candidate; 0 if there is only one.
        columns: what the reward or the rollout may read, by name. Only an example with sequences of kind "generate" or
            "rollout" has it.
        reference: what the base says of the example, where the objective asks (`ReferencedObjective`). The engine adds
            it before the first step.
        rewards: of the completions that its sequences hold, where steps score what the model has written
            (objectives/written.py).
    """

    sequences: tuple[ScoringSequence, ...]
    gold: int = 0
    columns: dict[str, Any] | None = None
    reference: tuple[float, ...] | None = None
    rewards: tuple[float, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def num_candidates(self) -> int:
        """A sequence of kind "labels" holds one candidate per label. One of another kind is a single candidate."""
        return sum(len(sequence.label_ids) if sequence.kind == "labels" else 1 for sequence in self.sequences)


@runtime_checkable
class Objective(Protocol):
    """Implementations are frozen dataclasses that can be pickled, and whose fields can be written as JSON."""

    name: str

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """Tokenise one record.

        Args:
            where: where the record stands, for messages: "train.jsonl, row 17".

        Raises:
            ConfigError: the record lacks a field, or a field holds what the objective cannot use.
        """
        ...

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """Losses and predictions of a mini-batch.

        Args:
            cells_PC: (probes, cells) float32 on the scoring device, in the order of the examples, of their sequences,
                and of the cells of a sequence. A cell that was not scored is NaN.

        Returns:
            (probes, examples) float32 nats, and (probes, examples) int64 predictions. A prediction is right if it
            equals `EncodedExample.gold`.
        """
        ...

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        """What an evaluation reports in addition to the mean loss. It always contains "accuracy".

        Args:
            losses, predictions: one per example, as `loss` gave them for the evaluated state.
        """
        ...


class Trust(IntEnum):
    """What the owner of the engine must allow for an objective. Each level includes those before it."""

    NAMES = 0
    """Nothing: the objective has settings and names of installed parts. Any client of a server may ask for it."""
    SOURCE = 1
    """It brings source text that runs in a child process (a Python grader). A client may ask for it if the server
    allows Python graders."""
    IMPORTS = 2
    """It names code that the engine imports ("module:function"). Python and the command line may ask for it, a client
    never."""


@runtime_checkable
class GeneratingObjective(Objective, Protocol):
    """An objective whose sequences are of kind "generate": members write completions, and its scorer scores them.

    The engine asks `isinstance(objective, GeneratingObjective)` to know where the losses of a group come from.
    """

    @property
    def timeout_s(self) -> float:
        """The longest time that the scores of one group may take, in seconds."""
        ...

    @property
    def steps_per_generation(self) -> int | None:
        """The job's own state writes, and so many steps score what it wrote (objectives/written.py). None: each probe
        writes its own completions, at every step."""
        ...

    @property
    def trust(self) -> Trust:
        """What its scorer runs, as the permission that it needs."""
        ...

    def scorer(self) -> Callable[[Sequence[str], Sequence[dict[str, Any]]], list[float]]:
        """A function (completions, columns of each one's example) -> one finite number each.

        A thread of the engine calls the function.

        Raises:
            ConfigError: at once, if this process cannot load the scorer.
            RewardError: when the engine calls the function, if it fails.
        """
        ...


def steps_per_generation(objective: Objective) -> int | None:
    """How many steps score what the job's state writes; None: probes write, or nobody does."""
    return objective.steps_per_generation if isinstance(objective, GeneratingObjective) else None


@runtime_checkable
class ReferencedObjective(Objective, Protocol):
    """An objective whose losses compare the model with the base that it started from.

    The engine scores the examples once with the base, before the first step, and keeps the answers of `reference` in
    `EncodedExample.reference`.
    """

    def reference(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> list[tuple[float, ...]]:
        """What to keep of each example. `cells_PC`: (1, cells), scored by the base."""
        ...


def is_objective(kind: Any) -> bool:
    """Whether a class has the members of `Objective`. (`issubclass` refuses protocols that have attributes.)"""
    members = ("encode", "loss", "metrics")
    return isinstance(kind, type) and is_dataclass(kind) and all(hasattr(kind, name) for name in ("name", *members))
