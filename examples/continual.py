"""A classifier behind the API that goes on learning, and follows when the meaning of its labels changes.

Start the server with the demo model in one terminal:

    vllm-zo serve examples/demo/model --served-model-name demo --dtype float32 --max-model-len 256 --zo-slowdown 4

and run this in another:

    python examples/continual.py [--base-url http://localhost:8000/v1] [--api-key KEY] [--plot continual.png]

A client asks the live version about one review after another, and says afterwards what the answer should have been.
That is all that the job learns from. This client asks all the time, so the server lets training have more than it does
by default. Half-way the two labels change places, as if somebody had turned the question
round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import deque
from pathlib import Path

import httpx
from openai import OpenAI

REVIEWS = Path(__file__).parent / "demo" / "reviews" / "train.jsonl"
TEMPLATE, OPTIONS = "{sentence} It was", [" terrible", " great"]
WINDOW = 32
"""Accuracy is that of the last so many answers."""
FOLLOWED = 0.8
"""The job has followed once the accuracy is this again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="none", help="what the server was started with")
    parser.add_argument("--examples", type=int, default=560, help="how many reviews are asked about")
    parser.add_argument("--steps-per-example", type=int, default=2, help="what the job gets to do between two reviews")
    parser.add_argument("--plot", type=Path, help="draw the accuracy into this file")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    base = client.models.list().data[0].id
    reviews = [json.loads(line) for line in REVIEWS.read_text().splitlines()]

    first = client.files.create(file=("first.jsonl", jsonl(reviews[:64])), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=first.id,
        seed=0,
        method={
            "type": "zeroth_order",
            "zeroth_order": {
                "continual": True,
                "feedback": {"retention_days": 7},
                "objective": {"name": "classification", "template": TEMPLATE, "options": OPTIONS},
                "hyperparameters": {
                    "buffer_rows": 64,  # the newest 64: what is older is forgotten
                    "batch_size": 16,
                    "learning_rate": 3e-4,
                    "eps": 1e-3,
                    "bases": 1,
                    "publish_interval": 10,
                },
            },
        },
    )
    live = f"live:{job.id}"
    while live not in [model.id for model in client.models.list().data]:
        time.sleep(0.5)

    # /tokenize is no route of OpenAI's: it stands beside /v1.
    root = args.base_url.removesuffix("/v1")
    tokens = [
        httpx.post(
            f"{root}/tokenize",
            json={"model": base, "prompt": option, "add_special_tokens": False},
            headers={"Authorization": f"Bearer {args.api_key}"},
        ).json()["tokens"][0]
        for option in OPTIONS
    ]
    right: deque[bool] = deque(maxlen=WINDOW)
    curve: list[float] = []
    turn, followed = args.examples // 2, None
    stream = itertools.islice(itertools.cycle(reviews[64:]), args.examples)
    for number, review in enumerate(stream):
        label = review["label"] if number < turn else 1 - review["label"]
        answer = client.completions.create(
            model=live,
            prompt=TEMPLATE.format(**review),
            max_tokens=1,
            temperature=0,
            extra_body={"allowed_token_ids": tokens},  # the option that the job would predict
        )
        right.append(answer.choices[0].text == OPTIONS[label])
        curve.append(sum(right) / len(right))
        client.post("/fine_tuning/feedback", body={"completion_id": answer.id, "label": label}, cast_to=httpx.Response)
        if number % 20 == 19:
            print(f"{number + 1:4} reviews, accuracy of the last {len(right)}: {curve[-1]:.2f}", flush=True)
        if number == turn - 1:
            print("Now the labels change places.", flush=True)
        if followed is None and number >= turn + WINDOW and curve[-1] >= FOLLOWED:
            followed = number - turn + 1
        wait_for_step(client, job.id, (number + 1) * args.steps_per_example)
    client.fine_tuning.jobs.cancel(job.id)

    print(f"Before the change: {curve[turn - 1]:.2f}. At the end: {curve[-1]:.2f}.")
    print(f"It followed within {followed} examples." if followed else "It has not followed yet.")
    if args.plot:
        plot(curve, turn, args.plot)


def wait_for_step(client: OpenAI, job_id: str, step: int) -> None:
    """Wait for the job: here reviews come as fast as it learns. Elsewhere they come when they come."""
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status not in ("validating_files", "queued", "running"):
            raise SystemExit(f"the job is {job.status}: {client.fine_tuning.jobs.list_events(job_id).data[0].message}")
        if job.model_extra["step"] >= step:
            return
        time.sleep(0.02)


def jsonl(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def plot(curve: list[float], turn: int, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot(range(1, len(curve) + 1), curve)
    axes.axvline(turn, linestyle="--", color="gray")
    axes.annotate("the labels change places", (turn, 0.05), (turn + 6, 0.05))
    axes.set(xlabel="reviews answered", ylabel=f"accuracy, last {WINDOW} answers", ylim=(0, 1.02))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
