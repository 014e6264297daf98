"""`vllm-zo check`: what it says about data, work and memory, and that it starts no engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.cli import train_flags, use_engine, vllm_zo, write_jsonl
from tests.engines import Engines, reviews
from vllm_zo.config import JobConfig
from vllm_zo.data.encode import Rows, encode_rows
from vllm_zo.data.load import Examples
from vllm_zo.entrypoints.cli import check as check_module
from vllm_zo.entrypoints.cli import train as train_module
from vllm_zo.entrypoints.cli.check import describe_example, describe_rows
from vllm_zo.entrypoints.cli.work import Work
from vllm_zo.methods import LoZO
from vllm_zo.objectives import Classification, LanguageModeling, MultipleChoice, Objective, Preference, Reward

Capture = pytest.CaptureFixture[str]
REVIEWS = Classification("{sentence} It was", [" terrible", " great", " dull"])
ROW = {
    "sentence": "a film of great charm",
    "label": 1,
    "prompt": "a film",
    "completion": " of charm",
    "choices": ["x", "y z"],
}


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an engine nor the settings that a program of its own would make."""

    def start(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(train_module, "start_engine", start)
    monkeypatch.setattr(check_module, "quiet_vllm", lambda: None)


def rows_of(records: list[dict[str, Any]], objective: Objective, tokenizer: Any, **options: Any) -> Rows:
    return encode_rows(records, objective, tokenizer, options.pop("limit", 64), "t.jsonl", **options)


def test_the_report_counts_labels_lengths_and_what_cannot_be_used(tokenizer: Any) -> None:
    records = [*reviews(30, seed=1, longest=9), {"sentence": "a"}, {"sentence": "a", "label": 7}]
    rows = rows_of(records, REVIEWS, tokenizer)
    lines = list(describe_rows(Examples(records, "some/where/t.jsonl"), rows, REVIEWS))
    assert lines[0] == "t.jsonl: 32 rows, 30 of them usable"
    assert lines[1:3] == ["  2 that cannot be used:", f"    {rows.refused[0]}"]
    assert "row 31: no field 'label'" in lines[2]
    golds = [record["label"] for record in records[:30]]
    shares = [f"{name!r} {n} ({n / 30:.0%})" for name, n in ((" terrible", golds.count(0)), (" great", golds.count(1)))]
    assert lines[4:6] == [f"  labels: {', '.join(shares)}, ' dull' 0 (0%)", "  no row has the label ' dull'"]
    lengths = sorted(len(example.sequences[0].token_ids) for example in rows.examples)
    assert lines[6].startswith(f"  tokens: {lengths[0]} to {lengths[-1]}, median ")
    bars = [re.fullmatch(r" +(\d+) to +(\d+)  (#*) +(\d+)", line) for line in lines[7:]]
    assert all(bars)
    drawn = [(int(bar[1]), int(bar[2]), len(bar[3]), int(bar[4])) for bar in bars if bar]
    assert [count for *_, count in drawn] == [sum(a <= n <= b for n in lengths) for a, b, *_ in drawn]
    assert sum(count for *_, count in drawn) == 30 and drawn[-1][1] == lengths[-1]
    assert max(length for _, _, length, _ in drawn) == 30 and all(bool(n) == bool(c) for *_, n, c in drawn)


@pytest.mark.parametrize(("on_long", "said"), [("drop", "left out"), ("truncate-left", "cut from the left")])
def test_the_report_counts_rows_that_are_too_long(on_long: Any, said: str, tokenizer: Any) -> None:
    long = {"sentence": " ".join(["a film of great charm"] * 20), "label": 1}
    records = [ROW, *[long] * 7]
    rows = rows_of(records, REVIEWS, tokenizer, limit=30, on_long=on_long)
    lines = list(describe_rows(Examples(records, "t.jsonl"), rows, REVIEWS))
    assert lines[0] == f"t.jsonl: 8 rows, {1 if on_long == 'drop' else 8} of them usable"
    assert lines[1].startswith(f"  7 too long and {said}: ") and lines[1].endswith("row 2, 3, 4, 5, 6, ...")


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (REVIEWS, ["  | </s>a film of great charm It was« terrible| great| dull»; the right one is ' great'"]),
        (
            Classification("{sentence} It was", [" terrible", " great"], mode="full"),
            ["  | </s>a film of great charm It was« terrible»", "  | </s>a film of great charm It was« great»",
             "    (the right one)"],
        ),
        (LanguageModeling(), ["  | </s>a film« of charm</s>»"]),
        (LanguageModeling(append_eos=False), ["  | </s>a film« of charm»"]),
        (MultipleChoice("{prompt}"), ["  | </s>a film« x»", "  | </s>a film« y z»", "    (the right one)"]),
        (
            Reward("{prompt}\nof", reward="contains", max_tokens=5, samples=3),
            ["  | </s>a film", "  | of«up to 5 tokens that the model writes»"],
        ),
    ],
    ids=["labels", "full", "completion", "no end", "choice", "reward"],
)  # fmt: skip
def test_an_example_is_shown_as_the_model_reads_it(objective: Objective, expected: list[str], tokenizer: Any) -> None:
    (example,) = rows_of([ROW], objective, tokenizer).examples
    _, *shown = describe_example(example, tokenizer)
    assert [line.replace("<s>", "</s>") for line in shown] == expected


