"""A stopped run goes on, and its seed log alone rebuilds the trained numbers, bit for bit.

    python examples/resume_and_replay.py

The log has one line per step, with learning rate and coefficients. Directions are functions of seeds, so a replay needs
nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import mkdtemp

HERE = Path(__file__).parent
MODEL = str(HERE / "demo" / "model")
TRAIN = HERE / "demo" / "reviews" / "train.jsonl"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40


def main() -> None:
    from vllm_zo import apply_cpu_defaults

    apply_cpu_defaults()
    from vllm_zo import LLM, Classification
    from vllm_zo.entrypoints.cli.saved import replay_job

    llm = LLM(MODEL, max_model_len=256, dtype="float32", zo_training=True)
    job = {
        "train": TRAIN,
        "objective": Classification("{sentence} It was", [" terrible", " great"]),
        "learning_rate": 3e-4,
        "batch_size": 8,
        "steps": STEPS,
        "progress": False,
    }
    directory = Path(mkdtemp(prefix="resume-and-replay-"))

    def stop_half_way(run, record) -> None:
        if record["step"] == STEPS // 2:
            run.cancel()  # Ctrl-C does the same; kill -9 loses at most the last half second

    try:
        llm.finetune(**job, output_dir=str(directory / "first"), callbacks=[stop_half_way])
    except Exception as error:
        print(error)
    resumed = llm.finetune(**job, resume_from=directory / "first", output_dir=str(directory / "second"))
    unbroken = llm.finetune(**job, output_dir=str(directory / "third"))
    same = resumed.history[-1]["coefficients"] == unbroken.history[-1]["coefficients"]
    print(f"the resumed run {'equals' if same else 'DIFFERS FROM'} the unbroken one at its last step")

    for line in replay_job(Path(resumed.directory)):  # the command: vllm-zo replay DIRECTORY
        print(line)


if __name__ == "__main__":
    main()
