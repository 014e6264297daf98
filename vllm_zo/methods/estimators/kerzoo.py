"""KerZOO's estimate: a random radius and a kernel weight that cancels the third-order bias of a central difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.estimators.base import Estimator, projected_grad
from vllm_zo.methods.plan import Probe, ProbePlan
from vllm_zo.options import option

RADIUS_STREAM = "radius"


@dataclass(frozen=True, kw_only=True)
class Kernel(Estimator):
    """`1/K sum_k K(s_k) (L(W + eps s_k Z_k) - L(W - eps s_k Z_k)) / (2 eps) * Z_k`,  s_k ~ U[-1, 1]

        K(s) = C (15/4) s (5 - 7 s^2)        E[s K(s)] = C,  E[s^3 K(s)] = 0

    The radius s_k is a function of the direction's key. With C = 1 the estimate has the scale of two-sided differences.
    Its bias is of order eps^4 instead of eps^2, and its variance is larger.

    Source: KerZOO, arXiv:2505.18886, Equation 8; the kernel is that of Bach and Perchet, COLT 2016.
    """

    name = "kerzoo"
    gives_slopes = False

    constant: float = option(1.0, above=0, fix="1 keeps the scale of a two-sided estimate", help="C of the kernel.")

    def probes(self, keys: Sequence[int], eps: float) -> tuple[Probe, ...]:
        return tuple(Probe(key, sign, eps * _radius(key)) for key in keys for sign in (1, -1))

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        mean_P = losses_PE.mean(dim=1)
        radii = [_radius(key) for key in plan.keys]
        # From the plan: an eps schedule may have scaled its radii. Each of them is eps times s_k.
        eps = plan.probes[0].eps / radii[0]
        weights = [self.constant * 15 / 4 * s * (5 - 7 * s**2) / len(radii) for s in radii]
        weights_K = torch.tensor(weights, dtype=losses_PE.dtype, device=losses_PE.device)
        return projected_grad(mean_P[0::2], mean_P[1::2], eps) * weights_K


def _radius(key: int) -> float:
    """Uniform in (-1, 1) and never 0, by which `coefficients` divides.

    The upper 53 bits of a derived key are exact in float64. The lowest of them is set: 0 would need the integer 2^52,
    which is even.
    """
    return ((noise.derive_key(key, RADIUS_STREAM) >> 11) | 1) * 2.0**-52 - 1.0
