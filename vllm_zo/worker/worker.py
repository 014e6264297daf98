"""vLLM's worker with training commands around its own forward; works with both model runners.

`execute_model` runs the commands that came with the step and then vLLM's forward; `sample_tokens` first reads the
hidden
states that the runner kept, scores the members and closes groups, and then lets vLLM sample for everybody.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vllm_zo import compat
from vllm_zo.commands import COMMANDS_ATTR, RESULTS_ATTR, ScoreMember, ZOCommands, ZOResults
from vllm_zo.compat import cpu_lora, gpu_lora
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.worker.host_copy import PendingGroup
from vllm_zo.worker.kernels import cpu_linear
from vllm_zo.worker.kernels.shared_rows import SharedRows
from vllm_zo.worker.logits import ServingLogits
from vllm_zo.worker.scoring import Head
from vllm_zo.worker.trainer import Trainer

logger = init_logger("vllm.zo.worker")

_Base: Any = object
"""Stands for the platform's worker: the mixin goes in front of it."""


class WithResults(AsyncModelRunnerOutput):
    """An asynchronous output that carries training results: an attribute set on it directly would be lost."""

    def __init__(self, inner: AsyncModelRunnerOutput, pending: list[PendingGroup], results: ZOResults) -> None:
        self.inner, self.pending, self.results = inner, pending, results

    def get_output(self) -> ModelRunnerOutput:
        return attach(self.inner.get_output(), self.pending, self.results)


def attach(output: ModelRunnerOutput, pending: list[PendingGroup], results: ZOResults) -> ModelRunnerOutput:
    """A copy of the output with the results on it (vLLM shares one empty output object between steps)."""
    results.groups += [group.resolve() for group in pending]
    output = copy(output)
    setattr(output, RESULTS_ATTR, results)
    return output


class ZOWorkerMixin(_Base):
    """Adds a Trainer to whichever worker the platform uses."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        compat.require()
        super().__init__(vllm_config, *args, **kwargs)
        self.zo_config = ZOTrainingConfig.of_engine(vllm_config.additional_config)
        self._zo_trainer: Trainer | None = None
        self._zo_commands: ZOCommands | None = None
        self._zo_batch: Any = None
        """The V2 runner's batch of the step, from the end of its forward to the end of sampling."""

    @property
    def zo(self) -> Trainer:
        """Made on first use, after vLLM's own warm-up has loaded and removed its dummy adapters."""
        if self._zo_trainer is None:
            model = self.model_runner.get_model()
            head = Head(model.lm_head, model.logits_processor, get_tp_group())
            lora_manager = self.model_runner.lora_manager
            self._zo_trainer = Trainer(lora_manager, self.zo_config.total_slots, head, self.device)
            wrappers = list(lora_manager._adapter_manager.punica_wrapper_mapping.values())
            for wrapper in wrappers:
                wrapper.pool = self._zo_trainer.pool
            if self.device.type == "cpu":
                self.model_runner.zo_shared_rows = SharedRows(self.model_runner, wrappers)
            self._logits = ServingLogits(model, self.model_config.get_vocab_size(), self._batch, wrappers)
        return self._zo_trainer

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        times = super().compile_or_warm_up_model(*args, **kwargs)
        assert self.zo is not None
        return times

    # --- one engine step --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        commands: ZOCommands | None = getattr(scheduler_output, COMMANDS_ATTR, None)
        self._zo_commands = commands
        if commands is None:
            return super().execute_model(scheduler_output)
        self._zo_num_tokens = scheduler_output.num_scheduled_tokens
        self._zo_batch = None
        self.zo.run(commands.before)
        members = [] if commands.alone else commands.members
        self._logits.expect({member.req_id for member in members})
        with self._members_share_rows(members):
            output = super().execute_model(scheduler_output)
        if output is None:
            return None
        # Nothing was scheduled: vLLM answers at once and does not call sample_tokens.
        self._zo_commands = None
        if commands.alone:
            self.zo.score_alone(commands.members, self.model_runner.zo_shared_rows.forward_alone)
        self.zo.run(commands.after)
        return self._with_results(output)

    @contextmanager
    def _members_share_rows(self, members: list[ScoreMember]) -> Iterator[None]:
        """In the block, the model may leave out rows of members that nobody needs (CPU)."""
        shared: SharedRows | None = getattr(self.model_runner, "zo_shared_rows", None)
        if shared is None or not members:
            yield
            return
        shared.chunks = functools.partial(self.zo.chunks, members, self._zo_num_tokens)
        try:
            yield
        finally:
            shared.chunks = None

    @torch.inference_mode()
    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        commands, self._zo_commands = self._zo_commands, None
        if commands is None:
            return super().sample_tokens(*args, **kwargs)
        self._zo_batch = getattr(self.model_runner.execute_model_state, "input_batch", None)
        if commands.members:
            first_row, hidden = self._rows_of_requests()
            self.zo.score(commands.members, hidden, first_row, self._zo_num_tokens)
        if commands.members or commands.generates:
            self._clean_kv_cache(self.model_runner.execute_model_state.hidden_states)
        self.zo.run(commands.after)
        return self._with_results(super().sample_tokens(*args, **kwargs))

    def _rows_of_requests(self) -> tuple[dict[str, int], Tensor]:
        """Where each request's tokens start among the hidden states of the step that just ran."""
        state = self.model_runner.execute_model_state
        first_row, row = {}, 0
        for req_id in self._batch().req_ids:
            first_row[req_id] = row
            row += self._zo_num_tokens.get(req_id, 0)
        return first_row, state.hidden_states

    def _batch(self) -> Any:
        return self._zo_batch or getattr(self.model_runner, "input_batch", None)

    def _clean_kv_cache(self, hidden: Tensor) -> None:
        """After a member that diverged: its KV blocks go to the next request, and CPU attention multiplies what a block
        holds beyond that request's tokens with weights 0. That is no harm unless it is not finite."""
        if self.device.type != "cpu":
            return
        shared: SharedRows = self.model_runner.zo_shared_rows
        last_attention, shared.last_attention = shared.last_attention, None
        if not shared.wrote_kv:
            return
        outputs = [hidden] if last_attention is None else [hidden, last_attention]  # `hidden` may lack its last layer
        if not all(torch.isfinite(output).all() for output in outputs):
            for cache in self.model_runner.kv_caches:
                cache.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def _with_results(self, output: Any) -> Any:
        pending, results = self.zo.take_results()
        if not pending and not results.failures and not results.modules:
            return output
        shared: SharedRows | None = getattr(self.model_runner, "zo_shared_rows", None)
        results.members_alone = shared is not None and not shared.not_alone
        if isinstance(output, AsyncModelRunnerOutput):
            return WithResults(output, pending, results)
        return attach(output, pending, results)


class ZOCPUWorker(ZOWorkerMixin, CPUWorker):
    """On CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cpu_lora.choose_wrapper()
        cpu_linear.keep_plain_weights()
        super().__init__(*args, **kwargs)


class ZOGPUWorker(ZOWorkerMixin, Worker):
    """On CUDA."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        gpu_lora.install()
        super().__init__(*args, **kwargs)
