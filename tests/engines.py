"""Real in-process vLLM engines for the tests: made once a session and model, shared by every test that asks alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.model_executor.models import registry
from vllm.platforms import current_platform

from tests import tiny
from vllm_zo import LLM, Classification
from vllm_zo.entrypoints.llm.client import EngineClient

# vLLM looks at the class of a model in a process of its own, so that CUDA stays untouched in this one: ten seconds for
# each architecture that the machine has not seen.
if current_platform.is_cpu():
    registry._run_in_subprocess = lambda look: look()

MAKERS: dict[str, Callable[[Path], Path]] = {"opt": tiny.make_opt, "llama": tiny.make_llama, "qwen2": tiny.make_qwen2}
SENTIMENT = Classification("{sentence} It was", [" terrible", " great"])


class Engines:
    """Makes engines on demand and keeps them; equal options give the same engine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models: dict[str, Path] = {}
        self._engines: dict[str, Any] = {}

    def model(self, family: str) -> Path:
        if family not in self._models:
            directory = self.root / family
            directory.mkdir()
            self._models[family] = MAKERS[family](directory)
        return self._models[family]

    def end(self) -> None:
        """Let go of every engine: nothing else keeps them."""
        self._engines.clear()

    def add(self, family: str, directory: Path) -> None:
        """A model that a test has made; its engine lives to the end of the session like the others."""
        assert family not in MAKERS, f"{family} is a model that other tests share"
        self._models[family] = directory

    def get(self, family: str = "opt", **options: Any) -> Any:
        key = repr((family, sorted(options.items())))
        if key not in self._engines:
            defaults = {
                "max_model_len": 128, "dtype": "float32", "zo_training": True, "block_size": 32,
                # 32,768 tokens. vLLM would give each engine the whole KVCACHE_SPACE, a GiB, and some twenty engines
                # live to the end of the session.
                "num_gpu_blocks_override": 1024,
            }  # fmt: skip
            self._engines[key] = LLM(str(self.model(family)), **{**defaults, **options})
        return self._engines[key]


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


@contextmanager
def members_as_requests(llm: Any) -> Iterator[None]:
    """Jobs that start in the block run their members as requests of vLLM's, as they do beside traffic."""
    rows = worker_of(llm).zo.platform.rows
    saved, rows.not_alone = rows.not_alone, "a test of members that are requests"
    try:
        yield
    finally:
        rows.not_alone = saved


def client_of(llm: Any) -> EngineClient:
    return EngineClient(llm.llm_engine)


def reviews(count: int, seed: int = 0, longest: int = 20) -> list[dict[str, Any]]:
    """Random word salads of mixed length with labels; enough for equivalence, nothing to learn."""
    words = " ".join(tiny.SENTENCES).split()
    rng = random.Random(seed)
    return [
        {"sentence": " ".join(rng.choices(words, k=rng.randint(3, longest))), "label": rng.randint(0, 1)}
        for _ in range(count)
    ]
