"""A reward without a gradient: jobs of ours against GRPO with LoRA, at equal CPU seconds and equal written tokens.

    python benchmarks/rewards_vs_grpo.py --model "$(python examples/models.py smollm2)" --dtype bfloat16
    python benchmarks/rewards_vs_grpo.py --model DIR --contenders "job, last layer; grpo" --factors 1 --seeds 1,2
    python benchmarks/rewards_vs_grpo.py --report                                    # the tables of what is there

A game (games.py) is an instruction to a chat model and a reward from 0 to 1. A step has COMPLETIONS completions for
every contender. Seconds are those of the process on one thread, in steps only; where the base writes before the first
step ("job, LM head"), that and the first evaluation are in them too. Tokens are those of the completions of training,
and the end of each. All start from the same model, see the same rows, sample at temperature 1, and give back the state
of their best greedy evaluation. What a step earned is the mean reward of its completions, sampled: the table has the
mean of each fifth of the steps. In "job, LM head, scored" the state writes, and 256 steps score what it wrote.

GRPO is TRL's GRPOTrainer (`pip install trl`) with its defaults, but for a constant rate, float32 (faster than bfloat16
in PyTorch on a CPU) and no checkpointing: transformers writes with a key-value cache, and AdamW trains LoRA of rank 8
on q and v. Each contender tries the same number of step sizes, --factors times its own of STEP_SIZES. Every run is a
line of --output, so a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts
from benchmarks.experiment import (
    EVALUATIONS,
    add_common,
    add_contenders,
    copies,
    in_child,
    longest,
    missing,
    put,
    results,
    train,
)
from benchmarks.games import GAMES, Grade
from benchmarks.long_run import Clock
from benchmarks.memory import MIB, peak_rss, reset_peak
from vllm_zo.methods.step_size import AUTO

COMPLETIONS, GROUP, PILOT_STEPS = 32, 8, 4
"""Completions of a step, and GRPO's for one prompt."""
GRPO = "grpo"
STEPS_PER_GENERATION = 256
SCORED = {"samples": GROUP, "steps_per_generation": STEPS_PER_GENERATION}
"""Options of `Reward` where the state writes, GROUP completions for a prompt as GRPO, and steps score them."""
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "job, all layers": ({"eps": 3e-3}, {}, {}),
    "job, last layer": ({"eps": 1e-2}, {"target_layers": "last"}, {}),
    "job, LM head": ({"eps": 3e-2, "u": "written", "interval": 10}, {"target_modules": "lm_head", "bases": 4}, {}),
    "job, LM head, all words alike": (
        {"eps": 3e-3, "interval": 10}, {"target_modules": "lm_head", "bases": 4}, {}
    ),
    "job, LM head, scored": (
        {"u": "written", "v": "activations", "interval": 1}, {"target_modules": "lm_head", "bases": 4}, SCORED
    ),
}  # fmt: skip
"""Options of LoZO, with the radius of a probe, further ones of `finetune`, and of `Reward`. In layers, with three times
the radius, probes hit hardly anything."""
STEP_SIZES: dict[str, Any] = {
    "job, all layers": 1e-4, "job, last layer": 1e-3, "job, LM head": 2.5e-3, "job, LM head, all words alike": 5e-5,
    "job, LM head, scored": AUTO, GRPO: 5e-4,
}  # fmt: skip
"""The learning rates of factor 1. Those of jobs of layers make a step of about a third of the radius, those of jobs of
the LM head of a sixth."""
CONTENDERS = (*JOBS, GRPO)
KEY = ("model", "task", "contender", "factor", "cpu_seconds", "seed")
Run = tuple[str, str, float, float, int]
"""The parts of KEY after the model."""
SLOTS = {"slots": 2, "slot_rank": 16}
BLOCK = 32
"""Tokens of a KV block, the fewest that vLLM has on a CPU: probes of the LM head share the whole blocks of a prompt."""


