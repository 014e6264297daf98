"""The model card of a run: `README.md` beside its adapter or merged model, with what a reader of the hub should know.

It names no place on this machine: of a file it has the name only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm_zo
from vllm_zo.config import JobConfig

CURVE = "run.png"


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        model: the base: a directory or a name on the hub.
        data: what each part of the data is called -> (its source, its rows).
        metrics: `JobResult.metrics`, and those of test data as `test_...`.
        recipe: the text of the recipe that repeats the run.
        rank: of the adapter; None: the whole model is there.
    """

    model: str
    config: JobConfig
    data: Mapping[str, tuple[str, int]]
    metrics: Mapping[str, Any]
    recipe: str
    rank: int | None

    def text(self, *, curve: bool) -> str:
        """The file's text. `curve`: the picture of the run lies beside it."""
        return "\n".join([*self._head(), *self._data(), *self._numbers(curve), *self._recipe(), *self._limits()]) + "\n"

    def _head(self) -> Iterator[str]:
        name, what = _name(self.model), "model" if self.rank is None else "adapter"
        yield "---"
        if name == self.model:  # of a directory the hub would look for a repository of that name
            yield f"base_model: {name}"
        if self.rank is not None:
            yield "library_name: peft"
        yield "pipeline_tag: text-generation"
        yield f"tags: [{'' if self.rank is None else 'lora, '}zeroth-order, vllm-zo]"
        yield "---\n"
        yield f"# {what.capitalize()} from {name}\n"
        yield f"Trained without gradients inside vLLM, by vllm_zo {vllm_zo.__version__}: {self.config.method},"
        yield f"objective `{self.config.objective.name}`, seed {self.config.seed}.\n"
        if self.rank is not None:
            yield f"Load it with `peft`, or serve it: `vllm serve {name} --enable-lora --max-lora-rank R`, R at least"
            yield f"{self.rank}, with `--lora-modules NAME=PLACE` of this repository.\n"

    def _data(self) -> Iterator[str]:
        yield "## Data\n"
        for part, (source, rows) in self.data.items():
            yield f"- {part}: `{_name(source)}`, {rows} rows"
        yield ""

    def _numbers(self, curve: bool) -> Iterator[str]:
        yield "## Numbers\n"
        after = {name: v for name, v in self.metrics.items() if f"initial_{name}" in self.metrics}
        if after:
            yield f"On the validation rows, before training and after step {self.metrics['step']}:\n"
            yield "| | before | after |\n|---|---|---|"
            yield from (
                f"| {name} | {_short(self.metrics[f'initial_{name}'])} | {_short(v)} |" for name, v in after.items()
            )
            yield ""
        yield from (f"- {name}: {_short(v)}" for name, v in self.metrics.items() if name.startswith("test_"))
        steps, loss = self.metrics["steps"], self.metrics.get("train_loss")
        yield f"- training loss of the last of {steps} steps: {_short(loss)}\n"
        if curve:
            yield f"![Loss and accuracy over the steps]({CURVE})\n"

    def _recipe(self) -> Iterator[str]:
        yield "## Recipe\n"
        yield "`vllm-zo train recipe.yaml` with this file trains it again:\n"
        yield f"```yaml\n{_without_places(self.recipe)}```\n"

    def _limits(self) -> Iterator[str]:
        yield "## Limits\n"
        measured = any(name.startswith("initial_") for name in self.metrics)
        if not measured:
            yield "- There was no validation data: how good it is has not been measured."
        elif self.config.keeps_best:
            yield "- It is the state of the best evaluation, chosen on the same rows as the numbers: they flatter it."
        yield "- One run with one seed. Gradients estimated from losses are noisy: another seed gives other numbers."
        yield "- Nothing else was tested: not its safety, and not what it has forgotten. The limits of the base remain."


def _name(source: str) -> str:
    """A name on a hub as it is; of a path the last part."""
    return Path(source).name if Path(source).exists() else source


def _without_places(recipe: str) -> str:
    """The recipe without its first line, which has a path, and with names of files in place of absolute paths."""

    def shortened(found: re.Match[str]) -> str:
        key, quote, value = found.groups()
        return f"{key}{quote}{_name(value)}{quote}"

    text = recipe.partition("\n")[2] if recipe.startswith("#") else recipe
    return re.sub(r"(?m)^(\s*[\w-]+: )(['\"]?)(/.*?)\2$", shortened, text)


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
