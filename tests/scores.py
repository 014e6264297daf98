"""One list of numbers by which a model in vLLM and one in transformers are compared: log-probabilities of fixed texts.

It knows nothing of `vllm_zo`, so that a child process can use it with a vLLM that was never patched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tests.tiny import SENTENCES

TEXTS = SENTENCES[:4]
TOLERANCE = 5e-4
"""Two orders of summation in float32 over at most 128 products: some 1e-6 of logits of size 10, through two layers."""


def token_ids(model: Path | str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(text).input_ids for text in TEXTS]


def of_vllm(llm: Any, model: Path | str, **kwargs: Any) -> list[float]:
    """Log-probability of every token of the texts but their first.

    One text at a time: where an adapter may reach the LM head (Llama), vLLM 0.32 on CPU fails on prompt
    log-probabilities of two requests at once.
    """
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": ids} for ids in token_ids(model)]
    outputs = [output for prompt in prompts for output in llm.generate([prompt], params, use_tqdm=False, **kwargs)]
    return [
        position[token].logprob
        for output in outputs
        for token, position in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    ]


@torch.no_grad()
def of_transformers(model: Any, directory: Path | str) -> list[float]:
    """The same numbers, from a model that `transformers` or `peft` has loaded."""
    scores: list[float] = []
    for ids in token_ids(directory):
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        scores += logprobs.gather(1, torch.tensor(ids[1:])[:, None]).flatten().tolist()
    return scores
