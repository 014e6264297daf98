"""A chat model learns from a grader: SmolLM2 goes on with reviews, and a classifier says how much praise that is.

    python examples/reward_chat.py [steps]

The grader is naive Bayes over the words of the demo's reviews; any function of texts will do. Its probability is the
reward, so nothing of it has a gradient. The job trains the LM head alone, along the words that the model writes anyway
(docs/methods.md, "The LM head alone, for a reward"). models.py fetches the model once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

from models import FetchError, fetch

REVIEWS = Path(__file__).parent / "demo" / "reviews"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
OPENING = 4
SHOWN = 10
"""The figures at the end average so many training steps."""


def read(part: str) -> list[dict]:
    return [json.loads(line) for line in (REVIEWS / f"{part}.jsonl").read_text().splitlines()]


def chats(part: str) -> list[dict]:
    """A chat for each review: the user gives its first words and asks how it goes on."""
    openings = dict.fromkeys(" ".join(row["sentence"].split()[:OPENING]) for row in read(part))
    ask = "Write how this review goes on: "
    return [{"messages": [{"role": "user", "content": ask + opening}]} for opening in openings]


def words(text: str) -> set[str]:
    return {word.strip(".,:;!?\"'()-") for word in text.lower().split()}


def word_odds() -> dict[str, float]:
    """Word -> the logarithm of how much likelier praise has it than scorn."""
    counts = Counter(), Counter()
    for row in read("train"):
        counts[row["label"]].update(words(row["sentence"]))
    return {word: math.log((counts[1][word] + 1) / (counts[0][word] + 1)) for word in counts[0] | counts[1]}


ODDS = word_odds()


def praise(completions: list[str], **columns: list) -> list[float]:
    """The reward, with TRL's signature: the probability that each completion is praise."""
    return [1 / (1 + math.exp(-sum(ODDS.get(word, 0.0) for word in words(text)))) for text in completions]


def main() -> None:
    try:
        model = fetch("smollm2")
    except FetchError as error:
        sys.exit(f"reward_chat.py: {error}")
    from vllm_zo import apply_cpu_defaults

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, which has the function `praise`
    apply_cpu_defaults()
    from vllm_zo import LLM, LoZO, Reward
    from vllm_zo.entrypoints.llm.cpu_defaults import has_native_bfloat16

    dtype = "auto" if has_native_bfloat16() else "float32"  # emulated bfloat16 is slower than float32
    llm = LLM(str(model), max_model_len=256, dtype=dtype, block_size=32, zo_training=True)
    run = llm.finetune(
        train=chats("train"),
        validation=chats("validation")[:32],
        objective=Reward("{prompt}", reward=praise, max_tokens=16, temperature=1.0, top_p=1.0),
        method=LoZO(u="written", interval=10, eps=3e-2),
        target_modules="lm_head",
        bases=4,
        batch_size=16,
        steps=STEPS,
        eval_interval=max(1, STEPS // 3),
        seed=0,
    )
    sampled = [record["reward"] for record in run.history]
    first, last = (sum(part) / len(part) for part in (sampled[:SHOWN], sampled[-SHOWN:]))
    print(f"praise, sampled: {first:.3f} in the first {SHOWN} steps, {last:.3f} in the last")
    print(f"praise, greedy:  {run.metrics['initial_reward']:.3f} -> {run.metrics['reward']:.3f} on validation")
    for chat in chats("validation")[32:35]:
        for name, adapter in (("before", None), ("after", run.lora_request)):
            (answer,) = llm.chat([chat["messages"]], greedy(), lora_request=adapter, use_tqdm=False)
            print(f"{name:>7}: {chat['messages'][0]['content']} ... {answer.outputs[0].text.strip()!r}")


def greedy():
    from vllm import SamplingParams

    return SamplingParams(max_tokens=16, temperature=0.0)


if __name__ == "__main__":
    main()
