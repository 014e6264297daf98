"""Turns feedback on an answer into a row for the job that gave it.

What is optimised is always the job's own loss:

    label   classification: cross-entropy of that option after the prompt that was asked
    text    language modelling: likelihood of that completion after the prompt, in place of the one that was given
    score   either of the two, with the answer that was given, if the score is at least `min_score`; an answer with a
            lower score is not learnt. So a job imitates its good answers (rejection sampling, on the answers of earlier
            versions); it does not move away from bad ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vllm_zo.entrypoints.llm.chats import Render
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import Classification, LanguageModeling, Objective


@dataclass(frozen=True)
class Lesson:
    """A row, and the objective that reads it; None: the job's own."""

    row: dict[str, Any]
    objective: Objective | None = None


def lesson_of(
    objective: Objective, answer: dict[str, Any], feedback: dict[str, Any], min_score: float, render: Render
) -> Lesson | None:
    """The row that feedback makes; None: the feedback is only counted.

    Args:
        objective: of the job.
        answer: as it was kept (answers.py).
        feedback: one of `score`, `label` and `text`; the others are None.

    Raises:
        ConfigError: the objective learns nothing from this kind of feedback.
    """
    if isinstance(objective, Classification):
        return _classified(objective, answer, feedback, min_score, render)
    if isinstance(objective, LanguageModeling):
        return _written(objective, answer, feedback, min_score)
    raise ConfigError(f"feedback: a job with objective {objective.name!r} takes none; classification and language "
                      "modelling do.")  # fmt: skip


def _classified(
    objective: Classification, answer: dict[str, Any], feedback: dict[str, Any], min_score: float, render: Render
) -> Lesson | None:
    label = feedback["label"] if feedback["label"] is not None else feedback["text"]
    if label is None:
        if feedback["score"] < min_score:
            return None
        given = answer["text"].strip()
        label = next((i for i, option in enumerate(objective.options) if given.startswith(option.strip())), None)
        if label is None:
            return None  # it gave none of the options
        label = label if objective.labels is None else objective.labels[label]
    prompt = answer["prompt"] if "prompt" in answer else render(answer["chat"]["messages"], answer["chat"], True)
    return Lesson({"prompt": prompt, "label": label}, replace(objective, template="{prompt}", label_field="label"))


def _written(
    objective: LanguageModeling, answer: dict[str, Any], feedback: dict[str, Any], min_score: float
) -> Lesson | None:
    if feedback["label"] is not None:
        raise ConfigError("label: a language model learns texts; give `text`, the answer that it should have given.")
    text = feedback["text"]
    if text is None:
        if feedback["score"] < min_score or not answer["text"]:
            return None
        text = answer["text"]
    learns_chats = not objective.special_tokens
    if learns_chats != ("chat" in answer):
        route = "/v1/chat/completions" if learns_chats else "/v1/completions"
        raise ConfigError(f"completion_id: the job learns what {route} asks, and this answer came from another route.")
    if learns_chats:
        chat = answer["chat"]
        return Lesson({**chat, "messages": [*chat["messages"], {"role": "assistant", "content": text}]})
    reads = replace(
        objective, template=None, prompt_field="prompt", completion_field="completion", prefix="", suffix=""
    )
    return Lesson({"prompt": answer["prompt"], "completion": text}, reads)
