"""The data sets of the MeZO and LoZO papers: prompts, losses and where to get them.

Each preset turns a record with the data set's own fields into what its objective reads. Labels may be the names below
(as in our JSONL files) or the indices of the Hugging Face data sets; the options are in the order of those indices.

Source: MeZO, arXiv:2305.17333, appendix E; princeton-nlp/MeZO, large_models/templates.py and tasks.py. As there, SST-2,
RTE, CB, BoolQ and WiC train as classification (cross-entropy over the options), and COPA and SQuAD on the likelihood of
the right answer. MeZO has TREC for masked language models only, whose prompt ("<mask>: {question}") has no counterpart
for a causal model. So our TREC has MeZO's label words and a prompt of our own. As everywhere in this package, field
values lose surrounding white space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.objectives import Classification, LanguageModeling, MultipleChoice, Objective, Reward

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything about a task except its records."""

    objective: Objective
    hub: tuple[str, str]
    """The training and the validation split on the Hugging Face hub, as `load_examples` takes them."""
    prepare: Callable[[Record, str], Record] = lambda record, where: record
    """(a record of the data set, where it stands) -> a record that the objective can encode."""
    dev: int = 500
    """How many records of the training set are for validation. MeZO takes 100 for the small sets."""
    final: Objective | None = None
    """The objective that measures the papers' figure, if it is another than the one that trains. None stands for the
    accuracy of `objective`."""


def _boolq(record: Record, where: str) -> Record:
    question = _field(record, "question", where)
    question = question if question.endswith("?") else f"{question}?"
    answer = record["answer"] if "answer" in record else _field(record, "label", where)
    # Files of this data set write the answer as a boolean, as 0 and 1, or as text.
    label = {"true": "Yes", "1": "Yes", "false": "No", "0": "No"}.get(str(answer).lower(), answer)
    return record | {"question": question[:1].upper() + question[1:], "label": label}


SQUAD_PROMPT = "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:"
CONJUNCTIONS = {"cause": "because", "effect": "so"}


def _copa(record: Record, where: str) -> Record:
    """ "My body cast a shadow over the grass." and "cause" -> "My body cast a shadow over the grass because"."""
    kind = _field(record, "question", where)
    if kind not in CONJUNCTIONS:
        raise ConfigError(f"{where}: field 'question' is {kind!r}, expected 'cause' or 'effect'.")
    # As in MeZO's template the choice continues the sentence of the premise, so the full stop and the capital go.
    premise = _field(record, "premise", where).rstrip().removesuffix(".")
    choices = [_lower_first_word(_field(record, name, where)) for name in ("choice1", "choice2")]
    return {"prompt": f"{premise} {CONJUNCTIONS[kind]}", "choices": choices, "label": record.get("label")}


def _lower_first_word(text: str) -> str:
    first, *rest = text.split(" ")
    return " ".join([first if first == "I" else first.lower(), *rest])


def _trec(record: Record, where: str) -> Record:
    """The hub calls the fields text and coarse_label."""
    names = (("question", "text"), ("label", "coarse_label"))
    return {ours: record[theirs if theirs in record else ours] for ours, theirs in names if {ours, theirs} & {*record}}


def _squad(record: Record, where: str) -> Record:
    """The hub keeps the answers as {"text": [...], "answer_start": [...]}."""
    answers = record.get("answers")
    return record | {"answers": answers["text"] if isinstance(answers, dict) and "text" in answers else answers}


def _field(record: Record, name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str | int):
        raise ConfigError(f"{where}: field {name!r} is {value!r:.60}; the record has {', '.join(map(repr, record))}.")
    return str(value)


PRESETS: dict[str, Preset] = {
    "sst2": Preset(
        objective=Classification("{sentence} It was", [" terrible", " great"]),
        hub=("hf:glue:sst2:train", "hf:glue:sst2:validation"),
    ),
    "rte": Preset(
        objective=Classification(
            '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
            ["Yes", "No"],
            labels=["entailment", "not_entailment"],
        ),
        hub=("hf:super_glue:rte:train", "hf:super_glue:rte:validation"),
    ),
    "cb": Preset(
        objective=Classification(
            'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
            ["Yes", "No", "Maybe"],
            labels=["entailment", "contradiction", "neutral"],
        ),
        hub=("hf:super_glue:cb:train", "hf:super_glue:cb:validation"),
        dev=100,
    ),
    "boolq": Preset(
        objective=Classification("{passage} {question}", [" Yes", " No"]),
        hub=("hf:super_glue:boolq:train", "hf:super_glue:boolq:validation"),
        prepare=_boolq,
    ),
    "wic": Preset(
        objective=Classification(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
            ["No", "Yes"],
        ),
        hub=("hf:super_glue:wic:train", "hf:super_glue:wic:validation"),
    ),
    "copa": Preset(
        objective=MultipleChoice("{prompt}", loss_kind="likelihood"),
        hub=("hf:super_glue:copa:train", "hf:super_glue:copa:validation"),
        prepare=_copa,
        dev=100,
    ),
    "trec": Preset(
        objective=Classification(
            "{question}\nType:",
            [" Expression", " Entity", " Description", " Human", " Location", " Number"],
            labels=["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"],
        ),
        hub=("hf:trec:train", "hf:trec:test"),
        prepare=_trec,
    ),
    "squad": Preset(
        objective=LanguageModeling(
            template=SQUAD_PROMPT,
            completion_field="answers",
            prefix=" ",
            suffix="\n",
            append_eos=False,
        ),
        hub=("hf:squad:train", "hf:squad:validation"),
        prepare=_squad,
        final=Reward(SQUAD_PROMPT, reward="token_f1", stop=["\n"], max_tokens=50, temperature=0.0),
    ),
}
