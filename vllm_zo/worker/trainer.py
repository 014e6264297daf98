"""Executes the scheduler's training commands on one rank. One engine step reads top to bottom in `Trainer`:

run(before)         make jobs, fold, open groups, materialise slots        -- then vLLM's own forward runs
score(...)          hidden rows -> cells of the loss tables                -- or score_alone, with a forward of ours
run(after)          close groups: losses -> coefficients -> update; publish, snapshot
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from vllm_zo import noise
from vllm_zo.checkpoint.replay import replay_into
from vllm_zo.checkpoint.seed_log import read_seed_log
from vllm_zo.checkpoint.snapshot import SnapshotInfo, load_snapshot, save_snapshot
from vllm_zo.commands import (
    CloseGroup,
    Command,
    CommandFailed,
    DropGroup,
    Fold,
    Materialise,
    OpenGroup,
    Publish,
    ScoreMember,
    Snapshot,
    StartJob,
    StopJob,
    ZOResults,
)
from vllm_zo.errors import ZOError
from vllm_zo.methods.base import ProbePlan
from vllm_zo.methods.fold import fold_into
from vllm_zo.methods.spaces import basis_of
from vllm_zo.methods.state import AdapterState
from vllm_zo.methods.targets import EMBEDDINGS, LM_HEAD
from vllm_zo.worker.base_weights import BaseWeights, check_writable
from vllm_zo.worker.host_copy import HostCopies, PendingGroup
from vllm_zo.worker.host_memory import TRIM_INTERVAL, give_back_freed_memory
from vllm_zo.worker.modules import Target, find_targets
from vllm_zo.worker.rows import Chunk
from vllm_zo.worker.scoring import Head, LossTable, Present, score_members
from vllm_zo.worker.slots import SlotPool
from vllm_zo.worker.versions import VersionStore, serve_versions

logger = logging.getLogger("vllm.zo.worker")


@dataclass
class JobState:
    """What a rank holds for a job: its fp32 state and the modules it lives in."""

    start: StartJob
    state: AdapterState
    targets: tuple[Target, ...]
    rounds: tuple[ProbePlan, Tensor, Tensor] | None = None
    """Of a step with a round still to come: the first plan, the coefficients so far, whether all was finite."""

    @functools.cached_property
    def kinds(self) -> frozenset[str]:
        """LINEAR, EMBEDDINGS, LM_HEAD: which of them the job trains."""
        return frozenset(target.kind for target in self.targets)

    def take_round(self, plan: ProbePlan, losses_PE: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Losses of a round to coefficients; after the last round of a step, the step. All on the device.

        Returns:
            (K,) float32 coefficients, zeros where a loss of the step was not finite; and whether all were.
        """
        method, finite, first = self.start.method, torch.isfinite(losses_PE).all(), plan
        if plan.round == 0:
            coefficients_K = method.coefficients(plan, losses_PE)
            if (most := self.start.max_coefficient) is not None:
                coefficients_K = coefficients_K.clamp(-most, most)
        else:
            assert self.rounds is not None, "a further round before the first"
            first, coefficients_K, finite_so_far = self.rounds
            finite = finite & finite_so_far
            coefficients_K = method.settle(coefficients_K, plan, losses_PE)
        finite = finite & torch.isfinite(coefficients_K).all()
        coefficients_K = torch.where(finite, coefficients_K, torch.zeros_like(coefficients_K))
        if method.next_round(plan) is None:
            self.state.apply(first, coefficients_K, learning_rate, finite)
        else:
            self.state.propose(first, coefficients_K, learning_rate)
            self.rounds = first, coefficients_K, finite
        return coefficients_K, finite


@dataclass
class OpenedGroup:
    command: OpenGroup
    table: LossTable
    slot_of_probe: dict[int, int] = field(default_factory=dict)


