"""Many directions per step: the mean of K estimates has a K-th of the variance, and vLLM runs all 2K probes as a batch.

    python examples/many_directions.py

To run together, 2K probes need 2K adapter slots. With fewer slots the same step takes several engine steps.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
MODEL = str(HERE / "demo" / "model")
TRAIN = HERE / "demo" / "reviews" / "train.jsonl"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
DIRECTIONS = (1, 4)


def main() -> None:
    from vllm_zo import apply_cpu_defaults

    apply_cpu_defaults()
    from vllm_zo import LLM, Classification, LoZO

    slots = 2 * max(DIRECTIONS)
    llm = LLM(MODEL, max_model_len=256, dtype="float32", zo_training={"slots": slots})
    for count in DIRECTIONS:
        run = llm.finetune(
            train=TRAIN,
            objective=Classification("{sentence} It was", [" terrible", " great"]),
            method=LoZO(queries=count),
            learning_rate=0.0,  # the weights stay as they are: this measures the estimate, not the training
            batch_size=8,
            steps=STEPS,
            progress=False,
        )
        # Mean of squares of the weights c_k / K: what the estimate's length, and so its noise, goes with.
        noise = statistics.fmean(sum((c / count) ** 2 for c in r["coefficients"]) for r in run.history)
        seconds = statistics.median(r["seconds"] for r in run.history)
        print(f"{count} directions: {seconds * 1e3:.0f} ms a step, mean squared weight {noise:.3f}")


if __name__ == "__main__":
    main()
