"""vLLM's scheduler with perturbation groups beside ordinary requests.

Members are ordinary `Request`s with `client_index` -1. They stay in vLLM's waiting queue only during `schedule()`: we
put them at its tail, behind all serving requests, and withdraw those that vLLM did not schedule. Inside the scheduler
they carry no LoRA request, so they do not count against the limit for serving adapters. `schedule` attaches the slot's
LoRA request to the `SchedulerOutput` on its way out.

When the engine has nothing else to do and the workers can, members are not requests at all: the workers run them whole,
in a forward of their own. That saves vLLM's work for each request.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState, SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_zo import compat
from vllm_zo.checkpoint.adapter_files import check_adapter
from vllm_zo.commands import (
    ADAPTER_SCHEME,
    COMMANDS_ATTR,
    PROBE_SCHEME,
    RESULTS_ATTR,
    SLOT_LORA_ID_BASE,
    UTILITY_METHODS,
    Alone,
)
from vllm_zo.compat import engine_core
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.doorbell import Doorbell
from vllm_zo.engine.admission import UNLIMITED, Capacity, Demand, capacity_for_training
from vllm_zo.engine.calls import Calls
from vllm_zo.engine.controller import Controller
from vllm_zo.engine.group import Member, Phase
from vllm_zo.engine.load_job import EngineFacts
from vllm_zo.engine.member_requests import MEMBER_CLIENT, MemberRequests
from vllm_zo.engine.pacing import EngineStep
from vllm_zo.engine.probe_requests import ProbeRequests
from vllm_zo.engine.throttle import Throttle
from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import ScoringSequence

logger = init_logger("vllm.zo.scheduler")

FINISHED_ABORTED = RequestStatus.FINISHED_ABORTED
IDLE_POLL_S = 1e-3
"""How long the engine loop waits at a time for rewards, or for space on a full disk. A request that arrives meanwhile
waits at most as long. vLLM sleeps the same 1 ms after a step that executed no model."""


def slot_lora_request(slot: int) -> LoRARequest:
    """The synthetic LoRA request of a ZO slot.

    A slot keeps its name while its content changes. That is safe because the prefix cache, which tells adapters apart
    by name, never sees the name (`member_requests.py`).
    """
    return LoRARequest(f"zo-slot-{slot}", SLOT_LORA_ID_BASE + slot, f"zo-slot://{slot}")


_Base: Any = object
"""Stands for Scheduler or AsyncScheduler: the mixin precedes either one in the order of base classes."""


def _is_of_probe(request: Request) -> bool:
    """Whether a rollout of training asks."""
    return request.lora_request is not None and request.lora_request.lora_path.startswith(PROBE_SCHEME)


def _is_directory(path: Path) -> bool:
    """Whether a LoRA path names a directory, as vLLM reads it: anything else is the name of a Hub repository."""
    return path.is_absolute() or path.exists()


def _workers_can_stop(vllm_config: VllmConfig) -> bool:
    """Whether there is one worker, on this machine, and no step is scheduled before the one that runs has ended.
    Several would stop at different layers, and wait for each other for ever."""
    parallel = vllm_config.parallel_config
    here = parallel.world_size == 1 and parallel.distributed_executor_backend in ("uni", "mp")
    return here and not vllm_config.scheduler_config.async_scheduling and Doorbell.possible


class ZOSchedulerMixin(_Base):
    """Adds perturbation groups to whichever scheduler vLLM would have used."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.zo_config = ZOTrainingConfig.of_engine(vllm_config.additional_config)
        self.zo = Controller(
            self.zo_config.slots, self.block_size, self.zo_config.concurrent_jobs, self._versions_in_use
        )
        # vLLM 0.30 keeps every request that it passed over in one queue, and limits running requests only.
        if not hasattr(self, "kv_holding_waiting"):
            self.kv_holding_waiting = self.skipped_waiting
            self.deferred_waiting: set[Request] = set()
            self.max_num_active_reqs = self.max_num_running_reqs
        self._zo_members: dict[str, Member] = {}
        """Request id -> member, for members whose request vLLM holds, running or preempted (`member.request`)."""
        self._zo_probes = ProbeRequests()
        self._zo_ended: list[tuple[int, EngineCoreOutput]] = []
        """(client, output) of requests that this scheduler has ended, until they ride on the outputs of a step."""
        self.zo_draining = False
        self.zo_loop_waits = False
        """Whether the engine loop waits by itself while `zo_waits` (compat/engine_core.py WAITING)."""
        self.zo_tokens = {"training": 0, "serving": 0}
        """Scheduled since the engine started."""
        # With async scheduling vLLM schedules a step before the one that runs has ended, and so it does with stages.
        self._zo_stages: int = vllm_config.parallel_config.pipeline_parallel_size
        ahead = max(int(vllm_config.scheduler_config.async_scheduling), self._zo_stages - 1)
        self.zo_throttle = Throttle(self.zo_config, steps_ahead=ahead)
        self._doorbell = Doorbell() if self.zo_throttle.yields and _workers_can_stop(vllm_config) else None
        """Rings while a request comes; None where the workers could not stop for it."""
        self.zo_calls = Calls(self)
        """What a front end may ask."""
        self._steps: deque[tuple[SchedulerOutput, EngineStep]] = deque()
        """Scheduled steps that have not ended."""
        # The workers stack the user's slots and ours. vLLM's scheduler limits serving adapters by this `max_loras`, so
        # it must be the user's number. A copy: the workers size their tensors by the original.
        self.lora_config: LoRAConfig = copy.copy(vllm_config.lora_config)
        self.lora_config.max_loras -= self.zo_config.total_slots
        hashed = getattr(self, "hash_block_size", None) or self.block_size  # vLLM 0.30 has one size
        self._zo_requests = MemberRequests(vllm_config, self.kv_cache_manager.coordinator, hashed)

    # --- one engine step ------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        step = EngineStep(start=time.monotonic())
        # First: `_offer_members` may give the slots of a group that has ended to another one.
        self._abort_orphans()
        self._end_probe_requests()
        may_start = self._pause_state == PauseState.UNPAUSED and not self.zo_draining
        offered: list[Member] = []
        if self.zo.stopped and not may_start:
            step.training = step.left = self.zo.forward.left
            self.zo.run_layers(Alone())  # nothing may stay under way in an engine that pauses or ends
        elif self.zo.stopped:
            self._run_layers(step, self._credit_beside(self._demand()[0]))
        elif may_start:
            offered = self._offer_members(step)
        self._forget_stale_kv()  # before vLLM looks up the prefix of any new request
        last_prefill = getattr(self, "last_prefill_step", None)
        output = super().schedule(*args, **kwargs)
        self._withdraw(m for m in offered if m.req_id not in output.num_scheduled_tokens)
        # Before commands are taken: a member that was preempted has lost its KV, and its group must not close.
        self._collect_preempted(output.preempted_req_ids)
        # Only now: inside vLLM's scheduler this LoRA request would count as a serving adapter.
        for new in output.scheduled_new_reqs:
            if (member := self._zo_members.get(new.req_id)) is not None:
                new.lora_request = slot_lora_request(member.slot)
            elif new.req_id in self._zo_probes:
                new.lora_request = slot_lora_request(self._zo_probes.slot_of(new.req_id))
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            if req_id in self._zo_probes:
                self._zo_probes.scheduled(req_id, num_tokens)
                step.training += num_tokens
                continue
            if (member := self._zo_members.get(req_id)) is None:
                self._note_serving(step, self.requests[req_id], num_tokens)
                continue
            step.training += num_tokens
            computed = member.request.num_computed_tokens  # vLLM has added this step's tokens already
            done = computed >= member.request.num_prompt_tokens
            self.zo.score(member, computed - num_tokens, num_tokens, last_chunk=done)
        if last_prefill is not None and not step.prefill:
            # With `prefill_schedule_interval` vLLM 0.33 holds prompts back for some steps after each step with one.
            # Members must not count: there would always be some, and requests would wait out every interval.
            self.last_prefill_step = last_prefill
        self._begin_step(step, output)
        if commands := self.zo.take_commands():
            setattr(output, COMMANDS_ATTR, commands)
        elif not output.total_num_scheduled_tokens:
            # Training keeps `has_requests` true: without a wait this loop would spin beside the reward threads.
            self.zo_wait()
        return output

    def _note_serving(self, step: EngineStep, request: Request, num_tokens: int) -> None:
        if num_tokens == 1:
            step.decode += 1
        else:
            step.prefill += num_tokens
        before = request.num_computed_tokens - num_tokens
        if before < request.num_prompt_tokens <= request.num_computed_tokens and not request.num_output_tokens:
            # vLLM's time of arrival is the time of day.
            step.arrived.append(step.start - (time.time() - request.arrival_time))

    def _begin_step(self, step: EngineStep, output: SchedulerOutput) -> None:
        self.zo_tokens["serving"] += step.decode + step.prefill
        self.zo_throttle.begun(step, self._largest_unit() + self._promised())
        self._steps.append((output, step))

    def _end_step(self, output: SchedulerOutput) -> None:
        """vLLM ends steps in their order. One that failed never ends."""
        while self._steps:
            scheduled, step = self._steps.popleft()
            if scheduled is output:
                if step.left:
                    step.training = step.left - (self.zo.forward.left if self.zo.stopped else 0)
                self.zo_tokens["training"] += step.training
                self.zo_throttle.ended(step)
                return

    def _forget_stale_kv(self) -> None:
        """Reset the prefix cache after a fold: the KV that it holds was computed with the old base weights.

        vLLM cannot reset it while members run, because their blocks are in use. That does no harm: during a `fold` job
        the engine serves no requests. After it nothing runs, and the reset comes before the next request's look-up.
        """
        if self.zo.folds_since_reset and not self.running and self.reset_prefix_cache():
            self.zo.folds_since_reset = False

    def _offer_members(self, step: EngineStep) -> list[Member]:
        serving, members_left = self._demand()
        credit = self._credit_beside(serving)
        # `_zo_members` holds preempted members, too: run alone, such a member would leave its request in vLLM for ever.
        alone = self.zo.can_run_alone and not members_left and not self._zo_members
        if not self._stops:
            alone = alone and not serving.requests and not self.running
        tokens = self.max_num_scheduled_tokens - members_left
        if alone or not serving.requests:
            tokens = min(tokens, self._most_alone() - members_left)
        if alone:
            # They use neither vLLM's sequences nor its KV blocks, and the credit pays for them layer by layer.
            begins = credit >= max(self.zo.smallest_unit, 1)
            capacity = Capacity(UNLIMITED, tokens, UNLIMITED, UNLIMITED if begins else 0)
        else:
            total = Capacity(self.max_num_active_reqs - len(self.running), tokens, self._blocks_left(), credit)
            capacity = capacity_for_training(total, serving)
        offered = self.zo.offer(
            capacity,
            in_chunks_beyond=UNLIMITED if members_left else self.max_num_scheduled_tokens,
            serving=serving.requests > 0,
            may_begin=self.zo_throttle.closed is None,
        )
        # A unit that is too large for one step goes to vLLM instead, which prefills it in chunks. So does one that
        # writes after all: the job was stopped a moment ago, and evaluates.
        fits = sum(len(member.token_ids) for member in offered) <= tokens
        if alone and offered and fits and all(member.generation is None for member in offered):
            self.zo.run_alone(offered)
            self._run_layers(step, credit)
            return []
        for member in offered:
            self._enqueue(member)
        return offered

    def _credit_beside(self, serving: Demand) -> int:
        """Training tokens that may begin in this step."""
        if not serving.requests:
            return UNLIMITED
        largest, promised = self._largest_unit(), self._promised()
        return self.zo_throttle.beside(
            promised=promised, largest=largest, first_tokens=serving.first_tokens, apart=self._stops
        )

    def _largest_unit(self) -> int:
        """Tokens of the largest unit that waits: a layer of a forward that has stopped is one."""
        return max(self.zo.largest_unit, self.zo.forward.next if self.zo.stopped else 0)

    def _run_layers(self, step: EngineStep, credit: int) -> None:
        """Let the workers run a forward of members alone, or go on with it, by as many layers as the credit pays for.

        Args:
            credit: UNLIMITED: to its end, unless a request comes.
        """
        forward = self.zo.forward
        step.training = step.left = forward.left
        layers = None
        if credit < UNLIMITED:
            layers = forward.within(credit)
            step.training = forward.cost(layers)
        self.zo.run_layers(Alone(self._listening(), layers))

    def _listening(self) -> str | None:
        """Where the workers look whether a request has come, in the step that is about to begin."""
        if self._doorbell is None:
            return None
        self._doorbell.renew()
        return self._doorbell.path

    def _most_alone(self) -> int:
        """Tokens that an engine step without requests may hold, or a forward that stops between layers."""
        rows = self.zo.layer_rows
        return self.zo_throttle.alone(self.zo.smallest_unit, sum(rows) / max(rows) if self._stops else None)

    @property
    def _stops(self) -> bool:
        """Whether a forward of the members that may be offered stops between layers."""
        return self._doorbell is not None and self.zo.can_run_alone and self.zo.layers_alone > 1

    def _demand(self) -> tuple[Demand, int]:
        """What serving requests want from this step, and how many tokens members and rollouts still want."""
        requests = tokens = blocks = members_left = 0
        first_tokens = False
        waiting = [*self.waiting, *self.kv_holding_waiting]
        for request in [*self.running, *waiting]:
            # As `Scheduler.schedule` counts the next tokens of a request.
            left = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
            if request.client_index == MEMBER_CLIENT or request.request_id in self._zo_probes:
                members_left += max(left, 0)
                continue
            requests += 1
            tokens += max(left, 0)
            first_tokens |= request.num_computed_tokens < request.num_prompt_tokens
            blocks += 1 + max(left, 0) // self.block_size  # enough wherever in a block the tokens begin
        return Demand(requests, tokens, blocks, len(waiting), first_tokens), members_left

    def _promised(self) -> int:
        """Tokens that running members may still use."""
        return sum(
            max(r.num_prompt_tokens + r.max_tokens - 1 - r.num_computed_tokens, 0)
            for r in self.running
            if r.client_index == MEMBER_CLIENT
        )

    def _blocks_left(self) -> int:
        """Free KV blocks minus those that running members still need for what they generate. Giving those away would
        get the members preempted."""
        to_come = sum(
            -(-(r.num_prompt_tokens + r.max_tokens) // self.block_size) - -(-r.num_computed_tokens // self.block_size)
            for r in self.running
            if r.client_index == MEMBER_CLIENT and r.max_tokens > 1
        )
        return self.kv_cache_manager.block_pool.get_num_free_blocks() - to_come

    def _enqueue(self, member: Member) -> None:
        if member.request is None:
            member.request = self._zo_requests.make(member)
        self._zo_members[member.req_id] = member
        self.requests[member.req_id] = member.request
        self.waiting.add_request(member.request)

    def _withdraw(self, members: Iterable[Member]) -> None:
        members = list(members)
        if not members:
            return
        self.waiting.remove_requests([m.request for m in members])
        for member in members:
            self.deferred_waiting.discard(member.request)
            if not member.request.num_preemptions:  # a preempted one keeps its request: it has written tokens
                self._forget(member)
                # Not by `finish_requests`: vLLM would tell the workers that a request ended which they never had.
                del self.requests[member.req_id]
            member.group.put_back(member)

    def _forget(self, member: Member) -> None:
        """Note that vLLM holds no request of the member any more."""
        del self._zo_members[member.req_id]
        member.request = None

    def _collect_preempted(self, preempted: Iterable[str] | None) -> None:
        """Take preempted members out of the waiting queue: vLLM puts them at its head, in front of serving requests.

        A member whose whole prompt was scheduled is scored already and ends here; any other runs again.
        """
        for req_id in preempted or ():
            member = self._zo_members.get(req_id)
            if member is None or member.request.status != RequestStatus.PREEMPTED:
                continue
            if member.scored:
                super().finish_requests(req_id, FINISHED_ABORTED)
                self._forget(member)
            else:
                self._withdraw([member])

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._collect_generated(outputs)  # before finished members are forgotten: it finds them by request id
        for req_id in scheduler_output.num_scheduled_tokens:
            if (member := self._zo_members.get(req_id)) is not None and req_id not in self.requests:
                self._forget(member)
        self._drop_member_outputs(outputs)
        for client, ended in self._zo_ended:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(ended)
        self._zo_ended.clear()
        if (results := getattr(model_runner_output, RESULTS_ATTR, None)) is not None:
            self.zo.on_results(results)
        self._end_step(scheduler_output)
        return outputs

    def _collect_generated(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Hand the tokens that members have written to the controller; it wants none of a dropped group."""
        for output in outputs[MEMBER_CLIENT].outputs if MEMBER_CLIENT in outputs else ():
            member = self._zo_members.get(output.request_id)
            if member is not None and member.generation is not None and member.group.phase is Phase.OPEN:
                self.zo.generated(member, output.new_token_ids, finished=output.finish_reason is not None)

    def _drop_member_outputs(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Take the members' outputs away, but not the statistics that vLLM puts on the first client's outputs.

        vLLM's output thread sends what is for client -1 to the data-parallel coordinator; without one it fails.
        """
        members = outputs.pop(MEMBER_CLIENT, None)
        if members is None or members.scheduler_stats is None:
            return
        if not outputs:
            outputs[0] = EngineCoreOutputs()
        next(iter(outputs.values())).scheduler_stats = members.scheduler_stats

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        finished = super().finish_requests(request_ids, finished_status)
        # vLLM tells the clients of what it aborted (a set of finished ids, an output each); a member has no client.
        if self.finished_req_ids_dict is not None:
            self.finished_req_ids_dict.pop(MEMBER_CLIENT, None)
        aborted = [r for r in finished if r.client_index == MEMBER_CLIENT]
        if aborted or (request_ids is None and self._zo_probes):
            self._forget_members()
        return [r for r in finished if r.client_index != MEMBER_CLIENT]

    def _forget_members(self) -> None:
        """Drop the open groups after vLLM aborted members (pause, shutdown). Their work runs again later."""
        self._abort([member for member in self._zo_members.values() if member.req_id in self.requests])
        self._zo_members.clear()
        self.zo.drop_groups()

    def _abort_orphans(self) -> None:
        """Abort members whose group was dropped. A scored one does not need its slot any more and ends by itself."""
        self._abort([m for m in self._zo_members.values() if m.group.phase is Phase.DROPPED and not m.scored])

    def _abort(self, members: list[Member]) -> None:
        if not members:
            return
        super().finish_requests([member.req_id for member in members], FINISHED_ABORTED)
        for member in members:
            self._forget(member)

    def _end_probe_requests(self) -> None:
        """Abort requests whose probe answers no more, tell their clients, and forget the blocks of dead probes."""
        self._zo_probes.let_go(self.requests)
        orphans = self._zo_probes.orphans()
        for request in super().finish_requests([request.request_id for request in orphans], FINISHED_ABORTED):
            reason = "the group of this probe has closed"
            ended = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=reason)
            self._zo_ended.append((request.client_index, ended))
        self._zo_probes.let_go(self.requests)
        pool = self.kv_cache_manager.block_pool
        for block_hash in self._zo_probes.dead_blocks():
            for kind in range(len(self.kv_cache_config.kv_cache_groups)):
                # Several blocks can have one hash: those of requests that ran at the same time.
                while blocks := pool.get_cached_block(block_hash, [kind]):
                    pool.evict_blocks({block.block_id for block in blocks})

    # --- the engine loop's questions ------------------------------------------------------------------------------

    def has_requests(self) -> bool:
        """Keep the engine loop stepping for training. Not while paused, but for a forward that has stopped: vLLM waits
        for a paused engine to be idle."""
        if super().has_requests() or self.zo.stopped:
            return True
        may_train = self._pause_state == PauseState.UNPAUSED and not self.zo_draining
        return may_train and self.zo.has_work(may_begin=self.zo_throttle.closed is None) and not self.zo_waits

    @property
    def zo_waits(self) -> bool:
        """Whether no engine step would bring anything before a reward or space on a full disk comes, or members may
        start: the rate of requests that holds them back falls with time."""
        if not self.zo_loop_waits or super().has_requests():
            return False
        return self.zo.waits(self._most_alone())

    def zo_wait(self) -> None:
        """Wait `IDLE_POLL_S` at most, while training can only wait."""
        self.zo.wait_idle(IDLE_POLL_S)

    def zo_coming(self, request: Request) -> None:
        """Tell the workers that a request comes. The engine's input thread calls this, before `add_request`."""
        if self._doorbell is not None and not _is_of_probe(request):
            self._doorbell.ring()

    def add_request(self, request: Request) -> None:
        adapter = request.lora_request
        if adapter is not None and _is_of_probe(request):
            # No `check_servable`: a `fold` job lets no other requests in, but those of its own rollouts.
            self._zo_probes.take(request, *self.zo.find_probe(adapter.lora_path))
        else:
            if self._doorbell is not None:
                self._doorbell.answer()
            self.check_servable(adapter)
            self.zo_throttle.arrived()
        super().add_request(request)

    def check_servable(self, lora_request: LoRARequest | None) -> None:
        """Refuse a request that the engine cannot answer.

        Raises:
            ConfigError: a `fold` job has the engine to itself; no job has published the version that the request
                names; or the files of its adapter are damaged, which would end the worker.
        """
        if lora_request is not None and lora_request.lora_path.startswith(ADAPTER_SCHEME):
            self.zo.queue.check_published(lora_request.lora_path.removeprefix(ADAPTER_SCHEME))
        elif lora_request is not None and _is_directory(path := Path(lora_request.lora_path).expanduser()):
            check_adapter(path)
        if (job := self.zo.queue.exclusive) is not None:
            raise ConfigError(
                f"update_space='fold' in job {job.job_id}: the base weights change while it runs, so the engine "
                "answers no other requests until it ends. Wait for it, cancel it, or train with update_space='bank'."
            )

    def _versions_in_use(self) -> list[str]:
        """The published versions, <job_id>/<step>, that unfinished requests name. Those that run count too: vLLM may
        have to load their adapter again."""
        paths = [request.lora_request.lora_path for request in self.requests.values() if request.lora_request]
        return [path.removeprefix(ADAPTER_SCHEME) for path in paths if path.startswith(ADAPTER_SCHEME)]

    def start_shutdown(self) -> None:
        """Start no new group: a draining engine ends when it has no work, and a job would give it work for ever."""
        self.zo_draining = True

    def finish_shutdown(self) -> None:
        """Close the jobs' logs. Called after the last step and before vLLM tears down the workers, for which it allows
        a few seconds only."""
        self.zo.queue.close()

    def shutdown(self) -> None:
        self.zo.queue.close()  # an engine in this process ends without `finish_shutdown`
        super().shutdown()

    # --- jobs that come ---------------------------------------------------------------------------------------------

    def utility_methods(self) -> dict[str, Callable[..., Any]]:
        """Name -> method, for every method that a front end may call."""
        return {name: getattr(self.zo_calls, name) for name in UTILITY_METHODS}

    @property
    def zo_facts(self) -> EngineFacts:
        """What a job must know of this engine."""
        model, workers = self.vllm_config.model_config, self.vllm_config.parallel_config.world_size
        return EngineFacts.of(self.zo_config, model, self.max_num_active_reqs, self._zo_stages, workers)

    def zo_read(self, continued: ScoringSequence, completion: Sequence[int]) -> str:
        """The text of a member's completion; the reward threads call it."""
        return self._zo_requests.text(continued, completion)


class ZOScheduler(ZOSchedulerMixin, Scheduler):
    """For engines without async scheduling."""


class ZOAsyncScheduler(ZOSchedulerMixin, AsyncScheduler):
    """For engines with async scheduling: the next group is scheduled while this one runs."""


def make_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> SchedulerInterface:
    """Make the scheduler; the engine's `scheduler_cls` names this function.

    The base class must fit the engine's scheduling mode. The synchronous one under async scheduling would schedule a
    request's next token only after the output of the one before.
    """
    # `VLLM_PLUGINS` may leave our plugin out, so the scheduler applies the patches that it needs by itself.
    compat.require(engine_core.install)
    cls = ZOAsyncScheduler if vllm_config.scheduler_config.async_scheduling else ZOScheduler
    logger.info(
        "zeroth-order training: %s, %d adapter slots",
        cls.__name__,
        ZOTrainingConfig.of_engine(vllm_config.additional_config).total_slots,
    )
    return cls(vllm_config, *args, **kwargs)
