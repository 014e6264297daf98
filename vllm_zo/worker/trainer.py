"""Executes the scheduler's training commands in one worker of an engine. A step of the engine runs in this order:

run(before)         make jobs, fold, open groups, materialise slots        -- then vLLM's own forward runs
score(...)          hidden rows -> cells of the loss tables
run(after)          close groups: losses -> coefficients -> update; publish, snapshot

Where members run alone, `run_alone` does what follows `run(before)`. Its forward may stop between layers; `go_on` in a
later step does the rest.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

from vllm_zo import noise
from vllm_zo.checkpoint.hf_checkpoint import check_modules
from vllm_zo.checkpoint.replay import apply_record, replay_into
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot, save_snapshot
from vllm_zo.commands import (
    ApplyRecord,
    CloseGroup,
    Command,
    CommandFailed,
    Drift,
    DropGroup,
    Fold,
    ForgetRows,
    ForgetVersions,
    Materialise,
    MeasureV,
    OpenGroup,
    Publish,
    ReportCells,
    ReportDigest,
    ScoreMember,
    SizeU,
    Snapshot,
    StartJob,
    StateDigest,
    StopJob,
    Unpublish,
    Unpublished,
    ZOResults,
)
from vllm_zo.errors import JobError, ZOError
from vllm_zo.job_memory import check_state, free_on
from vllm_zo.methods import drift
from vllm_zo.methods.adapter import whole_adapter
from vllm_zo.methods.decide import decide
from vllm_zo.methods.layers import layer_of
from vllm_zo.methods.leading import Inputs
from vllm_zo.methods.plan import ProbePlan
from vllm_zo.methods.state import BASIS_STREAM, AdapterState, regenerates
from vllm_zo.methods.targets import EMBEDDINGS, LINEAR, LM_HEAD, kind_of
from vllm_zo.methods.written import row_sizes
from vllm_zo.upload import upload
from vllm_zo.worker.base_weights import check_writable
from vllm_zo.worker.head import Head
from vllm_zo.worker.host_copy import Pending, PendingCells, PendingGroup
from vllm_zo.worker.lora_targets import Module, ModuleNames, Target, choose, find_targets
from vllm_zo.worker.loss_table import LossTable
from vllm_zo.worker.platform import Chunk, ForwardAlone, Platform
from vllm_zo.worker.published import VersionStore, serve_versions
from vllm_zo.worker.scoring import Present, score_members, scored_rows
from vllm_zo.worker.slots import SlotPool
from vllm_zo.worker.unmoved import UnmovedWords

logger = logging.getLogger("vllm.zo.worker")


@dataclass
class JobState:
    """What each worker holds for a job: the whole float32 state, and its part of the modules."""

    start: StartJob
    state: AdapterState
    targets: tuple[Target, ...]
    inputs: Inputs | None = None
    """What enters the LM head, while the job measures its V."""
    unmoved: UnmovedWords | None = None
    """What is kept of the words that the job does not move."""

    @functools.cached_property
    def kinds(self) -> frozenset[str]:
        """Which of LINEAR, EMBEDDINGS and LM_HEAD the job trains."""
        return frozenset(target.kind for target in self.targets)

    @functools.cached_property
    def first_layer(self) -> int:
        """Number of the first layer that the job changes: 0 if it changes the embeddings too, and a number beyond all
        layers if it changes the LM head only."""
        if EMBEDDINGS in self.kinds:
            return 0
        numbers = (layer_of(target.shape.name) for target in self.targets)
        return min((number for number in numbers if number is not None), default=sys.maxsize)


@dataclass
class OpenedGroup:
    """A group whose members are being scored."""

    command: OpenGroup
    table: LossTable
    slot_of_probe: dict[int, int] = field(default_factory=dict)
    """Probe -> index among the pool's slots."""
    inputs: dict[tuple[int, int], Tensor] | None = None
    """(sequence, its first token of the step) -> (T, I) what enters the head; None: the group does not measure it."""


@dataclass
class Unfinished:
    """Members in a forward of their own that has not ended, and what comes after it."""

    members: Sequence[ScoreMember]
    num_tokens: dict[str, int]
    """Request id -> tokens, in the order of the rows."""
    forward: ForwardAlone
    after: Sequence[Command]


