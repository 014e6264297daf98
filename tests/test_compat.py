"""The run-time patches as a set: recorded, matched by the series in `patches/`, refused where they would collide."""

from __future__ import annotations

import importlib
import logging
import re
import types
from pathlib import Path
from typing import Any

import pytest

import vllm_zo
from vllm_zo import plugin
from vllm_zo.compat.registry import DECLARED_IN, Patch, PatchConflictError, declared_patches, exists, names_in
from vllm_zo.entrypoints.llm.options import engine_options
from vllm_zo.entrypoints.llm.requirements import require_patches
from vllm_zo.errors import ZOError

PACKAGE = Path(vllm_zo.__file__).parent
PATCHES = Path(__file__).parents[1] / "patches"
RECORDED = list(declared_patches())


def named_patches() -> list[tuple[str, str, Patch]]:
    """(file, constant, patch) of all of them, read from the source: that is how the table names them."""
    found = []
    for module in map(importlib.import_module, DECLARED_IN):
        path = Path(str(module.__file__))
        for constant in re.findall(r"^([A-Z_]+) = Patch\(", path.read_text(), re.M):
            found.append((path.relative_to(PACKAGE).as_posix(), constant, getattr(module, constant)))
    return found


def test_every_module_with_records_is_known_to_the_doctor() -> None:
    declaring = {
        f"vllm_zo.{path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}"
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^[A-Z_]+ = Patch\(", path.read_text(), re.M)
    }
    assert declaring == set(DECLARED_IN)
    assert len(named_patches()) == len(RECORDED) == len({patch.target for patch in RECORDED})


@pytest.mark.parametrize(
    "file, constant, patch", named_patches(), ids=lambda value: value if type(value) is str else ""
)
def test_every_run_time_patch_has_its_counterpart_or_says_why_not(file: str, constant: str, patch: Patch) -> None:
    with_series, without = (PATCHES / "README.md").read_text().split("## Run-time patches without a counterpart")
    if patch.series.startswith("none: "):
        assert patch.built_in is None or patch.series.startswith("none: in vLLM since ")
        rows = [row for row in without.splitlines() if f"`{file}`" in row]
        assert any(constant in row for row in rows), "missing in the table of those without a counterpart"
        return
    source = (PATCHES / patch.series).read_text()
    rows = [row for row in with_series.splitlines() if f"({patch.series})" in row]
    assert len(rows) == 1 and re.search(rf"`{file}`[^`|]*\b{constant}\b", rows[0]), "the table names another patch"
    assert re.search(rf"{file} [^.]*\b{constant}\b", source), "the header of the patch does not name it"
    assert patch.built_in is not None
    added = "\n".join(line[1:] for line in source.splitlines() if re.match(r"\+(?!\+\+)", line))
    feature = re.split(r"[.:(]", patch.built_in.removesuffix(")"))[-1]
    assert re.search(rf"\b{feature}\b", added), f"{patch.series} does not add {feature}, so it would never be noticed"
    assert not exists(patch.built_in), "the installed release has it: delete the run-time patch"


def test_the_tables_name_no_patch_that_is_gone() -> None:
    tables = (PATCHES / "README.md").read_text().split("## Run-time patches without a counterpart")
    for table, without in zip(tables, (False, True), strict=True):
        cells = re.findall(r"`([\w/]+\.py)` ([A-Z_]+(?:, [A-Z_]+)*)", table)
        named = {(file, constant) for file, constants in cells for constant in constants.split(", ")}
        assert named == {(f, c) for f, c, patch in named_patches() if patch.series.startswith("none: ") == without}


def test_the_series_is_numbered_without_gaps_and_every_header_is_complete() -> None:
    files = sorted(PATCHES.glob("*.patch"))
    assert [f.name[:4] for f in files] == [f"{n:04}" for n in range(1, len(files) + 1)]
    for number, file in enumerate(files, 1):
        header, _, diff = file.read_text().partition("\n---\n")
        assert header.startswith(f"Subject: [PATCH {number}/{len(files)}] ")
        for part in ("Against", "What", "Why", "How it was tested", "Upstream", "Makes unnecessary in vllm_zo"):
            assert re.search(rf"^{part}:\s*\S", header, re.M), f"{file.name} has no {part!r}"
        assert "diff --git a/vllm/" in diff


def patch_of(target: str, **fields: Any) -> Patch:
    return Patch(target=target, why="w", how="h", upstream="u", remove_when="r", series="none: a test", **fields)


def vllm_class(**methods: Any) -> type:
    """A class whose methods look as if they were written in vLLM."""
    made = {}
    for name, function in methods.items():
        namespace = {**function.__globals__, "__name__": "vllm.somewhere"}
        made[name] = types.FunctionType(function.__code__, namespace, name)
    return type("Engine", (), made)


def test_a_patch_is_applied_once_however_often_it_is_asked_for() -> None:
    owner = vllm_class(step=lambda self: "vllm")
    patch = patch_of("vllm.somewhere:Engine.step")
    calls = []

    def wrap() -> Any:
        original = owner.step

        def step(self: Any) -> str:
            calls.append(1)
            return original(self) + "+zo"

        return step

    patch.apply(owner, "step", wrap())
    patch.apply(owner, "step", wrap())
    assert owner().step() == "vllm+zo" and calls == [1]


def test_two_patches_of_ours_do_not_replace_the_same_attribute() -> None:
    owner = vllm_class(step=lambda self: None)
    patch_of("vllm.somewhere:Engine.step").apply(owner, "step", lambda self: None)
    with pytest.raises(PatchConflictError, match="vllm_zo itself has replaced Engine.step already"):
        patch_of("another").apply(owner, "step", lambda self: None)


@pytest.mark.parametrize("module", ["vllm_ascend.patch", "somebody.plugin"])
def test_what_another_plugin_has_replaced_is_refused_with_who_and_what_to_do(module: str) -> None:
    owner = vllm_class(step=lambda self: None)
    theirs = types.FunctionType((lambda self: None).__code__, {"__name__": module}, "step")
    theirs.__module__ = "vllm.somewhere"  # as functools.wraps leaves it
    owner.step = theirs  # type: ignore[attr-defined]
    with pytest.raises(PatchConflictError, match=rf"{module} has replaced Engine.step.*VLLM_PLUGINS"):
        patch_of("vllm.somewhere:Engine.step").apply(owner, "step", lambda self: None)
    assert owner.step is theirs  # type: ignore[attr-defined]


def test_an_attribute_that_is_not_where_it_should_be_is_refused() -> None:
    with pytest.raises(PatchConflictError, match="not found in the installed vLLM; run `vllm-zo doctor`"):
        patch_of("vllm.somewhere:Engine.gone").apply(vllm_class(), "gone", lambda self: None)
    owner = vllm_class(finetune=lambda self: None)
    with pytest.raises(PatchConflictError, match="Engine.finetune exists already"):
        patch_of("vllm.somewhere:Engine.*").apply(owner, "finetune", lambda self: None, adds=True)


def test_a_patch_steps_aside_where_vllm_has_the_feature() -> None:
    owner = vllm_class(step=lambda self: "vllm")
    patch = patch_of("vllm.somewhere:Engine.step", built_in="vllm.v1.core.sched.interface:SchedulerInterface.schedule")
    patch.apply(owner, "step", lambda self: "zo")
    assert patch.unneeded() and owner().step() == "vllm"


# --- patches of one object --------------------------------------------------------------------------------------------


def test_a_patch_of_an_object_leaves_the_others_of_its_class_alone() -> None:
    owner = vllm_class(step=lambda self: "vllm")
    patched, other = owner(), owner()
    patch_of("vllm.somewhere:Engine.step").on(patched, "step", lambda: "zo")
    assert (patched.step(), other.step()) == ("zo", "vllm")


def test_an_object_is_patched_once_because_the_first_replacement_has_an_owner() -> None:
    engine, patch = vllm_class(step=lambda self: None)(), patch_of("vllm.somewhere:Engine.step")
    patch.on(engine, "step", lambda: None)
    with pytest.raises(PatchConflictError, match="vllm_zo itself has replaced Engine.step already"):
        patch.on(engine, "step", lambda: None)


def test_what_another_plugin_has_replaced_on_an_object_is_refused() -> None:
    patch = patch_of("vllm.somewhere:Engine.step")
    for on_class in (False, True):
        engine = vllm_class(step=lambda self: None)()
        theirs = types.FunctionType((lambda self=None: None).__code__, {"__name__": "somebody.plugin"}, "step")
        (type(engine) if on_class else engine).step = theirs
        with pytest.raises(PatchConflictError, match=r"somebody.plugin has replaced Engine.step.*VLLM_PLUGINS"):
            patch.on(engine, "step", lambda: None)
    with pytest.raises(PatchConflictError, match="not found in the installed vLLM"):
        patch.on(vllm_class()(), "step", lambda: None)


def test_a_model_of_another_package_has_methods_of_its_own() -> None:
    class Model:
        def compute_logits(self) -> str:
            return "all"

    model = Model()
    patch_of("vllm.somewhere:Model.compute_logits").on(model, "compute_logits", lambda: "some")
    assert model.compute_logits() == "some"


# --- what is in vLLM --------------------------------------------------------------------------------------------------


def test_names_are_found_in_vllms_code_behind_our_replacement() -> None:
    target = "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm"
    plugin.install()
    assert {"cpu_linear", "handler", "packed_weight"} <= names_in(target) and "no_such_name" not in names_in(target)


def test_a_feature_may_be_a_parameter() -> None:
    assert exists("vllm.v1.request:Request.__init__(priority)")
    assert not exists("vllm.v1.request:Request.__init__(no_such_parameter)")


def test_every_patch_in_this_process_is_marked_as_ours() -> None:
    """After an engine was made, nothing of ours is in vLLM that is not recorded, and what is recorded is there."""
    plugin.install()
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.llm_engine import LLMEngine

    marked = {
        getattr(getattr(value, "__func__", value), "_vllm_zo_patch", None)
        for owner in (EngineCore, EngineCoreProc, LLMEngine)
        for value in vars(owner).values()
    } - {None}
    assert marked == {
        p.target for p in RECORDED if p.target.startswith("vllm.v1.engine.") and "async_llm" not in p.target
    }


def another_plugins_method(self: Any) -> bool:
    return True


@pytest.mark.parametrize("theirs", [None, another_plugins_method], ids=["missing", "replaced"])
def test_a_vllm_that_the_patches_do_not_fit_serves_on_and_does_not_train(
    theirs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The plugin is loaded in engines that have nothing to do with training."""
    from vllm.v1.engine.core import EngineCoreProc

    if theirs is None:
        monkeypatch.delattr(EngineCoreProc, "_handle_shutdown")
    else:
        monkeypatch.setattr(EngineCoreProc, "_handle_shutdown", theirs)
    why = "_handle_shutdown.*vllm-zo doctor" if theirs is None else "test_compat has replaced .*_handle_shutdown"
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.install()
    assert re.search(f"cannot train with this vLLM: .*{why}", caplog.text)
    with pytest.raises(PatchConflictError, match=why):
        require_patches()
    with pytest.raises(ZOError, match="_handle_shutdown"):
        engine_options("no-model", True, {})
