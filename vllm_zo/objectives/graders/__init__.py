"""Graders: rewards for a text, described in the JSON of OpenAI's fine-tuning API. They know nothing of vLLM.

build.py           `build_grader(spec)`, the only way in; GRADERS, the types by name
template.py        {{sample.output_text}}, {{item.field}}
texts.py           string_check, text_similarity (similarity.py), regex
multi.py           several graders and a formula (formula.py)
python_grader.py   source text in a child process, if the server allows it
"""

from __future__ import annotations

from vllm_zo.objectives.graders.base import FLAGS, Grader, GraderResult
from vllm_zo.objectives.graders.build import GRADERS, GraderType, build_grader, runs_source

__all__ = ["FLAGS", "GRADERS", "Grader", "GraderResult", "GraderType", "build_grader", "runs_source"]
