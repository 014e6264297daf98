"""How alike two texts are, from 0 to 1, by metrics that need no model and no download.

The libraries are RapidFuzz, NLTK and rouge-score (pip install 'vllm-zo[graders]'). The module imports one only when a
grader asks for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.validation import check_known

Similarity = Callable[[str, str], float]
"""(input, reference) -> similarity."""

MAX_CHARACTERS = 16_384
"""The limit of each text. A metric runs in the engine's process and holds its interpreter meanwhile. At this length the
slowest takes 15 ms (measured)."""

ROUGE = ("rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l")
METRICS = ("fuzzy_match", "bleu", "gleu", *ROUGE)
REFUSED = {
    "cosine": "it compares embeddings, and this engine serves a language model; use fuzzy_match or rouge_l",
    "meteor": "it needs the WordNet data set, which is not part of any package; use rouge_l or gleu",
}


def similarity(field: str, metric: Any) -> Similarity:
    """The function that computes `metric`. It raises a ConfigError for texts of more than `MAX_CHARACTERS`.

    fuzzy_match   RapidFuzz's `fuzz.ratio`: 1 - (insertions and deletions) / (sum of both lengths)
    bleu, gleu    NLTK's sentence scores over tokens between white space. BLEU uses smoothing method 1 (Chen and Cherry
                  2014), without which a short text scores 0.
    rouge_1 .. 5  F1 of n-grams; rouge_l that of the longest common subsequence. Words as in rouge-score, not stemmed.

    Raises:
        ConfigError: the metric is unknown or not available here, or its library is missing.
    """
    check_known(field, metric, (*METRICS, *REFUSED))
    if metric in REFUSED:
        raise ConfigError(f"{field}={metric!r} is not available: {REFUSED[metric]}.")
    measure = _measure(field, metric)

    def limited(text: str, reference: str) -> float:
        for name, value in (("input", text), ("reference", reference)):
            if len(value) > MAX_CHARACTERS:
                raise ConfigError(f"{name}: {len(value)} characters; {metric} compares at most {MAX_CHARACTERS}.")
        return measure(text, reference)

    return limited


def _measure(field: str, metric: str) -> Similarity:
    if metric == "fuzzy_match":
        ratio = _library("rapidfuzz.fuzz", field, metric).ratio
        return lambda text, reference: float(ratio(text, reference)) / 100.0
    if metric in ROUGE:
        return _rouge(field, metric)
    if metric == "gleu":
        gleu = _library("nltk.translate.gleu_score", field, metric).sentence_gleu
        return lambda text, reference: float(gleu([reference.split()], text.split())) if text.split() else 0.0
    bleu = _library("nltk.translate.bleu_score", field, metric)
    smoothing = bleu.SmoothingFunction().method1
    return lambda text, reference: float(
        bleu.sentence_bleu([reference.split()], text.split(), smoothing_function=smoothing)
    )


def _rouge(field: str, metric: str) -> Similarity:
    """F1 = 2 * common / (ours + theirs), of n-grams or of words in the longest common subsequence.

    The words are those of rouge-score, and the numbers equal those of its RougeScorer. We do not use RougeScorer
    itself: its subsequence is a double loop in Python (12 s for 8,000 words), and it takes over the process's logging
    (absl).
    """
    words = _library("rouge_score.tokenizers", field, metric).DefaultTokenizer(use_stemmer=False).tokenize
    subsequence = _library("rapidfuzz.distance", field, metric).LCSseq.similarity
    n = 0 if metric == "rouge_l" else ROUGE.index(metric) + 1

    def score(text: str, reference: str) -> float:
        ours, theirs = words(text), words(reference)
        if n == 0:
            common, total = subsequence(ours, theirs), len(ours) + len(theirs)
        else:
            a, b = (Counter(zip(*(one[i:] for i in range(n)), strict=False)) for one in (ours, theirs))
            common, total = (a & b).total(), a.total() + b.total()
        return 2.0 * common / total if common else 0.0

    return score


def _library(module: str, field: str, metric: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{field}={metric!r} needs the package {module.split('.')[0]!r}: pip install 'vllm-zo[graders]' ({error})."
        ) from None
