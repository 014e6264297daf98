"""Accuracy and loss against steps on SST-2: LoZO inside vLLM, and the same LoZO in plain Hugging Face code.

    python benchmarks/convergence.py --steps 2000                        # bank and fold, ours and plain
    python benchmarks/convergence.py --space fold --steps 500 --plot fold.png
    python benchmarks/convergence.py --trainers ours,plain,plain-float64 # and what rounding alone does

The protocol is that of the MeZO and LoZO papers. A data seed draws 1,000 training and 500 validation sentences from
SST-2's training set; the final figure is for all 872 sentences of its validation set. Both trainers take the same
batches and the same directions in float32. Every curve is a file in --output. The program does not run a curve again if
its file has the same settings. So a second call goes on where the first one stopped, and each call may run one space or
trainer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import convergence_report, facts
from benchmarks.children import variables_of

ROOT = Path(__file__).parents[1]
TRAINERS = ("ours", "plain", "plain-float64")
SPACES = ("bank", "fold")
Evaluation = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that decide a pair of curves. The file of each curve holds them."""

    model: str
    data: str
    data_seed: int
    train_rows: int
    validation_rows: int
    test_rows: int | None
    """How many sentences of SST-2's own validation set to draw; None stands for all."""
    steps: int
    eval_interval: int
    learning_rate: float
    eps: float
    rank: int
    interval: int
    bases: int | None
    """Number of bases in `bank`; None stands for the package's default."""
    batch: int
    seed: int


@dataclass(frozen=True)
class Data:
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]

    @classmethod
    def of(cls, settings: Settings) -> Data:
        from vllm_zo.tasks import load_task

        task = load_task(
            "sst2", settings.data, settings.data_seed, settings.train_rows, settings.validation_rows, settings.test_rows
        )
        return cls(task.train, task.validation, task.test)


def train_ours(llm: Any, settings: Settings, space: str, data: Data) -> dict[str, Any]:
    """Train by a job inside a running engine. In `fold` space, restore the base weights afterwards."""
    from vllm_zo import LoZO
    from vllm_zo.tasks import PRESETS

    objective = PRESETS["sst2"].objective
    zero_shot = llm.evaluate(data.test, objective)
    start = time.perf_counter()
    run = llm.finetune(
        data.train,
        data.validation,
        objective=objective,
        method=LoZO(rank=settings.rank, interval=settings.interval, eps=settings.eps),
        learning_rate=settings.learning_rate,
        batch_size=settings.batch,
        steps=settings.steps,
        seed=settings.seed,
        update_space=space,
        bases=settings.bases if space == "bank" else None,
        eval_interval=settings.eval_interval,
        keep_best=False,  # `fold` can give back its last state only, so `bank` does the same
    )
    seconds = time.perf_counter() - start
    test = llm.evaluate(data.test, run=run)
    if space == "fold":
        llm.restore_base(run)
    return {
        "train": [[r["loss"], r["accuracy"]] for r in run.history],
        "evaluations": [
            {"step": e["step"], "loss": e["eval_loss"], "accuracy": e["eval_accuracy"]} for e in run.evaluations
        ],
        "zero_shot": zero_shot,
        "test": test,
        "seconds": seconds,
    }


def train_plain(settings: Settings, space: str, data: Data, dtype: str = "float32") -> dict[str, Any]:
    """Take the same run without vLLM."""
    import torch

    from benchmarks.plain_trainer import PlainTrainer
    from vllm_zo import LoZO
    from vllm_zo.config import ZOTrainingConfig
    from vllm_zo.data.batches import BatchOrder
    from vllm_zo.slot_fit import resolve_bases
    from vllm_zo.tasks import PRESETS

    sst2 = PRESETS["sst2"].objective
    method = LoZO(rank=settings.rank, interval=settings.interval, eps=settings.eps)
    bases = settings.bases if space == "bank" else None
    bases = resolve_bases(method, space, settings.steps, ZOTrainingConfig().slot_rank, bases)
    trainer = PlainTrainer(
        settings.model, sst2.template, sst2.options, method, settings.learning_rate, settings.seed,
        num_bases=bases if space == "bank" else None, dtype=getattr(torch, dtype),
    )  # fmt: skip
    order = BatchOrder(len(data.train), settings.batch, settings.seed)
    zero_shot = trainer.evaluate(data.test)
    start = time.perf_counter()
    train, evaluations = [], [{"step": 0, **trainer.evaluate(data.validation)}]
    for step in range(settings.steps):
        train.append(list(trainer.step(step, [data.train[i] for i in order.batch(step)])))
        if (step + 1) % settings.eval_interval == 0 or step + 1 == settings.steps:
            evaluations.append({"step": step + 1, **trainer.evaluate(data.validation)})
            print(f"plain {dtype} {space} {evaluations[-1]}", file=sys.stderr)
    seconds = time.perf_counter() - start
    test = trainer.evaluate(data.test)
    return {
        "train": train, "evaluations": evaluations, "zero_shot": zero_shot, "test": test, "seconds": seconds,
    }  # fmt: skip


