"""Reward: the model writes completions, and a reward scores them. Nothing of it needs a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample, Generation, ScoringSequence, Trust
from vllm_zo.objectives.graders import build_grader
from vllm_zo.objectives.reward_function import (
    build_reward,
    check_name,
    name_of,
    trust_for,
)
from vllm_zo.objectives.rewards import RewardFunction
from vllm_zo.objectives.shaping import SHAPINGS, shape
from vllm_zo.objectives.shared_options import PANEL, bos_option, special_tokens_option, template_option
from vllm_zo.objectives.text import field_of, parse_template, render, tokenise, trim
from vllm_zo.objectives.written import likelihood_loss, rewards_of
from vllm_zo.options import check_options, option
from vllm_zo.validation import reject

MAX_STOPS, MAX_STOP = 16, 256
"""Most stop texts, and most characters of one. A limit, because the engine looks for each in every completion."""
RESERVED = ("prompts", "completions")
"""Arguments that a reward function receives in addition to the record's fields. No field may have such a name."""


@dataclass(frozen=True)
class Reward:
    """The mean reward of the completions that each probe writes under its own weights. The loss is minus that.

    All probes of a step continue the same prompts with the same random numbers (one sampling seed per prompt and step),
    so that they differ by their weights alone. Evaluations decode greedily. They report the mean reward, and as
    accuracy the share of prompts whose reward reaches `pass_reward`.

    With `steps_per_generation` probes do not write. The job's own state writes the completions of a batch, and so many
    steps score them: the loss is then that of objectives/written.py, and falls where completions that earned more than
    the others of their prompt become likelier.

    The reward is one of
        reward   a Python function `reward(completions, **columns) -> list[float]`, which is TRL's signature; or its
                 name as "module:function"; or a name in `vllm_zo.objectives.REWARDS` ("token_f1"). Completions are
                 texts. Columns are the record's fields and "prompts", each a list with one value per completion.
        grader   a description such as {"type": "string_check", ...}; see `vllm_zo.objectives.graders`.
    It runs in a thread of the engine's process while the engine serves requests. The job fails if the reward raises, if
    it does not return one finite number per completion, or if it takes longer than `timeout_s` for a group. The state
    of the job stays intact, and the user can resume it.

    Example:
        >>> Reward("{question} Answer:", reward="token_f1", max_tokens=16).shaping
        'none'

    Raises:
        ConfigError: on creation, if a setting is bad; on `encode`, if a record lacks a field of the prompt or grader.

    Source: MeZO, arXiv:2305.17333, section 3.3 (non-differentiable objectives); evolution strategies with common random
    numbers.
    """

    name = "reward"

    template: str = template_option()
    _: KW_ONLY
    reward: str | RewardFunction | None = option(
        None,
        panel=PANEL,
        metavar="MODULE:FUNCTION",
        help="reward: function that scores completions, reward(completions, **columns); or a registered name.",
    )
    """A function becomes its name, because a job crosses processes as JSON."""
    grader: Mapping[str, Any] | None = option(
        None, hash=False, panel=PANEL, metavar="FILE", help="reward: JSON file with a grader instead."
    )
    """The description of a grader."""
    max_tokens: int = option(32, minimum=1, panel=PANEL, help="reward: the most tokens of a completion.")
    stop: Sequence[str] = option((), panel=PANEL, help="reward: text that ends a completion; may be repeated.")
    """The reader cuts the text off. EOS and the stop tokens of the model's generation_config.json always end a
    completion, as in serving."""
    temperature: float | None = option(
        None,
        minimum=0,
        fix="0 decodes greedily",
        panel=PANEL,
        help="reward: temperature of sampling; evaluations are greedy. Unset: as the server samples.",
    )
    """None samples as for a request to the server that does not set it (1, or the value of generation_config.json)."""
    top_p: float | None = option(
        None,
        above=0,
        maximum=1,
        help="Share of the probability that sampling draws from. Unset: as served.",
    )
    samples: int = option(1, minimum=1, panel=PANEL, help="reward: completions for each prompt and probe.")
    """The reward of a prompt is the mean over them."""
    steps_per_generation: int | None = option(
        None,
        minimum=1,
        panel=PANEL,
        help="reward: the trained model writes, and so many steps score what it wrote. Unset: every probe writes.",
    )
    """TRL's name."""
    shaping: str = option(
        "none", choices=SHAPINGS, panel=PANEL, help=f"reward: shaping of rewards: {', '.join(SHAPINGS)}."
    )
    """How the rewards of the probes for one prompt change each other (shaping.py)."""
    pass_reward: float = option(1.0, help="The least reward with which a prompt counts as right in `accuracy`.")
    timeout_s: float = option(60.0, above=0, help="Longest time for the reward of one group, in seconds.")
    bos_token_id: int | None = bos_option()
    special_tokens: bool = special_tokens_option()
    """Set it to False if a chat template has written the prompt. The objective then takes it as it is, white space
    included."""

    def __post_init__(self) -> None:
        parse_template(self.template)
        if (self.reward is None) == (self.grader is None):
            raise ConfigError("reward, grader: give exactly one of the two.")
        if callable(self.reward):
            object.__setattr__(self, "reward", name_of(self.reward))
        if self.reward is not None:
            check_name(self.reward)
        # Only to check the description. `trust` says whether it brings source text, and the server refuses that itself.
        if self.grader is not None:
            build_grader(self.grader, allow_python=True)
        if not isinstance(self.stop, list | tuple) or not all(isinstance(s, str) and s for s in self.stop):
            reject("stop", self.stop, "a list of non-empty texts")
        if len(self.stop) > MAX_STOPS or max(map(len, self.stop), default=0) > MAX_STOP:
            raise ConfigError(f"stop: at most {MAX_STOPS} texts of at most {MAX_STOP} characters.")
        object.__setattr__(self, "stop", tuple(self.stop))
        check_options(self)
        if self.samples > 1 and self.temperature == 0.0:
            raise ConfigError(f"samples={self.samples}: at temperature 0 all completions are the same; use 1.")
        if self.steps_per_generation is not None and self.shaping != "none":
            raise ConfigError(
                f"shaping={self.shaping!r}: it compares what probes have written, and with "
                f"steps_per_generation={self.steps_per_generation} they write nothing; drop one of the two."
            )

    @property
    def trust(self) -> Trust:
        assert not callable(self.reward)
        return trust_for(self.reward, self.grader)

    @cached_property
    def _fields_read(self) -> frozenset[str]:
        """The fields that the grader reads of every record."""
        assert self.grader is not None
        return build_grader(self.grader, allow_python=True).item_fields

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """`samples` sequences of kind "generate", all with the same prompt."""
        taken = [name for name in RESERVED if name in example]
        if taken:
            raise ConfigError(f"{where}: field {taken[0]!r} has a name that rewards use themselves; rename it.")
        if self.grader is not None:
            if missing := self._fields_read - example.keys():
                raise ConfigError(f"{where}: no field {min(missing)!r}, which grader {self.grader['name']!r} reads.")
            # `field_of` refuses a missing value now; in training it would fail the whole job.
            for name in sorted(self._fields_read):
                field_of(example, name, where)
        prompt = render(self.template, example, where, strip=self.special_tokens)
        prompt = trim(prompt) if self.special_tokens else prompt
        (token_ids,) = tokenise([prompt], tokenizer, self.bos_token_id, self.special_tokens)
        if not token_ids:
            raise ConfigError(f"{where}: the prompt is empty, and the tokenizer adds no BOS.")
        generation = Generation(
            self.max_tokens, self.temperature, self.top_p, self._stop_token_ids(tokenizer), tuple(self.stop)
        )
        sequence = ScoringSequence(tuple(token_ids), (), (), "generate", generation)
        return EncodedExample((sequence,) * self.samples, columns={**example, "prompts": prompt})

    def _stop_token_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """The stop texts that are one token. The engine core stops at tokens only; the reader cuts off other texts."""
        tokens = [(text, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in self.stop]
        return tuple(
            ids[0]
            for text, ids in tokens
            # Not if the tokenizer normalises the text: the token would then stand for another text.
            if len(ids) == 1 and text in tokenizer.decode(ids, skip_special_tokens=True)
        )

    def scorer(self) -> Callable[[Sequence[str], Sequence[dict[str, Any]]], list[float]]:
        """A function (completions as clients read them, columns of each one's example) -> rewards.

        It runs in the engine's process.

        Raises:
            ConfigError: at once, if the reward cannot be loaded.
            RewardError: when the engine calls the function; see `build_reward`.
        """
        assert not callable(self.reward)
        score = build_reward(self.reward, self.grader)

        def rewards(completions: Sequence[str], examples: Sequence[dict[str, Any]]) -> list[float]:
            # A dictionary instead of a set keeps the order of the fields. A record may lack a field that others have.
            names = dict.fromkeys(name for example in examples for name in example)
            columns = {name: [example.get(name) for example in examples] for name in names}
            return score(completions, columns)

        return rewards

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """(P, E) float32 minus the shaped mean reward, and (P, E) int64, 0 where the reward reaches `pass_reward`.

        A cell is the reward of one completion. Of completions that were written before it is a score, and the loss
        that of objectives/written.py.
        """
        dtype = torch.promote_types(cells_PC.dtype, torch.float32)
        if examples[0].rewards is not None:
            misses_E = (rewards_of(examples).mean(-1) < self.pass_reward).long()
            loss_PE = likelihood_loss(cells_PC, examples, self.max_tokens).to(dtype)
            return loss_PE, misses_E.to(cells_PC.device).expand(len(cells_PC), -1)
        cells_PC = cells_PC.to(dtype)
        rewards_PE = cells_PC.unflatten(1, (len(examples), -1)).mean(-1)
        return -shape(rewards_PE, self.shaping), (rewards_PE < self.pass_reward).long()

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        return {"accuracy": predictions.count(0) / len(predictions), "reward": -sum(losses) / len(losses)}
