"""vLLM's worker with training commands around its own forward; works with both model runners.

`execute_model` runs the commands that came with the step, then vLLM's forward. `sample_tokens` scores the members from
the hidden states that the runner kept, closes groups, and then lets vLLM sample for all requests. `cpu/worker.py` and
`cuda/worker.py` derive their workers from this mixin and from vLLM's worker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import astuple
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_zo.commands import COMMANDS_ATTR, RESULTS_ATTR, Alone, ZOCommands, ZOResults
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.doorbell import listen
from vllm_zo.worker.find_head import find_head
from vllm_zo.worker.head import Head
from vllm_zo.worker.head_adapters import give_head_adapters
from vllm_zo.worker.host_copy import Pending
from vllm_zo.worker.lora_targets import modules_here, modules_of_model
from vllm_zo.worker.platform import Platform
from vllm_zo.worker.serving_logits import ServingLogits
from vllm_zo.worker.trainer import Trainer

_Base: Any = object
"""Stands for the platform's worker, which follows the mixin in the bases of the class."""


class WithResults(AsyncModelRunnerOutput):
    """An asynchronous output that carries training results.

    vLLM passes on only what `get_output` returns: an attribute of the asynchronous output itself would be lost.
    """

    def __init__(self, inner: AsyncModelRunnerOutput, pending: list[Pending], results: ZOResults) -> None:
        self.inner, self.pending, self.results = inner, pending, results

    def get_output(self) -> ModelRunnerOutput:
        """vLLM's output with the results on it. Waits for the device."""
        return attach(self.inner.get_output(), self.pending, self.results)


def attach(output: ModelRunnerOutput, pending: list[Pending], results: ZOResults) -> ModelRunnerOutput:
    """A copy of the output with the results on it."""
    results.groups += [group.resolve() for group in pending]
    output = copy(output)  # vLLM returns one shared object for all steps without requests
    setattr(output, RESULTS_ATTR, results)
    return output


