"""A method of your own: LoZO whose projected gradient is clipped, so that one odd batch cannot throw the run off.

    python examples/custom_method.py

A method is a frozen dataclass of pure torch; docs/adding-a-method.md has everything it may answer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vllm_zo import LoZO
from vllm_zo.methods import METHODS
from vllm_zo.methods.base import ProbePlan
from vllm_zo.validation import check_float

HERE = Path(__file__).parent
MODEL = str(HERE / "demo" / "model")
TRAIN, VALIDATION = HERE / "demo" / "reviews" / "train.jsonl", HERE / "demo" / "reviews" / "validation.jsonl"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100


@dataclass(frozen=True, kw_only=True)
class ClippedLoZO(LoZO):
    """LoZO with `c <- max(-clip, min(c, clip))`."""

    name = "clipped-lozo"

    clip: float = 2.0
    """Largest projected gradient, in nats per unit of eps."""

    def validate(self) -> None:
        super().validate()
        check_float("clipped-lozo.clip", self.clip, above=0.0)

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        return super().coefficients(plan, losses_PE).clamp(-self.clip, self.clip)


# The engine builds methods by name. Here it runs in this process; for one in a child process (vLLM's default without
# apply_cpu_defaults) the class belongs in a package that declares it, see docs/adding-a-method.md.
METHODS[ClippedLoZO.name] = ClippedLoZO


def main() -> None:
    from vllm_zo.entrypoints.cpu_defaults import apply_cpu_defaults

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
    clipped = sum(abs(record["projected_grad"][0]) >= 2.0 for record in run.history)
    print(f"{clipped} of {STEPS} steps were clipped")
    print(f"accuracy {run.metrics['initial_accuracy']:.3f} -> {run.metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
