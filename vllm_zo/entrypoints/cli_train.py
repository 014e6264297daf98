"""The flags of `vllm-zo train`. What they do is in `train_command.py`.

A flag that is not given stays None: its default is in `JobConfig`, `ZOTrainingConfig` or the method, and is read from
there to be shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.methods import ESTIMATORS, OPTIMIZERS, LoZO, known_methods
from vllm_zo.methods.schedules import LR_SCHEDULES
from vllm_zo.methods.spaces import SPACES
from vllm_zo.methods.targets import PRESETS
from vllm_zo.objectives import OBJECTIVES, Reward
from vllm_zo.objectives.shaping import SHAPINGS
from vllm_zo.tasks import PRESETS as TASKS


def _default(owner: Any, name: str) -> Any:
    """Default of a dataclass field; None where there is none."""
    found = next((f.default for f in fields(owner) if f.name == name), None)
    return None if found is MISSING else found


def _option(panel: str, text: str, default: Any = None, flag: str | None = None, metavar: str | None = None) -> Any:
    names = [flag] if flag else []
    shown = "" if default is None else f" (default: {default})"
    return typer.Option(*names, help=text + shown, show_default=False, rich_help_panel=panel, metavar=metavar)


def _data(text: str, flag: str | None = None, metavar: str | None = None) -> Any:
    return _option("Data and objective", text, flag=flag, metavar=metavar)


def _generation(name: str, text: str) -> Any:
    return _option("Data and objective", f"reward: {text}", _default(Reward, name))


def _method(name: str, text: str) -> Any:
    known = known_methods()
    defaults = {method: _default(known[method], name) for method in known}
    return _option("Method", text, ", ".join(f"{method}: {value}" for method, value in defaults.items() if value))


def _parts(known: Mapping[str, type[Any]]) -> str:
    """ "sgd, adam:beta1=0.9,beta2=0.999": the names, with the settings that each has."""
    shown = []
    for name, part in known.items():
        settings = ",".join(f"{f.name}={f.default}" for f in fields(part) if f.name != "weight_decay")
        shown.append(f"{name}:{settings}" if settings else name)
    return " | ".join(shown)


def _job(panel: str, name: str, text: str, metavar: str | None = None) -> Any:
    return _option(panel, text, _default(JobConfig, name), metavar=metavar)


def _engine(text: str, name: str = "", flag: str | None = None, metavar: str | None = None) -> Any:
    return _option("Engine", text, _default(ZOTrainingConfig, name), flag, metavar)


OPTIMISATION, RESULTS = "Optimisation", "Evaluation and results"


def train(
    context: typer.Context,
    model: Annotated[str | None, _data("Model to train: a directory or a Hugging Face name.")] = None,
    train: Annotated[str | None, _data("Training data: .jsonl, .csv or hf:<data set>[:<config>]:<split>.")] = None,
    validation: Annotated[str | None, _data("Validation data, in the same forms.")] = None,
    task: Annotated[
        str | None,
        _data(f"Ready-made data, prompt and loss: {', '.join(TASKS)}; in place of the flags that follow."),
    ] = None,
    data: Annotated[
        Path | None,
        _data("--task: directory with train.jsonl and validation.jsonl. Unset: the Hugging Face hub.", metavar="DIR"),
    ] = None,
    data_seed: Annotated[
        int | None, _data("--task: chooses the training, validation and test rows (default: 0).")
    ] = None,
    objective: Annotated[str | None, _data(f"{' or '.join(OBJECTIVES)}; the first where there are --option.")] = None,
    template: Annotated[str | None, _data('Prompt with {field} placeholders: "{sentence} It was".')] = None,
    option: Annotated[
        list[str] | None, _data('Text of a class, with its leading space: --option " terrible" --option " great".')
    ] = None,
    label: Annotated[
        list[str] | None,
        _data("What the data calls each class, in the order of --option. Unset: index or text."),
    ] = None,
    label_field: Annotated[str | None, _data("Field that holds the class.")] = None,
    choices: Annotated[
        list[str] | None,
        _data("multiple-choice: field that holds the list of choices, or (repeated) the fields that hold one each."),
    ] = None,
    prompt_field: Annotated[str | None, _data("language-modeling: field with the prompt.")] = None,
    completion_field: Annotated[str | None, _data("language-modeling: field with the text to learn.")] = None,
    reward: Annotated[
        str | None,
        _data("reward: function that scores completions, reward(completions, **columns).", metavar="MODULE:FUNCTION"),
    ] = None,
    grader: Annotated[Path | None, _data("reward: JSON file with a grader instead.", metavar="FILE")] = None,
    max_tokens: Annotated[int | None, _generation("max_tokens", "longest completion.")] = None,
    stop: Annotated[list[str] | None, _data("reward: text that ends a completion; may be repeated.")] = None,
    temperature: Annotated[float | None, _generation("temperature", "of sampling; evaluations are greedy.")] = None,
    samples: Annotated[int | None, _generation("samples", "completions per prompt and probe.")] = None,
    shaping: Annotated[str | None, _generation("shaping", f"of rewards: {', '.join(SHAPINGS)}.")] = None,
    method: Annotated[str | None, _option("Method", f"{', '.join(known_methods())}.", LoZO.name)] = None,
    rank: Annotated[int | None, _method("rank", "Rank of a direction.")] = None,
    interval: Annotated[int | None, _method("interval", "Steps for which V is kept.")] = None,
    eps: Annotated[float | None, _method("eps", "Probe radius in weight units.")] = None,
    queries: Annotated[int | None, _method("queries", "Directions a step, averaged.")] = None,
    alpha: Annotated[float | None, _method("alpha", "LoRA's alpha, where an adapter is trained.")] = None,
    estimator: Annotated[
        str | None, _option("Method", f"How losses become a gradient estimate: {_parts(ESTIMATORS)}.", metavar="PART")
    ] = None,
    optimizer: Annotated[
        str | None, _option("Method", f"How that becomes a step: {_parts(OPTIMIZERS)}.", metavar="PART")
    ] = None,
    method_option: Annotated[
        list[str] | None, _option("Method", "Any other hyperparameter of the method.", metavar="K=V")
    ] = None,
    update_space: Annotated[str | None, _option("Method", f"{' or '.join(SPACES)}. Unset: the method's first.")] = None,
    bases: Annotated[
        int | None, _option("Method", "Bases kept in `bank`. Unset: one an interval, as far as the slot rank goes.")
    ] = None,
    target_modules: Annotated[
        str | None, _job("Method", "target_modules", f"{', '.join(PRESETS)}, or a regular expression for whole names.")
    ] = None,
    learning_rate: Annotated[
        str | None,
        _job(OPTIMISATION, "learning_rate", "Step size; auto: measured in the first steps.", metavar="FLOAT|auto"),
    ] = None,
    learning_rate_multiplier: Annotated[
        float | None, _job(OPTIMISATION, "learning_rate_multiplier", "Factor of the learning rate.")
    ] = None,
    lr_schedule: Annotated[str | None, _job(OPTIMISATION, "lr_schedule", f"{', '.join(LR_SCHEDULES)}.")] = None,
    warmup_steps: Annotated[int | None, _job(OPTIMISATION, "warmup_steps", "Steps of linear warm-up.")] = None,
    batch_size: Annotated[int | None, _job(OPTIMISATION, "batch_size", "Examples a step.")] = None,
    micro_batches: Annotated[
        int | None, _job(OPTIMISATION, "micro_batches", "Mini-batches a step adds up before it moves.")
    ] = None,
    eps_schedule: Annotated[
        str | None, _job(OPTIMISATION, "eps_schedule", f"{', '.join(LR_SCHEDULES)}; of the probe radius.")
    ] = None,
    max_coefficient: Annotated[
        float | None, _job(OPTIMISATION, "max_coefficient", "Cut coefficients of directions to this. Unset: no limit.")
    ] = None,
    steps: Annotated[int | None, _job(OPTIMISATION, "steps", "Optimiser steps; 0 evaluates only.")] = None,
    seed: Annotated[int | None, _job(OPTIMISATION, "seed", "Decides batch order and every direction.")] = None,
    eval_interval: Annotated[
        int | None, _job(RESULTS, "eval_interval", "Steps between evaluations. Unset: at the start and the end.")
    ] = None,
    eval_examples: Annotated[
        int | None, _job(RESULTS, "eval_examples", "Validation examples an evaluation scores. Unset: all.")
    ] = None,
    checkpoint_interval: Annotated[
        int | None, _job(RESULTS, "checkpoint_interval", "Steps between snapshots (the seed log has every step).")
    ] = None,
    publish_interval: Annotated[
        int | None, _job(RESULTS, "publish_interval", "Steps between versions that can be served. Unset: evaluations.")
    ] = None,
    divergence_factor: Annotated[
        float | None, _job(RESULTS, "divergence_factor", "Stop when the loss has grown by about this factor.")
    ] = None,
    keep_best: Annotated[
        bool | None,
        _option(RESULTS, "Give back the best evaluation (default), or the last step.", flag="--keep-best/--keep-last"),
    ] = None,
    output: Annotated[
        Path | None, _option(RESULTS, "Directory of the job and its results. Unset: runs/<time>.", metavar="DIR")
    ] = None,
    resume_from: Annotated[
        Path | None,
        _option(RESULTS, "Continue the run in DIR; flags that are not given are as they were then.", metavar="DIR"),
    ] = None,
    wandb: Annotated[bool, _option(RESULTS, "Send metrics to Weights & Biases.", flag="--wandb")] = False,
    quiet: Annotated[bool, _option(RESULTS, "Warnings and the result only.", flag="--quiet")] = False,
    dtype: Annotated[str | None, _engine("Type of the weights: auto, float32, bfloat16, float16.")] = None,
    max_model_len: Annotated[int | None, _engine("Longest sequence. Unset: the model's.")] = None,
    slots: Annotated[int | None, _engine("ZO adapter slots; with 2 a query all run at once.", "slots")] = None,
    slot_rank: Annotated[int | None, _engine("Rank of a slot: (bases + 1) * rank must fit.", "slot_rank")] = None,
    engine_option: Annotated[
        list[str] | None,
        _engine("Any option of vLLM's LLM: --engine-option tensor_parallel_size=2.", metavar="K=V"),
    ] = None,
) -> None:
    """Fine-tune a model inside vLLM: metrics as it goes, then an adapter (or merged model) and a picture of the run."""
    from vllm_zo.entrypoints.train_command import run_training

    run_training(context.params)
