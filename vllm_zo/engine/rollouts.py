"""The rollouts of a group: which of them a front end plays, and what it has answered.

The engine knows nothing of what a rollout does. It gives every probe of the open wave a name, hands the rollouts out,
and keeps the probes in their slots until each rollout has a reward or has failed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_zo.commands import PROBE_SCHEME
from vllm_zo.engine.rewarder import Cells
from vllm_zo.errors import RewardError
from vllm_zo.objectives import Rollout


@dataclass(frozen=True)
class Answer:
    """What a front end says of one rollout: a reward, or the error with which it failed."""

    group_id: str
    probe: int
    sequence: int
    reward: float | None
    error: str = ""


@dataclass
class Cost:
    """What the rollouts of a group have cost.

    Attributes:
        requests: that they have sent to the model.
        tokens: that the engine has computed for them.
        idle_s: seconds in which the engine had nothing to do but wait for them.
    """

    requests: int = 0
    tokens: int = 0
    idle_s: float = 0.0


class Rollouts:
    """What is known of a group's rollouts.

    Attributes:
        failure: why the job must fail; None if it may go on.
        cost: so far.
    """

    def __init__(self, objective: Rollout) -> None:
        self.failure: str | None = None
        self.cost = Cost()
        self._objective = objective
        self._rewards: dict[tuple[int, int], float] = {}
        self._errors: list[str] = []

    def note(self, answer: Answer) -> None:
        """Keep the reward of a rollout, or what its failure counts."""
        reward, error = answer.reward, answer.error
        if not error and (reward is None or not math.isfinite(reward)):
            error = f"its reward is {reward}: expected a finite number"
        if error:
            self._errors.append(error)
            reward = self._objective.reward_of_failure()
            if self._objective.on_failure == "fail":
                self.failure = f"a rollout failed, and on_failure='fail': {error}"
        assert reward is not None
        self._rewards[answer.probe, answer.sequence] = reward

    def cells(self, probes: int, sequences: int, samples: int = 1) -> Cells:
        """(probes, sequences) rewards, NaN for every probe where a rollout of the sequence's row was dropped.

        Args:
            samples: sequences of a row.

        Raises:
            RewardError: no row is left.
        """
        rewards = [[self._rewards[probe, sequence] for sequence in range(sequences)] for probe in range(probes)]
        rows = {sequence // samples for (_, sequence), reward in self._rewards.items() if math.isnan(reward)}
        dropped = [sequence // samples in rows for sequence in range(sequences)]
        if all(dropped):
            raise RewardError(
                f"every row of the step was dropped, because rollouts failed; {len(self._errors)} of "
                f"{probes * sequences} did, the last one so: {self._errors[-1]}"
            )
        return tuple(
            tuple(math.nan if d else r for r, d in zip(of_probe, dropped, strict=True)) for of_probe in rewards
        )


def probe_path(group_id: str, probe: int) -> str:
    """The `lora_path` of a request for a probe. It is another one each time a step is taken again."""
    return f"{PROBE_SCHEME}{group_id}/{probe}"
