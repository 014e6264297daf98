"""What the examples of rollouts share: they differ by their program only. It is a module of theirs, and no script."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REVIEWS = HERE / "demo" / "reviews"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60


def learn(play: Any, what: str, **settings: Any) -> Any:
    """Train the demo model on the rewards of a program, print how far it came, and draw it.

    Args:
        what: the name of its score.
        settings: of `Rollout`, in place of those below.
    """
    from vllm_zo import apply_cpu_defaults

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    apply_cpu_defaults()  # on a CPU it sets threads and KV cache
    from vllm_zo import EGGROLL, LLM, Rollout

    llm = LLM(str(HERE / "demo" / "model"), max_model_len=256, dtype="float32", zo_training={"slots": 8})
    run = llm.finetune(
        train=REVIEWS / "train.jsonl",
        validation=REVIEWS / "validation.jsonl",
        objective=Rollout(play, **{"concurrency": 64, "shaping": "zscore", **settings}),
        method=EGGROLL(queries=4, eps=3e-2),
        update_space="bank",
        bases=1,
        learning_rate=0.3,
        batch_size=16,
        steps=STEPS,
        eval_interval=max(1, STEPS // 5),
        seed=0,
    )
    print(f"{what} on held-out reviews: {run.metrics['initial_reward']:.3f} -> {run.metrics['reward']:.3f}")
    waited = sum(record["waiting_seconds"] for record in run.history)
    whole = sum(record["group_seconds"] for record in run.history)
    first, last = run.history[0]["turns"], run.history[-1]["turns"]
    print(f"requests of a rollout: {first:.2f} -> {last:.2f}; the engine waited {waited / whole:.0%} of the time")
    print("a rollout of the newest version:")
    for said in run.transcripts["newest"]["rollouts"][0]["said"]:
        print(f"  {said['role']}: {said['text'].strip()}")
    run.plot(run.directory / "run.png")
    print(f"picture: {run.directory / 'run.png'}")
    return run
