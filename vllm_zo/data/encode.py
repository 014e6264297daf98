"""Records to tokenised examples, with every bad row found before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample, Objective

MAX_SHOWN = 5
"""Bad rows listed in an error; the rest are counted."""


def encode_examples(
    examples: Sequence[dict[str, Any]], objective: Objective, tokenizer: Any, max_model_len: int, source_name: str
) -> list[EncodedExample]:
    """Tokenise every record of a data set.

    Args:
        max_model_len: tokens the engine allows; a row of n tokens needs n + 1 (vLLM samples one, which is thrown away),
            and a prompt what it may generate.
        source_name: what messages call the data, e.g. "train.jsonl". Rows count from 1.

    Raises:
        ConfigError: no examples, or bad ones: a missing field, a label outside the options, a prompt that is too long.
            The first few are listed with their row, and all are counted.
    """
    if not examples:
        raise ConfigError(f"{source_name}: no examples.")
    encoded, problems = [], []
    for number, example in enumerate(examples, start=1):
        where = f"{source_name}, row {number}"
        try:
            one = objective.encode(example, tokenizer, where)
            _check_length(one, max_model_len, where)
            encoded.append(one)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(_report(problems, len(examples), source_name))
    return encoded


def _check_length(example: EncodedExample, max_model_len: int, where: str) -> None:
    longest = max(example.rows, key=lambda row: len(row.token_ids) + row.max_new_tokens)
    limit = max_model_len - longest.max_new_tokens
    if len(longest.token_ids) > limit:
        less = "the one vLLM samples" if longest.generation is None else f"max_tokens={longest.max_new_tokens}"
        raise ConfigError(
            f"{where}: {len(longest.token_ids)} tokens, the limit is {limit} (max_model_len={max_model_len} less "
            f"{less}); shorten the text or raise max_model_len."
        )


def _report(problems: list[str], total: int, source_name: str) -> str:
    if len(problems) == 1:
        return problems[0]
    more = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    return "\n  ".join(
        [f"{source_name}: {len(problems)} of {total} rows cannot be used:", *problems[:MAX_SHOWN], *more]
    )
