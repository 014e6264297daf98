"""Whether the source of some vLLM has what this package imports, replaces and overrides. Imports nothing of it.

    python ci/check_source.py DIRECTORY...      # each holds a `vllm` folder: site-packages, or an unpacked wheel

For wheels that the machine cannot run (CUDA builds). Exit status 1 when something is missing in one of them, or when a
patch does not apply to a release that it names. Signatures are compared with those of the installed vLLM; a difference
is a line to read, not a failure, because overrides hand arguments on (`*args, **kwargs`).
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from vllm_zo import compat
from vllm_zo.compat.moved import PLACES
from vllm_zo.compat.registry import declared_patches
from vllm_zo.compat.seams import EXTENDED, READ

PACKAGE = Path(compat.__file__).parents[1]
SERIES = sorted((PACKAGE.parent / "patches").glob("*.patch"))
FIELDS = {
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "scheduled_new_reqs", "num_scheduled_tokens", "preempted_req_ids", "finished_req_ids",
    ),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs", "scheduler_stats", "finished_requests"),
    "vllm.lora.request:LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
}  # fmt: skip
"""Fields that our classes read or write."""
CALLED = {
    "vllm.v1.request:Request.__init__": (
        "request_id", "prompt_token_ids", "sampling_params", "pooling_params", "client_index", "priority",
    ),
    "vllm.lora.lora_weights:LoRALayerWeights.__init__": ("module_name", "rank", "lora_alpha", "lora_a", "lora_b"),
    "vllm.lora.lora_model:LoRAModel.__init__": ("lora_model_id", "rank", "loras"),
}  # fmt: skip
"""Arguments that we pass, by name or in this order."""
PROBED = ("choose_punica_wrapper", "dispatcher", "skipped_waiting")
"""Names that are used only where they are known to be there."""
Names = tuple[str, ...]


class Source:
    """The definitions of one `vllm` folder, by parsing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not (root / "vllm" / "__init__.py").exists():
            sys.exit(f"{root}: no vllm folder in it; give site-packages, or the directory a wheel was unpacked to")

    def version(self) -> str:
        found = sorted(self.root.glob("vllm*.dist-info"))
        return next((p.name.removesuffix(".dist-info").replace("-", " ") for p in found if "zo" not in p.name), "?")

    @cache  # noqa: B019
    def module(self, name: str) -> dict[str, ast.AST] | None:
        """Top-level names, also those inside `if` and `try`; None if there is no such module."""
        path = self.root.joinpath(*name.split("."))
        file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.exists()), None)
        return None if file is None else dict(_definitions(ast.parse(file.read_text()).body))

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Where a name is defined (imports are followed inside vllm), and its definition."""
        names = self.module(module)
        if names is None:
            return None
        if name not in names:
            return (f"{module}.{name}", ast.Module([], [])) if self.module(f"{module}.{name}") is not None else None
        found = names[name]
        if not isinstance(found, ast.ImportFrom):
            return module, found
        level = module.split(".") if self._is_package(module) else module.split(".")[:-1]
        base = ".".join(level[: len(level) - found.level + 1]) if found.level else ""
        target = ".".join(filter(None, [base, found.module]))
        original = next(a.name for a in found.names if (a.asname or a.name) == name)
        return self.find(target, original) if target.startswith("vllm") else (module, found)

    def _is_package(self, module: str) -> bool:
        return self.root.joinpath(*module.split("."), "__init__.py").exists()

    def member(self, target: str) -> ast.AST | None:
        """The definition behind "module:Class.attribute" or "module:name", also an inherited one."""
        module, _, path = target.partition(":")
        name, _, attribute = path.partition(".")
        found = self.find(module, name)
        if found is None or not attribute or "*" in attribute:
            return None if found is None else found[1]
        return self._of_class(*found, attribute)

    def _of_class(self, module: str, node: ast.AST, attribute: str) -> ast.AST | None:
        if not isinstance(node, ast.ClassDef):
            return None
        own = dict(_definitions(node.body))
        if attribute in own:
            return own[attribute]
        if attribute == "__init__" and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            return node
        for base in node.bases:
            parent = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if parent is not None and (found := self._of_class(*parent, attribute)) is not None:
                return found
        return None


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.ImportFrom() | ast.Import():
                yield from ((a.asname or a.name, node) for a in node.names)
            case ast.Assign():
                yield from ((t.id, node) for t in node.targets if isinstance(t, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name, node
            case ast.If() | ast.Try() | ast.With():
                yield from _definitions([*node.body, *getattr(node, "orelse", [])])


def parameters(node: ast.AST) -> Names:
    if isinstance(node, ast.ClassDef):
        node = dict(_definitions(node.body)).get("__init__", node)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ()
    a = node.args
    return tuple(p.arg for p in [*a.posonlyargs, *a.args, *a.kwonlyargs] if p.arg != "self")


def names_in(node: ast.AST) -> set[str]:
    """Every attribute, variable and definition inside; what `compat.registry.names_in` finds in a loaded function."""
    found = set()
    for part in ast.walk(node):
        found.update(getattr(part, field) for field in ("attr", "id", "arg", "name") if hasattr(part, field))
    return found


def imported() -> Iterator[tuple[str, str, str]]:
    """(file, module, name) of every import of vLLM in this package."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                names = [a.name for a in node.names if a.name not in PROBED]
                yield from ((str(file.relative_to(PACKAGE)), str(node.module), name) for name in names)


