"""Preferences: of two answers to a prompt, the chosen one becomes likelier than the rejected one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample
from vllm_zo.objectives.cells import candidate_logprobs
from vllm_zo.objectives.shared_options import PANEL, prompt_field_option, special_tokens_option
from vllm_zo.objectives.text import continuation_sequence, ended, text_of, tokenise
from vllm_zo.options import check_options, option

MAX_MARGIN = 700.0
"""Where exp(-margin) is the smallest float64: an evaluation reports no larger margin."""


@dataclass(frozen=True)
class Preference:
    """Direct preference optimisation (DPO). The reference is the base that the job starts from.

        reward(answer) = beta * (log p(answer | prompt) - log p_base(answer | prompt)), summed over the answer's tokens
        loss           = -log sigmoid(reward(chosen) - reward(rejected))                      nats per pair

    Before the first step the engine scores every pair once with the base, and keeps two numbers of it.

    A prediction is the answer with the larger reward, and the chosen one (0) is right. Where the rewards are equal, as
    before the first step, it counts as wrong.

    A record without the prompt's field has the prompt at the front of both answers: what they have in common. Answers
    may be chats; see `entrypoints/llm/chats.py`.

    Example:
        >>> Preference(beta=0.3).chosen_field
        'chosen'

    Raises:
        ConfigError: on creation, if a value is out of range; on `encode`, if a record lacks a field, its two answers
            are equal, or the tokenizer has no EOS while `append_eos` asks for one.

    Source: Rafailov et al., arXiv:2305.18290; huggingface/trl, trl/trainer/dpo_trainer.py (`loss_type="sigmoid"`).
    """

    name = "preference"

    beta: float = option(
        0.1, above=0, panel=PANEL, help="preference: how strongly the model is held near the base (large: near)."
    )
    prompt_field: str = prompt_field_option()
    chosen_field: str = option(
        "chosen", text="the name of a field", panel=PANEL, help="preference: field with the better answer."
    )
    rejected_field: str = option(
        "rejected", text="the name of a field", panel=PANEL, help="preference: field with the worse answer."
    )
    append_eos: bool = option(True, help="Every answer ends with the tokenizer's EOS, once.")
    special_tokens: bool = special_tokens_option()

    def __post_init__(self) -> None:
        check_options(self)

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """Two sequences of kind "logprobs": the chosen answer, then the rejected one."""
        prompt, answers = self._texts(example, where)
        texts = [prompt, *(prompt + answer for answer in answers)]
        stem, *full = tokenise(texts, tokenizer, special_tokens=self.special_tokens)
        if self.append_eos:
            full = [ended(ids, tokenizer) for ids in full]
        if full[0] == full[1]:
            raise ConfigError(
                f"{where}: {self.chosen_field!r} and {self.rejected_field!r} have equal tokens: neither can be "
                "preferred; leave the row out."
            )
        sequences = (continuation_sequence(stem, ids, a, where) for ids, a in zip(full, answers, strict=True))
        return EncodedExample(tuple(sequences))

    def _texts(self, example: dict[str, Any], where: str) -> tuple[str, list[str]]:
        """The prompt, and both answers behind it."""
        chosen, rejected = (text_of(example, name, where) for name in (self.chosen_field, self.rejected_field))
        if self.prompt_field in example:
            return text_of(example, self.prompt_field, where), [chosen, rejected]
        # As TRL: a space in front of the answers belongs to them, as it does in one token.
        prompt = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        prompt = prompt.removesuffix(" ")
        return prompt, [chosen.removeprefix(prompt), rejected.removeprefix(prompt)]

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """(P, E) float32 nats per pair, and (P, E) int64 answers with the larger reward; see `Objective.loss`.

        A score that is not finite makes the loss of its pair NaN.
        """
        references = [example.reference for example in examples]
        assert None not in references, "the engine measures the reference of an example before it asks for a loss"
        reference_E2 = torch.tensor(references, dtype=torch.float64).to(cells_PC.device, non_blocking=True)
        rewards_PE2 = self.beta * (candidate_logprobs(cells_PC, examples) - reference_E2)
        margin_PE = rewards_PE2[..., 0] - rewards_PE2[..., 1]
        # x - x is 0, or NaN for a score that is not finite: without it an impossible rejected answer had a loss of 0.
        loss_PE = F.softplus(-margin_PE) + (margin_PE - margin_PE)
        # "Not larger" instead of "at most": a comparison with NaN is false, and NaN must not be right.
        return loss_PE.to(torch.promote_types(cells_PC.dtype, torch.float32)), (~(margin_PE > 0)).long()

    def reference(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> list[tuple[float, ...]]:
        """log p_base of the chosen and of the rejected answer of each pair; see `ReferencedObjective`."""
        return [tuple(pair) for pair in candidate_logprobs(cells_PC, examples)[0].tolist()]

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        """TRL's rewards/accuracies as "accuracy", and its rewards/margins as "margin".

        accuracy  share of pairs whose chosen answer has the larger reward
        margin    mean of reward(chosen) - reward(rejected), in nats times beta
        """
        margins = map(_margin, losses)
        return {
            "accuracy": sum(p == 0 for p in predictions) / len(predictions),
            "margin": sum(margins) / len(losses),
        }


def _margin(loss: float) -> float:
    """The margin m of a loss log(1 + exp(-m))."""
    if loss > 30.0:  # log(exp(loss) - 1) is loss to the last bit, and exp overflows later
        return -loss
    return -math.log(math.expm1(loss)) if loss > math.exp(-MAX_MARGIN) else MAX_MARGIN
