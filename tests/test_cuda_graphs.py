"""Which CUDA graphs an engine that trains captures. Pure functions: no GPU is looked at."""

from __future__ import annotations

import doctest
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.shapes import PROMPT_LENGTHS, mean_prompt_tokens
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.llm import cuda_graphs
from vllm_zo.entrypoints.llm import options as engine_options
from vllm_zo.entrypoints.llm.cuda_graphs import LARGEST, SERVING, chosen_by_user, default_sizes, padded_size, sizes_for


def test_the_examples_of_the_docstrings() -> None:
    result = doctest.testmod(cuda_graphs)
    assert result.attempted >= 2 and result.failed == 0


@pytest.mark.parametrize("slots", [2, 3, 4, 32])
def test_every_group_of_the_slots_replays_a_graph_of_nearly_its_size(slots: int) -> None:
    sizes = default_sizes(slots)
    assert sizes == sorted(set(sizes)) and set(SERVING) <= set(sizes), "serving keeps its graphs"
    for tokens in range(256, min(slots // 2 * 1024, LARGEST) + 1):
        replayed = next(size for size in sizes if size >= tokens)
        assert replayed == padded_size(tokens) and replayed - tokens <= max(16, tokens / 16)
    assert len(sizes) < 150, "each takes a part of a second to capture"


def test_a_group_of_32_examples_of_sst2_fits_the_default() -> None:
    """vLLM's own 512 tokens do not even hold all groups of 16."""
    longest = sorted((length for length, count in PROMPT_LENGTHS.items() for _ in range(count)), reverse=True)
    assert 2 * 32 * mean_prompt_tokens() < 1024 < 2 * sum(longest[:32])
    assert default_sizes(2)[-1] == 1024


def test_groups_that_are_known_get_just_their_sizes() -> None:
    assert sizes_for([441, 450, 700]) == [1, 2, 4, 8, 16, 32, 64, 128, 448, 464, 704]
    assert max(sizes_for([441, 10_000])) == 448 and max(sizes_for([441, 10_000], 16384)) == 10_048
    options = gpu.engine_options("no such model", [441, 7100])
    assert options["compilation_config"]["cudagraph_capture_sizes"][-2:] == [448, 7104]
    assert chosen_by_user(options)


@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": True},
        {"cudagraph_capture_sizes": [1]},
        {"max_cudagraph_capture_size": 64},
        {"compilation_config": {"cudagraph_capture_sizes": [1]}},
        {"compilation_config": '{"max_cudagraph_capture_size": 64}'},
        {"compilation_config": SimpleNamespace(cudagraph_capture_sizes=[1])},
    ],
    ids=str,
)
def test_what_the_user_has_chosen_stays(options: dict[str, Any]) -> None:
    assert chosen_by_user(options)
    assert engine_options._graphs(ZOTrainingConfig(), options) == {}


@pytest.mark.parametrize(
    "options", [{}, {"enforce_eager": False}, {"compilation_config": 3}, {"compilation_config": {}}]
)
def test_else_sizes_are_chosen_and_the_log_says_which(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vllm.zo"):
        chosen = engine_options._graphs(ZOTrainingConfig(slots=4), options)
    assert chosen == {"cudagraph_capture_sizes": default_sizes(4)}
    assert "up to 2048" in caplog.text and "cudagraph_capture_sizes=" in caplog.text