def test_forward_passes_and_tokens_are_counted(tokenizer: Any) -> None:
    objective = Classification("{sentence} It was", [" terrible", " great"], mode="full")
    examples = rows_of([ROW] * 20, objective, tokenizer).examples
    tokens = examples[0].num_tokens
    config = JobConfig(objective=objective, batch_size=4, micro_batches=2, steps=10, eval_interval=4, eval_examples=3)
    step, run, evaluations = Work.of(config, examples, examples[:5]).described()
    assert step == f"a step: 2 probes x 8 rows x 2 sequences a row = 32 forward passes, about {2 * 8 * tokens} tokens"
    assert run == f"the run: 10 steps, 4.0 times through the data, about {160 * tokens:,} tokens"
    assert evaluations == f"evaluations: 4 of 3 rows, 6 forward passes and about {3 * tokens} tokens each"
    written = Reward("{prompt}", reward="contains", max_tokens=5, samples=3)
    (example,) = rows_of([ROW], written, tokenizer).examples
    config = JobConfig(objective=written, batch_size=1, steps=1)
    counted = next(Work.of(config, [example], []).described())
    assert f"= 6 forward passes, about {2 * (example.num_tokens + 15)} tokens" in counted


def test_the_rows_that_the_base_scores_are_counted(tokenizer: Any) -> None:
    records = [{"prompt": "a film", "chosen": " of charm", "rejected": " so terrible"}] * 20
    examples = rows_of(records, Preference(), tokenizer).examples
    tokens = examples[0].num_tokens
    for steps, read in ((3, 12), (100, 20)):
        config = JobConfig(objective=Preference(), batch_size=4, steps=steps)
        lines = list(Work.of(config, examples, examples[:5]).described())
        assert lines[0].startswith("a step: 2 probes x 4 rows x 2 sequences a row = 16 forward passes")
        assert lines[2] == f"before: the base reads {read + 5} rows, about {(read + 5) * tokens} tokens"


def test_so_are_those_from_which_v_is_measured(tokenizer: Any) -> None:
    labels = Classification("{prompt} is", [" good", " bad"])
    examples = rows_of([{"prompt": "a film", "label": 1}] * 20, labels, tokenizer).examples
    config = JobConfig(objective=labels, method=LoZO(v="activations"), target_modules="lm_head", batch_size=4, steps=3)
    lines = list(Work.of(config, examples, examples[:5]).described())
    assert lines[2] == f"before: the base reads 12 rows, about {12 * examples[0].num_tokens} tokens"


