"""Coordinates: the numbers that a method trains of each linear weight, and how they become two factors.

    delta W = U(theta, frozen) V(theta, frozen)^T      theta: the trained numbers, zero at the start of a job
                                                       frozen: drawn from a key at every refresh, fixed in between

A direction is a vector of the same numbers. In all coordinates but two, U is linear in theta and V does not depend on
it. An adapter then holds the state and a perturbation in separate columns (`methods/adapter.py`), so that their sum
never rounds. The two others are `TwoFactors`, which trains V too, and `Dense`, which has no factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.plan import ModuleShape


@dataclass(frozen=True)
class Coordinates(ABC):
    """The trained numbers of every module. Implementations are frozen dataclasses without state.

    Tensors are float32 on the state's device, flat over all modules in the layout's order.
    """

    refreshed: ClassVar[str]
    """What a refresh draws again, in the words of log lines: "V"."""
    has_matrices: ClassVar[bool] = True
    """Whether the numbers of a module form matrices (see `matrices`)."""
    has_factors: ClassVar[bool] = True
    """Whether a change of a weight is a product U V^T, which an adapter can carry. If not, the worker writes a probe
    into the base weights."""
    trains_v: ClassVar[bool] = False
    """Whether V depends on theta, as U always does."""

    rank: int
    """The number of columns of U and V."""
    scale: float = 1.0
    """A direction is `scale` times what `draw` gives."""
    folds_every_step: bool = False
    """True if V changes every step. The worker then folds the accumulator into the base before each step. So an adapter
    needs one rank block only: the perturbation in training, the accumulator in an evaluation."""

    @property
    def max_probes_at_once(self) -> int | None:
        """How many probes an engine can score side by side; None stands for any number.

        Without factors it is 1, because the base weights hold one probe at a time.
        """
        return None if self.has_factors else 1

    @property
    def draws_normals(self) -> bool:
        """Whether a direction is `noise.normal` of `ranges` as it is.

        An update may then draw the direction again while it adds it (`noise.add_normals`). A subclass that overrides
        `draw` or `embed` has other directions; the comparison finds that without a flag that one could forget.
        """
        return type(self).draw is Coordinates.draw and type(self).embed is Coordinates.embed

    def check_module(self, module: ModuleShape) -> None:  # noqa: B027 - most have no condition
        """Raise ConfigError for a module for which the factors do not exist."""

    @abstractmethod
    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        """Where the trained numbers lie, one piece for each module. N in the shapes below is their total."""

    def draw(self, key: int, layout: FactorLayout, device: torch.device) -> Tensor:
        """The float32 numbers behind one direction: independent normals, (N,) unless `embed` says otherwise."""
        return noise.normal(key, self.ranges(layout), device)

    def embed(self, draw: Tensor, index: int, layout: FactorLayout) -> Tensor:
        """(N,) the direction that is number `index` of its step, from its draw."""
        return draw

    @property
    def measures_u(self) -> bool:
        """Whether the sizes of a direction's numbers are measured (`AdapterState.sizes_N`)."""
        return False

    @property
    def measures_v(self) -> bool:
        """Whether V is no noise, but made of what enters the modules (`AdapterState.measured_BN`)."""
        return False

    @property
    def measured(self) -> str | None:
        """The option of the method, as a user writes it, for which the base is asked something before the first step
        that no key gives again; None: there is none."""
        return None

    @abstractmethod
    def draw_frozen(self, key: int, layout: FactorLayout, device: torch.device) -> Any:
        """The part that stays fixed between refreshes. The methods below receive it as `frozen`."""

    @abstractmethod
    def factors(self, theta_N: Tensor, frozen: Any, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        """Flat (N_U,) and (N_V,) with `U V^T` the change of the weight."""

    def factor_changes(self, offset_N: Tensor, frozen: Any, layout: FactorLayout) -> tuple[Tensor, Tensor | None]:
        """What an offset (N,) of theta adds to the flat factors: (N_U,), and (N_V,) or None if V does not move."""
        # U is linear in theta unless a subclass overrides this, so the U of the offset is the change of U.
        return self.factors(offset_N, frozen, layout)[0], None

    def module_factors(
        self, theta_N: Tensor, frozen: Any, layout: FactorLayout
    ) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """For each module U (O, R) and V (I, R). V None means that U is the whole change (O, I)."""
        u_N, v_N = self.factors(theta_N, frozen, layout)
        return layout.split_u(u_N), layout.split_v(v_N)

    def transfer(self, vector_N: Tensor, old: Any, new: Any, layout: FactorLayout) -> Tensor:
        """(N,) an optimizer's vector, such as a momentum, projected from the frozen part `old` to `new`.

        Raises:
            NotImplementedError: the coordinates are never refreshed.
        """
        raise NotImplementedError(f"{type(self).__name__} is never refreshed")

    def matrices(self, theta_N: Tensor, layout: FactorLayout) -> list[Tensor]:
        """Views of theta (N,) as matrices, in the order of the modules. A module may have more than one.

        Raises:
            NotImplementedError: the numbers of a module form no matrices.
        """
        raise NotImplementedError(f"{type(self).__name__} trains a vector a module")
