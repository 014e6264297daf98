"""The numbered layers of a model, between which a forward may change its rows."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vllm_zo.methods.layers import layer_of

BY_ROW = {"hidden_states", "x", "residual", "positions", "position_ids"}
"""Parameters of a layer's forward that have a row for each token."""
_IN_A_LAYER = re.compile(r"(.+?)\.\d+\.")


@dataclass
class DecoderLayers:
    """The numbered layers of a model.

    Attributes:
        layers: in their order.
        attentions: how many attention layers each of them has.
        of_no_rows: what a layer returns for no rows; None until a layer has run.
    """

    layers: Sequence[nn.Module]
    attentions: Sequence[int]
    of_no_rows: Any = field(default=None)

    def note(self, output: Any) -> Any:
        """Learn from the output of a layer what layers return: a tensor, or several. Returns it."""
        if self.of_no_rows is None:
            self.of_no_rows = _no_rows(output)
        return output


def _no_rows(output: Any) -> Any:
    if output is None:
        return None
    if isinstance(output, Tensor):
        return output.new_empty((0, *output.shape[1:]))
    return tuple(_no_rows(part) for part in output)


def find_decoder_layers(model: nn.Module, modules: Sequence[str], attentions: Sequence[str]) -> DecoderLayers | str:
    """The numbered layers of a model, or the reason why its rows cannot change between them.

    Args:
        modules: names of the modules with LoRA.
        attentions: names of the attention layers.
    """
    lists = {found[1] for name in modules if (found := _IN_A_LAYER.match(name))}
    if len(lists) != 1:
        return f"its modules are in {len(lists)} lists of layers"
    (prefix,) = lists
    layers = model.get_submodule(prefix)
    if not isinstance(layers, nn.ModuleList):
        return f"{prefix} is no list of layers"
    for layer in layers:
        parameters = inspect.signature(layer.forward).parameters.values()
        unknown = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if unknown := [name for name in unknown if name not in BY_ROW]:
            return f"{type(layer).__name__}.forward takes {', '.join(unknown)}"
    count = Counter(layer_of(name) for name in attentions)
    if set(count) != set(range(len(layers))):
        return "not every layer has attention"
    return DecoderLayers(list(layers), [count[index] for index in range(len(layers))])
