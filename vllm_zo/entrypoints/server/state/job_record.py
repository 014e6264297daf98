"""The record of a fine-tuning job: the fields that clients see, and those that the server needs to go on with it."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_zo.entrypoints.server.keys.current import OPERATOR
from vllm_zo.jobs.status import JobStatus

Json = dict[str, Any]


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of one job in the store. Only `Store` makes changed copies; only `Store.move_job` changes a status."""

    # --- what clients see (http/schemas.py: Job) ---
    id: str
    object: str = "fine_tuning.job"
    created_at: int
    finished_at: int | None = None
    estimated_finish: int | None = None
    model: str
    fine_tuned_model: str | None = None
    organization_id: str
    status: JobStatus = JobStatus.VALIDATING
    error: Json | None = None
    hyperparameters: Json
    """Every value that the job runs with, in place of "auto"."""
    method: Json
    training_file: str
    validation_file: str | None = None
    result_files: list[str] = []
    trained_tokens: int | None = None
    seed: int
    integrations: list[Json] = []
    metadata: dict[str, str] | None = None
    suffix: str | None = None
    step: int = 0
    total_steps: int = 0
    """0 until the server has validated the files."""

    # --- what only the server needs ---
    owner: str = OPERATOR
    """The project whose key has created the job."""
    request: Json
    """The body of the request that created the job, with its seed. The server reads it again after a restart, and when
    it reads the files."""
    model_path: str
    """The base model as the engine names it. Exports find its configuration there."""
    base: str
    """Fingerprint of the base model's weights. On a server with another base model the job waits."""
    exclusive: bool = False
    """Update space `fold`: the job writes the base, and has the engine to itself."""
    keep_base: bool = False
    """The weights of a `fold` job stay in the base after its end, until its model is unloaded."""
    cancelling: bool = False
    """A client has cancelled the job. It ends as cancelled, also after a restart of the server."""
    handed_over_at: int = 0
    """When the server last gave the job to an engine, in Unix seconds."""
    fruitless_starts: int = 0
    """How often in a row the server ended while the job ran, without a new step or evaluation since its last start."""
    brought_before: int = 0
    """Steps and evaluations that the job had at its last start."""
    keeps_best: bool = False
    """The job gives back the state of its best evaluation."""
    live: Json = {}
    """Of a continual job: which of its versions is live (server/live/state.py)."""
    evaluations: list[Json] = []
    """All `EvaluationMetrics` so far. JSON has no nan and no infinities: they are null, here and in `last_step`."""
    last_step: Json = {}
    """The last `StepMetrics`."""

    @property
    def continual(self) -> bool:
        """Whether the job has no last step, and its rows may grow."""
        return bool((self.method.get("zeroth_order") or {}).get("continual"))

    def to_json(self) -> Json:
        """The fields as plain values. `Store` keeps them as JSON text, and the routes answer with them."""
        fields: Json = msgspec.to_builtins(self)
        return fields

    @classmethod
    def from_json(cls, fields: Json) -> JobRecord:
        """The inverse of `to_json`."""
        return msgspec.convert(fields, type=cls)

    @classmethod
    def from_text(cls, text: str) -> JobRecord:
        """The inverse of `to_json`, from JSON text."""
        return msgspec.json.decode(text, type=cls)
