"""What is kept of an answer: read from the bodies of vLLM's completion routes, plain and streamed. Pure."""

from __future__ import annotations

import json
from typing import Any

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def read_answer(path: str, asked: dict[str, Any], body: bytes) -> dict[str, Any] | None:
    """The answer to a request: its id, model, prompt or messages, and text. None: there is nothing to learn from.

    Only one prompt and the first choice of each count.

    Args:
        asked: the body of the request.
        body: of the answer; server-sent events if it was streamed.
    """
    question = _question(path, asked)
    chunks = _chunks(body)
    if question is None or not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        return None
    first, text = chunks[0], "".join(_text(chunk) for chunk in chunks)
    if not isinstance(first.get("id"), str) or not isinstance(first.get("model"), str):
        return None
    return {"id": first["id"], "model": first["model"], **question, "text": text}


def _question(path: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    if path == CHATS:
        kept = {name: asked[name] for name in ("messages", "tools", "chat_template_kwargs") if asked.get(name)}
        return {"chat": kept} if isinstance(kept.get("messages"), list) else None
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    return {"prompt": prompt} if isinstance(prompt, str) and not asked.get("echo") else None


def _chunks(body: bytes) -> list[Any]:
    try:
        if not body.lstrip().startswith(b"data:"):
            return [json.loads(body)]
        lines = (line.removeprefix(b"data:").strip() for line in body.split(b"\n") if line.startswith(b"data:"))
        return [json.loads(line) for line in lines if line != b"[DONE]"]
    except ValueError:
        return []


def _text(chunk: dict[str, Any]) -> str:
    for choice in chunk.get("choices") or ():
        if choice.get("index", 0) == 0:
            said = choice.get("message") or choice.get("delta") or choice
            return said.get("content") or said.get("text") or ""
    return ""
