"""A job on a disk that fails, or on a machine that dies, at any of its writes: the job goes on as the undisturbed one.

One run is watched, and at each of its writes, fsyncs and renames its directory is kept as it would be found if the
process died there, or the power failed. Then every such directory is resumed. In the second part the disk refuses one
operation after another.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engines import Engines, reviews
from tests.trajectories import JOB, train
from vllm_zo import ConfigError, JobError
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log

OPTIONS: dict[str, Any] = {"eval_interval": 4, "checkpoint_interval": 3, "publish_interval": 5}
A_FEW = 8
"""Points that the short test takes of all; the slow one takes every point."""
TIMES = ("seconds", "tokens")
"""Fields of a record that say how this run went, and not what it learnt."""


def run(llm: Any, **options: Any) -> Any:
    return train(llm, "bank", validation=reviews(8, seed=2), **{**OPTIONS, **options})


def records(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def left(done: Any) -> tuple[Any, ...]:
    """What must not depend on what happened on the way: the bytes of the log, the state, and every record."""
    assert done.status == "succeeded"
    log = Path(done.directory) / "seeds.log"
    _, steps = log.read_bytes().split(b"\n", 1)  # the header names the directory
    # From the log: the disk may have refused the file of the last version.
    return steps, rebuild_state(read_seed_log(log), JOB["steps"]).acc_BN.tolist(), records(Path(done.directory))


def go_on(llm: Any, directory: Path) -> Any:
    if (directory / "job.json").exists():
        return run(llm, resume_from=directory)
    return run(llm, output_dir=str(directory))  # it died before there was a job


class Watched:
    """`os.pwrite`, `os.fsync`, `os.ftruncate` and `os.replace` under a directory, one at a time.

    Args:
        before: called with the name of the operation and the number of those before it. It may raise OSError.
    """

    def __init__(self, root: Path, before: Callable[[str, int], None]) -> None:
        self.root, self.before, self.count = root, before, 0
        self.synced: dict[Path, bytes] = {}
        """What the disk has of each file, for sure."""
        self.renamed: list[tuple[Path, Path]] = []
        """Renames of which the directory has not reached the disk."""
        self.lock = threading.RLock()
        self.tear: Callable[[], None] = lambda: None

    @contextmanager
    def installed(self) -> Iterator[None]:
        real = {name: getattr(os, name) for name in ("pwrite", "fsync", "ftruncate", "replace")}

        def watched(name: str) -> Any:
            def call(target: Any, *arguments: Any) -> Any:
                path = Path(os.readlink(f"/proc/self/fd/{target}")) if isinstance(target, int) else Path(target)
                if self.root not in (path, *path.parents):
                    return real[name](target, *arguments)
                with self.lock:
                    if name == "pwrite":
                        self.tear = lambda: real["pwrite"](target, arguments[0][: len(arguments[0]) // 2], arguments[1])
                    self.count += 1
                    self.before(name, self.count - 1)
                    answer = real[name](target, *arguments)
                    self._note(name, path, *arguments)
                    return answer

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in real:
                patch.setattr(os, name, watched(name))
            yield

    def _note(self, name: str, path: Path, *arguments: Any) -> None:
        if name == "replace":
            self.renamed.append((path, Path(arguments[0])))
        elif name == "fsync" and path.is_dir():
            for source, target in self.renamed:
                # Twice the same rename where the directory's fsync has failed: the later content counts.
                if (content := self.synced.pop(source, None)) is not None:
                    self.synced[target] = content
            self.renamed.clear()
        elif name == "fsync":
            self.synced[path] = path.read_bytes()


class Deaths:
    """The directory of a job as it is found after a death at each of its operations, without those that are equal."""

    def __init__(self, job: Path, kept: Path) -> None:
        self.job, self.kept, self.found = job, kept, dict[str, Path]()
        self.watched = Watched(job, self.keep)

    def keep(self, name: str, number: int) -> None:
        self._add(f"{number}-before-{name}", self._alive())
        self._add(f"{number}-power-at-{name}", self.watched.synced)
        if name == "pwrite":
            self.watched.tear()  # half of it; the whole write follows, at the same place
            self._add(f"{number}-half-{name}", self._alive())

    def _alive(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.job.rglob("*") if path.is_file()}

    def _add(self, label: str, files: dict[Path, bytes]) -> None:
        content = sorted((str(path.relative_to(self.job)), data) for path, data in files.items())
        key = hashlib.sha256(repr(content).encode()).hexdigest()
        if key not in self.found:
            self.found[key] = self.kept / label
            self.found[key].mkdir(parents=True)
            for name, data in content:
                (self.kept / label / name).write_bytes(data)


@pytest.fixture(scope="module")
def undisturbed(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Path]]:
    """What an undisturbed run leaves, and the directories of all deaths."""
    root = tmp_path_factory.mktemp("deaths")
    deaths = Deaths(root / "job", root / "found")
    with deaths.watched.installed():
        done = run(engines.get(), output_dir=str(root / "job"))
    found = list(deaths.found.values())
    assert len(found) > 40 and any("half" in path.name for path in found)
    return left(done), found


def assert_goes_on(engines: Engines, undisturbed: tuple[Any, list[Path]], places: list[Path], tmp_path: Path) -> None:
    llm, (expected, _) = engines.get(), undisturbed
    for place in places:
        directory = tmp_path / place.name
        shutil.copytree(place, directory)
        assert left(go_on(llm, directory)) == expected, place.name


def test_a_job_that_died_at_some_writes_goes_on_as_the_undisturbed_one(
    engines: Engines, undisturbed: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    found = undisturbed[1]
    assert_goes_on(engines, undisturbed, found[:: len(found) // A_FEW], tmp_path)


@pytest.mark.slow
def test_a_job_that_died_at_any_write_goes_on_as_the_undisturbed_one(
    engines: Engines, undisturbed: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    assert_goes_on(engines, undisturbed, undisturbed[1], tmp_path)


# --- a disk that refuses ----------------------------------------------------------------------------------------------


def disturbed(llm: Any, directory: Path, number: int, code: int) -> Any:
    """A run at whose operation `number` the disk refuses, once; gone on with where that ended it."""

    def refuse(name: str, count: int) -> None:
        if count == number:
            raise OSError(code, os.strerror(code))

    with Watched(directory, refuse).installed():
        try:
            return run(llm, output_dir=str(directory))
        except (JobError, ConfigError) as error:
            assert os.strerror(code) in str(error), f"operation {number}: the reason is not told: {error}"
    return go_on(llm, directory)


def assert_survives(engines: Engines, undisturbed: tuple[Any, list[Path]], tmp_path: Path, every: int) -> None:
    llm, (expected, _) = engines.get(), undisturbed
    counting = Watched(tmp_path / "counted", lambda name, count: None)
    with counting.installed():
        run(llm, output_dir=str(tmp_path / "counted"))
    assert counting.count > 30
    for number in range(0, counting.count, every):
        code = errno.EIO if number % 2 else errno.ENOSPC
        directory = tmp_path / f"{number}-{errno.errorcode[code]}"
        assert left(disturbed(llm, directory, number, code)) == expected, directory.name


def test_a_job_whose_disk_refuses_some_operations_is_the_undisturbed_one(
    engines: Engines, undisturbed: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    assert_survives(engines, undisturbed, tmp_path, every=9)


@pytest.mark.slow
def test_a_job_whose_disk_refuses_any_operation_is_the_undisturbed_one(
    engines: Engines, undisturbed: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    assert_survives(engines, undisturbed, tmp_path, every=1)
