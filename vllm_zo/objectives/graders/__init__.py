"""Graders: a reward for a text, described in the JSON of OpenAI's fine-tuning API. Pure; knows nothing of vLLM.

build.py        `build_grader(spec)`, the only way in
template.py     {{sample.output_text}}, {{item.field}}
texts.py        string_check, text_similarity (similarity.py), regex
multi.py        several graders and a formula (formula.py)
python_grader.py   source text in a child process, where allowed
"""

from __future__ import annotations

from vllm_zo.objectives.graders.base import FLAGS, Grader, GraderResult
from vllm_zo.objectives.graders.build import build_grader

__all__ = ["FLAGS", "Grader", "GraderResult", "build_grader"]