# --- what is measured -------------------------------------------------------------------------------------------------


class Meter:
    """Scores completions, and counts the tokens of those that are written in training."""

    def __init__(self, tokenizer: Any, grade: Grade) -> None:
        self._tokenizer, self.grade = tokenizer, grade
        self.tokens = 0
        self.at: list[int] = []
        """The tokens before each evaluation of a job."""
        self.earned: list[float] = []
        """The mean reward of each step's completions."""

    def reward(self, completions: Sequence[str], answer: Sequence[str], part: Sequence[str], **_: Any) -> list[float]:
        rewards = self.grade(completions, answer)
        if part[0] == "train":  # a group has rows of one part
            ids = self._tokenizer(list(completions), add_special_tokens=False)["input_ids"]
            self.tokens += sum(len(of_one) + 1 for of_one in ids)
            self.earned.append(mean(rewards))
        return rewards

    def start_again(self) -> None:
        """Forget what a pilot has written."""
        self.tokens = 0
        self.earned.clear()

    @property
    def fifths(self) -> list[float]:
        """The mean reward of the steps' completions, in each fifth of the steps."""
        count = len(self.earned)
        parts = [self.earned[count * i // 5 : count * (i + 1) // 5] for i in range(5)]
        return [mean(part) for part in parts if part]

    def __call__(self, run: Any, record: dict[str, Any]) -> None:
        """A callback of `finetune`."""
        if "eval_loss" in record:
            self.at.append(self.tokens)


def load(args: argparse.Namespace, name: str, tokenizer: Any) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The rows of each part, and the template of a prompt: the instruction as the model's chat has it."""
    parts: dict[str, list[dict[str, Any]]] = {}
    left = iter(GAMES[name].rows(args.data))
    for part, count in zip(("train", "validation", "test"), args.rows, strict=True):
        parts[part] = [{**row, "part": part} for row in islice(left, count)]
    return parts, chat(tokenizer, GAMES[name].instruction)


def chat(tokenizer: Any, instruction: str) -> str:
    """A chat of one message without a system prompt, which costs tokens; the plain instruction for a base model."""
    if not tokenizer.chat_template:
        return f"{instruction}\n"
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": instruction}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


# --- our jobs ---------------------------------------------------------------------------------------------------------


def job_child(args: argparse.Namespace, runs: list[Run]) -> None:
    from vllm_zo import LLM, Reward
    from vllm_zo.tasks import Task

    llm: Any = LLM(
        args.model, dtype=args.dtype, max_model_len=min(512, longest(args.model)), zo_training=SLOTS, block_size=BLOCK
    )
    for run in runs:
        name, contender, factor, _, seed = run
        game = GAMES[name]
        meter = Meter(llm.get_tokenizer(), game.grader(args.data))
        parts, template = load(args, name, llm.get_tokenizer())
        method, options, of_reward = JOBS[contender]
        objective = Reward(
            template, reward=meter.reward, max_tokens=game.max_tokens, temperature=1.0, top_p=1.0,
            special_tokens=False, **of_reward,
        )  # fmt: skip
        task = Task(name, objective, parts["train"], parts["validation"], parts["test"], objective)
        options = {
            "method": {"name": "lozo", **method}, "batch_size": COMPLETIONS // (GROUP if of_reward else 2), "bases": 1,
            "divergence_factor": None, **options,
        }  # fmt: skip
        each = of_reward.get("steps_per_generation", 1)
        steps = max(1, int(args.cpu_seconds / seconds_a_step(llm, task, options, each)))
        meter.start_again()
        llm.reset_prefix_cache()  # of the prompts that the pilot has read
        rate = STEP_SIZES[contender]
        options |= {"learning_rate": rate, "learning_rate_multiplier": factor}
        result = train(llm, task, options, steps, seed, cpu_seconds=args.cpu_seconds, callbacks=[meter])
        if "curve" in result:
            for point, tokens in zip(result["curve"], meter.at, strict=True):
                point["written"] = tokens
        write(args, run, {"rate": rate, **result, "written": meter.tokens, "earned": meter.fifths})


def seconds_a_step(llm: Any, task: Any, options: dict[str, Any], each: int) -> float:
    """CPU seconds, by a short job that changes nothing. each: steps for which the state writes at once."""
    clock = Clock(time.process_time)
    llm.finetune(
        task.train, objective=task.objective, steps=PILOT_STEPS * each, learning_rate=0.0, callbacks=[clock],
        progress=False, **options,
    )  # fmt: skip
    return mean(clock.steps[each:])


# --- GRPO -------------------------------------------------------------------------------------------------------------


def grpo_child(args: argparse.Namespace, runs: list[Run]) -> None:
    for run in runs:
        name, _, factor, _, seed = run
        write(args, run, train_grpo(args, name, factor * STEP_SIZES[GRPO], seed))


def train_grpo(args: argparse.Namespace, name: str, rate: float, seed: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    game = GAMES[name]
    meter = Meter(tokenizer, game.grader(args.data))
    parts, template = load(args, name, tokenizer)
    rows = {part: [{**row, "prompt": template.format(**row)} for row in found] for part, found in parts.items()}
    curve: list[dict[str, float]] = []
    kept: list[Any] = []
    spent = began = 0.0

    def trained(model: Any) -> list[Any]:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def evaluate(model: Any, step: int) -> None:
        score = greedy(model, tokenizer, rows["validation"], meter.grade, game.max_tokens)
        if not curve or score > max(point["accuracy"] for point in curve):
            kept[:] = copies(trained(model))
        curve.append({"step": step, "spent": spent, "written": meter.tokens, "accuracy": score, "loss": -score})

    class Watch(TrainerCallback):
        """Counts the seconds of steps, evaluates EVALUATIONS times, and ends the run."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            evaluate(model, 0)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            began = time.process_time()

        def on_step_end(self, _: Any, state: Any, control: Any, model: Any, **__: Any) -> None:
            nonlocal spent
            spent += time.process_time() - began
            if spent >= args.cpu_seconds * len(curve) / EVALUATIONS:
                evaluate(model, state.global_step)
                control.should_training_stop = len(curve) > EVALUATIONS

    trainer = GRPOTrainer(
        args.model, meter.reward, GRPOConfig(
            output_dir=str(args.output.parent / "grpo"), learning_rate=rate, lr_scheduler_type="constant", seed=seed,
            per_device_train_batch_size=COMPLETIONS, num_generations=GROUP, max_completion_length=game.max_tokens,
            max_steps=10**6, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            model_init_kwargs={"dtype": args.grpo_dtype},
        ),
        train_dataset=Dataset.from_list(rows["train"]), processing_class=tokenizer, callbacks=[Watch()],
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    reset_peak()
    trainer.train()
    peak = peak_rss()
    put(trained(trainer.model), kept)
    best = max(point["accuracy"] for point in curve)
    test = greedy(trainer.model, tokenizer, rows["test"], meter.grade, game.max_tokens)
    return {
        "steps": trainer.state.global_step, "spent": spent, "written": meter.tokens, "rate": rate,
        "dtype": args.grpo_dtype, "peak_mib": peak / MIB,
        "validation": {"accuracy": best}, "test": {"accuracy": test}, "earned": meter.fifths, "curve": curve,
    }  # fmt: skip


def greedy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], grade: Grade, max_tokens: int) -> float:
    """The mean reward of what the model writes when it does not sample."""
    import torch

    was_training = model.training
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row["prompt"]))  # a batch of equal lengths has no padding
    rewards: list[float] = []
    for start in range(0, len(ordered), COMPLETIONS):
        batch = ordered[start : start + COMPLETIONS]
        prompts = tokenizer(
            [row["prompt"] for row in batch], return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.no_grad():
            ids = model.generate(
                **prompts, max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards += grade(texts, [row["answer"] for row in batch])
    model.train(was_training)
    return sum(rewards) / len(rewards)


# --- results ----------------------------------------------------------------------------------------------------------


def write(args: argparse.Namespace, run: Run, result: dict[str, Any]) -> None:
    line = {**dict(zip(KEY, (Path(args.model).name, *run), strict=True)), "dtype": args.dtype, **result}
    with args.output.open("a") as file:
        file.write(json.dumps({**line, "rows": args.rows, "cpu": facts.machine([])["cpu"]}) + "\n")
    print({field: value for field, value in line.items() if field != "curve"}, flush=True)


def at_tokens(curve: Sequence[dict[str, float]], most: float) -> float:
    """The best greedy reward of the evaluations before which at most so many tokens were written."""
    return max(point["accuracy"] for point in curve if point["written"] <= most)


def report(lines: Iterable[dict[str, Any]]) -> str:
    """A table for each model, game and number of seconds.

    The column of equal tokens is for as many as the contender that wrote least has written.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["model"], line["task"], line["cpu_seconds"]), []).append(line)
    parts = []
    for (model, task, seconds), runs in groups.items():
        least = min(run["written"] for run in runs if "curve" in run)
        columns = [
            "", "rate", "seed", "steps", "CPU seconds", "tokens written", "at the start",
            f"after {least} tokens", "best", "test", "sampled, by fifths", "peak MiB",
        ]  # fmt: skip
        rows = [row(run, least) for run in sorted(runs, key=lambda run: (run["contender"], run["factor"], run["seed"]))]
        heading = f"{task}, {model}, {seconds:g} CPU seconds, {runs[0]['cpu']}; greedy reward of {runs[0]['rows']} rows"
        parts.append("\n".join([heading, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]))
    return "\n\n".join(parts)


def row(run: dict[str, Any], least: int) -> str:
    rate = run["rate"] if run["rate"] == AUTO else f"{run['rate']:g}"  # of a run that diverged before it was known
    cells = [run["contender"], rate, run["seed"], run["steps"], f"{run['spent']:.0f}", run["written"]]
    if "curve" in run:
        scores = run["curve"][0]["accuracy"], at_tokens(run["curve"], least), run["validation"]["accuracy"]
        cells += [f"{score:.3f}" for score in (*scores, run["test"]["accuracy"])]
        cells += [", ".join(f"{reward:.2f}" for reward in run.get("earned", [])), f"{run['peak_mib']:.0f}"]
    else:
        cells += ["", "", "diverged", "", "", ""]
    return f"| {' | '.join(map(str, cells))} |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, ",".join(GAMES), "rewards_vs_grpo.jsonl")
    parser.set_defaults(rows=(200, 50, 100))
    add_contenders(parser, CONTENDERS)
    parser.add_argument("--factors", default=[0.3, 1.0, 3.0], type=lambda s: [float(f) for f in s.split(",")])
    parser.add_argument("--cpu-seconds", type=float, default=200.0, help="for the steps of a contender")
    parser.add_argument("--grpo-dtype", default="float32")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.tasks if name not in GAMES]:
        parser.error(f"{unknown[0]!r}: choose from {'; '.join(GAMES)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.report:
        cells = product(args.tasks, args.contenders, args.factors, [args.cpu_seconds], args.seeds)
        runs = missing(args, KEY, list(cells))
        with_trl = [run for run in runs if run[1] == GRPO]
        if with_trl and find_spec("trl") is None:
            print("skipped: grpo needs TRL; pip install trl", file=sys.stderr)
            with_trl = []
        in_child("ours", job_child, args, [run for run in runs if run[1] in JOBS])
        in_child(GRPO, grpo_child, args, with_trl)
    print(report(results(args.output)))


if __name__ == "__main__":
    main()
