"""Reward: members write, and what they write is scored. Nothing of it needs a gradient."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample, Generation, ScoringRow
from vllm_zo.objectives.graders import build_grader
from vllm_zo.objectives.reward_function import (
    RewardFunction,
    build_reward,
    check_name,
    is_foreign_code,
    name_of,
)
from vllm_zo.objectives.shaping import SHAPINGS, shape
from vllm_zo.objectives.text import parse_template, render, tokenise, trim
from vllm_zo.validation import check_bool, check_float, check_int, check_known, reject

RESERVED = ("prompts", "completions")
"""Column names that a reward function is given besides the record's own."""


@dataclass(frozen=True)
class Reward:
    """The mean reward of completions that each probe writes under its own weights; the loss is minus that.

    All probes of a step continue the same prompts with the same random numbers (one sampling seed per prompt and step),
    so that they differ by their weights alone. Evaluations decode greedily and report the mean reward, and as accuracy
    the share of prompts whose reward reaches `pass_reward`.

    The reward is one of
        reward   a Python function `reward(completions, **columns) -> list[float]`, TRL's signature, or its name as
                 "module:function". Completions are texts; columns are the record's fields and "prompts", each a list
                 with a value per completion.
        grader   a description such as {"type": "string_check", ...}; see `vllm_zo.objectives.graders`.
    It runs in the engine's process, in a thread, while the engine serves others. One that raises, returns something
    else than a finite number per completion, or takes longer than `timeout_s` for a group, fails the job; the state
    until then is intact, and the job can be resumed.

    Example:
        >>> Reward("{question} Answer:", reward="vllm_zo.rewards:token_f1", max_tokens=16).shaping
        'none'

    Raises:
        ConfigError: on creation, a bad setting; on `encode`, a record that lacks a field of prompt or grader.

    Source: MeZO, arXiv:2305.17333, section 3.3 (non-differentiable objectives); ES with common random numbers.
    """

    name = "reward"

    template: str
    """Prompt with {field} placeholders; field values are stripped."""
    _: KW_ONLY
    reward: str | RewardFunction | None = None
    """A function, kept as its name."""
    grader: Mapping[str, Any] | None = field(default=None, hash=False)
    """The description of a grader."""
    max_tokens: int = 32
    """Length of a completion."""
    stop: Sequence[str] = ()
    """Texts at which a completion ends; they are cut off. EOS always ends it."""
    temperature: float = 1.0
    """Of sampling in training; 0 decodes greedily."""
    top_p: float = 1.0
    """Share of the probability that sampling draws from."""
    samples: int = 1
    """Completions per prompt and probe, averaged."""
    shaping: str = "none"
    """"none", "baseline", "zscore" or "rank": what the probes' rewards for a prompt make of each other (shaping.py)."""
    pass_reward: float = 1.0
    """Reward from which on a prompt counts as right in `accuracy`."""
    timeout_s: float = 60.0
    """For the reward of one group."""
    bos_token_id: int | None = None
    """Token to start every prompt with, instead of the tokenizer's own special tokens."""
    special_tokens: bool = True
    """Add the tokenizer's special tokens. False: the prompt has all it needs and is taken as it is, white space
    included, as a chat template has written it."""

    def __post_init__(self) -> None:
        parse_template(self.template)
        if (self.reward is None) == (self.grader is None):
            raise ConfigError("reward, grader: give exactly one of the two.")
        if callable(self.reward):
            object.__setattr__(self, "reward", name_of(self.reward))
        if self.reward is not None:
            check_name(self.reward)
        if self.grader is not None:
            build_grader(self.grader, allow_python=True)
        if not isinstance(self.stop, list | tuple) or not all(isinstance(s, str) and s for s in self.stop):
            reject("stop", self.stop, "a list of non-empty texts")
        object.__setattr__(self, "stop", tuple(self.stop))
        check_int("max_tokens", self.max_tokens, 1)
        check_int("samples", self.samples, 1)
        check_float("temperature", self.temperature, at_least=0.0, fix="0 decodes greedily")
        check_float("top_p", self.top_p, above=0.0)
        if self.top_p > 1.0:
            reject("top_p", self.top_p, "a number <= 1")
        if self.samples > 1 and self.temperature == 0.0:
            raise ConfigError(f"samples={self.samples}: at temperature 0 all completions are the same; use 1.")
        check_known("shaping", self.shaping, SHAPINGS)
        check_float("pass_reward", self.pass_reward)
        check_float("timeout_s", self.timeout_s, above=0.0)
        check_bool("special_tokens", self.special_tokens)

    @property
    def needs_trust(self) -> bool:
        """Whether scoring runs code that the job brings along: only for those who may run code on the engine."""
        assert not callable(self.reward)
        return is_foreign_code(self.reward, self.grader)

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """`samples` rows of kind "generate", all with the prompt."""
        taken = [name for name in RESERVED if name in example]
        if taken:
            raise ConfigError(f"{where}: field {taken[0]!r} has a name that rewards use themselves; rename it.")
        if self.grader is not None and (missing := _item_fields(json.dumps(self.grader)) - example.keys()):
            raise ConfigError(f"{where}: no field {min(missing)!r}, which grader {self.grader['name']!r} reads.")
        prompt = render(self.template, example, where, strip=self.special_tokens)
        prompt = trim(prompt) if self.special_tokens else prompt
        (token_ids,) = tokenise([prompt], tokenizer, self.bos_token_id, self.special_tokens)
        if not token_ids:
            raise ConfigError(f"{where}: the prompt is empty, and the tokenizer adds no BOS.")
        generation = Generation(self.max_tokens, self.temperature, self.top_p, self._stop_token_ids(tokenizer))
        row = ScoringRow(tuple(token_ids), (), (), "generate", generation)
        return EncodedExample((row,) * self.samples, columns={**example, "prompts": prompt})

    def _stop_token_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """EOS, and stop texts that are one token: vLLM's engine core knows no others, which are cut off afterwards."""
        ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for text in self.stop:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens if len(tokens) == 1 else []
        return tuple(ids)

    def scorer(self) -> Callable[[Sequence[str], Sequence[dict[str, Any]]], list[float]]:
        """(completions, columns of each one's example) -> rewards; in the engine's process.

        Raises:
            ConfigError: at once, the reward cannot be loaded.
            RewardError: on call; see `build_reward`.
        """
        assert not callable(self.reward)
        score = build_reward(self.reward, self.grader)

        def rewards(completions: Sequence[str], examples: Sequence[dict[str, Any]]) -> list[float]:
            names = dict.fromkeys(name for example in examples for name in example)
            columns = {name: [example.get(name) for example in examples] for name in names}
            return score([self._cut(text) for text in completions], columns)

        return rewards

    def _cut(self, text: str) -> str:
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """(P, E) float32, minus the shaped mean reward; and (P, E) int64, 0 where the reward reaches `pass_reward`.

        A cell is the reward of one completion.
        """
        cells_PC = cells_PC.to(torch.promote_types(cells_PC.dtype, torch.float32))
        rewards_PE = cells_PC.unflatten(1, (len(examples), -1)).mean(-1)
        return -shape(rewards_PE, self.shaping), (rewards_PE < self.pass_reward).long()

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        return {"accuracy": predictions.count(0) / len(predictions), "reward": -sum(losses) / len(losses)}


@lru_cache(maxsize=8)
def _item_fields(grader: str) -> frozenset[str]:
    return build_grader(json.loads(grader), allow_python=True).item_fields
