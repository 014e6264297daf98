"""LoRA by back-propagation (peft, AdamW), as somebody would train who has a gradient: for memory, and as a neighbour.

It is spared what it need not do: the LM head sees the last token of each prompt only, and the padding is on the left.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

RANK, LEARNING_RATE = 8, 5e-4
TARGETS = ("q_proj", "v_proj")


class LoraTrainer:
    """Trains on prompts whose answer is one of some tokens.

    Args:
        option_ids: the tokens of the answers.
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
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        self._options = torch.tensor(option_ids, device=device)
        self._device = device

    def step(self, prompts: list[list[int]], labels: list[int]) -> float:
        """One step on a batch of token ids; the loss in nats per example."""
        ids, mask = self._padded(prompts)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
        gold = torch.tensor(labels, device=self._device)
        loss = torch.nn.functional.cross_entropy(logits[:, self._options].float(), gold)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def _padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self._device), torch.tensor(mask, device=self._device)
