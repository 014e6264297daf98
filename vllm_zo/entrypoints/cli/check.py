"""`vllm-zo check`: says what a run would train on, what a step takes, and what is wrong with the data. No engine
starts, but for `--measure`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vllm_zo.data.encode import Rows, check_bos_token_id, encode_rows, listed
from vllm_zo.data.load import Examples
from vllm_zo.entrypoints.cli.doctor import size
from vllm_zo.entrypoints.cli.slot_memory import slot_memory
from vllm_zo.entrypoints.cli.terminal_logging import quiet_vllm
from vllm_zo.entrypoints.cli.train import Plan, plan_run
from vllm_zo.entrypoints.cli.work import Work
from vllm_zo.entrypoints.llm.cpu_defaults import is_cpu_build
from vllm_zo.entrypoints.llm.options import check_local_model
from vllm_zo.errors import ConfigError
from vllm_zo.job_memory import EXAMPLE_BYTES, TOKEN_BYTES, state_bytes
from vllm_zo.methods.state import regenerates
from vllm_zo.methods.targets import EMBEDDINGS, LM_HEAD, select_shapes
from vllm_zo.objectives.base import EncodedExample, Objective, ScoringSequence
from vllm_zo.slot_fit import describe_space, resolve_bases

RECIPES = (".yaml", ".yml", ".toml")
BARS, BAR_WIDTH = 6, 30
"""Lines of a histogram, and the length of the longest bar."""
SHOWN_REFUSALS, SHOWN_LABELS = 5, 10
SCORED = ("\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}", "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}")
"""What stands around the tokens whose probability is the loss."""


@dataclass(frozen=True)
class Reader:
    """What the engine would read the data with.

    Attributes:
        renderer: vLLM's; it has the tokenizer, and renders chats.
        max_model_len: most tokens of a request.
        vocab_size: tokens for which the model has an embedding.
    """

    renderer: Any
    max_model_len: int
    vocab_size: int

    @property
    def tokenizer(self) -> Any:
        return self.renderer.get_tokenizer()


def check_run(params: Mapping[str, Any]) -> tuple[str, bool]:
    """The report on a run, and whether all of its data can be used.

    Args:
        params: flags by name. `recipe` may be a recipe or a file of training data.

    Raises:
        ConfigError: a setting cannot work, or the model is not there.
    """
    given = params["recipe"]
    if given is not None and given.suffix.lower() not in RECIPES:
        if params["train"] is not None:
            raise ConfigError(f"--train {params['train']}: {given} is training data already; give one of them.")
        params = {**params, "recipe": None, "train": str(given)}
    plan = plan_run(params)
    reader = reader_of(plan)
    from vllm_zo.entrypoints.llm.chats import chats_of, rendered  # imports vLLM, whose logging has just been set up

    check_bos_token_id(plan.config.objective, reader.vocab_size)
    found: list[tuple[Examples, Rows]] = []
    objective = plan.config.objective
    for source in (plan.train, *([] if plan.validation is None else [plan.validation])):
        records, objective = rendered(source, plan.config.objective, chats_of(reader, plan.chat), source.source)
        examples = Examples(records, source.source)
        found.append((examples, _rows(plan, reader, examples, objective)))
    lines = [line for examples, rows in found for line in (*describe_rows(examples, rows, objective), "")]
    (_, train), *others = found
    work: Work | None = None
    if train.examples and not _is_played(train.examples[0]):
        lines += [*describe_example(train.examples[0], reader.tokenizer), ""]
        work = Work.of(plan.config, train.examples, [e for _, rows in others for e in rows.examples])
        lines += [*work.described(), ""]
    if train.examples:
        lines += _memory(plan, train.examples)
    if params.get("measure") and train.examples:
        lines += ["", *_time(plan, work)]
    return "\n".join(lines).rstrip(), all(rows.examples and not rows.refused for _, rows in found)


def _time(plan: Plan, work: Work | None) -> Iterator[str]:
    if work is None:
        raise ConfigError("--measure: how long a rollout takes is up to its program; take a few --steps with train.")
    from vllm_zo.entrypoints.cli.measure import measure

    yield from measure(plan, work)


def reader_of(plan: Plan) -> Reader:
    """The tokenizer, the chat template and the limits that vLLM would use with the options of a run.

    Raises:
        ConfigError: vLLM does not take the model or an option.
    """
    check_local_model(plan.model, f"--model {plan.model}")
    quiet_vllm()
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config

    try:
        config = EngineArgs(model=plan.model, **plan.engine).create_model_config()
        renderer = renderer_from_config(VllmConfig(model_config=config))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"model={plan.model!r}: {' '.join(str(error).split())}") from error
    return Reader(renderer, config.max_model_len, config.get_vocab_size())


def _rows(plan: Plan, reader: Reader, examples: Examples, objective: Objective) -> Rows:
    return encode_rows(
        examples,
        objective,
        reader.tokenizer,
        reader.max_model_len,
        examples.source,
        reader.vocab_size,
        plan.config.on_long,
    )


# --- data -------------------------------------------------------------------------------------------------------------


def describe_rows(examples: Examples, rows: Rows, objective: Objective) -> Iterator[str]:
    """Counts, label balance, lengths, and what cannot be used."""
    yield f"{Path(examples.source).name}: {len(examples)} rows, {len(rows.examples)} of them usable"
    for numbers, what in ((rows.dropped, "too long and left out"), (rows.cut, "too long and cut from the left")):
        if numbers:
            yield f"  {len(numbers)} {what}: row {listed(numbers)}"
    if rows.refused:
        yield f"  {len(rows.refused)} that cannot be used:"
        yield from (f"    {message}" for message in rows.refused[:SHOWN_REFUSALS])
        if len(rows.refused) > SHOWN_REFUSALS:
            yield f"    ... and {len(rows.refused) - SHOWN_REFUSALS} more"
    if rows.examples and not _is_played(rows.examples[0]):
        yield from _labels(rows.examples, objective)
        yield from _lengths(rows.examples)


def _is_played(example: EncodedExample) -> bool:
    """Whether a program of the user plays the row: what the model reads and writes is then up to the program."""
    return example.sequences[0].kind == "rollout"


def _labels(examples: Sequence[EncodedExample], objective: Objective) -> Iterator[str]:
    """How often each class or choice is the right one. An objective with a single candidate has no labels."""
    if max(example.num_candidates for example in examples) < 2 or examples[0].sequences[0].kind == "generate":
        return
    counts = Counter(example.gold for example in examples)
    options = getattr(objective, "options", None)
    names = range(len(options)) if options else sorted(counts)
    shown = [
        f"{options[gold]!r} {_share(counts[gold], len(examples))}"
        if options
        else f"choice {gold} {_share(counts[gold], len(examples))}"
        for gold in names
    ]
    yield f"  labels: {', '.join(shown[:SHOWN_LABELS])}{', ...' if len(shown) > SHOWN_LABELS else ''}"
    if options and len(missing := [options[gold] for gold in names if not counts[gold]]):
        yield f"  no row has the label {', '.join(map(repr, missing[:SHOWN_LABELS]))}"


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})"


def _lengths(examples: Sequence[EncodedExample]) -> Iterator[str]:
    """Tokens of the longest sequence of each row, as a histogram."""
    lengths = [max(len(sequence.token_ids) for sequence in example.sequences) for example in examples]
    least, most = min(lengths), max(lengths)
    yield f"  tokens: {least} to {most}, median {median(lengths):g}"
    width = -(-(most - least + 1) // BARS)
    counts = Counter((length - least) // width for length in lengths)
    tallest, digits = max(counts.values()), len(str(most))
    for bar in range((most - least) // width + 1):
        start, end = least + bar * width, min(least + (bar + 1) * width - 1, most)
        drawn = "#" * -(-BAR_WIDTH * counts[bar] // tallest)
        yield f"  {start:>{digits + 2}} to {end:>{digits}}  {drawn:{BAR_WIDTH}} {counts[bar]}"


# --- an example -------------------------------------------------------------------------------------------------------


def describe_example(example: EncodedExample, tokenizer: Any) -> Iterator[str]:
    """The first row as the model reads it, with marks around what is scored."""
    yield f"the first row, as the model reads it; the loss comes from what stands in {''.join(SCORED)}:"
    for index, sequence in enumerate(example.sequences):
        right = sequence.kind == "logprobs" and len(example.sequences) > 1 and index == example.gold
        text = _marked(sequence, example.gold, tokenizer)
        yield from (f"  | {line}" for line in text.splitlines() or [""])
        if right:
            yield "    (the right one)"
        if sequence.kind == "generate":
            break  # every sample has the same prompt


def _marked(sequence: ScoringSequence, gold: int, tokenizer: Any) -> str:
    opened, closed = SCORED
    if sequence.generation is not None:
        text = tokenizer.decode(list(sequence.token_ids))
        return f"{text}{opened}up to {sequence.generation.max_tokens} tokens that the model writes{closed}"
    if sequence.kind == "labels":
        options = [tokenizer.decode([label]) for label in sequence.label_ids]
        right = f"; the right one is {options[gold]!r}"
        return f"{tokenizer.decode(list(sequence.token_ids))}{opened}{'|'.join(options)}{closed}{right}"
    # The tokens that are scored are those behind the first position. The last of them is not fed to the model.
    start = sequence.positions[0] + 1
    before = tokenizer.decode(list(sequence.token_ids[:start]))
    return f"{before}{opened}{tokenizer.decode(list(sequence.label_ids))}{closed}"


# --- work and memory --------------------------------------------------------------------------------------------------


def _memory(plan: Plan, train: Sequence[EncodedExample]) -> Iterator[str]:
    config, zo = plan.config, plan.zo
    reserved = slot_memory(plan.model, zo, str(plan.engine.get("dtype", "auto")))
    yield f"memory: the model's weights {size(reserved.weights)}, adapter slots of training {size(reserved.training)}"
    bases = resolve_bases(config.method, config.space, config.steps, zo.slot_rank, config.bases)
    rows = sum(TOKEN_BYTES * example.num_tokens + EXAMPLE_BYTES for example in train)
    yield f"  the job's rows {size(rows)}; the KV cache comes on top"
    if config.target_modules not in (EMBEDDINGS, LM_HEAD):  # `reserved` lists linear layers
        modules = select_shapes(config.target_modules, reserved.modules, config.target_layers)
        again = regenerates(config.method.coordinates, "cpu" if is_cpu_build() else "cuda")
        state = state_bytes(config.method, modules, bases, regenerates=again)
        yield f"  the job's state {size(state)} ({len(modules)} modules)"
    yield describe_space(config.method, config.space, config.steps, bases)