def seams() -> list[str]:
    replaced = [p.target for p in declared_patches() if not p.optional]
    return [*replaced, *(f"{owner}.{name}" for owner, names in EXTENDED.items() for name in names)]


def problems(source: Source) -> Iterator[str]:
    for file, module, name in sorted(set(imported())):
        if source.find(module, name) is None:
            yield f"missing: from {module} import {name} ({file})"
    for name, modules in PLACES.items():
        if not any(source.find(module, name) for module in modules):
            yield f"missing: {name}, in none of {', '.join(modules)}"
    for target in seams():
        if source.member(target) is None:
            yield f"missing: {target}"
    for target, names in READ.items():
        node = source.member(target)
        have = names_in(node) if node is not None else ()
        yield from (f"missing: {name} in {target}" for name in names if name not in have)
    scheduler = source.find("vllm.v1.core.sched.scheduler", "Scheduler")
    text = ast.unparse(scheduler[1]) if scheduler is not None else ""
    for name in inherited():
        if f"self.{name}" not in text and f"def {name}" not in text and name not in PROBED:
            yield f"missing: Scheduler.{name}"
    for owner, names in FIELDS.items():
        yield from (f"missing: field {owner}.{name}" for name in names if source.member(f"{owner}.{name}") is None)
    for target, names in CALLED.items():
        node = source.member(target)
        have = parameters(node) if node is not None else ()
        yield from (f"missing: argument {name} of {target}" for name in names if name not in have)


def inherited() -> list[str]:
    """Attributes that our scheduler reads from vLLM's: `self.name`, not set or defined in our own class."""
    tree = ast.parse((PACKAGE / "engine" / "scheduler.py").read_text())
    ours = next(n for n in tree.body if isinstance(n, ast.ClassDef))
    used, own = set(), {n.name for n in ours.body if isinstance(n, ast.FunctionDef)}
    for node in ast.walk(ours):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
    return sorted(used - own)


def differences(source: Source, reference: Source) -> Iterator[str]:
    for target in seams():
        theirs, ours = source.member(target), reference.member(target)
        if theirs is None or ours is None or (have := parameters(theirs)) == (known := parameters(ours)):
            continue
        parts = [f"+{n}" for n in have if n not in known] + [f"-{n}" for n in known if n not in have]
        yield f"differs: {target}: {', '.join(parts) or 'another order'}"


def unpatched(source: Source) -> Iterator[str]:
    """The patches that do not apply, one after the other; only those that name this release among theirs."""
    release = source.version().rpartition(" ")[2]
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        shutil.copytree(source.root / "vllm", tree / "vllm", ignore=lambda _, names: _no_python(names))
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
        for patch in SERIES:
            named = next(line for line in patch.read_text().splitlines() if line.startswith("Against: "))
            if release not in named:
                continue
            command = ["git", "apply", str(patch)]
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
            if done.returncode:
                yield f"does not apply: {patch.name}: {done.stderr.splitlines()[0]}"


def _no_python(names: list[str]) -> list[str]:
    return [name for name in names if "." in name and not name.endswith(".py")]


def main(*directories: str) -> int:
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    installed: Any = spec.origin if spec else None
    reference = Source(Path(installed).parents[1])
    failed = False
    for directory in directories:
        source = Source(Path(directory))
        missing, failing = list(problems(source)), list(unpatched(source))
        failed |= bool(missing or failing)
        print(f"{source.version()}: {len(missing)} missing, {len(failing)} patches of its own do not apply")
        for line in [*missing, *failing, *differences(source, reference)]:
            print(f"  {line}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
