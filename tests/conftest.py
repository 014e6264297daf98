"""Settings of the whole test suite. vLLM reads its environment at import, so its defaults are set here, first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.engines import Engines
    from tests.openai_server import Servers


def two_cores() -> str:
    """The first two cores this process may run on, in vLLM's notation ("0-1"); one core where there is only one."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    adjacent = len(cores) == 2 and cores[1] == cores[0] + 1
    return f"{cores[0]}-{cores[1]}" if adjacent else ",".join(map(str, cores))


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine core in process: starts in seconds, fails with its own traceback
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a share of the machine's memory
    "VLLM_CPU_OMP_THREADS_BIND": two_cores(),  # the default leaves a core of two idle
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # models are made in the tests; a download is a mistake
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run_slow = config.getoption("--run-slow")
    for item in items:
        if item.get_closest_marker("slow") and not run_slow:
            item.add_marker(pytest.mark.skip(reason="slow; give --run-slow, or make test-slow"))
        if item.get_closest_marker("gpu") and not cuda_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Real engines, shared by the session. See tests/engines.py."""
    from tests.engines import Engines

    yield Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="session")
def servers(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The training server in a process of its own, shared by the session. See tests/openai_server.py."""
    from tests.openai_server import Servers

    servers = Servers(str(engines.model("opt")), tmp_path_factory.mktemp("server") / "state")
    yield servers
    servers.end()
