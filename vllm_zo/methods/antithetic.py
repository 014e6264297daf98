"""Helpers shared by methods that probe pairs: each direction once with + and once with -, on the same mini-batch."""

from __future__ import annotations

from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.base import Probe, ProbePlan, projected_grad
from vllm_zo.validation import check_float, check_int

DIRECTION_STREAM = "U"
MAX_RANK = 512
"""The largest `max_lora_rank` vLLM 0.32 accepts."""


def antithetic_plan(job_seed: int, step: int, basis: int, eps: float, queries: int) -> ProbePlan:
    """(+d0, -d0, +d1, -d1, ...) for `queries` fresh directions; direction k's seed is a function of (job, step, k).

    Example: with queries=2 the seeds of step 7 are derive_key(job_seed, "U", 7, 0) and derive_key(job_seed, "U", 7, 1).
    """
    seeds = [noise.derive_key(job_seed, DIRECTION_STREAM, step, k) for k in range(queries)]
    probes = tuple(Probe(seed=seed, sign=sign, eps=eps) for seed in seeds for sign in (1, -1))
    return ProbePlan(step=step, probes=probes, basis=basis)


def mean_projected_grads(losses_PE: Tensor, eps: float) -> Tensor:
    """Weights of the K directions in the averaged estimate `1/K sum_k c_k Z_k`.

    Args:
        losses_PE: (2K, E) nats, probes in the order of `antithetic_plan`.

    Returns:
        (K,) projected gradients of the mini-batch's mean loss, divided by K; dtype and device of `losses_PE`.

    Source: n-SPSA, MeZO, arXiv:2305.17333, Definition 1.
    """
    mean_P = losses_PE.mean(dim=1)
    plus_K, minus_K = mean_P[0::2], mean_P[1::2]
    return projected_grad(plus_K, minus_K, eps) / len(plus_K)


def check_hyperparameters(method: str, rank: object, eps: object, queries: object) -> None:
    """Range checks of what every low-rank method has. Raises ConfigError."""
    check_int(f"{method}.rank", rank, 1, MAX_RANK, "vLLM's adapters go no further")
    check_float(f"{method}.eps", eps, above=0.0, fix="LoZO and MeZO use 1e-3")
    check_int(f"{method}.queries", queries, 1, fix="1 direction a step is what the papers use")
