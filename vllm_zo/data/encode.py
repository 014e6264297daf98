"""Tokenises records into examples, and finds every bad one before any work starts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_zo.config import OnLong
from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample, Objective, ScoringSequence

logger = logging.getLogger("vllm.zo")

MAX_SHOWN = 5
"""Most bad records that an error lists; it counts the rest."""


def encode_examples(
    examples: Sequence[dict[str, Any]],
    objective: Objective,
    tokenizer: Any,
    max_model_len: int,
    source_name: str,
    vocab_size: int = sys.maxsize,
    on_long: OnLong = "error",
) -> list[EncodedExample]:
    """Tokenise every record of a data set. It logs how many records `on_long` has left out or cut.

    Args:
        max_model_len: most tokens of a request in the engine. A sequence of n tokens needs n + 1, because vLLM samples
            one token, which we ignore; a prompt needs as many more as it may generate.
        source_name: the name of the data in messages, such as "train.jsonl". Messages count its records (rows) from 1.
        vocab_size: number of tokens for which the model has an embedding.
        on_long: what to do with a record that is too long; see `JobConfig.on_long`.

    Raises:
        ConfigError: there are no examples, or bad ones: a missing field, a label outside the options, a text that is
            too long, a token that the model does not have. The message lists the first few by row, and counts all.
    """
    check_bos_token_id(objective, vocab_size)
    if not examples:
        raise ConfigError(f"{source_name}: no examples.")
    rows = encode_rows(examples, objective, tokenizer, max_model_len, source_name, vocab_size, on_long)
    if rows.refused:
        raise ConfigError(_report(rows.refused, len(examples), source_name))
    if told := rows.on_long_told(source_name, max_model_len):
        logger.warning("%s", told)
    if not rows.examples:
        raise ConfigError(f"{source_name}: every row is too long for max_model_len={max_model_len}; raise it.")
    return rows.examples


@dataclass
class Rows:
    """What became of the records of a data set.

    Attributes:
        examples: those that can be used.
        refused: a message for each record that cannot.
        dropped, cut: numbers, from 1, of the records that `on_long` has left out, and of those it has shortened.
    """

    examples: list[EncodedExample] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)

    def on_long_told(self, source_name: str, max_model_len: int) -> str:
        """A sentence that counts what `on_long` has done; empty if it has done nothing."""
        total = len(self.examples) + len(self.dropped) + len(self.refused)
        for numbers, done in ((self.dropped, "left out"), (self.cut, "cut from the left")):
            if numbers:
                longer = f"too long for max_model_len={max_model_len} and {done}"
                return f"{source_name}: {len(numbers)} of {total} rows are {longer} (row {listed(numbers)})"
        return ""


def listed(numbers: Sequence[int]) -> str:
    """The first few numbers, for a message."""
    return ", ".join(map(str, numbers[:MAX_SHOWN])) + (", ..." if len(numbers) > MAX_SHOWN else "")


def encode_rows(
    examples: Sequence[dict[str, Any]],
    objective: Objective,
    tokenizer: Any,
    max_model_len: int,
    source_name: str,
    vocab_size: int = sys.maxsize,
    on_long: OnLong = "error",
) -> Rows:
    """`encode_examples` without its judgement: bad records are listed, and the others encoded."""
    rows = Rows()
    for number, example in enumerate(examples, start=1):
        where = f"{source_name}, row {number}"
        # Goes on after a bad record: the message lists several, so that users can repair them in one go.
        try:
            one = objective.encode(example, tokenizer, where)
            _check_tokens(one, tokenizer, vocab_size, where)
            excess = max(_excess(sequence, max_model_len) for sequence in one.sequences)
            if excess > 0 and on_long == "error":
                raise ConfigError(_too_long(one, max_model_len, where))
            if excess > 0 and on_long == "drop":
                rows.dropped.append(number)
                continue
            if excess > 0:
                one = _without_front(one, excess, tokenizer, max_model_len, where)
                rows.cut.append(number)
            rows.examples.append(one)
        except ConfigError as error:
            rows.refused.append(str(error))
    return rows


def check_bos_token_id(objective: Objective, vocab_size: int) -> None:
    """Refuse a `bos_token_id` that the model has no embedding for.

    Raises:
        ConfigError: the id is too large; the message names the largest id that the model has.
    """
    bos: int | None = getattr(objective, "bos_token_id", None)
    if bos is not None and bos >= vocab_size:
        raise ConfigError(
            f"bos_token_id={bos}: the model has {vocab_size} tokens, up to id {vocab_size - 1}; None keeps the "
            "tokenizer's own."
        )


def _check_tokens(example: EncodedExample, tokenizer: Any, vocab_size: int, where: str) -> None:
    for sequence in example.sequences:
        for ids, what in ((sequence.label_ids, "a text to score"), (sequence.token_ids, "the text")):
            if ids and (largest := max(ids)) >= vocab_size:
                raise ConfigError(
                    f"{where}: {what} holds the token {tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), the "
                    f"model has {vocab_size} tokens: its tokenizer has more; leave that token out, or use the model's "
                    "own tokenizer."
                )


def _excess(sequence: ScoringSequence, max_model_len: int) -> int:
    """How many tokens a sequence has too many; negative if there is room for more."""
    return len(sequence.token_ids) + sequence.max_new_tokens - max_model_len


def _too_long(example: EncodedExample, max_model_len: int, where: str) -> str:
    longest = max(example.sequences, key=lambda sequence: _excess(sequence, max_model_len))
    limit = max_model_len - longest.max_new_tokens
    less = "the one vLLM samples" if longest.generation is None else f"max_tokens={longest.max_new_tokens}"
    return (
        f"{where}: {len(longest.token_ids)} tokens, the limit is {limit} (max_model_len={max_model_len} less {less}); "
        "shorten the text, raise max_model_len, or set on_long to drop or truncate-left."
    )


def _without_front(
    example: EncodedExample, excess: int, tokenizer: Any, max_model_len: int, where: str
) -> EncodedExample:
    """The example with `excess` tokens fewer at the front of its prompt, behind the token that starts it.

    Every sequence loses as many: the options of an example stay options of one prompt.

    Raises:
        ConfigError: what is scored, or may be written, leaves no room for any prompt.
    """
    first = example.sequences[0].token_ids[0]
    start = int(first in tokenizer.all_special_ids)
    shortest = min(
        sequence.positions[0] if sequence.positions else len(sequence.token_ids) - 1 for sequence in example.sequences
    )
    if shortest < excess:
        raise ConfigError(
            f"{where}: the prompt is {excess} tokens too long for max_model_len={max_model_len}, and has only "
            f"{shortest + 1}; shorten what it scores or writes, or raise max_model_len."
        )
    cut = tuple(
        replace(
            sequence,
            token_ids=sequence.token_ids[:start] + sequence.token_ids[start + excess :],
            positions=tuple(position - excess for position in sequence.positions),
        )
        for sequence in example.sequences
    )
    return replace(example, sequences=cut)


def _report(problems: list[str], total: int, source_name: str) -> str:
    if len(problems) == 1:
        return problems[0]
    more = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    return "\n  ".join(
        [f"{source_name}: {len(problems)} of {total} rows cannot be used:", *problems[:MAX_SHOWN], *more]
    )
