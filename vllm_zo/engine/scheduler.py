"""vLLM's scheduler with perturbation groups beside ordinary requests. The one engine file that touches vLLM.

Members are ordinary `Request`s (one token to sample, `client_index` -1) that exist in vLLM's queues only during
`schedule()`: they are offered at the tail of the waiting queue, behind everything that serves, and what was not
scheduled is withdrawn again. They carry no LoRA request inside the scheduler, so that the serving-adapter limit and the
prefix-cache keys never see them; the slot's LoRA request is attached to the `SchedulerOutput` on its way out.

Where nothing else is asked of the engine, and the workers can do it, members are no requests at all: the workers run
them whole, in a forward of their own, and nothing is done that vLLM does for each request.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState, SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_zo import compat
from vllm_zo.commands import ADAPTER_SCHEME, COMMANDS_ATTR, RESULTS_ATTR, SLOT_LORA_ID_BASE, UTILITY_METHODS
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.engine.admission import UNLIMITED, Capacity, Demand, capacity_for_training
from vllm_zo.engine.controller import Controller
from vllm_zo.engine.group import Member
from vllm_zo.engine.job_dir import load_job
from vllm_zo.engine.rewarder import Rewarder
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import Reward

logger = init_logger("vllm.zo.scheduler")

MEMBER_CLIENT = -1
MEMBER_PRIORITY = 1 << 30
REWARD_POLL_S = 1e-3
"""How long an engine step without anything to do waits for rewards; a request that arrives meanwhile waits with it."""


def slot_lora_request(slot: int) -> LoRARequest:
    """The synthetic LoRA request of a ZO slot. One name a slot is safe: members never enter the prefix cache."""
    return LoRARequest(f"zo-slot-{slot}", SLOT_LORA_ID_BASE + slot, f"zo-slot://{slot}")


_HAS_BACKGROUND = "background" in inspect.signature(Request.__init__).parameters
"""Whether this vLLM knows requests that nobody waits for (`patches/0004`), and keeps them out of the prefix cache."""
_Base: Any = object
"""Stands for Scheduler or AsyncScheduler: the mixin goes in front of either."""


class ZOSchedulerMixin(_Base):
    """Adds perturbation groups to whichever scheduler vLLM would have used."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.zo_config = ZOTrainingConfig.of_engine(vllm_config.additional_config)
        self.zo = Controller(self.zo_config.slots, self.block_size, self.zo_config.concurrent_jobs)
        if not hasattr(self, "kv_holding_waiting"):  # 0.30 keeps all that it passed over in one queue
            self.kv_holding_waiting = self.skipped_waiting
            self.deferred_waiting: set[Request] = set()
            self.max_num_active_reqs = self.max_num_running_reqs
        self._zo_members: dict[str, Member] = {}
        self._zo_preempted: dict[str, Request] = {}
        self.zo_draining = False
        self._zo_tokenizer: Any = None
        self._zo_tokens = {"training": 0, "serving": 0}
        # The stacked tensors hold the user's slots and ours; the limit for serving adapters stays what the user set.
        self.lora_config: LoRAConfig = copy.copy(vllm_config.lora_config)
        self.lora_config.max_loras -= self.zo_config.total_slots
        self._zo_params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, skip_reading_prefix_cache=True
        )
        if not _HAS_BACKGROUND:
            self._keep_members_out_of_prefix_cache()

    def _keep_members_out_of_prefix_cache(self) -> None:
        """Members have no block hashes; caching their full blocks would index past them (and poison the cache)."""
        coordinator = self.kv_cache_manager.coordinator
        cache_blocks = coordinator.cache_blocks

        def cache_serving_blocks(request: Request, num_computed_tokens: int) -> None:
            if request.client_index != MEMBER_CLIENT:
                cache_blocks(request, num_computed_tokens)

        coordinator.cache_blocks = cache_serving_blocks

    # --- one engine step ------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._abort_orphans()
        may_start = self._pause_state == PauseState.UNPAUSED and not self.zo_draining
        offered = self._offer_members() if may_start else []
        self._forget_stale_kv()  # before vLLM looks up the prefix of any new request
        output = super().schedule(*args, **kwargs)
        self._withdraw(m for m in offered if m.req_id not in output.num_scheduled_tokens)
        self._collect_preempted(output.preempted_req_ids)
        for new in output.scheduled_new_reqs:
            if (member := self._zo_members.get(new.req_id)) is not None:
                new.lora_request = slot_lora_request(member.slot)
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            member = self._zo_members.get(req_id)
            self._zo_tokens["serving" if member is None else "training"] += num_tokens
            if member is not None:
                request = self.requests[req_id]
                done = request.num_computed_tokens >= request.num_prompt_tokens
                self.zo.score(member, request.num_computed_tokens - num_tokens, num_tokens, last_chunk=done)
        if commands := self.zo.take_commands():
            setattr(output, COMMANDS_ATTR, commands)
        elif not output.total_num_scheduled_tokens:
            self.zo.wait_for_rewards(REWARD_POLL_S)
        return output

    def _forget_stale_kv(self) -> None:
        """After a fold, cached KV of the base is stale. While groups are in flight their blocks are in use and the
        cache cannot be reset, but nobody is served either; after the job nothing runs, and the reset comes first."""
        if self.zo.folds_since_reset and not self.running and self.reset_prefix_cache():
            self.zo.folds_since_reset = False

    def _offer_members(self) -> list[Member]:
        serving, members_left = self._demand()
        is_empty = not serving.requests and not members_left
        alone = is_empty and not self.running and not self._zo_preempted and self.zo.can_run_alone
        tokens = self.max_num_scheduled_tokens - members_left
        total = Capacity(
            sequences=UNLIMITED if alone else self.max_num_active_reqs - len(self.running),
            tokens=tokens,
            kv_blocks=UNLIMITED if alone else self._blocks_left(),
        )
        capacity = capacity_for_training(total, serving, self.zo_config.token_budget)
        offered = self.zo.offer(capacity, engine_is_empty=is_empty)
        offered_tokens = sum(len(member.token_ids) for member in offered)
        if alone and offered and offered_tokens <= tokens:
            self.zo.run_alone(offered)
            self._zo_tokens["training"] += offered_tokens
            return []
        for member in offered:
            self._enqueue(member)
        return offered

    def _demand(self) -> tuple[Demand, int]:
        """What serving requests in the queues want from this step, and the tokens left of members being prefilled."""
        requests = tokens = blocks = members_left = 0
        waiting = [*self.waiting, *self.kv_holding_waiting]
        for request in [*self.running, *waiting]:
            left = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
            if request.client_index == MEMBER_CLIENT:
                members_left += max(left, 0)
                continue
            requests += 1
            tokens += max(left, 0)
            blocks += 1 + max(left, 0) // self.block_size
        return Demand(requests, tokens, blocks, waiting=len(waiting)), members_left

    def _blocks_left(self) -> int:
        """KV blocks without those that members which generate will still fill; given to others, they would be
        preempted."""
        to_come = sum(
            -(-(r.num_prompt_tokens + r.max_tokens) // self.block_size) - -(-r.num_computed_tokens // self.block_size)
            for r in self.running
            if r.client_index == MEMBER_CLIENT and r.max_tokens > 1
        )
        return self.kv_cache_manager.block_pool.get_num_free_blocks() - to_come

    def _enqueue(self, member: Member) -> None:
        request = self._zo_preempted.pop(member.req_id, None)
        if request is None:
            request = Request(
                request_id=member.req_id,
                prompt_token_ids=list(member.token_ids),
                sampling_params=self._params_of(member),
                pooling_params=None,
                client_index=MEMBER_CLIENT,
                priority=MEMBER_PRIORITY,
                **({"background": True} if _HAS_BACKGROUND else {}),
            )
        self._zo_members[member.req_id] = member
        self.requests[member.req_id] = request
        self.waiting.add_request(request)

    def _params_of(self, member: Member) -> SamplingParams:
        generation = member.generation
        if generation is None:
            return self._zo_params
        return SamplingParams(
            max_tokens=generation.max_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p if generation.temperature else 1.0,
            seed=member.seed if generation.temperature else None,
            stop_token_ids=list(generation.stop_token_ids),
            detokenize=False,
            skip_reading_prefix_cache=True,
        )

    def _withdraw(self, members: Iterable[Member]) -> None:
        members = list(members)
        if not members:
            return
        self.waiting.remove_requests([self.requests[m.req_id] for m in members])
        for member in members:
            request = self.requests[member.req_id]
            self.deferred_waiting.discard(request)
            del self._zo_members[member.req_id]
            if request.num_preemptions:
                self._zo_preempted[member.req_id] = request
            else:
                del self.requests[member.req_id]
            self.zo.put_back(member)

    def _collect_preempted(self, preempted: Iterable[str] | None) -> None:
        """vLLM put preempted members at the head of the waiting queue, in front of serving requests: take them out.

        A member whose whole prompt had been scheduled is scored already; one that had not runs again.
        """
        for req_id in preempted or ():
            member = self._zo_members.get(req_id)
            if member is None or self.requests[req_id].status != RequestStatus.PREEMPTED:
                continue
            if member.scored:
                super().finish_requests(req_id, RequestStatus.FINISHED_ABORTED)
                del self._zo_members[req_id]
            else:
                self._withdraw([member])

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._collect_generated(outputs)
        for req_id in scheduler_output.num_scheduled_tokens:
            if req_id in self._zo_members and req_id not in self.requests:
                del self._zo_members[req_id]
        self._drop_member_outputs(outputs)
        if (results := getattr(model_runner_output, RESULTS_ATTR, None)) is not None:
            self.zo.on_results(results)
        return outputs

    def _collect_generated(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Hand what members have written to the controller."""
        for output in outputs[MEMBER_CLIENT].outputs if MEMBER_CLIENT in outputs else ():
            member = self._zo_members.get(output.request_id)
            if member is not None and member.generation is not None:
                self.zo.generated(member, output.new_token_ids, finished=output.finish_reason is not None)

    def _drop_member_outputs(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """No client asked for member outputs. Scheduler stats ride on whichever output comes first: keep those."""
        members = outputs.pop(MEMBER_CLIENT, None)
        if members is None or members.scheduler_stats is None:
            return
        if not outputs:
            outputs[0] = EngineCoreOutputs()
        next(iter(outputs.values())).scheduler_stats = members.scheduler_stats

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        finished = super().finish_requests(request_ids, finished_status)
        if self.finished_req_ids_dict is not None:
            self.finished_req_ids_dict.pop(MEMBER_CLIENT, None)
        aborted = [r for r in finished if r.client_index == MEMBER_CLIENT]
        if aborted:
            self._forget_members()
        return [r for r in finished if r.client_index != MEMBER_CLIENT]

    def _forget_members(self) -> None:
        """Members were aborted from outside (pause, shutdown): their group changes nothing and runs again later."""
        left = [req_id for req_id in self._zo_members if req_id in self.requests]
        super().finish_requests(left, RequestStatus.FINISHED_ABORTED)
        self._zo_members.clear()
        self._zo_preempted.clear()
        self.zo.drop_groups()

    def _abort_orphans(self) -> None:
        """Members whose group was dropped (its job was cancelled) must not go on: their slots are given to others."""
        groups = self.zo.open_groups
        running = [r for r, m in self._zo_members.items() if m.group_id not in groups and not m.scored]
        preempted = [r for r in self._zo_preempted if r.rsplit("/", 2)[0] not in groups]
        if running or preempted:
            super().finish_requests([*running, *preempted], RequestStatus.FINISHED_ABORTED)
        for req_id in running:
            del self._zo_members[req_id]
        for req_id in preempted:
            del self._zo_preempted[req_id]

    # --- the engine loop's questions ------------------------------------------------------------------------------

    def has_requests(self) -> bool:
        """Keeps the loop alive for training, and lets it rest while paused: a paused engine must become idle."""
        if super().has_requests():
            return True
        return self._pause_state == PauseState.UNPAUSED and not self.zo_draining and self.zo.has_work()

    def add_request(self, request: Request) -> None:
        self.check_servable(request.lora_request)
        super().add_request(request)

    def check_servable(self, lora_request: LoRARequest | None) -> None:
        """Raise ConfigError for a request that cannot be answered: a `fold` job owns the engine, and the base changes
        under every request; or the adapter is a version that no job has published, which would end the worker."""
        if lora_request is not None and lora_request.lora_path.startswith(ADAPTER_SCHEME):
            self.zo.table.check_published(lora_request.lora_path.removeprefix(ADAPTER_SCHEME))
        if (job := self.zo.table.exclusive) is not None:
            raise ConfigError(
                f"update_space='fold' in job {job.job_id}: the base weights change while it runs, so the engine "
                f"answers no "
                "other requests until it ends. Wait for it, cancel it, or train with update_space='bank'."
            )

    def start_shutdown(self) -> None:
        """The engine drains: a job would keep it busy for ever, so nothing new starts."""
        self.zo_draining = True

    def finish_shutdown(self) -> None:
        """The last step is done, and vLLM has not begun to tear down workers: close the jobs' logs."""
        self.zo.table.close()

    def shutdown(self) -> None:
        self.zo.table.close()
        super().shutdown()

    # --- calls from the front end (EngineCore utility calls) ------------------------------------------------------

    def utility_methods(self) -> dict[str, Callable[..., Any]]:
        return {name: getattr(self, name) for name in UTILITY_METHODS}

    def zo_start(self, job_dir: str) -> dict[str, Any]:
        """Start the job that the front end wrote to `job_dir`; returns its summary."""
        job, recorder, start = load_job(Path(job_dir), self.zo_config, self.vllm_config, self.max_num_active_reqs)
        if job.space == "fold" and self.get_num_unfinished_requests():
            raise ConfigError(
                "update_space='fold' needs the engine to itself and it has unfinished requests: wait for them, or "
                "train "
                "with update_space='bank'."
            )
        if isinstance(job.config.objective, Reward):
            job.rewarder = Rewarder(job.config.objective, self._decode)
        self.zo.start_job(job, recorder, start)
        return job.summary()

    def _decode(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Texts of completions. Called in threads; the front end's own tokenizer may be in use in another."""
        if self._zo_tokenizer is None:
            from vllm.tokenizers import get_tokenizer

            config = self.vllm_config.model_config
            self._zo_tokenizer = get_tokenizer(
                config.tokenizer,
                tokenizer_mode=config.tokenizer_mode,
                revision=config.tokenizer_revision,
                trust_remote_code=config.trust_remote_code,
            )
        return [self._zo_tokenizer.decode(list(ids), skip_special_tokens=True) for ids in completions]

    def zo_status(self, job_id: str, since: int = 0) -> dict[str, Any]:
        return self.zo.table.status(job_id, since)

    def zo_stop(self, job_id: str, cancel: bool) -> None:
        self.zo.finish_early(job_id, cancel=cancel)

    def zo_pause(self, job_id: str) -> None:
        self.zo.table.pause(job_id)

    def zo_resume(self, job_id: str) -> None:
        self.zo.table.resume(job_id)

    def zo_stats(self) -> dict[str, Any]:
        """What `JobTable.stats` knows, and tokens scheduled since the engine started."""
        return {**self.zo.table.stats(), "tokens": dict(self._zo_tokens)}

    def zo_restore_base(self, job_id: str) -> None:
        """Bring the base weights of before the `fold` job back."""
        if self.zo.table.exclusive is None and self.get_num_unfinished_requests():
            raise ConfigError(
                "restore_base changes the weights under unfinished requests: wait for them, or abort them."
            )
        self.zo.request_restore(job_id)


class ZOScheduler(ZOSchedulerMixin, Scheduler):
    """For engines without async scheduling."""


class ZOAsyncScheduler(ZOSchedulerMixin, AsyncScheduler):
    """For engines with async scheduling: the next group is scheduled while this one runs."""


def make_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> SchedulerInterface:
    """What `scheduler_cls` names: the class that fits the engine's scheduling mode (picking the wrong base is slow)."""
    compat.require()
    cls = ZOAsyncScheduler if vllm_config.scheduler_config.async_scheduling else ZOScheduler
    logger.info(
        "zeroth-order training: %s, %d adapter slots",
        cls.__name__,
        ZOTrainingConfig.of_engine(vllm_config.additional_config).total_slots,
    )
    return cls(vllm_config, *args, **kwargs)
