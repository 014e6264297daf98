"""Rollout: a program of the user talks to the model under each probe, and what it returns is the reward."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.objectives import functions
from vllm_zo.objectives.base import EncodedExample, ScoringSequence, Trust
from vllm_zo.objectives.shaping import SHAPINGS, shape
from vllm_zo.objectives.shared_options import PANEL
from vllm_zo.options import check_options, option
from vllm_zo.validation import reject

Play = Callable[[Any, str, dict[str, Any]], "float | Awaitable[float]"]
"""play(client, model, row) -> reward, a coroutine function or a plain one.

client: an `openai.AsyncOpenAI`, or an `openai.OpenAI` for a plain function. model: the name of the probe. row: a record
of the data."""
ON_FAILURE = ("drop", "floor", "fail")
ROLLOUT = ScoringSequence((), (), (), "rollout")


@dataclass(frozen=True)
class Rollout:
    """The mean reward of the rollouts that a program of the user plays against each probe. The loss is minus that.

    A rollout is one call of `play` for one row of the data and one probe. It may ask the model as often as it likes,
    through any client that speaks the OpenAI API. All probes of a step play the same rows, and get the same random
    numbers: request number n of a row has one sampling seed for all probes, unless the program sets a seed itself.

    A rollout fails if it raises, returns no finite number, or takes longer than `timeout_s`. `on_failure` decides what
    that means:
        drop    the row counts for no probe of this step. If every row of a step is dropped, the job fails
        floor   the reward is `floor`
        fail    the job fails; its state stays intact, and the user can resume it

    Evaluations play every validation row `eval_samples` times against the unperturbed weights. They report the mean
    reward, and as accuracy the share of rollouts whose reward reaches `pass_reward`, which is pass@1. With more samples
    than one, `pass_at_<samples>` is the share of rows that at least one of their rollouts passes.

    Example:
        >>> async def play(client, model, row):
        ...     answer = await client.chat.completions.create(model=model, messages=row["messages"])
        ...     return float(row["answer"] in answer.choices[0].message.content)
        >>> Rollout(play, concurrency=8).on_failure
        'drop'

    Raises:
        ConfigError: on creation, if a setting is bad.

    Source: evolution strategies with common random numbers, Salimans et al. 2017, arXiv:1703.03864.
    """

    name = "rollout"

    play: str | Play | None = option(
        None, panel=PANEL, metavar="MODULE:FUNCTION", help="rollout: play(client, model, row) gives the reward."
    )
    """A function becomes its name, because a job crosses processes as JSON."""
    _: KW_ONLY
    url: str | None = option(None, text="an address", help="A program that plays over HTTP, instead of `play`.")
    """It is posted {row, base_url, model, seed}, and answers {"score": number} (docs/rollouts.md)."""
    concurrency: int = option(32, minimum=1, help="Rollouts that play at the same time.")
    timeout_s: float = option(120.0, above=0, help="Longest time of one rollout, in seconds.")
    on_failure: str = option("drop", choices=ON_FAILURE, help="What a failed rollout counts.")
    floor: float = option(0.0, help="Reward of a failed rollout with on_failure='floor'.")
    shaping: str = option("none", choices=SHAPINGS, help="Of rewards, as for `Reward`.")
    """How the rewards of the probes for one row change each other (shaping.py)."""
    pass_reward: float = option(1.0, help="Reward from which on a rollout passes, for `accuracy` and pass@k.")
    eval_samples: int = option(1, minimum=1, help="Rollouts of each validation row in an evaluation: the k of pass@k.")
    server: Mapping[str, Any] = option(factory=dict, hash=False, help="Arguments of vLLM's server, by their names.")
    """For the client of `play`, such as {"chat_template": ..., "tool_call_parser": "hermes"}."""

    def __post_init__(self) -> None:
        if callable(self.play):
            object.__setattr__(self, "play", functions.name_of(self.play))
        if (self.play is None) == (self.url is None):
            raise ConfigError("play, url: give exactly one of the two.")
        if self.url is not None:
            check_url(self.url)
        elif isinstance(self.play, str) and self.play:
            functions.check_name("play", self.play)
        else:
            reject("play", self.play, "a function play(client, model, row), or its name as 'module:function'")
        if not isinstance(self.server, Mapping) or not all(isinstance(name, str) for name in self.server):
            reject("server", self.server, "a mapping from arguments of vLLM's server to their values")
        check_options(self)

    @property
    def trust(self) -> Trust:
        return Trust.IMPORTS if self.url is None else Trust.NAMES

    def function(self) -> Play:
        """The function behind `play`. Raises ConfigError: this process cannot import it."""
        assert isinstance(self.play, str)
        found = functions.find("play", self.play)
        if not callable(found):
            raise ConfigError(f"play={self.play!r} is {type(found).__name__}: expected a function.")
        function: Play = found
        return function

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """The record itself: only the program knows what it makes of it."""
        return EncodedExample((ROLLOUT,), columns=dict(example))

    def evaluated(self, example: EncodedExample) -> EncodedExample:
        """A row as an evaluation plays it: `eval_samples` times."""
        return replace(example, sequences=(ROLLOUT,) * self.eval_samples)

    def reward_of_failure(self) -> float:
        """What takes the place of the reward of a failed rollout; NaN drops its row."""
        return self.floor if self.on_failure == "floor" else math.nan

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """(P, E) float32 minus the shaped rewards, and (P, E) int64, how many rollouts do not reach `pass_reward`.

        A cell is the reward of one rollout, and the reward of a row the mean of its rollouts; NaN drops their row. A
        dropped row has loss 0 under every probe of a training step, so that it tells no probe from another. In an
        evaluation, which has one probe, its loss is NaN.
        """
        cells_PES = cells_PC.to(torch.promote_types(cells_PC.dtype, torch.float32)).unflatten(1, (len(examples), -1))
        rewards_PE = cells_PES.mean(-1)
        dropped_E = rewards_PE.isnan().any(0)
        losses_PE = -shape(rewards_PE, self.shaping)
        if len(rewards_PE) > 1:
            losses_PE = losses_PE.masked_fill(dropped_E, 0.0)
        return losses_PE, (~(cells_PES >= self.pass_reward)).sum(-1)

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        samples, rows = len(examples[0].sequences), len(examples)
        metrics = {"accuracy": 1 - sum(predictions) / (rows * samples), "reward": -sum(losses) / rows}
        if samples > 1:
            metrics[f"pass_at_{samples}"] = sum(failed < samples for failed in predictions) / rows
        return metrics


def check_url(url: Any) -> None:
    """Refuse what is no plain address of a web server. Raises ConfigError."""
    expected = "an address like https://host/path, without a user name"
    try:
        parts = urlsplit(url)
        port = parts.port  # raises for what is no number
    except (ValueError, AttributeError, TypeError):
        reject("url", url, expected)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or port == 0:
        reject("url", url, expected)
