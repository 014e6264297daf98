"""Transcripts: what programs and the model have said to each other in a few rollouts of the validation rows.

A job's file `transcripts.json` holds those of its first evaluation and of its newest one:

    {"base": {"step": 0, "rollouts": [ROLLOUT, ...]}, "newest": {"step": 400, "rollouts": [ROLLOUT, ...]}}
    ROLLOUT  {"row": 0, "reward": 0.5 or null, "error": "", "said": [{"role": "user", "text": "..."}, ...]}

The roles are those of chats; a completion has "prompt" and "assistant". Rows, rollouts and texts are bounded.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.errors import JobError
from vllm_zo.jobs.directory import JobDir

logger = logging.getLogger("vllm.zo")

ROWS = 3
"""Rollouts of an evaluation that are kept: one of each of the first rows."""
MAX_TEXT, MAX_SAID = 2_000, 16_000
"""Most characters of one text, and of all texts of a rollout."""
MAX_ANSWER = 256 << 10
"""Most bytes that are read of one answer."""


class Transcript:
    """What is said in one rollout."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget everything: the program begins again."""
        self.said: list[dict[str, str]] = []
        self._room = MAX_SAID
        self._told: list[Any] = []
        """The messages of the last chat request: the next one repeats them."""

    def turn(self, asked: Mapping[str, Any], answer: bytes) -> None:
        """Take in a request and the body of its answer."""
        messages = asked.get("messages")
        if isinstance(messages, list):
            again = self._told and messages[: len(self._told)] == self._told
            # Behind what was told comes the answer to it, which is here already.
            new = messages[len(self._told) + 1 :] if again else messages
            for message in new:
                if isinstance(message, Mapping):
                    self._say(str(message.get("role")), _text(message.get("content")))
            self._told = messages
        else:
            self._say("prompt", _text(asked.get("prompt", asked.get("input"))))
        self._say("assistant", answer_text(answer))

    def _say(self, role: str, text: str) -> None:
        short = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} [{len(text) - MAX_TEXT} more characters]"
        if self._room >= len(short):
            self.said.append({"role": role, "text": short})
        elif self._room > 0:
            self.said.append({"role": "note", "text": "what follows was not kept"})
            self._room = 0
        self._room -= len(short)


class Transcripts:
    """The transcripts of a job, in its file. It belongs to one event loop."""

    def __init__(self, directory: JobDir) -> None:
        self._directory = directory
        self._writes = asyncio.Lock()

    def of(self, described: Mapping[str, Any]) -> Transcript | None:
        """The transcript to be kept of a rollout that begins; None for those of which none is kept."""
        kept = not described["trains"] and described["sample"] == 0 and described["example"] < ROWS
        return Transcript() if kept else None

    async def keep(
        self, described: Mapping[str, Any], transcript: Transcript, reward: float | None, error: str
    ) -> None:
        """Keep what a rollout has said. A full disk costs the transcript, and nothing else."""
        step, row = described["step"], described["example"]
        one = {"row": row, "reward": reward, "error": error[:MAX_TEXT], "said": list(transcript.said)}
        async with self._writes:
            # Read again each time: on several engines the evaluations of a job are played by several processes.
            kept = await asyncio.to_thread(self._directory.read_transcripts)
            for name in ("base", "newest"):
                evaluation = kept.get(name)
                # The base is that of the first evaluation, played again or not.
                if evaluation is None or (name == "newest" and evaluation["step"] != step):
                    evaluation = kept[name] = {"step": step, "rollouts": []}
                if evaluation["step"] == step:
                    others = [other for other in evaluation["rollouts"] if other["row"] != row]
                    evaluation["rollouts"] = sorted([*others, one], key=lambda other: int(other["row"]))
            try:
                await asyncio.to_thread(write_atomically, self._directory.transcripts, json.dumps(kept).encode())
            except JobError as error:
                logger.warning("a transcript is not kept: %s", error)


def answer_text(body: bytes) -> str:
    """What the model has written, of any body that vLLM's routes answer: JSON, or a stream of server-sent events."""
    try:
        if not body.startswith(b"data:"):
            return "".join(_pieces(json.loads(body)))
        lines = (line.removeprefix(b"data:").strip() for line in body.splitlines() if line.startswith(b"data:"))
        return "".join(piece for line in lines if line != b"[DONE]" for piece in _pieces(json.loads(line)))
    except ValueError:
        return "[an answer that was cut off]"


def _pieces(answer: Any) -> Iterator[str]:
    """The texts and calls of tools in an answer, or in a part of one."""
    if not isinstance(answer, Mapping):
        return
    if isinstance(error := answer.get("error"), Mapping):
        yield f"[error: {error.get('message')}]"
    for choice in (answer.get("choices") or [])[:1]:
        message = choice.get("message") or choice.get("delta") or {}
        yield choice.get("text") or _text(message.get("content"))
        for call in message.get("tool_calls") or []:
            function = call.get("function") or {}
            yield f"{function['name']}: " if function.get("name") else ""
            yield function.get("arguments") or ""
    for item in answer.get("output") or []:  # the Responses API
        yield _text(item.get("content"))


def _text(content: Any) -> str:
    """The text of a message's content: text, parts of text, or whatever a client has sent instead."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return json.dumps(content)
