"""Recipes: what a file says, what flags change, what a job keeps, and how a mistake is named."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.cli import train_flags, use_engine, vllm_zo
from tests.engines import Engines
from tests.trajectories import steps_of
from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.entrypoints.cli import train as train_module
from vllm_zo.entrypoints.cli.flags import train_command
from vllm_zo.entrypoints.cli.recipes.document import read_document, to_yaml
from vllm_zo.entrypoints.cli.recipes.packaged import packaged
from vllm_zo.entrypoints.cli.recipes.recipe import JOB, RUN, Recipe, read_recipe, resolved_recipe
from vllm_zo.entrypoints.cli.recipes.schema import recipe_schema
from vllm_zo.entrypoints.cli.train import job_config
from vllm_zo.errors import ConfigError
from vllm_zo.methods import METHODS
from vllm_zo.objectives import Classification, LanguageModeling, MultipleChoice, Objective, Reward
from vllm_zo.options import options_of

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "vllm_zo" / "entrypoints" / "cli" / "recipes"
Capture = pytest.CaptureFixture[str]
Write = Callable[..., Path]
GRADER = {"type": "regex", "name": "an a", "input": "{{sample.output_text}}", "pattern": "a"}
OBJECTIVES: list[Objective] = [
    Classification("{sentence}\nIt ${was}", [" no", " 1e-3", " null"], labels=["010", "yes", "0x1"]),
    LanguageModeling(template="{a}: ", suffix="\n"),
    MultipleChoice("{a}", ["x", "y"]),
    Reward("{a}", grader=GRADER, stop=["\n", "~"]),
]
WHOLE = """\
model: m
train: t.jsonl
objective: {name: classification, template: "{sentence} It was", options: [" a", " b"]}
method: {name: lozo, rank: 4}
steps: 7
learning_rate: 1e-2
output: out
engine: {slot_rank: 32, dtype: float32}
"""


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str, name: str = "recipe.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_file


def flags(**given: Any) -> dict[str, Any]:
    """The flags of a command: those that are not given are None."""
    known = {flag.name: flag.default for flag in inspect.signature(train_command(print)).parameters.values()}
    assert known.keys() >= given.keys()
    return known | given


# --- what a recipe may hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_of_a_job_gives_the_job_again(objective: Objective, method: str, write: Write) -> None:
    config = JobConfig(objective=objective, method=METHODS.build(method), divergence_factor=None, seed=2**63 - 1)
    zo, vllm = ZOTrainingConfig(slot_rank=64), {"dtype": "float32", "hf_overrides": {"a": ["${x}", None]}}
    path = write(resolved_recipe({"model": "m", "train": "t"}, config, zo, vllm, Path("a b/recipe.yaml")))
    recipe = read_recipe(path)
    assert job_config(flags(output="o"), {}, recipe=recipe).to_json() == config.to_json() | {"output_dir": "o"}
    assert (ZOTrainingConfig(**recipe.zo), recipe.vllm, recipe.run) == (zo, vllm, {"model": "m", "train": "t"})
    assert path.read_text().splitlines()[0].endswith("To repeat this run: vllm-zo train 'a b/recipe.yaml'")


def test_every_option_of_run_job_and_engine_is_a_key_and_is_in_the_schema(write: Write) -> None:
    properties = recipe_schema()["properties"]
    assert properties.keys() == {*RUN, *options_of(JobConfig), "objective", "method", "engine"} - {"output_dir"}
    assert {f.name for f in fields(JobConfig)} - {"output_dir"} <= properties.keys()
    assert properties["engine"]["properties"].keys() == options_of(ZOTrainingConfig).keys()
    defaults = {name: JOB[name].default for name in JOB}
    assert read_recipe(write(to_yaml(defaults))).config == defaults


def test_toml_says_the_same_as_yaml(write: Write) -> None:
    toml = """
        model = "m"
        train = "t.jsonl"
        steps = 7
        learning_rate = 1e-2
        output = "out"
        [objective]
        name = "classification"
        template = "{sentence} It was"
        options = [" a", " b"]
        [method]
        name = "lozo"
        rank = 4
        [engine]
        slot_rank = 32
        dtype = "float32"
    """
    one, other = read_recipe(write(WHOLE)), read_recipe(write(toml, "recipe.toml"))
    assert (one.run, one.config, one.engine) == (other.run, other.config, other.engine)
    assert one.config["learning_rate"] == 0.01 and one.vllm == {"dtype": "float32"}


def test_plain_words_are_texts_and_numbers_are_numbers(write: Write) -> None:
    read = read_document(write("a: [no, yes, on, 010, 12:30, 2026-01-02, 1_0]\nb: [1e-3, 10, true, null, .5, 1.0e-05]"))
    assert read.values["a"] == ["no", "yes", "on", "010", "12:30", "2026-01-02", "1_0"]
    assert read.values["b"] == [0.001, 10, True, None, 0.5, 1e-05]


# --- variables --------------------------------------------------------------------------------------------------------


def test_variables_of_the_environment_are_filled_in(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "12")
    monkeypatch.setenv("HERE", "/data")
    text = 'steps: ${STEPS}\ntrain: "${HERE}/${FILE:-train.jsonl}"\nmodel: $${HERE}\nvalidation: ${STEPS}s'
    assert read_document(write(text)).values == {
        "steps": 12,
        "train": "/data/train.jsonl",
        "model": "${HERE}",
        "validation": "12s",
    }
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 2: \$\{NOT_SET\}: the environment has no variable 'NOT"):
        read_document(write("steps: 1\nmodel: ${NOT_SET}"))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nbatchsize: 2", "line 2: unknown key 'batchsize': did you mean 'batch_size'?"),
        ("steps: 1\n\nlearning-rate: 2", "line 3: unknown key 'learning-rate': did you mean 'learning_rate'?"),
        ("rank: 2", "line 1: 'rank' is not a key of the recipe itself: write it under method."),
        ("template: a", "line 1: 'template' is not a key of the recipe itself: write it under objective."),
        ("slot_rank: 2", "line 1: 'slot_rank' is not a key of the recipe itself: write it under engine."),
        ("output_dir: a", "line 1: unknown key 'output_dir': in a recipe it is 'output'."),
        ("method:\n  name: lozo\n  ranc: 2", "line 3: unknown setting of method lozo 'ranc': did you mean 'rank'?"),
        ("method:\n  name: lozoo", "line 2: unknown method 'lozoo': did you mean 'lozo'?"),
        ("method: lozoo", "line 1: unknown method 'lozoo': did you mean 'lozo'?"),
        ("method: {rank: 2}", "line 1: method={'rank': 2}: expected a mapping with a name, one of lozo"),
        ("method:\n  name: lozo\n  eps: -1", "line 3: method.eps=-1: expected a number > 0"),
        ("objective:\n  name: classification\n  temlate: a", "line 3: unknown setting of objective classification"),
        ("steps: many", "line 1: steps='many': expected an integer >= 0."),
        ("steps: true", "line 1: steps=True: expected an integer >= 0."),
        ("keep_best: maybe", "line 1: keep_best='maybe': expected True or False."),
        ("engine:\n  slots: 1", "line 2: engine.slots=1: expected an integer >= 2; a pair of probes needs 2."),
        ("engine: 3", "line 1: engine=3: expected a mapping"),
        ("task: sst2\ntrain: a", "line 2: train: task 'sst2' brings its own; drop one of the two."),
        ("task: sst3", "line 1: unknown task 'sst3': did you mean 'sst2'?"),
        ("steps: 1\nsteps: 2", "line 2: 'steps' stands in line 1 already; keep one."),
        ("steps: [1", "line 1: not valid YAML (expected ',' or ']'"),
        ("- steps", "expected keys with values"),
        ("a: *b", "line 1: not valid YAML (found undefined alias"),
        ("a: !!python/object:os.system {}", "line 1: not valid YAML (could not determine a constructor"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_nearest_word(text: str, message: str, write: Write) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith((f"{path}, {message}", f"{path}: {message}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 1\nbatchsize = 2", "line 2: unknown key 'batchsize': did you mean 'batch_size'?"),
        ("[method]\nname = 'lozo'\nranc = 2", "line 3: unknown setting of method lozo 'ranc': did you mean 'rank'?"),
        ("method = {name = 'lozo', ranc = 2}", "line 1: unknown setting of method lozo 'ranc'"),
        ("steps = 1\n[methd]", "line 2: unknown key 'methd': did you mean 'method'?"),
        ("steps = 1\nsteps = 2\n", "not valid TOML (Cannot overwrite a value (at line 2"),
    ],
)
def test_a_mistake_in_toml_is_named_with_its_line_too(text: str, message: str, write: Write) -> None:
    path = write(text, "recipe.toml")
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith((f"{path}, {message}", f"{path}: {message}"))


def test_an_option_that_vllm_has_not_is_named_with_its_line(write: Write) -> None:
    recipe = read_recipe(write("engine:\n  slots: 2\n  max_model_lenn: 3"))
    with pytest.raises(ConfigError, match=r"line 3: unknown engine option 'max_model_lenn': did you mean 'max_model_l"):
        recipe.check_vllm(["max_model_len", "dtype"])


def test_a_file_that_is_no_recipe_is_refused(write: Write, tmp_path: Path) -> None:
    for path, message in (
        (write("a", "recipe.json"), r"expected a recipe that ends in \.yaml, \.yml or \.toml"),
        (tmp_path / "none.yaml", "cannot be read: No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_recipe(path)


# --- flags ------------------------------------------------------------------------------------------------------------


def merged(path: Path, **given: Any) -> JobConfig:
    params = flags(**given)
    recipe = read_recipe(path).under(params)
    return job_config({**params, **recipe.run, **{k: v for k, v in given.items() if k in RUN}}, {}, recipe=recipe)


def test_flags_win_over_the_recipe_one_by_one(write: Write) -> None:
    path = write(WHOLE)
    config = merged(path, steps=9, eps=0.5, template="{text}", output="elsewhere")
    plain = config.to_json()
    assert (config.steps, config.learning_rate, config.output_dir) == (9, 0.01, "elsewhere")
    assert (plain["method"]["rank"], plain["method"]["eps"]) == (4, 0.5)
    assert (plain["objective"]["template"], plain["objective"]["options"]) == ("{text}", [" a", " b"])
    other = merged(path, method="mezo-lora").to_json()["method"]
    assert other == JobConfig(objective=OBJECTIVES[0], method=METHODS.build("mezo-lora")).to_json()["method"]


def test_a_flag_for_the_data_replaces_the_other_way_to_give_data(write: Write) -> None:
    files = read_recipe(write(WHOLE)).under(flags(task="sst2"))
    assert "train" not in files.run and "objective" not in files.config and files.run["model"] == "m"
    task = read_recipe(write("task: sst2\ndata: d\nmodel: m")).under(flags(train="t"))
    assert task.run == {"model": "m"}
    resumed = read_recipe(write(WHOLE)).under(flags(resume_from=Path("job")))
    assert "output" not in resumed.run


def test_a_resumed_job_keeps_what_neither_flags_nor_recipe_say(write: Write) -> None:
    started = {"config": JobConfig(objective=OBJECTIVES[0], method=METHODS.build("lozo", rank=8, interval=9)).to_json()}
    recipe = read_recipe(write("method: {name: lozo, rank: 4}\neval_interval: 5"))
    config = job_config(flags(checkpoint_interval=3, resume_from=Path("job")), started, recipe=recipe)
    assert (config.method.rank, config.method.interval) == (4, 9)  # type: ignore[attr-defined]
    assert (config.eval_interval, config.checkpoint_interval, config.objective) == (5, 3, OBJECTIVES[0])


def test_the_command_starts_the_engine_as_recipe_and_flags_say(
    write: Write, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def start(*arguments: Any, **named: Any) -> None:
        seen.extend([*arguments, named])
        raise ConfigError("seen")

    monkeypatch.setattr(train_module, "start_engine", start)
    monkeypatch.chdir(tmp_path)
    train_flags(Path("m"), tmp_path)  # writes train.jsonl
    path = write(WHOLE.replace("t.jsonl", "train.jsonl") + "quiet: true\n")
    ended = vllm_zo(capsys, "train", path, "--batch-size", 4, "--max-model-len", 99, "--slots", 4)
    assert ended.error == "vllm-zo: seen"
    model, zo, engine, recipe, named = seen
    assert (model, zo) == ("m", ZOTrainingConfig(slots=4, slot_rank=32)) and isinstance(recipe, Recipe)
    assert (engine, named) == ({"dtype": "float32", "max_model_len": 99}, {"quiet": True})
    seen.clear()
    assert vllm_zo(capsys, "train", "--recipe", "reviews", "--model", "m", "--train", "train.jsonl",
                   "--validation", "train.jsonl", "--batch-size", 4).error == "vllm-zo: seen"  # fmt: skip
    assert seen[3].document.name == str(RECIPES / "reviews.yaml")
    two = vllm_zo(capsys, "train", path, "--recipe", "reviews")
    assert two.error == f"vllm-zo: --recipe reviews: {path} is a recipe already; give one of them."
    assert "unknown recipe 'review': did you mean 'reviews'?" in vllm_zo(capsys, "train", "--recipe", "review").error
    bad = vllm_zo(capsys, "train", write("steps: 1\nstep: 2"))
    assert bad.status == 2 and bad.error.startswith(f"vllm-zo: {path}, line 2: unknown key 'step': did you mean 'st")


# --- packaged recipes and the schema ----------------------------------------------------------------------------------


def test_the_packaged_recipes_are_listed_copied_and_read(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = list(packaged())
    assert {"sst2", "reviews", "reward", "completion"} <= {*names}
    listed = vllm_zo(capsys, "recipes", "ls").out.splitlines()
    assert [line.split()[0] for line in listed] == names and all(len(line.split()) > 5 for line in listed)
    for name in names:
        assert vllm_zo(capsys, "recipes", "cp", name).out == f"to run it: vllm-zo train {name}.yaml\n"
        assert (tmp_path / f"{name}.yaml").read_text() == packaged()[name]
    assert vllm_zo(capsys, "recipes", "cp", "sst2", "mine.yaml").status == 0
    again = vllm_zo(capsys, "recipes", "cp", "sst2", "mine.yaml")
    assert again.status == 2 and "mine.yaml: exists already" in again.error
    assert "unknown recipe 'sst': did you mean 'sst2'?" in vllm_zo(capsys, "recipes", "cp", "sst").error


@pytest.mark.parametrize("name", packaged())
def test_a_packaged_recipe_makes_a_job_and_its_files_are_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL", raising=False)
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    if "task" not in recipe.run:
        assert job_config(flags(output="o"), {}, recipe=recipe).steps >= 100
    for key in ("model", "train", "validation"):
        assert not recipe.run.get(key, "").startswith("examples/") or (ROOT / recipe.run[key]).exists()
    jsonschema.Draft202012Validator(recipe_schema()).validate(read_document(RECIPES / f"{name}.yaml").values)


def test_the_schema_accepts_what_a_job_keeps_and_refuses_mistakes(capsys: Capture, write: Write) -> None:
    schema = json.loads(vllm_zo(capsys, "recipes", "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    for objective in OBJECTIVES:
        for method in METHODS:
            config = JobConfig(objective=objective, method=METHODS.build(method))
            text = resolved_recipe({"model": "m", "train": "t"}, config, ZOTrainingConfig(), {}, Path("r"))
            check.validate(read_document(write(text)).values)
    check.validate({"steps": "${STEPS}", "learning_rate": "auto", "divergence_factor": None, "method": "lozo"})
    wrong: list[Mapping[str, Any]] = [
        {"stepps": 1}, {"steps": -1}, {"steps": "many"}, {"lr_schedule": "lineer"}, {"method": "lozoo"},
        {"method": {"name": "lozo", "ranc": 1}}, {"method": {"name": "mezo", "rank": 1}}, {"engine": {"slots": 1}},
        {"objective": {"name": "classification", "template": "{a}"}}, {"objective": {"template": "{a}"}},
    ]  # fmt: skip
    assert [values for values in wrong if check.is_valid(values)] == []


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_recipe_which_repeats_it(
    engines: Engines, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, engines.get())
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MODEL", str(engines.model("opt")))
    small = ["--steps", 3, "--batch-size", 4, "--eval-examples", 4, "--quiet"]
    job, again = tmp_path / "job", tmp_path / "again"
    ended = vllm_zo(capsys, "train", RECIPES / "reviews.yaml", *small, "--output", job)
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-1] == f"To repeat this run: vllm-zo train {job / 'recipe.yaml'}"
    monkeypatch.chdir(tmp_path)  # the paths in it hold anywhere
    monkeypatch.delenv("MODEL")
    kept = (job / "recipe.yaml").read_text()
    assert re.search(r"^# vllm-zo .*To repeat this run: vllm-zo train ", kept)
    assert vllm_zo(capsys, "train", job / "recipe.yaml", "--output", again, "--quiet").status == 0
    assert steps_of(again) == steps_of(job)
    assert (again / "recipe.yaml").read_text().splitlines()[1:] == kept.splitlines()[1:]
