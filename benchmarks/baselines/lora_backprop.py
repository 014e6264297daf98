"""LoRA by back-propagation (peft, AdamW), as somebody would train who has a gradient: for memory, as a neighbour, and
as what a job is compared with.

It is spared what it need not do: the LM head sees the positions that are scored and what follows them only, and the
padding is on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from vllm_zo.objectives import EncodedExample, Objective, ScoringSequence

RANK, LEARNING_RATE = 8, 5e-4
TARGETS = ("q_proj", "v_proj")
EVALUATION_BATCH = 16


class LoraTrainer:
    """Trains on prompts whose answer is one of some tokens (`step`), or on the loss of an objective (`learn`).

    Args:
        option_ids: the tokens of the answers; () where only `learn` is called.
        checkpointing: keep the input of each layer only, and compute the rest again on the way back.
    """

    def __init__(
        self, model_dir: str, dtype: torch.dtype, option_ids: tuple[int, ...], *, checkpointing: bool, device: str
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.config.use_cache = False
        self.model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS)))
        self.model.train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)
        self._options = torch.tensor(option_ids, device=device)
        self._device = device

    def step(self, prompts: list[list[int]], labels: list[int]) -> float:
        """One step on a batch of token ids; the loss in nats per example."""
        logits = self._logits(prompts, 1)[:, -1]
        gold = torch.tensor(labels, device=self._device)
        return self._apply(torch.nn.functional.cross_entropy(logits[:, self._options].float(), gold))

    def learn(self, objective: Objective, examples: Sequence[EncodedExample]) -> float:
        """One step on the loss of an objective; the loss in nats per example."""
        losses, _ = objective.loss(self._cells(examples), examples)
        return self._apply(losses.mean())

    @torch.no_grad()
    def evaluate(self, objective: Objective, examples: Sequence[EncodedExample]) -> dict[str, float]:
        """The mean loss (nats), and what the objective measures of the predictions."""
        ordered = sorted(examples, key=lambda example: example.num_tokens)  # a batch of equal lengths has no padding
        losses: list[float] = []
        predictions: list[int] = []
        for start in range(0, len(ordered), EVALUATION_BATCH):
            batch = ordered[start : start + EVALUATION_BATCH]
            of_batch, best = objective.loss(self._cells(batch), batch)
            losses += of_batch[0].tolist()
            predictions += best[0].tolist()
        return {"loss": sum(losses) / len(losses), **objective.metrics(losses, predictions, ordered)}

    def _apply(self, loss: Tensor) -> float:
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _cells(self, examples: Sequence[EncodedExample]) -> Tensor:
        """(1, cells) float32, as an objective's loss reads them."""
        sequences = [sequence for example in examples for sequence in example.sequences]
        kept = max(len(sequence.token_ids) - sequence.positions[0] for sequence in sequences)
        logits = self._logits([list(sequence.token_ids) for sequence in sequences], kept)
        return torch.cat([_cells_of(s, of_s) for s, of_s in zip(sequences, logits, strict=True)])[None]

    def _logits(self, prompts: list[list[int]], kept: int) -> Tensor:
        """(prompts, kept, vocabulary): the logits at the last positions."""
        ids, mask = self._padded(prompts)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        return logits

    def _padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self._device), torch.tensor(mask, device=self._device)


def _cells_of(sequence: ScoringSequence, logits: Tensor) -> Tensor:
    """(cells,) of one sequence, from the logits of its last positions (`objectives/base.py` says what they are)."""
    labels = torch.tensor(sequence.label_ids, device=logits.device)
    rows = logits[[position - len(sequence.token_ids) for position in sequence.positions]].float()
    if sequence.kind == "labels":
        return rows[0, labels]
    if sequence.kind != "logprobs":
        raise ValueError(f"a sequence of kind {sequence.kind!r} has no gradient")
    logprobs = rows.log_softmax(-1)
    return torch.cat([logprobs[torch.arange(len(labels)), labels], logprobs.amax(-1)])