class ZOWorkerMixin(_Base):
    """Adds a Trainer to the worker of the platform.

    Raises:
        PatchConflictError: from the constructor, if the patches do not fit the installed vLLM.
    """

    platform_class: ClassVar[type[Platform]]
    zo: Trainer
    """Exists from the end of `compile_or_warm_up_model` on."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self.platform_class.before_load()
        super().__init__(vllm_config, *args, **kwargs)
        self.zo_config = ZOTrainingConfig.of_engine(vllm_config.additional_config)
        self._zo_commands: ZOCommands | None = None
        """Commands of the current step, from `execute_model` to `sample_tokens`."""
        self._zo_batch: Any = None
        """The V2 runner's batch of the current step, from `sample_tokens` until the next step that has commands."""
        self._zo_listen = functools.cache(listen)
        self._logits: ServingLogits | None = None
        """Of the last pipeline stage."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        give_head_adapters(self.model_runner)
        super().load_model(*args, **kwargs)

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        times = super().compile_or_warm_up_model(*args, **kwargs)
        # Not earlier: vLLM's warm-up loads dummy adapters into all slots, and removes them again.
        self._make_trainer()
        return times

    def _make_trainer(self) -> None:
        runner = self.model_runner
        # Private: vLLM's worker manager hands adapters to a model manager, which owns the slots and the kernels.
        wrappers = list(runner.lora_manager._adapter_manager.punica_wrapper_mapping.values())
        platform = self.platform_class(runner, wrappers, self.device)
        # A stage that is not the last has neither a head nor logits: it passes hidden states on.
        head = self._take_head(platform, wrappers) if get_pp_group().is_last_rank else None
        modules = modules_of_model(modules_here(runner.lora_manager._adapter_manager), get_pp_group())
        slots = self.zo_config.total_slots
        self.zo = Trainer(runner.lora_manager, slots, modules, head, platform, self.model_config.model)
        # The wrappers are of a class of ours: `before_load` named it to vLLM.
        for wrapper in wrappers:
            wrapper.pool = self.zo.pool

    def _take_head(self, platform: Platform, wrappers: Sequence[Any]) -> Head:
        """Make the head that scores members, and see that vLLM computes logits for other requests only."""
        model = self.model_runner.get_model()
        found = find_head(model, self.model_config.get_hidden_size(), self.model_config.dtype, self.device)
        vocab_size = self.model_config.get_vocab_size()
        wrappers = wrappers if hasattr(found.processor, "lora_a_stacked") else []
        self._logits = ServingLogits(model, vocab_size, self._batch, wrappers, platform.sampler_slots_changed)
        return platform.head(found.lm_head, found.processor, get_tp_group())

    def zo_modules(self) -> list[tuple[str, int, int]]:
        """(name, outputs, inputs) of every module that a job can train; a front end asks by `collective_rpc`."""
        return [astuple(module.shape) for module in self.zo.modules]

    # --- one engine step --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        commands: ZOCommands | None = getattr(scheduler_output, COMMANDS_ATTR, None)
        self._zo_commands = commands
        if commands is None:
            return super().execute_model(scheduler_output)
        self._zo_num_tokens = scheduler_output.num_scheduled_tokens
        self._zo_batch = None
        if commands.more:
            self.zo.go_on()  # a forward that has stopped comes first: the scheduler has told of it before
        self.zo.run(commands.before)
        # Before the forward: the V1 runner computes logits in `execute_model`, the V2 runner in `sample_tokens`.
        members = [] if commands.alone else commands.members
        if self._logits is not None:
            self._logits.expect({member.req_id for member in members})
        with self.zo.sharing_rows(members, self._zo_num_tokens):
            output = super().execute_model(scheduler_output)
        if output is None:
            return None
        # vLLM had nothing scheduled: it answers at once and does not call `sample_tokens`, so the step ends here.
        self._zo_commands = None
        self._run_after(commands)
        return self._with_results(output)

    @torch.inference_mode()
    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        commands, self._zo_commands = self._zo_commands, None
        if commands is None:
            return super().sample_tokens(*args, **kwargs)
        # The runner's `sample_tokens` drops `execute_model_state`, which has the hidden states and, in the V2 runner,
        # the batch: members are scored before it. The V1 runner has one batch for good.
        self._zo_batch = getattr(self.model_runner.execute_model_state, "input_batch", None)
        if commands.alone:
            # A forward alone sets the adapters of its rows. So vLLM samples first.
            output = super().sample_tokens(*args, **kwargs)
            self._run_after(commands)
            return self._with_results(output)
        if commands.members and self.zo.head is not None:
            first_row, hidden = self._rows_of_requests()
            self.zo.score(commands.members, hidden, first_row, self._zo_num_tokens)
        if commands.members or commands.generates:
            self.zo.platform.after_forward(getattr(self.model_runner.execute_model_state, "hidden_states", None))
        self._run_after(commands)
        return self._with_results(super().sample_tokens(*args, **kwargs))

    def _run_after(self, commands: ZOCommands) -> None:
        """Do what follows vLLM's forward: run members alone where the scheduler says so, and the commands after it."""
        if commands.alone is None:
            self.zo.run(commands.after)
        elif commands.more:
            self.zo.run_alone(commands.members, commands.after, self._stop(commands.alone))
        else:
            self.zo.go_on(self._stop(commands.alone))

    def _stop(self, alone: Alone) -> Callable[[int], bool]:
        """See `ForwardAlone.go_on`."""
        rung: Callable[[], bool] = bool if alone.doorbell is None else self._zo_listen(alone.doorbell)
        return lambda gone: rung() or (alone.layers is not None and gone >= alone.layers)

    def _rows_of_requests(self) -> tuple[dict[str, int], Tensor]:
        """First row of each request, by request id, and the hidden states (T, D) of the step that just ran."""
        first_row, row = {}, 0
        for req_id in self._batch().req_ids:
            first_row[req_id] = row
            row += self._zo_num_tokens.get(req_id, 0)
        return first_row, self.model_runner.execute_model_state.hidden_states

    def _batch(self) -> Any:
        """The runner's batch; its `req_ids` are in the order of the rows."""
        return self._zo_batch or getattr(self.model_runner, "input_batch", None)

    def _with_results(self, output: Any) -> Any:
        pending, results = self.zo.take_results()
        if not pending and not results:
            return output
        # Set last, because this flag alone is no reason to answer: ZOResults does not count it.
        results.layers_alone = self.zo.platform.layers_alone
        if isinstance(output, AsyncModelRunnerOutput):
            return WithResults(output, pending, results)
        return attach(output, pending, results)
