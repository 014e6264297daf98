"""Prometheus metrics of training, beside vLLM's own on `/metrics`. A scrape shows numbers at most a second old."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_zo.errors import ConfigError

logger = logging.getLogger("vllm.zo.server")

INTERVAL_S = 1.0
PER_JOB = {
    "step": "Optimiser steps taken.",
    "steps": "Optimiser steps the job will take.",
    "loss": "Training loss of the last step, nats.",
    "accuracy": "Training accuracy of the last step.",
    "update_norm": "Norm of the update of the newest version (continual jobs).",
    "steps_per_second": "Speed over the last steps.",
    "group_latency_s": "Seconds from the opening of a perturbation group to its results.",
    "slots": "ZO slots that the job's open groups hold.",
}
"""Key of a job in `zo_stats` -> help of the gauge vllm_zo:job_<key>."""
PACE = {
    "budget_tokens": "Training tokens that the last engine step might have held.",
    "slowdown": "How many times as long as without training the steps that served took, over the last minute.",
    "idle_used": "Share of the time without requests in which training ran, over the last minute.",
    "stops": "How often training stopped between two layers because a request came, over the last minute.",
}
"""Key of the pace in `zo_stats` -> help of the gauge vllm_zo:<key>."""

ADAPTER_SETS, KEPT_SETS = "vllm:lora_requests_info", 16
"""vLLM's gauge of which adapters have requests, and how many of its latest sets of adapters are kept."""


def kv_cache_usage() -> float | None:
    """Share of the KV cache in use as vLLM last reported it; None with --disable-log-stats."""
    # This metric only: all of them take 6 ms, five times a second, and no answer gets on meanwhile.
    for metric in REGISTRY.restricted_registry(["vllm:kv_cache_usage_perc"]).collect():
        return float(metric.samples[0].value) if metric.samples else None
    return None


def forget_adapter_sets() -> None:
    """Remove all but the latest time series of `ADAPTER_SETS`.

    vLLM makes one for each set of adapters that had requests at the same time, with the time as its value, and removes
    none. Where adapters come and go that was one for each answer: 3 KB each, and as many lines in every scrape.
    """
    gauge = REGISTRY._names_to_collectors.get(ADAPTER_SETS)  # private: a registry gives samples only
    if not isinstance(gauge, Gauge):  # with --disable-log-stats
        return
    samples = [sample for metric in gauge.collect() for sample in metric.samples]
    for sample in sorted(samples, key=lambda sample: sample.value)[:-KEPT_SETS]:
        gauge.remove(*sample.labels.values())  # they are in the order of the gauge's label names


class TrainingMetrics(Collector):
    """Asks the engine once a second, and answers scrapes from its last answer: a scrape cannot wait for the engine.

    As often it looks after a gauge of vLLM's (`forget_adapter_sets`), on vLLM's event loop, which sets that gauge.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._stats: dict[str, Any] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        REGISTRY.register(self)
        self._task = asyncio.create_task(self._poll(), name="zo-metrics")

    def stop(self) -> None:
        REGISTRY.unregister(self)
        if self._task is not None:
            self._task.cancel()

    async def _poll(self) -> None:
        while True:
            try:
                # Replaced as a whole: a scrape never sees half of an answer.
                self._stats = await self._client.call("zo_stats")
            except ConfigError as error:
                logger.warning("metrics: %s", error)
            forget_adapter_sets()
            await asyncio.sleep(INTERVAL_S)

    def describe(self) -> Iterator[Metric]:
        """No metrics: without this method `register` would call `collect`, before the engine has answered once."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        if not stats:
            return
        slots = GaugeMetricFamily("vllm_zo:slots", "ZO adapter slots.", labels=["state"])
        slots.add_metric(["in_use"], stats["slots"]["in_use"])
        slots.add_metric(["total"], stats["slots"]["total"])
        yield slots
        tokens = CounterMetricFamily("vllm_zo:tokens", "Tokens scheduled, by what for.", labels=["use"])
        for use, count in stats["tokens"].items():
            tokens.add_metric([use], count)
        yield tokens
        for key, text in PACE.items():
            if (value := stats["pace"].get(key)) is not None:
                yield GaugeMetricFamily(f"vllm_zo:{key}", text, value=value)
        yield from _of_jobs(stats["jobs"])


def _of_jobs(jobs: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    for key, text in PER_JOB.items():
        gauge = GaugeMetricFamily(f"vllm_zo:job_{key}", text, labels=["job"])
        for job_id, job in jobs.items():
            if (value := job.get(key)) is not None:
                gauge.add_metric([job_id], value)
        yield gauge
    tokens = CounterMetricFamily("vllm_zo:job_tokens", "Training tokens of the job.", labels=["job"])
    status = GaugeMetricFamily("vllm_zo:job_info", "1, with the job's status as a label.", labels=["job", "status"])
    for job_id, job in jobs.items():
        tokens.add_metric([job_id], job["tokens"])
        status.add_metric([job_id, job["status"]], 1)
    shards = CounterMetricFamily(
        "vllm_zo:job_shards", "Parts of steps that an engine scored.", labels=["job", "engine"]
    )
    for job_id, job in jobs.items():
        for name, engine in job.get("engines", {}).items():
            shards.add_metric([job_id, name], engine["shards"])
    yield tokens
    yield status
    yield shards