def _child(trainer: str, space: str, settings: Settings, path: Path, cores: list[int]) -> None:
    """Make one curve. It runs in a process of its own, because vLLM needs its own environment and threads."""
    data = Data.of(settings)
    if trainer == "ours":
        from vllm_zo import LLM

        llm = LLM(settings.model, max_model_len=256, dtype="float32", zo_training=True)
        curve = train_ours(llm, settings, space, data)
    else:
        import torch

        torch.set_num_threads(len(cores))
        curve = train_plain(settings, space, data, "float64" if trainer.endswith("float64") else "float32")
    head = {"trainer": trainer, "space": space, "settings": asdict(settings), "machine": facts.machine(cores)}
    write_json(path, head | curve)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a file whole or not at all, so that every file is a finished curve."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document) + "\n")
    partial.replace(path)


def curves_of(args: argparse.Namespace, settings: Settings) -> dict[str, dict[str, Any]]:
    """space-trainer -> curve. It reads the curves that have a file, and runs the others."""
    args.output.mkdir(parents=True, exist_ok=True)
    for space in args.space:
        for trainer in args.trainers:
            path = args.output / f"{space}-{trainer}.json"
            if _load(path, settings) is None:
                print(f"running {trainer} in {space}", file=sys.stderr)
                _in_child(trainer, _child, trainer, space, settings, path, args.cores)
    names = [f"{space}-{trainer}" for space in SPACES for trainer in TRAINERS]
    found = {name: _load(args.output / f"{name}.json", settings) for name in names}
    return {name: curve for name, curve in found.items() if curve is not None}


def _load(path: Path, settings: Settings) -> dict[str, Any] | None:
    if not path.exists():
        return None
    curve: dict[str, Any] = json.loads(path.read_text())
    return curve if curve["settings"] == asdict(settings) else None


def _in_child(name: str, target: Callable[..., None], *arguments: Any) -> None:
    with variables_of(name, sorted(os.sched_getaffinity(0))):
        process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
        process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} failed; see above")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/demo/model", help="Hugging Face checkpoint")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/sst2", help="train/validation.jsonl")
    parser.add_argument("--data-seed", type=int, default=0, help="chooses the training and validation rows")
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--validation-rows", type=int, default=500)
    parser.add_argument("--test-rows", type=int, help="drawn from SST-2's validation set (default: all 872)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--eval-interval", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--interval", type=int, default=50, help="steps between refreshes of V")
    parser.add_argument("--bases", type=int, help="of bank (default: as many as the slot rank holds, 7)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of batches and directions")
    parser.add_argument("--space", default="bank,fold", help="update spaces to run")
    parser.add_argument("--trainers", default="ours,plain", help=f"of: {', '.join(TRAINERS)}")
    parser.add_argument("--cores", help='cores to use, e.g. "0,1" (default: the first two)')
    parser.add_argument("--output", type=Path, default=ROOT / "runs/convergence", help="where the curves are kept")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (default: in --output)")
    args = parser.parse_args(argv)
    args.space, args.trainers = args.space.split(","), args.trainers.split(",")
    for name, given, known in (("space", args.space, SPACES), ("trainers", args.trainers, TRAINERS)):
        if unknown := set(given) - set(known):
            parser.error(f"--{name} {unknown.pop()}: must be of {', '.join(known)}")
    args.cores = facts.chosen_cores(args.cores)
    for what, file in (("--data", args.data / "train.jsonl"), ("--model", args.model / "config.json")):
        if not file.exists():
            raise SystemExit(f"SKIPPED, nothing was run: there is no {file}; give {what} a directory that has it.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    os.sched_setaffinity(0, args.cores)
    names = Settings.__dataclass_fields__.keys() - {"model", "data"}
    settings = Settings(model=str(args.model), data=str(args.data), **{name: getattr(args, name) for name in names})
    curves = curves_of(args, settings)
    print(convergence_report.markdown(curves))
    convergence_report.plot(curves, args.plot or args.output / "convergence.png")


if __name__ == "__main__":
    main()
