"""What a run leaves behind: a PEFT adapter that peft and any vLLM load, and a merged model that everything loads.

    python examples/export.py

The commands `vllm-zo export JOB_DIR OUT` and `vllm-zo export --merged JOB_DIR OUT` do the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import mkdtemp

HERE = Path(__file__).parent
MODEL = str(HERE / "demo" / "model")
TRAIN = HERE / "demo" / "reviews" / "train.jsonl"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
PROMPT = "a warm and clever story , beautifully told . It was"


def main() -> None:
    from vllm_zo import apply_cpu_defaults

    apply_cpu_defaults()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_zo import LLM, Classification

    llm = LLM(MODEL, max_model_len=256, dtype="float32", zo_training=True)
    run = llm.finetune(
        train=TRAIN,
        objective=Classification("{sentence} It was", [" terrible", " great"]),
        learning_rate=1e-3,
        steps=STEPS,
        progress=False,
    )
    out = Path(mkdtemp(prefix="export-"))
    report = run.save(out / "adapter")
    run.save_merged(out / "merged")
    print(f"adapter of rank {report.rank}: {out / 'adapter'}\nmerged model: {out / 'merged'}")

    ids = AutoTokenizer.from_pretrained(MODEL)(PROMPT, return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits[0, -1]
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)(ids).logits[0, -1]
        adapted = PeftModel.from_pretrained(base, out / "adapter")(ids).logits[0, -1]
    print(f"logits moved by up to {(adapted - before).abs().max():.3f};", end=" ")
    # The merge rounds the weights to the type of the checkpoint, bfloat16 here. The adapter is exact.
    print(f"adapter and merged model differ by up to {(adapted - merged).abs().max():.1e}")


if __name__ == "__main__":
    main()
