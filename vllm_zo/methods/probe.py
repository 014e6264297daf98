"""The plain data of a step: modules, probes, plans. A leaf: estimators, optimizers, the engine and the worker use it.

Notation (shape suffixes in dense code): O out features, I in features, R rank, K directions, P probes, E examples,
N trained numbers of all modules together, B bases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModuleShape:
    """One weight in Hugging Face (unfused) coordinates: q_proj, k_proj and v_proj are three modules.

    Embeddings count as a layer with a one-hot input: as many in features as tokens.
    """

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Probe:
    """One parameter state to score: `state + sign * eps * direction(seed)`. Equal seeds, equal direction."""

    seed: int
    sign: int  # +1, -1, or 0 for the centre
    eps: float
    at_step: bool = False
    """In a second round: the direction is the step that the first round proposes, times `eps`; `seed` means nothing."""


@dataclass(frozen=True)
class ProbePlan:
    """The probes of one round. Probes of one direction are adjacent: (+d0, -d0, +d1, -d1, ...)."""

    step: int
    probes: tuple[Probe, ...]
    basis: int
    """Index of what a refresh draws anew (V). A change means: refresh (and fold, in `fold` space) before this step."""
    round: int = 0

    @property
    def seeds(self) -> tuple[int, ...]:
        """Distinct direction seeds, in order of first appearance; the centre and the proposed step have none."""
        return tuple(dict.fromkeys(p.seed for p in self.probes if p.sign and not p.at_step))

    def scaled(self, factor: float) -> ProbePlan:
        """The plan with all radii times `factor` (an eps schedule)."""
        if factor == 1.0:
            return self
        return replace(self, probes=tuple(replace(p, eps=p.eps * factor) for p in self.probes))
