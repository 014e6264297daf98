"""Fine-tune over HTTP with the OpenAI SDK, and use the model while it learns.

Start the server with the demo model in one terminal (see the README for other models):

    vllm-zo serve examples/demo/model --served-model-name demo --dtype float32 --max-model-len 256

and run this in another:

    python examples/openai_finetune.py [--base-url http://localhost:8000/v1] [--api-key KEY] [--steps 400]
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from openai import OpenAI

REVIEWS = Path(__file__).parent / "demo" / "reviews"
TEMPLATE, OPTIONS = "{sentence} It was", [" terrible", " great"]
REVIEW = "the soup was cold and the waiter never came back ."
ENDED = ("succeeded", "failed", "cancelled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="none", help="what the server was started with")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    base = client.models.list().data[0].id

    train, validation = (
        client.files.create(file=REVIEWS / name, purpose="fine-tune") for name in ("train.jsonl", "validation.jsonl")
    )
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=train.id,
        validation_file=validation.id,
        suffix="reviews",
        seed=0,
        method={
            "type": "zeroth_order",
            "zeroth_order": {
                "algorithm": "lozo",
                "hyperparameters": {"steps": args.steps, "learning_rate": 3e-4, "eps": 1e-3, "bases": 1, "n_evals": 4},
                "objective": {"name": "classification", "template": TEMPLATE, "options": OPTIONS},
            },
        },
    )
    print(f"{job.id}: {base} says {great(client, base):.0%} great of: {REVIEW}")

    seen: set[str] = set()
    while job.status not in ENDED:
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
            if event.id not in seen and ("validation" in event.message or event.type == "message"):
                print(" ", event.message)
                if event.message.startswith("Checkpoint created"):  # the server serves it while the job runs
                    print(f"    the job's newest state says {great(client, f'job:{job.id}'):.0%} great")
            seen.add(event.id)
    if job.fine_tuned_model is None:
        raise SystemExit(f"{job.status}: {job.error.message if job.error else ''}")

    print(f"{job.fine_tuned_model} says {great(client, job.fine_tuned_model):.0%} great")
    for checkpoint in reversed(client.fine_tuning.jobs.checkpoints.list(job.id).data):
        metrics = checkpoint.metrics
        accuracy = metrics.full_valid_mean_token_accuracy
        print(
            f"  step {checkpoint.step_number}: validation loss {metrics.full_valid_loss:.3f}, accuracy {accuracy:.3f}"
        )


def great(client: OpenAI, model: str) -> float:
    """The probability of " great" after the review, if the only other answer is " terrible"."""
    scores = []
    for option in OPTIONS:
        prompt = TEMPLATE.format(sentence=REVIEW) + option
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=1, echo=True, logprobs=1)
        scores.append(answer.choices[0].logprobs.token_logprobs[-2])  # the last one belongs to the sampled token
    return 1 / (1 + math.exp(scores[0] - scores[1]))


if __name__ == "__main__":
    main()
