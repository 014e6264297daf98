"""A reward without a gradient: the demo model learns to give its verdict in one exact format.

    python examples/reward.py [steps]

The model continues "... It was". The reward of a completion is 1 if it is one word and a full stop, and 0 otherwise. No
gradient leads there, because the model samples completions and a Python function reads them. The engine runs in this
process, so that it can call a function of this script. A function that can be imported works with any engine.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
MODEL = str(HERE / "demo" / "model")
TRAIN, VALIDATION = HERE / "demo" / "reviews" / "train.jsonl", HERE / "demo" / "reviews" / "validation.jsonl"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
SHOWN = 10
"""The figures at the end average so many training steps."""


def one_word(completions: list[str], **columns: list) -> list[float]:
    """The reward, with TRL's signature: completions, and the fields of their records as lists, which it ignores."""
    return [float(re.match(r" \w+\.", text) is not None) for text in completions]


def main() -> None:
    from vllm_zo import apply_cpu_defaults

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process; before vLLM is imported
    apply_cpu_defaults()  # on a CPU it sets threads and KV cache
    from vllm_zo import LLM, LoZO, Reward

    llm = LLM(MODEL, max_model_len=256, dtype="float32", zo_training=True)
    run = llm.finetune(
        train=TRAIN,
        validation=VALIDATION,
        objective=Reward("{sentence} It was", reward=one_word, max_tokens=3, samples=2),
        method=LoZO(rank=2, eps=3e-2),
        bases=1,
        learning_rate=1e-3,
        batch_size=16,
        steps=STEPS,
        eval_interval=max(1, STEPS // 5),
        seed=0,
    )
    sampled = [record["reward"] for record in run.history]
    first, last = (sum(part) / len(part) for part in (sampled[:SHOWN], sampled[-SHOWN:]))
    print(f"in the format, sampled: {first:.3f} in the first {SHOWN} steps, {last:.3f} in the last")
    print(f"in the format, greedy:  {run.metrics['initial_reward']:.3f} -> {run.metrics['reward']:.3f} on validation")
    run.plot(run.directory / "run.png")
    print(f"picture: {run.directory / 'run.png'}")


if __name__ == "__main__":
    main()