class Trainer:
    """Training state of one worker: jobs, open groups, slots, published versions, base weights.

    Args:
        lora_manager: vLLM's `LRUCacheWorkerLoRAManager`.
        num_slots: slots of the stacked LoRA tensors that belong to training.
        modules: of the whole model, those that a job can choose.
        head: scores members; None on a pipeline stage that is not the last.
        platform: of this worker.
        model: the engine's model, a directory or a name.
    """

    def __init__(
        self,
        lora_manager: Any,
        num_slots: int,
        modules: Sequence[Module],
        head: Head | None,
        platform: Platform,
        model: str,
    ) -> None:
        self.model = model
        self.manager = lora_manager._adapter_manager  # private, and the only way to the LoRA layers
        self.pool = SlotPool(lora_manager, num_slots, platform.slot_writer, self._forget_states)
        self.modules, self.head = modules, head
        self.platform = platform
        self.device = platform.device
        self.base = platform.base_weights()
        self.jobs: dict[str, JobState] = {}
        self.groups: dict[str, OpenedGroup] = {}
        self.versions = VersionStore(self.pool.dtype, self.pool.exponent, ModuleNames.of_model(self.manager.model))
        self._failed: set[str] = set()
        """Jobs with a command that failed. The scheduler learns of a failure a step later. Groups that close before are
        dropped, or the state would hold an update that no log has."""
        self._unfinished: Unfinished | None = None
        self._pending: list[Pending] = []
        self._results = ZOResults()
        serve_versions(lora_manager, self.versions)
        noise.warm_up()

    # --- commands ---------------------------------------------------------------------------------------------------

    def run(self, commands: Sequence[Command]) -> None:
        """Execute commands in order. A command that raises fails its job, and the scheduler learns of it; serving goes
        on."""
        for command in commands:
            try:
                self.execute(command)
            except ZOError as error:  # for example a full disk or a quantised layer: the message says enough
                logger.error("%s", error)
                self._fail(command.job_id, str(error))
            except Exception as error:  # of any kind: a bug in training must not end a server that others use
                logger.exception("training command failed: %s", type(command).__name__)
                self._fail(command.job_id, f"{type(error).__name__}: {error}")

    def _fail(self, job_id: str, message: str) -> None:
        self._failed.add(job_id)
        self._results.failures.append(CommandFailed(job_id, message))

    @functools.singledispatchmethod
    def execute(self, command: Command) -> None:
        """Execute one command; `singledispatchmethod` chooses the method below by the command's class.

        Raises:
            TypeError: no method is registered for the class.
        """
        raise TypeError(f"unknown command {command!r}")

    @execute.register
    def _start(self, command: StartJob) -> None:
        # A job that failed may be started again under its id, to go on from its log.
        self._failed.discard(command.job_id)
        shapes = choose(self.modules, command.target_modules, command.target_layers)
        targets = find_targets(self.manager, shapes)
        if command.trains:
            check_modules((shape.name for shape in shapes if kind_of(shape.name) == LINEAR), self.model)
        if command.update_space == "fold":
            for target in targets:
                check_writable(target.module.base_layer, target.shape.name)
            self._forget_states()
        layout = command.method.layout(shapes)
        # Before anything is allocated: a process that runs out of memory takes the server with it.
        check_state(
            command.method,
            layout.modules,
            command.num_bases,
            free_on(self.device),
            regenerates=regenerates(command.method.coordinates, self.device.type),
        )
        state = AdapterState(command.method, layout, command.seed, command.num_bases, self.device)
        self.jobs[command.job_id] = JobState(command, state, targets)
        if command.seed_log is not None:
            self._resume(self.jobs[command.job_id])
        elif command.snapshot is not None:
            load_snapshot(command.snapshot, state)
        for version, path in command.versions.items():
            self.versions.know(command.job_id, version, state, path)
        self._results.modules[command.job_id] = list(layout.modules)

    def _resume(self, job: JobState) -> None:
        """Rebuild the state from the job's seed log. In `fold` space this repeats the folds into the base."""
        assert job.start.seed_log is not None
        log, state, start = read_seed_log(job.start.seed_log), job.state, job.start

        def fold(key: int, basis: int, acc_N: Tensor) -> None:
            self._fold_factors(job, basis, acc_N, key)

        on_fold = fold if start.update_space == "fold" else None
        replay_into(state, log, start.upto, snapshot=start.snapshot, on_fold=on_fold)

    @execute.register
    def _stop(self, command: StopJob) -> None:
        ended = self.jobs.pop(command.job_id, None)
        self.pool.evict_owner(command.job_id)
        self.platform.let_go(command.job_id)
        for group_id in [g for g, opened in self.groups.items() if opened.command.job_id == command.job_id]:
            del self.groups[group_id]
        if command.restore_base:
            logger.info("restored the base weights of %d layers", self.base.restore())
        if command.restore_base or (ended is not None and ended.start.update_space == "fold"):
            self._forget_states()

    def _forget_states(self) -> None:
        """Drop what is kept of the base's states: its weights are others now."""
        self.platform.forget_states()
        for job in self.jobs.values():
            job.unmoved = None

    @execute.register
    def _forget_rows(self, command: ForgetRows) -> None:
        self.platform.let_go(command.job_id)
        self.jobs[command.job_id].unmoved = None

    @execute.register
    def _open(self, command: OpenGroup) -> None:
        table = LossTable.empty(command.examples, len(command.plan.probes), self.device)
        measures = command.plan.of_base and self.jobs[command.job_id].state.measured_BN is not None
        self.groups[command.group_id] = OpenedGroup(command, table, inputs={} if measures else None)

    @execute.register
    def _drop(self, command: DropGroup) -> None:
        self.groups.pop(command.group_id, None)

    @execute.register
    def _materialise(self, command: Materialise) -> None:
        self.groups[command.group_id].slot_of_probe[command.probe] = command.slot
        opened = self.groups[command.group_id].command
        job = self.jobs[opened.job_id]
        self.pool.materialise(command.slot, opened.job_id, job.state, job.targets, opened.plan, command.probe)
        if not job.state.coordinates.has_factors:
            self._write_probe(job, opened.plan, command.probe)

    def _write_probe(self, job: JobState, plan: ProbePlan, probe: int) -> None:
        """Write the base weights of a probe: original + update + perturbation, rounded once."""
        # A probe of dense MeZO starts from the original each time: if it added its perturbation to the weights and took
        # it off again, the 16-bit rounding of every probe would stay in them.
        theta_N = torch.zeros_like(job.state.acc_BN[0]) if plan.of_base else job.state.acc_BN[0]
        if plan.probes[probe].sign:
            theta_N = theta_N + job.state.offset(plan, probe)
        changes = job.state.coordinates.matrices(theta_N, job.state.layout)
        for layer, weight, modules in self.base.edit_layers(job.targets, changes):
            original = self.base.original(layer).to(weight.device)
            for target, change_OI in modules:
                change = change_OI[target.out_slice, target.in_slice]
                weight[target.rows] = original[target.rows].float() + change

    @execute.register
    def _close(self, command: CloseGroup) -> None:
        opened = self.groups.pop(command.group_id)  # of a failed job too, or its table would stay in memory
        if opened.command.job_id in self._failed:
            return
        plan, job = opened.command.plan, self.jobs[opened.command.job_id]
        if command.cells is not None:
            opened.table.cells_PC.copy_(torch.tensor(command.cells))
        losses, predictions = job.start.objective.loss(opened.table.cells_PC, opened.command.examples)
        coefficients, finite = torch.zeros(0, device=self.device), torch.isfinite(losses).all()
        if command.learning_rate is not None:
            assert get_pp_group().world_size == 1, "only the last stage has losses: others learn of them from the log"
            coefficients, finite = decide(job.start.method, plan, losses, job.start.max_coefficient)
            job.state.apply(plan, coefficients, command.learning_rate, finite)
            self.platform.after_update(plan.step)
        # The copy begins before vLLM queues the next step, and so does not wait for that step.
        numbers = self.platform.copy_to_host([losses, predictions, coefficients, finite])
        self._pending.append(PendingGroup(command.group_id, numbers))

    @execute.register
    def _report(self, command: ReportCells) -> None:
        opened = self.groups.pop(command.group_id)
        if opened.command.job_id in self._failed:
            return
        if opened.inputs:
            self._measure(self.jobs[opened.command.job_id], opened.inputs)
        cells = opened.table.cells_PC if command.cells is None else torch.tensor(command.cells)
        self._pending.append(PendingCells(command.group_id, self.platform.copy_to_host([cells])))

    @staticmethod
    def _measure(job: JobState, inputs: Mapping[tuple[int, int], Tensor]) -> None:
        # Sorted: how a group was cut into forwards must not change the order of a sum, or equal jobs would differ.
        rows_TI = torch.cat([inputs[key] for key in sorted(inputs)])
        if job.inputs is None:
            job.inputs = Inputs(rows_TI.shape[1], rows_TI.device)
        job.inputs.add(rows_TI)

    @execute.register
    def _measure_v(self, command: MeasureV) -> None:
        job = self.jobs[command.job_id]
        state, inputs, job.inputs = job.state, job.inputs, None
        assert inputs is not None and state.measured_BN is not None
        count = state.num_bases * state.coordinates.rank
        v_IC = inputs.leading(count, noise.derive_key(state.job_seed, BASIS_STREAM, 0))
        state.measured_BN.copy_(v_IC.view(len(v_IC), state.num_bases, -1).transpose(0, 1).flatten(1))
        self._save(job, command.path, 0)

    @execute.register
    def _size_u(self, command: SizeU) -> None:
        job = self.jobs[command.job_id]
        state = job.state
        assert state.sizes_N is not None
        (head,) = state.layout.modules
        sizes_O = row_sizes(command.counts, head.out_features, state.device)
        state.sizes_N.copy_(sizes_O.repeat_interleave(state.coordinates.rank))
        if command.path is not None:
            self._save(job, command.path, 0)

    @execute.register
    def _apply(self, command: ApplyRecord) -> None:
        if command.job_id in self._failed:
            return
        job = self.jobs[command.job_id]
        apply_record(job.state, command.record, job.start.update_space)
        self.platform.after_update(command.record.step)

    @execute.register
    def _fold(self, command: Fold) -> None:
        job = self.jobs[command.job_id]
        if (taken := job.state.take()) is not None:
            self._fold_factors(job, *taken, command.key)

    def _fold_factors(self, job: JobState, basis: int, acc: Tensor, key: int) -> None:
        """`W += U_acc V^T` in place, for every module of the job.

        Args:
            basis: of the accumulator.
            acc: (N,) float32 accumulator.
            key: seeds the stochastic rounding.
        """
        for layer, weight, modules in self.base.edit_layers(job.targets, *job.state.factors(basis, acc)):
            if not job.state.coordinates.has_factors:  # the last probe may still be in the weight
                weight.copy_(self.base.original(layer))
            for target, u_OR, v_IR in modules:
                if v_IR is None:
                    u, v = u_OR[target.out_slice, target.in_slice], None
                else:
                    u, v = u_OR[target.out_slice], v_IR[target.in_slice]
                rows = weight[target.rows]
                ins = target.shape.in_features
                first = target.out_slice.start * ins + target.in_slice.start
                stride = None if rows.shape[1] == ins else ins
                self.platform.fold_into(
                    rows, u, v, key, target.shape.name, out=rows, first_element=first, stride=stride
                )

    @execute.register
    def _publish(self, command: Publish) -> None:
        job = self.jobs[command.job_id]
        try:
            self._save(job, command.path, command.version)
        except JobError as error:
            logger.warning("job %s: step %d is not published: %s", command.job_id, command.version, error)
            self._results.unpublished.append(Unpublished(command.job_id, command.version))
        else:
            self.versions.publish(command.job_id, command.version, job.state, command.path)
        if command.measure:
            norm = drift.norm((u_OR, v_IR) for _, u_OR, v_IR in whole_adapter(job.state))
            self._results.drifts.append(Drift(command.job_id, command.version, norm))

    @execute.register
    def _unpublish(self, command: Unpublish) -> None:
        self.versions.forget(command.job_id, command.version)
        if _answers():
            Path(command.path).unlink(missing_ok=True)

    @execute.register
    def _forget_versions(self, command: ForgetVersions) -> None:
        self.versions.forget_job(command.job_id)

    @execute.register
    def _report_digest(self, command: ReportDigest) -> None:
        digest = self.jobs[command.job_id].state.digest()
        self._results.digests.append(StateDigest(command.job_id, command.steps, digest))

    @execute.register
    def _snapshot(self, command: Snapshot) -> None:
        try:
            self._save(self.jobs[command.job_id], command.path, command.step)
        except JobError as error:  # a snapshot only makes resuming faster: the seed log alone rebuilds the state
            logger.warning("job %s: no snapshot at step %d: %s", command.job_id, command.step, error)

    def _save(self, job: JobState, path: str, step: int) -> None:
        if _answers():  # every worker holds the whole float32 state, so one of them writes it
            save_snapshot(path, job.state, step)

    # --- scoring ----------------------------------------------------------------------------------------------------

    def score(
        self,
        members: Sequence[ScoreMember],
        hidden: Tensor,
        first_row: Mapping[str, int],
        num_tokens: Mapping[str, int],
    ) -> None:
        """Fill the cells of the members that ran in this step, except those of groups that have been dropped.

        Args:
            members: that have tokens in this step.
            hidden: (tokens of the step, D) final hidden states.
            first_row: request id -> its first row in `hidden`.
            num_tokens: request id -> number of its rows.
        """
        present = self._present(members, first_row, num_tokens)
        if present:
            assert self.head is not None, "hidden states come out of the last stage"
            with self._failing("scoring", members):
                score_members(self.head, hidden, present)
                for one in present:
                    if (inputs := self.groups[one.member.group_id].inputs) is not None:
                        rows = upload(scored_rows(one), hidden.device)
                        inputs[one.member.sequence, one.member.num_computed_tokens] = hidden[rows]

    def _present(
        self, members: Sequence[ScoreMember], first_row: Mapping[str, int], num_tokens: Mapping[str, int]
    ) -> list[Present]:
        return [
            Present(
                m,
                probe,
                self.groups[m.group_id].table,
                first_row[m.req_id],
                num_tokens[m.req_id],
                self._slot_at_the_head(m, probe),
                self._unmoved_words(m),
            )
            for m in members
            if m.group_id in self.groups
            for probe in m.probes
        ]

    def run_alone(self, members: Sequence[ScoreMember], after: Sequence[Command], stop: Callable[[int], bool]) -> None:
        """Run the whole sequences of members in a forward of their own, fill their cells, then execute `after`.

        Args:
            stop: see `ForwardAlone.go_on`.
        """
        assert self._unfinished is None
        members = [m for m in members if m.job_id not in self._failed and m.group_id in self.groups]
        with self._failing("the forward of members", members):
            if members and not self._score_again(members):
                self._unfinished = self._forward_of(members, after)
        if self._unfinished is None:
            self.run(after)
        self.go_on(stop)

    def _score_again(self, members: Sequence[ScoreMember]) -> bool:
        """Score members without a forward, if they are the batch that their job has scored last and their probes change
        the words that it moves alone. Returns whether it did."""
        self._check_materialised(members)
        num_tokens = self._lengths(members)
        present = self._present(members, dict.fromkeys(num_tokens, 0), num_tokens)
        unmoved = present[0].unmoved
        if (
            unmoved is None
            or any(one.unmoved is not unmoved or not one.is_scored_by_words for one in present)
            or any(self.groups[m.group_id].inputs is not None for m in members)
            or not unmoved.knows([one.scored for one in present])
        ):
            return False
        assert self.head is not None
        unmoved.score(self.head, None, [one.scored for one in present])
        return True

    def _check_materialised(self, members: Sequence[ScoreMember]) -> None:
        for slot in {self._slot_of(m, probe) for m in members for probe in m.probes}:
            self.pool.check_materialised(slot)

    def _lengths(self, members: Sequence[ScoreMember]) -> dict[str, int]:
        """Request id -> tokens of its sequence, in the order of the members."""
        return {m.req_id: len(self.groups[m.group_id].table.sequences[m.sequence].token_ids) for m in members}

    def _forward_of(self, members: Sequence[ScoreMember], after: Sequence[Command]) -> Unfinished:
        slots = [self._slot_of(m, m.probes[0]) for m in members]
        num_tokens = self._lengths(members)
        chunks = self._chunks(members, num_tokens, list(num_tokens))
        forward = self.platform.forward_alone(chunks, [self.pool.first + slot for slot in slots])
        self._results.layer_rows = forward.layer_rows
        return Unfinished(members, num_tokens, forward, after)

    def go_on(self, stop: Callable[[int], bool] = lambda gone: False) -> None:
        """Go on with the forward that has stopped, if there is one, and do what comes after it once it has ended.

        Args:
            stop: see `ForwardAlone.go_on`; by default nothing stops it.
        """
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None:
            return
        with self._failing("the forward of members", unfinished.members):
            hidden = unfinished.forward.go_on(stop)
            if hidden is None:
                self._unfinished, self._results.stopped_at = unfinished, unfinished.forward.reached
                return
            num_tokens = unfinished.num_tokens
            first_row = dict(zip(num_tokens, itertools.accumulate(num_tokens.values(), initial=0), strict=False))
            self.score(unfinished.members, hidden, first_row, num_tokens)
        self.run(unfinished.after)

    @contextmanager
    def _failing(self, what: str, members: Sequence[ScoreMember]) -> Iterator[None]:
        """Catch an exception of the block: it fails the jobs of these members, and nothing else, as in `run`."""
        try:
            yield
        except Exception as error:
            logger.exception("%s failed", what)
            for job_id in {m.job_id for m in members}:
                self._fail(job_id, f"{type(error).__name__}: {error}")

    def _slot_at_the_head(self, member: ScoreMember, probe: int) -> int | None:
        """The slot of a probe's adapter, among all of vLLM's, if its job trains the LM head; else None."""
        trained = self.jobs[member.job_id].kinds
        return self.pool.first + self._slot_of(member, probe) if LM_HEAD in trained else None

    def _unmoved_words(self, member: ScoreMember) -> UnmovedWords | None:
        """What is kept of the words that the member's job does not move; None if it moves all of them, or hidden states
        too."""
        job = self.jobs[member.job_id]
        assert self.head is not None
        if job.unmoved is None and job.kinds == {LM_HEAD} and self.head.tp is None:
            moved_M = job.state.moved_O
            job.unmoved = None if moved_M is None else UnmovedWords(moved_M)
        return job.unmoved

    def _slot_of(self, member: ScoreMember, probe: int) -> int:
        """The slot of a probe's adapter, counted from the first slot of the pool."""
        return self.groups[member.group_id].slot_of_probe[probe]

    def sharing_rows(
        self, members: Sequence[ScoreMember], num_tokens: Mapping[str, int]
    ) -> AbstractContextManager[None]:
        """In the block, vLLM's forward may leave out rows of these members whose result is not read.

        Args:
            num_tokens: request id -> number of its rows in this step.
        """
        if not members:
            return nullcontext()
        return self.platform.sharing_rows(functools.partial(self._chunks, members, num_tokens))

    def _chunks(
        self, members: Sequence[ScoreMember], num_tokens: Mapping[str, int], req_ids: Sequence[str]
    ) -> list[Chunk]:
        """The rows of this step, a chunk for each request, in the order of the batch."""
        by_id = {m.req_id: m for m in members}
        return [self._chunk(by_id.get(req_id), num_tokens.get(req_id, 0)) for req_id in req_ids]

    def _chunk(self, member: ScoreMember | None, count: int) -> Chunk:
        # A member of a dropped group may still be in vLLM's batch; its rows are computed like those of any request.
        opened = self.groups.get(member.group_id) if member is not None else None
        if member is None or opened is None:
            return Chunk(count)
        sequence, start = opened.table.sequences[member.sequence], member.num_computed_tokens
        job = self.jobs[opened.command.job_id]
        state: Hashable = (member.group_id, member.probes[0])
        if job.kinds == {LM_HEAD}:  # the hidden states are the same for all probes
            state = "as loaded"
        return Chunk(
            count,
            state=state,
            embedded_by=state if EMBEDDINGS in job.kinds else None,
            token_ids=sequence.token_ids[:count] if start == 0 else (),
            targets=[position - start for position in sequence.positions if 0 <= position - start < count],
            whole=count == len(sequence.token_ids),
            first_layer=job.first_layer,
            owner=opened.command.job_id,
        )

    def take_results(self) -> tuple[list[Pending], ZOResults]:
        """The groups that closed in this step, and its other results. `resolve` of one is for when vLLM reads the
        step's output."""
        taken = self._pending, self._results
        self._pending, self._results = [], ZOResults()
        return taken


def _answers() -> bool:
    """Whether this is the worker whose results the scheduler gets: it tells if a file cannot be written."""
    return get_tensor_model_parallel_rank() == 0 and bool(get_pp_group().is_last_rank)
