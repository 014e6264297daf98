"""Completions that the model has written as what the steps score: the good ones become likelier than the bad ones.

A completion is written once, and any number of probes score it, in one forward pass each. Its loss is

    - advantage * log p(completion | prompt) / max_tokens

where the advantage is what it earned above the others, in standard deviations. Where the model that scores is the one
that wrote, the derivative of the mean loss is that of the mean reward, up to this scale. (A probe that writes its own
completions says what these earned, and most of that is chance.)

Shape suffixes: P probes, E examples (prompts), S completions of a prompt.

Source: REINFORCE with a baseline, and groups: GRPO, arXiv:2402.03300; the sum over tokens is divided by a constant, as
in Dr. GRPO, arXiv:2503.20783, and the advantage by the deviation of all completions, arXiv:2508.08221.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vllm_zo.objectives.base import EncodedExample, ScoringSequence
from vllm_zo.objectives.cells import candidate_logprobs

ROUNDING = 1e-9
"""Of the largest reward. Equal ones differ from their mean by the rounding of float64, and divided by that they would
be all that a step learns from."""


def scored(example: EncodedExample, completions: Sequence[Sequence[int]], rewards: Sequence[float]) -> EncodedExample:
    """The example with what was written for it, ends included, in place of what is to be continued.

    Args:
        completions: token ids, one for each of its sequences.
        rewards: of the completions.
    """
    pairs = zip(example.sequences, completions, strict=True)
    sequences = tuple(_scored(prompt, completion) for prompt, completion in pairs)
    return replace(example, sequences=sequences, columns=None, rewards=tuple(rewards))


def _scored(prompt: ScoringSequence, completion: Sequence[int]) -> ScoringSequence:
    first = len(prompt.token_ids) - 1
    # The last token is scored and not read.
    token_ids = (*prompt.token_ids, *completion[:-1])
    return ScoringSequence(token_ids, tuple(range(first, len(token_ids))), tuple(completion), "logprobs")


def rewards_of(examples: Sequence[EncodedExample]) -> Tensor:
    """(E, S) float64: what the completions of each example earned."""
    return torch.tensor([example.rewards for example in examples], dtype=torch.float64)


def advantages(rewards_ES: Tensor) -> Tensor:
    """(E, S) rewards less the mean of their prompt's, or of all where a prompt has one completion, divided by the
    (population) standard deviation of all that is left; zeros where that is nothing."""
    over_prompts = rewards_ES.shape[1] == 1
    centred = rewards_ES - (rewards_ES.mean() if over_prompts else rewards_ES.mean(1, keepdim=True))
    spread = centred.square().mean().sqrt()
    differ = spread > ROUNDING * rewards_ES.abs().max()
    return centred / spread if differ else torch.zeros_like(centred)


def likelihood_loss(cells_PC: Tensor, examples: Sequence[EncodedExample], max_tokens: int) -> Tensor:
    """(P, E) float64: the mean loss of each example's completions.

    Args:
        cells_PC: (P, cells) as `Objective.loss` gets them, of sequences that `scored` has made.
        max_tokens: the most tokens of a completion.
    """
    logprob_PES = candidate_logprobs(cells_PC, examples)
    advantage_ES = advantages(rewards_of(examples)).to(cells_PC.device, non_blocking=True)
    return -(advantage_ES * logprob_PES).mean(-1) / max_tokens
