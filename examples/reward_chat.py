"""A chat model learns from a reward: SmolLM2 says what a review is, in exactly one form.

    python examples/reward_chat.py [generations]

The reward is 1 for the right one of two sentences and nothing else. The job's own state writes a generation of answers,
which are rewarded once, and EACH steps score them: what earned more than other answers to its prompt is to become
likelier (docs/objectives.md, "Rewards"). The job trains the LM head alone, along the words that the model writes anyway
(docs/methods.md, "The LM head alone, for a reward"). In some minutes the model learns the form; the review itself
would take far longer (docs/results.md). models.py fetches the model once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from models import FetchError, fetch

REVIEWS = Path(__file__).parent / "demo" / "reviews"
ANSWERS = ("This review is negative.", "This review is positive.")
QUESTION = f'Is this review positive or negative? {{}}\nReply "{ANSWERS[1]}" or "{ANSWERS[0]}"'
SYSTEM = {"role": "system", "content": ""}
"""In place of the model's own system message, which makes prompts longer by half."""
GENERATIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 24
EACH = 256
"""Steps that score a generation: 8 answers to each of 4 prompts."""
SHOWN = 4
"""The figures at the end average so many generations."""


def chats(part: str, most: int) -> list[dict]:
    """Rows with `messages`, as everywhere, and whatever else the reward reads."""
    rows = [json.loads(line) for line in (REVIEWS / f"{part}.jsonl").read_text().splitlines()[:most]]
    return [
        {
            "messages": [SYSTEM, {"role": "user", "content": QUESTION.format(row["sentence"])}],
            "answer": ANSWERS[row["label"]],
        }
        for row in rows
    ]


def exact(completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """The reward, with TRL's signature: completions, and the fields of their rows as lists."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def main() -> None:
    try:
        model = fetch("smollm2")
    except FetchError as error:
        sys.exit(f"reward_chat.py: {error}")
    from vllm_zo import apply_cpu_defaults

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, which has the function `exact`
    apply_cpu_defaults()
    from vllm_zo import LLM, LoZO, Reward
    from vllm_zo.entrypoints.llm.cpu_defaults import has_native_bfloat16

    dtype = "auto" if has_native_bfloat16() else "float32"  # emulated bfloat16 is slower than float32
    # Probes of the head share the KV of a prompt, block by block; a block has 128 tokens on a CPU by default.
    llm = LLM(str(model), max_model_len=256, dtype=dtype, block_size=32, zo_training=True)
    run = llm.finetune(
        train=chats("train", 320),
        validation=chats("validation", 32),
        objective=Reward(
            "{prompt}", reward=exact, max_tokens=8, temperature=1.0, top_p=1.0, samples=8, steps_per_generation=EACH
        ),
        method=LoZO(u="written", v="activations", interval=1),
        target_modules="lm_head",
        bases=4,
        batch_size=4,
        steps=GENERATIONS * EACH,
        eval_interval=GENERATIONS * EACH,
        seed=0,
    )
    sampled = [record["reward"] for record in run.history[::EACH]]
    first, last = (sum(part) / len(part) for part in (sampled[:SHOWN], sampled[-SHOWN:]))
    print(f"right in the form, sampled: {first:.3f} in the first {SHOWN} generations, {last:.3f} in the last")
    print(
        f"right in the form, greedy:  {run.metrics['initial_reward']:.3f} -> {run.metrics['reward']:.3f} on validation"
    )
    run.plot(run.directory / "run.png")
    print(f"picture: {run.directory / 'run.png'}")


if __name__ == "__main__":
    main()
