"""A method of your own: LoZO with a clipped projected gradient, so that one odd batch cannot throw the run off.

    python examples/custom_method.py

A method is a frozen dataclass of pure torch; docs/adding-a-method.md lists all that it may define. `register` makes it
known in this process, where the engine runs too. For an engine in another process, a package must declare it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vllm_zo import LoZO
from vllm_zo.methods import METHODS
from vllm_zo.methods.plan import ProbePlan
from vllm_zo.options import option

HERE = Path(__file__).parent
MODEL = str(HERE / "demo" / "model")
TRAIN, VALIDATION = HERE / "demo" / "reviews" / "train.jsonl", HERE / "demo" / "reviews" / "validation.jsonl"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100


@METHODS.register  # a job names its method, and the engine builds the method from the name
@dataclass(frozen=True, kw_only=True)
class ClippedLoZO(LoZO):
    """LoZO with `c <- max(-clip, min(c, clip))`."""

    name = "clipped-lozo"

    clip: float = option(2.0, above=0, help="Largest projected gradient, in nats per unit of eps.")

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        return super().coefficients(plan, losses_PE).clamp(-self.clip, self.clip)


def main() -> None:
    from vllm_zo import apply_cpu_defaults

    apply_cpu_defaults()
    from vllm_zo import LLM, Classification

    llm = LLM(MODEL, max_model_len=256, dtype="float32", zo_training=True)
    run = llm.finetune(
        train=TRAIN,
        validation=VALIDATION,
        objective=Classification("{sentence} It was", [" terrible", " great"]),
        method=ClippedLoZO(clip=2.0),
        learning_rate=3e-4,
        steps=STEPS,
    )
    # The seed log has the clipped coefficients, so a replay needs no clipping.
    clipped = sum(abs(record["coefficients"][0]) >= 2.0 for record in run.history)
    print(f"{clipped} of {STEPS} steps were clipped")
    print(f"accuracy {run.metrics['initial_accuracy']:.3f} -> {run.metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