class Trainer:
    """Training state of one worker: jobs, open groups, slots, published versions, base weights."""

    def __init__(self, lora_manager: Any, num_slots: int, head: Head, device: torch.device) -> None:
        self.manager = lora_manager._adapter_manager
        self.pool = SlotPool(lora_manager, num_slots)
        self.head = head
        self.device = device
        self.base = BaseWeights()
        self.jobs: dict[str, JobState] = {}
        self.groups: dict[str, OpenedGroup] = {}
        self.versions = VersionStore(self.pool.dtype, self.pool.exponent)
        self._failed: set[str] = set()
        """Jobs of which a command failed. The scheduler hears of it a step later: groups that close meanwhile are
        dropped, or the state would hold an update that no log has."""
        self._copies = HostCopies(device)
        self._pending: list[PendingGroup] = []
        self._results = ZOResults()
        serve_versions(lora_manager, self.versions)
        self._warm_up()

    @staticmethod
    def _warm_up() -> None:
        """The first noise in a process compiles its kernel (over a second on CPU): not in somebody's request."""
        ranges = noise.ElementRanges.of([("warm-up", 0, 4)])
        noise.normal(0, ranges, "cpu")
        noise.uniform_int32(0, ranges, "cpu")

    # --- commands ---------------------------------------------------------------------------------------------------

    def run(self, commands: Sequence[Command]) -> None:
        """Execute commands in order. One that raises fails its job and is reported; serving goes on."""
        for command in commands:
            job_id = getattr(command, "job_id", None) or self._job_of(command)
            try:
                self.execute(command)
            except ZOError as error:  # a full disk, a quantised layer: the message says all there is to say
                logger.error("%s", error)
                self._fail(job_id, str(error))
            except Exception as error:  # the boundary between a training bug and everybody's server
                logger.exception("training command failed: %s", type(command).__name__)
                self._fail(job_id, f"{type(error).__name__}: {error}")

    def _fail(self, job_id: str, message: str) -> None:
        self._failed.add(job_id)
        self._results.failures.append(CommandFailed(job_id, message))

    def _job_of(self, command: Any) -> str:
        group = self.groups.get(command.group_id)
        return group.command.job_id if group else ""

    @functools.singledispatchmethod
    def execute(self, command: Command) -> None:
        raise TypeError(f"unknown command {command!r}")

    @execute.register
    def _start(self, command: StartJob) -> None:
        self._failed.discard(command.job_id)
        targets = find_targets(self.manager, command.target_modules)
        if command.update_space == "fold":
            for target in targets:
                check_writable(target.module.base_layer, target.shape.name)
        layout = command.method.layout(tuple(t.shape for t in targets))
        state = AdapterState(command.method, layout, command.seed, command.num_bases, self.device)
        self.jobs[command.job_id] = JobState(command, state, targets)
        if command.seed_log is not None:
            self._resume(self.jobs[command.job_id])
        elif command.snapshot is not None:
            self._mark_touched(self.jobs[command.job_id], load_snapshot(command.snapshot, state).step)
        self._results.modules[command.job_id] = list(layout.modules)

    def _resume(self, job: JobState) -> None:
        """Rebuild the state from the log; in `fold` space the base is folded again on the way."""
        assert job.start.seed_log is not None
        log, state, start = read_seed_log(job.start.seed_log), job.state, job.start

        def fold(key: int, basis: int) -> None:
            self._fold_factors(job, basis, state.acc_BN[0], key)

        replay_into(state, log, snapshot=start.snapshot, on_fold=fold if start.update_space == "fold" else None)
        self._mark_touched(job, log.num_steps)

    def _mark_touched(self, job: JobState, num_steps: int) -> None:
        """After loading accumulators: which bases the first `num_steps` steps have touched."""
        epochs = range(job.start.method.epoch(num_steps - 1) + 1) if num_steps else range(0)
        last = epochs[-job.start.num_bases :]
        job.state.mark_touched(last if job.start.update_space == "fold" else {e % job.start.num_bases for e in last})

    @execute.register
    def _stop(self, command: StopJob) -> None:
        self.jobs.pop(command.job_id, None)
        self.pool.evict_owner(command.job_id)
        for group_id in [g for g, opened in self.groups.items() if opened.command.job_id == command.job_id]:
            del self.groups[group_id]
        if command.restore_base:
            logger.info("restored the base weights of %d layers", self.base.restore())

    @execute.register
    def _open(self, command: OpenGroup) -> None:
        table = LossTable.empty(command.examples, len(command.plan.probes), self.device)
        self.groups[command.group_id] = OpenedGroup(command, table)

    @execute.register
    def _drop(self, command: DropGroup) -> None:
        self.groups.pop(command.group_id, None)

    @execute.register
    def _materialise(self, command: Materialise) -> None:
        self.groups[command.group_id].slot_of_probe[command.probe] = command.slot
        opened = self.groups[command.group_id].command
        job = self.jobs[opened.job_id]
        self.pool.materialise(command.slot, opened.job_id, job.state, job.targets, opened.plan, command.probe)
        if job.state.coordinates.in_place:
            self._write_probe(job, opened.plan, command.probe)

    def _write_probe(self, job: JobState, plan: ProbePlan, probe: int) -> None:
        """The base weights of a probe: the original, the update and the perturbation, rounded once."""
        theta_N = job.state.acc_BN[0]
        if plan.probes[probe].sign:
            theta_N = theta_N + job.state.offset(plan, probe)
        parts = zip(job.targets, job.state.coordinates.matrices(theta_N, job.state.layout), strict=True)
        for _, of_layer in itertools.groupby(parts, key=lambda part: id(part[0].module)):
            modules = list(of_layer)
            layer = modules[0][0].module.base_layer
            with self.base.edit(layer) as weight:
                original = self.base.original(layer).to(weight.device)
                for target, change_OI in modules:
                    rows = _slice_rows(target, weight)
                    weight[rows] = original[rows].float() + change_OI[target.out_slice, target.in_slice]

    @execute.register
    def _close(self, command: CloseGroup) -> None:
        opened = self.groups.pop(command.group_id)
        if opened.command.job_id in self._failed:
            return
        plan, job = opened.command.plan, self.jobs[opened.command.job_id]
        if command.cells is not None:
            opened.table.cells_PC.copy_(torch.tensor(command.cells))
        losses, predictions = job.start.objective.loss(opened.table.cells_PC, opened.command.examples)
        coefficients, finite = torch.zeros(0, device=self.device), torch.isfinite(losses).all()
        if command.learning_rate is not None:
            coefficients, finite = job.take_round(plan, losses, command.learning_rate)
            if self.device.type == "cpu" and plan.step % TRIM_INTERVAL == 0:
                give_back_freed_memory()
        self._pending.append(self._copies.start(command.group_id, losses, predictions, coefficients, finite))

    @execute.register
    def _fold(self, command: Fold) -> None:
        job = self.jobs[command.job_id]
        if (taken := job.state.take()) is not None:
            self._fold_factors(job, *taken, command.key)

    def _fold_factors(self, job: JobState, basis: int, acc: Tensor, key: int) -> None:
        """`W += U_acc V^T` in place, layer by layer; a packed layer holds several modules."""
        parts = zip(job.targets, *job.state.factors(basis, acc), strict=True)
        for _, of_layer in itertools.groupby(parts, key=lambda part: id(part[0].module)):
            modules = list(of_layer)
            layer = modules[0][0].module.base_layer
            with self.base.edit(layer) as weight:
                if job.state.coordinates.in_place:  # a probe may still be in it
                    weight.copy_(self.base.original(layer))
                for target, u_OR, v_IR in modules:
                    rows = weight[_slice_rows(target, weight)]
                    if v_IR is None:
                        u, v = u_OR[target.out_slice, target.in_slice], None
                    else:
                        u, v = u_OR[target.out_slice], v_IR[target.in_slice]
                    fold_into(rows, u, v, key, target.shape.name, out=rows)

    @execute.register
    def _publish(self, command: Publish) -> None:
        job = self.jobs[command.job_id]
        self._save(job, command.path, command.version)
        self.versions.publish(command.job_id, command.version, job.state, command.path)

    @execute.register
    def _snapshot(self, command: Snapshot) -> None:
        self._save(self.jobs[command.job_id], command.path, command.step)

    def _save(self, job: JobState, path: str, step: int) -> None:
        if get_tensor_model_parallel_rank() == 0:  # every rank holds the whole fp32 state; one of them writes it
            basis = basis_of(job.start.method, max(step - 1, 0), job.start.update_space, job.start.num_bases)
            save_snapshot(path, job.state, SnapshotInfo(step, basis))

    # --- scoring ----------------------------------------------------------------------------------------------------

    def score(
        self,
        members: Sequence[ScoreMember],
        hidden: Tensor,
        first_row: Mapping[str, int],
        num_tokens: Mapping[str, int],
    ) -> None:
        """Fill the cells of the members that ran in this step.

        Args:
            hidden: (tokens of the step, D) final hidden states.
            first_row, num_tokens: per request id, where its rows start in `hidden` and how many there are.
        """
        present = [
            Present(
                m, self.groups[m.group_id].table, first_row[m.req_id], num_tokens[m.req_id], self._slot_at_the_head(m)
            )
            for m in members
            if m.group_id in self.groups
        ]
        if present:
            with self._failing("scoring", members):
                score_members(self.head, hidden, present)

    def score_alone(self, members: Sequence[ScoreMember], forward: Callable[[list[Chunk], list[int]], Tensor]) -> None:
        """Run whole members and fill their cells.

        Args:
            forward: (sequences, slot of each among all of vLLM's) -> (tokens, D) final hidden states.
        """
        dropped = {"", *self._failed}
        members = [m for m in members if self._job_of(m) not in dropped]
        if not members:
            return
        with self._failing("the forward of members", members):
            slots = [self._slot_of(m) for m in members]
            for slot in set(slots):
                self.pool.check_materialised(slot)
            num_tokens = {m.req_id: len(self.groups[m.group_id].table.rows[m.row].token_ids) for m in members}
            first_row = dict(zip(num_tokens, itertools.accumulate(num_tokens.values(), initial=0), strict=False))
            chunks = self.chunks(members, num_tokens, list(num_tokens))
            hidden = forward(chunks, [self.pool.first + slot for slot in slots])
            self.score(members, hidden, first_row, num_tokens)

    @contextmanager
    def _failing(self, what: str, members: Sequence[ScoreMember]) -> Iterator[None]:
        """An exception in the block fails the jobs of these members, as in `run`."""
        try:
            yield
        except Exception as error:
            logger.exception("%s failed", what)
            for job_id in {self._job_of(m) for m in members} - {""}:
                self._fail(job_id, f"{type(error).__name__}: {error}")

    def _slot_at_the_head(self, member: ScoreMember) -> int | None:
        """Index among all slots of a member's adapter, if its job trains the LM head."""
        trained = self.jobs[self._job_of(member)].kinds
        return self.pool.first + self._slot_of(member) if LM_HEAD in trained else None

    def _slot_of(self, member: ScoreMember) -> int:
        """Of the pool's slots, the one that holds a member's adapter."""
        return self.groups[member.group_id].slot_of_probe[member.probe]

    def chunks(
        self, members: Sequence[ScoreMember], num_tokens: Mapping[str, int], req_ids: Sequence[str]
    ) -> list[Chunk]:
        """The rows of this step, request by request as they lie in the batch."""
        by_id = {m.req_id: m for m in members}
        return [self._chunk(by_id.get(req_id), num_tokens.get(req_id, 0)) for req_id in req_ids]

    def _chunk(self, member: ScoreMember | None, count: int) -> Chunk:
        opened = self.groups.get(member.group_id) if member is not None else None
        if member is None or opened is None:
            return Chunk(count)
        row, start = opened.table.rows[member.row], member.num_computed_tokens
        state = member.group_id, member.probe
        return Chunk(
            count,
            state=state,
            embedded_by=state if EMBEDDINGS in self.jobs[opened.command.job_id].kinds else None,
            token_ids=row.token_ids[:count] if start == 0 else (),
            targets=[position - start for position in row.positions if 0 <= position - start < count],
            whole=count == len(row.token_ids),
        )

    def take_results(self) -> tuple[list[PendingGroup], ZOResults]:
        """What this step answers; the pending part is resolved when the output is read."""
        taken = self._pending, self._results
        self._pending, self._results = [], ZOResults()
        return taken


def _slice_rows(target: Target, weight: Tensor) -> slice:
    """Rows of a packed layer's weight that belong to one Hugging Face module."""
    sizes = target.module.output_slices
    start = sum(sizes[: target.slice_index])
    return slice(start, start + sizes[target.slice_index])
