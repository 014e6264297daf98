"""Offline fine-tuning: a sentiment task in the style of SST-2 with LoZO, on the small model of this repository.

    python examples/finetune.py

Change the settings for a model and a data set of your own. The command line does the same: `vllm-zo train --task sst2`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
MODEL = str(HERE / "demo" / "model")  # or a Hugging Face name: "facebook/opt-1.3b"
TRAIN, VALIDATION = HERE / "demo" / "reviews" / "train.jsonl", HERE / "demo" / "reviews" / "validation.jsonl"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 150
LEARNING_RATE = 3e-4  # large, because the model is small; 1e-7 to 1e-6 for models of a billion parameters


def main() -> None:
    from vllm_zo import apply_cpu_defaults

    apply_cpu_defaults()  # on a CPU it keeps the engine in this process, which starts sooner
    from vllm import SamplingParams

    from vllm_zo import LLM, Classification, LoZO

    llm = LLM(MODEL, max_model_len=256, dtype="float32", zo_training=True)
    run = llm.finetune(
        train=TRAIN,
        validation=VALIDATION,
        objective=Classification("{sentence} It was", [" terrible", " great"]),
        method=LoZO(rank=2, interval=50, eps=1e-3),
        learning_rate=LEARNING_RATE,
        batch_size=16,
        steps=STEPS,
        eval_interval=max(1, STEPS // 3),
        seed=0,
    )
    next_token = SamplingParams(max_tokens=1, temperature=0.0)
    print(f"accuracy {run.metrics['initial_accuracy']:.3f} -> {run.metrics['accuracy']:.3f}")
    for text in ("a warm and clever story , beautifully told .", "the soup was cold and nobody came ."):
        (answer,) = llm.generate(f"{text} It was", next_token, lora_request=run.lora_request, use_tqdm=False)
        print(f"{text} It was{answer.outputs[0].text}")
    print(f"log and snapshots: {run.directory}")


if __name__ == "__main__":
    main()
