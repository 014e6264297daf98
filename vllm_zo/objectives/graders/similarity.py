"""How alike two texts are, from 0 to 1, by the metrics that need no model and no download.

Libraries, imported when a grader asks for them (pip install 'vllm-zo[graders]'): RapidFuzz, NLTK, rouge-score.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.validation import check_known

Similarity = Callable[[str, str], float]
"""(input, reference) -> similarity."""

ROUGE = {f"rouge_{n}": f"rouge{n}" for n in range(1, 6)} | {"rouge_l": "rougeL"}
METRICS = ("fuzzy_match", "bleu", "gleu", *ROUGE)
REFUSED = {
    "cosine": "it compares embeddings, and this engine serves a language model; use fuzzy_match or rouge_l",
    "meteor": "it needs the WordNet data set, which is not part of any package; use rouge_l or gleu",
}


def similarity(field: str, metric: Any) -> Similarity:
    """The metric called `metric`.

    fuzzy_match   RapidFuzz's `fuzz.ratio`: 1 - (insertions and deletions) / (both lengths)
    bleu, gleu    NLTK's sentence scores over white-space tokens; BLEU with smoothing method 1 (Chen and Cherry 2014),
                  without which a short text scores 0
    rouge_1 .. 5  F1 of n-grams; rouge_l of the longest common subsequence; rouge-score without stemming

    Raises:
        ConfigError: an unknown metric, one that cannot be computed here, or one whose library is missing.
    """
    if metric in REFUSED:
        raise ConfigError(f"{field}={metric!r} is not available: {REFUSED[metric]}.")
    check_known(field, metric, METRICS)
    if metric == "fuzzy_match":
        ratio = _library("rapidfuzz.fuzz", field, metric).ratio
        return lambda text, reference: float(ratio(text, reference)) / 100.0
    if metric in ROUGE:
        scorer = _library("rouge_score.rouge_scorer", field, metric).RougeScorer([ROUGE[metric]])
        return lambda text, reference: float(scorer.score(reference, text)[ROUGE[metric]].fmeasure)
    if metric == "gleu":
        gleu = _library("nltk.translate.gleu_score", field, metric).sentence_gleu
        return lambda text, reference: float(gleu([reference.split()], text.split())) if text.split() else 0.0
    bleu = _library("nltk.translate.bleu_score", field, metric)
    smoothing = bleu.SmoothingFunction().method1
    return lambda text, reference: float(
        bleu.sentence_bleu([reference.split()], text.split(), smoothing_function=smoothing)
    )


def _library(module: str, field: str, metric: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{field}={metric!r} needs the package {module.split('.')[0]!r}: pip install 'vllm-zo[graders]' ({error})."
        ) from None
