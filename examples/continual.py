"""A classifier behind the API that goes on learning, and follows when the meaning of its labels changes.

Start the server with the demo model in one terminal:

    vllm-zo serve examples/demo/model --served-model-name demo --dtype float32 --max-model-len 256

and run this in another:

    python examples/continual.py [--base-url http://localhost:8000/v1] [--api-key KEY] [--plot continual.png]

A client asks the live version about one review after another, and says afterwards what the answer should have been.
That is all that the job learns from. Half-way the two labels change places, as if somebody had turned the question
round. With `--neighbour 6` another client asks the base model for some words, up to six times a second. How long it
waits is compared with the same reviews at the same times while the job is paused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

REVIEWS = Path(__file__).parent / "demo" / "reviews" / "train.jsonl"
TEMPLATE, OPTIONS = "{sentence} It was", [" terrible", " great"]
HYPERPARAMETERS = {
    "buffer_rows": 64,  # the newest 64: what is older is forgotten
    "batch_size": 32,
    # What a label word means is decided late, so the last layer is enough. That makes a step short, and it bears three
    # times the step size that "auto" finds.
    "target_layers": "-1:",
    "rank": 8,
    "bases": 1,
    "learning_rate_multiplier": 3.0,
    "publish_interval": 40,
}
WINDOW = 32
"""Accuracy is that of the last so many answers."""
FOLLOWED = 0.75
"""The job has followed once the accuracy is this again."""
POLL_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="none", help="what the server was started with")
    parser.add_argument("--examples", type=int, default=448, help="how many reviews are asked about")
    parser.add_argument("--steps-per-example", type=int, default=4, help="what the job gets to do between two reviews")
    parser.add_argument("--neighbour", type=float, default=0.0, help="requests a second of another client; 0: none")
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
                "hyperparameters": HYPERPARAMETERS,
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

    def answer(review: dict, label: int) -> bool:
        """Ask about a review, then say what the answer should have been; returns whether it was."""
        said = client.completions.create(
            model=live,
            prompt=TEMPLATE.format(**review),
            max_tokens=1,
            temperature=0,
            extra_body={"allowed_token_ids": tokens},  # the option that the job would predict
        )
        client.post("/fine_tuning/feedback", body={"completion_id": said.id, "label": label}, cast_to=httpx.Response)
        return said.choices[0].text == OPTIONS[label]

    right: deque[bool] = deque(maxlen=WINDOW)
    curve: list[float] = []
    turn, followed = args.examples // 2, None
    stream = list(itertools.islice(itertools.cycle(reviews[64:]), args.examples))
    times: list[float] = []
    begin = step_of(client, job.id)
    with neighbour(client, base, args.neighbour) as beside:
        start = time.monotonic()
        for number, review in enumerate(stream):
            times.append(time.monotonic() - start)
            right.append(answer(review, review["label"] if number < turn else 1 - review["label"]))
            curve.append(sum(right) / len(right))
            if number % 16 == 15:
                print(f"{number + 1:4} reviews, accuracy of the last {len(right)}: {curve[-1]:.2f}", flush=True)
            if number == turn - 1:
                print("Now the labels change places.", flush=True)
            if followed is None and number >= turn + WINDOW and curve[-1] >= FOLLOWED:
                followed = number - turn + 1
            while step_of(client, job.id) < begin + (number + 1) * args.steps_per_example:
                time.sleep(POLL_S)  # here reviews come as fast as it learns; elsewhere they come when they come
    seconds, steps = time.monotonic() - start, step_of(client, job.id) - begin
    print(f"{steps} steps, {steps / seconds:.1f} a second.")
    print(f"Before the change: {curve[turn - 1]:.2f}. At the end: {curve[-1]:.2f}.")
    print(f"It followed within {followed} examples." if followed else "It has not followed yet.")
    if args.neighbour:
        client.post(f"/fine_tuning/jobs/{job.id}/pause", cast_to=httpx.Response)
        with neighbour(client, base, args.neighbour) as without:
            start = time.monotonic()
            for at, review in zip(times, stream, strict=True):
                while time.monotonic() < start + at:
                    step_of(client, job.id)  # as before: this asks the server, too
                    time.sleep(POLL_S)
                answer(review, review["label"])
        compare(without, beside)
    client.fine_tuning.jobs.cancel(job.id)
    if args.plot:
        plot(curve, turn, followed, args.plot)


def step_of(client: OpenAI, job_id: str) -> int:
    job = client.fine_tuning.jobs.retrieve(job_id)
    if job.status not in ("validating_files", "queued", "running", "paused"):
        raise SystemExit(f"the job is {job.status}: {client.fine_tuning.jobs.list_events(job_id).data[0].message}")
    return job.model_extra["step"]


@contextmanager
def neighbour(client: OpenAI, model: str, rate: float) -> Iterator[list[tuple[float, float]]]:
    """In the block another client asks, at random times. The list gets (seconds to the first token, mean seconds
    between tokens) of each answer."""
    answers: list[tuple[float, float]] = []
    end = threading.Event()

    def ask() -> None:
        pauses = random.Random(0)
        while not end.wait(pauses.expovariate(rate)):
            begin, times = time.monotonic(), []
            options = {"max_tokens": 16, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
            for _ in client.completions.create(model=model, prompt="The film", **options):
                times.append(time.monotonic())
            answers.append((times[0] - begin, (times[-1] - times[0]) / (len(times) - 1)))

    thread = threading.Thread(target=ask)
    if rate:
        thread.start()
    try:
        yield answers
    finally:
        end.set()
        if rate:
            thread.join()


def compare(without: list[tuple[float, float]], beside: list[tuple[float, float]]) -> None:
    print(f"The other client, {len(without)} answers while the job is paused -> {len(beside)} beside it:")
    for index, name in enumerate(("to the first token", "between tokens")):
        pairs = [(percentiles(answers, index)) for answers in (without, beside)]
        shown = ", ".join(
            f"{p} {1e3 * before:.1f} -> {1e3 * after:.1f} ms ({after / before:.2f}x)"
            for p, before, after in zip(("p50", "p99"), *pairs, strict=True)
        )
        print(f"  {name}: {shown}")


def percentiles(answers: list[tuple[float, float]], index: int) -> tuple[float, float]:
    ordered = sorted(answer[index] for answer in answers)
    return statistics.median(ordered), ordered[int(0.99 * len(ordered))]


def jsonl(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def plot(curve: list[float], turn: int, followed: int | None, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot(range(1, len(curve) + 1), curve)
    axes.axvline(turn, linestyle="--", color="gray")
    axes.annotate("the labels change places", (turn - 6, 0.05), horizontalalignment="right")
    if followed is not None:
        axes.axvline(turn + followed, linestyle="--", color="gray")
        axes.annotate(f"{followed} examples later", (turn + followed + 6, 0.05))
    axes.set(xlabel="reviews answered", ylabel=f"accuracy, last {WINDOW} answers", ylim=(0, 1.02))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
