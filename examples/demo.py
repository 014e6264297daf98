"""`make demo`: a small OPT model learns to tell good reviews from bad ones, inside vLLM, in a few minutes on a CPU.

    python examples/demo.py [--model smollm2] [--steps 400] [--output demo-run]

It shows the zero-shot accuracy, trains with LoZO and a progress bar, shows the final accuracy, and saves a PEFT adapter
and a picture of the run. The small model is in this repository. `--model` (`make demo MODEL=smollm2`) takes a real one,
which models.py fetches once, and trains what is cheapest there (docs/methods.md, "Which modules").
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from models import MODELS, FetchError, fetch

HERE = Path(__file__).parent
SMALL, REVIEWS = HERE / "demo" / "model", HERE / "demo" / "reviews"
TEMPLATE, OPTIONS = "{sentence} It was", [" terrible", " great"]
LAYERS = {"bases": 1, "batch_size": 16}
HEAD = {
    "method": {"name": "lozo", "v": "activations", "u": "written", "interval": 10}, "target_modules": "lm_head",
    "bases": 31, "batch_size": 64, "lr_schedule": "linear",
}  # fmt: skip
EXAMPLES = ("a warm and clever story , beautifully told .", "the soup was cold and the waiter never came back .")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="a pretrained model in place of the small one")
    parser.add_argument("--steps", type=int, help="(default: 400; of a pretrained model 1500)")
    parser.add_argument("--output", type=Path, default=Path("demo-run"), help="job, adapter/ and run.png go here")
    args = parser.parse_args()
    try:
        model = fetch(args.model) if args.model else SMALL
    except FetchError as error:
        sys.exit(f"demo.py: {error}")
    trained, steps, slot_rank = (HEAD, 1500, 64) if args.model else (LAYERS, 400, 16)
    steps = args.steps or steps
    job = args.output / time.strftime("%Y%m%d-%H%M%S")

    # Before the import of vLLM, which reads its logging level then.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm_zo import apply_cpu_defaults
    from vllm_zo.entrypoints.llm.cpu_defaults import has_native_bfloat16

    apply_cpu_defaults()
    from vllm_zo import LLM, Classification

    print("Starting vLLM with", model, file=sys.stderr)
    dtype = "auto" if has_native_bfloat16() else "float32"  # emulated bfloat16 is slower than float32
    llm = LLM(str(model), max_model_len=256, dtype=dtype, zo_training={"slot_rank": slot_rank})
    run = llm.finetune(
        train=REVIEWS / "train.jsonl",
        validation=REVIEWS / "validation.jsonl",
        objective=Classification(TEMPLATE, OPTIONS),
        steps=steps,
        eval_interval=max(1, steps // 4),
        output_dir=str(job),
        **trained,
    )
    run.save(job / "adapter")
    run.plot(job / "run.png")

    before, after = run.metrics["initial_accuracy"], run.metrics["accuracy"]
    print(f"\nValidation accuracy: {before:.3f} zero-shot, {after:.3f} after {steps} steps of LoZO.")
    for sentence in EXAMPLES:
        prompt = TEMPLATE.format(sentence=sentence)
        words = [next_option(llm, prompt, adapter) for adapter in (None, run.lora_request)]
        print(f"  {prompt} ...   before:{words[0]}   after:{words[1]}")
    print(f"Adapter: {job / 'adapter'}   picture: {job / 'run.png'}   log: {job / 'metrics.jsonl'}")


def next_option(llm, prompt: str, adapter) -> str:
    """The option that the model finds likelier after the prompt."""
    from vllm import SamplingParams

    ids = [llm.get_tokenizer()(o, add_special_tokens=False).input_ids[0] for o in OPTIONS]
    params = SamplingParams(max_tokens=1, temperature=0.0, allowed_token_ids=ids)
    return llm.generate([prompt], params, lora_request=adapter, use_tqdm=False)[0].outputs[0].text


if __name__ == "__main__":
    main()
