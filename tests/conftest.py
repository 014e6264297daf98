"""Settings of the whole test suite. vLLM reads its environment at import, so its defaults are set here, first."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests import leash

if TYPE_CHECKING:
    from tests.engines import Engines
    from tests.openai_server import Servers


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine core in process: starts in seconds, fails with its own traceback
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a share of the machine's memory
    # One thread, wherever the system puts it. Models are tiny, and two threads wait for each other at every operator:
    # beside any other program they took ten times as long.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Not sys.stdout: that is a test's own where it captures output, closed after it, and vLLM keeps what it finds when
    # it is imported.
    "VLLM_LOGGING_STREAM": "ext://sys.__stderr__",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # models are made in the tests; a download is a mistake
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
leash.hold()
# The imports make millions of objects and hardly any garbage: looking for it takes a sixth of their time, and later
# collections need not look at them again.
gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()  # or extension modules find their objects alive at exit, and complain


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run_slow = config.getoption("--run-slow")
    for item in items:
        if item.get_closest_marker("slow") and not run_slow:
            item.add_marker(pytest.mark.skip(reason="slow; give --run-slow, or make test-slow"))
        if item.get_closest_marker("gpu") and not cuda_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.scheduling import TogetherByFixture

    return TogetherByFixture(config, log) if config.getoption("dist") == "loadfile" else None


def cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Real engines, shared by the session. See tests/engines.py."""
    from tests.engines import Engines

    engines = Engines(tmp_path_factory.mktemp("engines"))
    yield engines
    with pytest.MonkeyPatch.context() as patch:
        # An engine that ends collects garbage: a second each, with all that a session holds.
        patch.setattr(gc, "collect", lambda *_: 0)
        engines.end()


@pytest.fixture(scope="session")
def servers(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The training server in a process of its own, shared by the session. See tests/openai_server.py."""
    from tests.openai_server import Servers

    servers = Servers(str(engines.model("opt")), tmp_path_factory.mktemp("server") / "state")
    yield servers
    servers.end()


@pytest.fixture(scope="session")
def engine_apart(engines: Engines) -> Iterator[Any]:
    """An engine in a process of its own, as vLLM starts it by default, shared by the session."""
    from vllm import envs

    from tests.children import engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        envs.disable_envs_cache()  # an engine in this process has frozen vLLM's settings
        llm = engine(str(engines.model("opt")), zo_training=True)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.tiny import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that puts nothing before a text."""
    from tests.tiny import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("plain"), bos=None)


@pytest.fixture(scope="module")
def ending_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Two that agree but for the end that the second puts behind every text."""
    from tests.tokenizers_of import byte_level

    root = tmp_path_factory.mktemp("ends")
    return byte_level(root / "plain"), byte_level(root / "ends", appends_eos=True)
