"""Each method against its paper's rule, written down naively: dense float64 weights, no factors kept, no package code
but the noise.

Two losses: one that is far from quadratic, and the cross-entropy of a network of two layers. Every run crosses
refreshes of the basis. Tolerance of the weights: ours are float32 (6e-8 of numbers near 1), in at most 24 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.test_methods import EXAMPLES, JOB_SEED, MODULES, Loss, Toy, Weights, curved, random_weights
from vllm_zo import noise
from vllm_zo.methods import METHODS
from vllm_zo.methods.estimators.kerzoo import _radius

EPS = 0.05
STEPS = 12
INTERVAL = 5
Step = Callable[[int, Weights, Loss, dict[str, list[Tensor]]], Weights]
"""(step, weights, loss, memory) -> new weights; memory is a dictionary of the method's own."""


def two_layers() -> Loss:
    """Cross-entropy of `W2 [tanh(W1 x), 1]` over three classes, one example each."""
    x_EI = torch.randn(EXAMPLES, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    start = random_weights(9)

    def loss(weights: Weights) -> Tensor:
        first, second = (w + s for w, s in zip(weights, start, strict=True))
        hidden = torch.cat([torch.tanh(x_EI @ first.T), torch.ones(EXAMPLES, 1, dtype=torch.float64)], dim=1)
        return -(hidden @ second.T).log_softmax(-1)[range(EXAMPLES), range(EXAMPLES)]

    return loss


LOSSES = {"curved": curved(random_weights(4)), "two layers": two_layers()}


def numbers(key: int, counts: list[int]) -> list[Tensor]:
    return [
        noise.normal(key, noise.ElementRanges.of([(m.name, 0, n)]), "cpu").double()
        for m, n in zip(MODULES, counts, strict=True)
    ]


def signs(key: int, counts: list[int]) -> list[Tensor]:
    bits = [
        noise.uniform_bits(key, noise.ElementRanges.of([(m.name, 0, n)]), "cpu")
        for m, n in zip(MODULES, counts, strict=True)
    ]
    return [torch.where(b < 2**31, 1.0, -1.0).double() for b in bits]


def outs(rank: int) -> list[int]:
    return [m.out_features * rank for m in MODULES]


def ins(rank: int) -> list[int]:
    return [m.in_features * rank for m in MODULES]


def u_key(step: int, k: int) -> int:
    return noise.derive_key(JOB_SEED, "U", step, k)


def v_key(step: int, interval: int = INTERVAL) -> int:
    return noise.derive_key(JOB_SEED, "V", step // interval)


def left(step: int, k: int, rank: int) -> list[Tensor]:
    return [u.view(-1, rank) for u in numbers(u_key(step, k), outs(rank))]


def right(step: int, rank: int, interval: int = INTERVAL) -> list[Tensor]:
    return [v.view(-1, rank) for v in numbers(v_key(step, interval), ins(rank))]


def moved(weights: Weights, z: Weights, factor: float | Tensor) -> Weights:
    return [w + factor * d for w, d in zip(weights, z, strict=True)]


def products(us: list[Tensor], vs: list[Tensor], factor: float = 1.0) -> Weights:
    return [factor * u @ v.T for u, v in zip(us, vs, strict=True)]


def slope(loss: Loss, weights: Weights, z: Weights, eps: float = EPS) -> float:
    plus, minus = loss(moved(weights, z, eps)).mean(), loss(moved(weights, z, -eps)).mean()
    return float((plus - minus) / (2 * eps))


def msign(matrix: Tensor) -> Tensor:
    x, s, yt = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-9
    return x[:, kept] @ yt[kept]


def orthonormal(matrix: Tensor) -> Tensor:
    """Gram-Schmidt."""
    columns: list[Tensor] = []
    for column in matrix.T:
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


# --- estimators, on LoZO's directions ---------------------------------------------------------------------------------


def one_sided(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    vs, start = right(step, 2), w
    for k in range(3):
        z = products(left(step, k, 2), vs)
        g = (loss(moved(start, z, EPS)).mean() - loss(start).mean()) / EPS
        w = moved(w, z, -0.02 * g / 3)
    return w


def leave_one_out(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    zs = [products(left(step, k, 2), right(step, 2)) for k in range(3)]
    losses = [float(loss(moved(w, z, EPS)).mean()) for z in zs]
    for k, z in enumerate(zs):
        others = [value for j, value in enumerate(losses) if j != k]
        w = moved(w, z, -0.02 * (losses[k] - sum(others) / 2) / EPS / 3)
    return w


def fzoo(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    vs = [v.view(-1, 1) for v in signs(v_key(step), ins(1))]
    zs = [products([u.view(-1, 1) for u in signs(u_key(step, k), outs(1))], vs) for k in range(4)]
    centre, losses = float(loss(w).mean()), [float(loss(moved(w, z, EPS)).mean()) for z in zs]
    mean = sum(losses) / 4
    sigma = math.sqrt(sum((value - mean) ** 2 for value in losses) / 3)
    for value, z in zip(losses, zs, strict=True):
        w = moved(w, z, -1e-3 * (value - centre) / (EPS * 4 * sigma))
    return w


def kerzoo(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    vs, start = right(step, 2), w
    for k in range(2):
        z, s = products(left(step, k, 2), vs), _radius(u_key(step, k))
        plus, minus = loss(moved(start, z, EPS * s)).mean(), loss(moved(start, z, -EPS * s)).mean()
        kernel = 15 / 4 * s * (5 - 7 * s**2)
        w = moved(w, z, -0.01 * kernel * (plus - minus) / (2 * EPS) / 2)
    return w


def eggroll(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    """N = 6 members of rank 2, as the paper maximises: fitness = -loss."""
    factors = right(step, 6, interval=1)
    members = []
    for k in range(3):
        b = [v[:, 2 * k : 2 * k + 2] for v in factors]
        e = products(left(step, k, 2), b, 1 / math.sqrt(2))
        members += [e, [-d for d in e]]
    fitness = torch.stack([-loss(moved(w, e, EPS)).mean() for e in members])
    scores = (fitness - fitness.mean()) / fitness.std(correction=0)
    for score, e in zip(scores, members, strict=True):
        w = moved(w, e, 0.5 * math.sqrt(6) / 6 * score * EPS)
    return w


# --- coordinates ------------------------------------------------------------------------------------------------------


def tezo(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    us = [u.view(-1, 3) for u in numbers(noise.derive_key(noise.derive_key(JOB_SEED, "V", 0), "left"), outs(3))]
    vs, z = right(0, 3), []
    for u, v, tau in zip(us, vs, numbers(u_key(step, 0), [3, 3]), strict=True):
        z.append(sum((tau[s] * torch.outer(u[:, s], v[:, s]) for s in range(3)), torch.zeros(len(u), len(v))))
    return moved(w, z, -0.01 * slope(loss, w, z))


def subzero(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    us = [orthonormal(u.view(-1, 2)) for u in numbers(noise.derive_key(v_key(step), "left"), outs(2))]
    vs = [orthonormal(v) for v in right(step, 2)]
    cores = [c.view(2, 2) for c in numbers(u_key(step, 0), [4, 4])]
    z = []
    for m, u, c, v in zip(MODULES, us, cores, vs, strict=True):
        z.append(math.sqrt(m.out_features * m.in_features / 4) * u @ c @ v.T)
    return moved(w, z, -0.01 * slope(loss, w, z))


def zo_muon(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    vs = [orthonormal(v) for v in right(step, 2)]
    g = [torch.zeros(m.out_features, 2, dtype=torch.float64) for m in MODULES]
    for k in range(4):
        us = left(step, k, 2)
        g = moved(g, us, slope(loss, w, products(us, vs)) / 4)
    return moved(w, products([msign(part) for part in g], vs), -0.01)


def peft_a(rank: int) -> list[Tensor]:
    key = noise.derive_key(JOB_SEED, "V", 0)
    ranges = [noise.ElementRanges.of([(m.name, 0, n)]) for m, n in zip(MODULES, ins(rank), strict=True)]
    uniform = [noise.uniform(key, r, "cpu").double().view(-1, rank) for r in ranges]
    return [v / math.sqrt(len(v)) for v in uniform]


def lora_fa(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    """alpha 6, rank 2: the adapter counts three times."""
    start = w
    for k in range(2):
        z = products(left(step, k, 2), peft_a(2), 3.0)
        w = moved(w, z, -0.01 * slope(loss, start, z) / 2)
    return w


def mezo_lora(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    """Two parameters a module, moved together; the weights are rebuilt from them."""
    bs = memory.setdefault("b", [torch.zeros(m.out_features, 2, dtype=torch.float64) for m in MODULES])
    a_s = memory.setdefault("a", peft_a(2))
    drawn = numbers(u_key(step, 0), [(m.out_features + m.in_features) * 2 for m in MODULES])
    db = [d[: m.out_features * 2].view(-1, 2) for d, m in zip(drawn, MODULES, strict=True)]
    da = [d[m.out_features * 2 :].view(-1, 2) for d, m in zip(drawn, MODULES, strict=True)]

    def mean(factor: float) -> float:
        return float(loss(products(moved(bs, db, factor), moved(a_s, da, factor), 3.0)).mean())

    c = (mean(EPS) - mean(-EPS)) / (2 * EPS)
    memory["b"], memory["a"] = moved(bs, db, -0.01 * c), moved(a_s, da, -0.01 * c)
    return products(memory["b"], memory["a"], 3.0)


def mezo(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    sizes = [m.out_features * m.in_features for m in MODULES]
    z = [d.view(part.shape) for d, part in zip(numbers(u_key(step, 0), sizes), w, strict=True)]
    return moved(w, z, -0.01 * slope(loss, w, z))


# --- optimizers, on LoZO's estimate -----------------------------------------------------------------------------------


def estimate(step: int, w: Weights, loss: Loss, queries: int = 1) -> list[Tensor]:
    """In U-space."""
    g = [torch.zeros(m.out_features, 2, dtype=torch.float64) for m in MODULES]
    for k in range(queries):
        us = left(step, k, 2)
        g = moved(g, us, slope(loss, w, products(us, right(step, 2))) / queries)
    return g


def remembered(memory: dict[str, list[Tensor]], name: str) -> list[Tensor]:
    return memory.setdefault(name, [torch.zeros(m.out_features, 2, dtype=torch.float64) for m in MODULES])


def said_in_new_v(m: list[Tensor], step: int) -> list[Tensor]:
    """LOZO-M's change of subspace, on the step that refreshes V."""
    if step == 0 or step % INTERVAL:
        return m
    pairs = zip(m, right(step - 1, 2), right(step, 2), strict=True)
    return [x @ (old.T @ new) / len(old) for x, old, new in pairs]


def lozo_m(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    old = said_in_new_v(remembered(memory, "m"), step)
    memory["m"] = [0.9 * m + 0.1 * g for m, g in zip(old, estimate(step, w, loss), strict=True)]
    return moved(w, products(memory["m"], right(step, 2)), -0.05)


def adam(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    g, t = estimate(step, w, loss, 2), step + 1
    old = said_in_new_v(remembered(memory, "m"), step)
    memory["m"] = [0.8 * m + 0.2 * x for m, x in zip(old, g, strict=True)]
    memory["v"] = [0.9 * v + 0.1 * x**2 for v, x in zip(remembered(memory, "v"), g, strict=True)]
    pairs = zip(memory["m"], memory["v"], strict=True)
    change = [(m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6) for m, v in pairs]
    return moved(w, products(change, right(step, 2)), -0.02)


def meazo(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    zs = [products(left(step, k, 2), right(step, 2)) for k in range(2)]
    cs = [slope(loss, w, z) for z in zs]
    [v] = memory.setdefault("v", [torch.zeros((), dtype=torch.float64)])
    memory["v"] = [v := 0.9 * v + 0.1 * (cs[0] ** 2 + cs[1] ** 2) / 2]
    size = 0.03 / (float(v / (1 - 0.9 ** (step + 1))) ** 0.5 + 1e-8)
    for c, z in zip(cs, zs, strict=True):
        w = moved(w, z, -size * c / 2)
    return w


def sign(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    g = estimate(step, w, loss, 2)
    return moved(w, products([x.sign() for x in g], right(step, 2)), -0.01)


def muon(step: int, w: Weights, loss: Loss, memory: dict[str, list[Tensor]]) -> Weights:
    old = said_in_new_v(remembered(memory, "m"), step)
    memory["m"] = [0.5 * m + g for m, g in zip(old, estimate(step, w, loss), strict=True)]
    return moved(w, products([msign(m) for m in memory["m"]], right(step, 2)), -0.02)


LOZO = {"rank": 2, "interval": INTERVAL}
RULES: dict[str, tuple[Step, str, dict[str, object], float]] = {
    "one-sided": (one_sided, "lozo", {**LOZO, "queries": 3, "estimator": "one-sided"}, 0.02),
    "rloo": (leave_one_out, "lozo", {**LOZO, "queries": 3, "estimator": "rloo"}, 0.02),
    "fzoo": (fzoo, "fzoo", {"interval": INTERVAL, "queries": 4}, 1e-3),
    "kerzoo": (kerzoo, "kerzoo", {**LOZO, "queries": 2}, 0.01),
    "eggroll": (eggroll, "eggroll", {"rank": 2, "queries": 3}, 0.5),
    "tezo": (tezo, "tezo", {"rank": 3}, 0.01),
    "subzero": (subzero, "subzero", LOZO, 0.01),
    "zo-muon": (zo_muon, "zo-muon", LOZO, 0.01),
    "lora-fa": (lora_fa, "lora-fa", {"rank": 2, "alpha": 6.0, "queries": 2}, 0.01),
    "mezo-lora": (mezo_lora, "mezo-lora", {"rank": 2, "alpha": 6.0}, 0.01),
    "mezo": (mezo, "mezo", {}, 0.01),
    "lozo-m": (lozo_m, "lozo", {**LOZO, "optimizer": "momentum"}, 0.05),
    "adam": (
        adam,
        "lozo",
        {**LOZO, "queries": 2, "optimizer": {"name": "adam", "beta1": 0.8, "beta2": 0.9, "adam_eps": 1e-6}},
        0.02,
    ),
    "meazo": (meazo, "lozo", {**LOZO, "queries": 2, "optimizer": {"name": "meazo", "beta": 0.9}}, 0.03),
    "sign": (sign, "lozo", {**LOZO, "queries": 2, "optimizer": "sign"}, 0.01),
    "muon": (muon, "lozo", {**LOZO, "optimizer": {"name": "muon", "beta": 0.5}}, 0.02),
}


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("name", RULES)
def test_a_method_equals_its_papers_rule(name: str, loss_name: str) -> None:
    rule, method_name, hyperparameters, lr = RULES[name]
    method, loss = METHODS.build(method_name, eps=EPS, **hyperparameters), LOSSES[loss_name]
    spaces = [(s, 1 if s == "fold" or method.epoch(10**6) == 0 else 3) for s in method.update_spaces]
    memory: dict[str, list[Tensor]] = {}
    weights: Weights = [torch.zeros(m.out_features, m.in_features, dtype=torch.float64) for m in MODULES]
    toys = [Toy(method, *space) for space in spaces if space[0] == "fold" or method.epoch(STEPS - 1) < space[1]]
    for step in range(STEPS):
        weights = rule(step, weights, loss, memory)
        for toy in toys:
            toy.step(step, loss, lr)
            for ours, theirs in zip(toy.weights(), weights, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5, msg=f"step {step}")
    assert toys and max(float(w.abs().max()) for w in weights) > 5e-3, "hardly moved; this would prove nothing"


def test_kernel_weights_cancel_the_third_order() -> None:
    """E[s K(s)] = 1 and E[s^3 K(s)] = 0 over the radii that are drawn: 5 standard errors of 20,000."""
    s = torch.tensor([_radius(noise.derive_key(0, "U", i, 0)) for i in range(20_000)], dtype=torch.float64)
    kernel = 15 / 4 * s * (5 - 7 * s**2)
    for power, expected in ((1, 1.0), (3, 0.0)):
        sample = s**power * kernel
        assert abs(float(sample.mean()) - expected) < 5 * float(sample.std()) / math.sqrt(len(s))


def test_equal_losses_give_no_step_where_the_rule_divides_by_their_spread() -> None:
    for name in ("fzoo", "z-score"):
        method = METHODS.build("lozo", queries=3, estimator=name)
        plan = method.plan(0, 0, 0)
        assert method.coefficients(plan, torch.ones(len(plan.probes), 2)).tolist() == [0.0, 0.0, 0.0]