def test_the_time_of_a_run_follows_from_two_measured_steps(
    engines: Engines, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, jobs = engines.get(), []

    class Watched:
        def finetune(self, *arguments: Any, **options: Any) -> Any:
            jobs.append(llm.finetune(*arguments, **options))
            for record, seconds in zip(jobs[-1].history, (5.0, 5.5, 6.5), strict=True):
                record["seconds"] = seconds
            return jobs[-1]

    use_engine(monkeypatch, Watched())
    monkeypatch.setattr(check_module, "quiet_vllm", lambda: None)
    _, *rest = train_flags(engines.model("opt"), tmp_path)
    command = ["check", *rest, "--steps", 1000, "--eval-interval", 100, "--max-model-len", 64]
    said = vllm_zo(capsys, *command, "--measure")
    assert said.status == 0, said.err
    time, run = said.out.splitlines()[-2:]
    assert time.startswith("time: 750 ms a step (2 steps measured), ")
    # 1000 steps of 2 probes x 4 rows; 11 evaluations of 6 rows: 750 s and, by their tokens, some 6 s
    assert run.startswith("  1000 steps and 11 evaluations take about 13 min on this machine")
    (job,) = jobs
    assert job.config.steps == 3 and not job.directory.exists() and not job.evaluations
    assert said.out.startswith(vllm_zo(capsys, *command).out.rstrip())
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {engines.model('opt')}\ntrain: {rest[3]}\nobjective: {{name: rollout, url: 'http://a/b'}}\n"
    )
    played = vllm_zo(capsys, "check", recipe, "--measure")
    assert played.status == 2 and "--measure: how long a rollout takes is up to its program" in played.error


@pytest.mark.usefixtures("no_engine")
def test_check_reports_on_files_recipes_and_the_flags_of_train(
    engines: Engines, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = train_flags(engines.model("opt"), tmp_path)
    train, rest = command[4], command[5:]
    good = vllm_zo(capsys, "check", train, "--model", engines.model("opt"), *rest, "--max-model-len", 64)
    assert (good.status, good.err) == (0, "")
    assert good.out.startswith("train.jsonl: 24 rows, 24 of them usable\n  labels: ' terrible' ")
    for part in (
        "\n\nvalidation.jsonl: 6 rows, 6 of them usable\n", "« terrible| great»; the right one is ' ",
        "a step: 2 probes x 4 rows x 1 sequence a row = 8 forward passes", "memory: the model's weights ",
        "the job's state ", "evaluations: 2 of 6 rows", "update_space=bank: 2 bases of rank 2",
    ):  # fmt: skip
        assert part in good.out
    assert vllm_zo(capsys, *command, "--max-model-len", 64, "--check").out == good.out
    layers = vllm_zo(capsys, *command, "--check", "--target-layers", "0", "--target-modules", "attention")
    assert "(4 modules)" in layers.out
    assert "modules)" not in vllm_zo(capsys, *command, "--check", "--target-modules", "lm_head").out
    assert vllm_zo(capsys, "check", train, *command[1:]).error.endswith("is training data already; give one of them.")

    write_jsonl(tmp_path / "train.jsonl", [*reviews(5), {"sentence": "a"}])
    bad = vllm_zo(capsys, *command, "--check")
    assert bad.status == 1 and "1 that cannot be used:\n    " in bad.out and "row 6: no field 'label'" in bad.out

    recipe = tmp_path / "r.yaml"
    fields = "prompt_field: sentence, completion_field: sentence"
    data = f"model: {engines.model('opt')}\ntrain: {tmp_path / 'train.jsonl'}\nbatch_size: 2\n"
    recipe.write_text(f"{data}objective: {{name: language-modeling, {fields}}}\n")
    learnt = vllm_zo(capsys, "check", recipe, "--on-long", "drop")
    assert learnt.out.startswith("train.jsonl: 6 rows, 6 of them usable\n  tokens: ")
    chat = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "of charm"}]
    write_jsonl(tmp_path / "train.jsonl", [{"messages": [*chat, *chat]}])
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}"
                        "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    one = ["--objective", "language-modeling", "--batch-size", 1, "--chat-template", template]
    chats = vllm_zo(capsys, "check", tmp_path / "train.jsonl", "--model", engines.model("opt"), *one)
    assert chats.out.startswith("train.jsonl: 2 rows, 2 of them usable\n"), chats.err
    assert "user: a film. assistant:« of charm. »" in chats.out
    recipe.write_text(
        f"{data.replace('batch_size: 2', 'batch_size: 1')}objective: {{name: rollout, url: 'http://localhost:1/play'}}\n"
    )
    played = vllm_zo(capsys, "check", recipe)
    assert played.out.startswith("train.jsonl: 1 rows, 1 of them usable\n\nmemory: "), played.err

    nowhere = vllm_zo(capsys, "check", recipe, "--model", "./nowhere")
    assert nowhere.status == 2 and "--model ./nowhere: no such directory" in nowhere.error
    assert not (Path.cwd() / "runs").exists()
