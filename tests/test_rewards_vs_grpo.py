"""benchmarks/rewards_vs_grpo.py: what is rewarded, what is counted, and what its table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import games
from benchmarks import rewards_vs_grpo as bench


class Words:
    """A tokenizer of words, whose model knows no chats."""

    chat_template = None

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] * len(text.split()) for text in texts]}


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("It is bad.", 1), (" It is bad.\n", 1), ("It is good.", 0), ("It is bad", 0), ("It is bad. I think", 0)],
)
def test_only_the_right_answer_alone_is_rewarded(completion: str, reward: int) -> None:
    assert games.exact([completion], ["It is bad."]) == [reward]


def test_praise_is_graded_by_words_that_count_once() -> None:
    grade = games.Praise([("a good film", 1), ("good fun", 1), ("a bad film", 0), ("bad plot", 0)])
    texts = ["Good.", "good, good", "so bad!", "good or bad", "a zebra"]
    # `good` is 2 of the 5 words of praise and none of the others; 6 words are known. Add-one: 3/11 against 1/11.
    assert grade(texts, [""] * 5) == pytest.approx([0.75, 0.75, 0.25, 0.5, 0.5])


def test_tokens_of_training_are_counted_and_those_of_evaluations_not() -> None:
    meter = bench.Meter(Words(), games.exact)
    meter({}, {"eval_loss": 0.0})
    assert meter.reward(["a b", "7"], ["7", "7"], ["train", "train"]) == [0, 1]
    meter.reward(["a b c"], ["7"], ["validation"])
    meter({}, {"loss": 0.0})
    meter({}, {"eval_loss": 0.0})
    assert meter.at == [0, 3 + 2]  # one more for the end of each
    assert meter.earned == [0.5], "nothing of evaluations"
    meter.earned[:] = [0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0]
    assert meter.fifths == [0.0, 0.5, 0.5, 0.5, 0.75]
    meter.start_again()
    assert meter.tokens == 0 and meter.fifths == []


def test_the_parts_of_a_game_share_no_row(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    rest = "of a film that goes on and on and on"
    rows = [{"sentence": f"part {number} {rest} ", "label": number % 2} for number in range(90)]
    (tmp_path / "sst2" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for game in bench.GAMES:
        args = bench.parse(["--tasks", game, "--data", str(tmp_path), "--rows", "40", "20", "20"])
        parts, template = bench.load(args, game, Words())
        questions = [row["question"] for rows in parts.values() for row in rows]
        assert len(questions) == len(set(questions)) == 80
        assert all(row["part"] == part for part, rows in parts.items() for row in rows)
        last = parts["test"][-1]
        assert last["question"] in template.format(**last) and last["answer"] in template


def test_the_table_compares_at_equal_tokens_too() -> None:
    def line(contender: str, written: list[int], rewards: list[float]) -> dict[str, Any]:
        curve = [{"written": w, "accuracy": r} for w, r in zip(written, rewards, strict=True)]
        head = {
            "model": "m",
            "task": "reviews",
            "cpu_seconds": 9.0,
            "cpu": "one",
            "rows": [3, 2, 2],
            "contender": contender,
        }
        scores = {"validation": {"accuracy": max(rewards)}, "test": {"accuracy": 0.25}, "peak_mib": 7.0}
        of_run = {"factor": 1.0, "rate": 1e-3, "seed": 0, "steps": 4, "spent": 9.0, "written": written[-1]}
        return {**head, **of_run, **scores, "earned": [0.1, 0.25], "curve": curve}

    diverged = {**line("job, last layer", [0], [0.1]), "written": 50}
    del diverged["curve"]
    text = bench.report(
        [line("grpo", [0, 60, 100], [0.1, 0.4, 0.3]), line("job, all layers", [0, 90, 300], [0.1, 0.2, 0.5]), diverged]
    )
    assert "after 100 tokens" in text
    assert "| grpo | 0.001 | 0 | 4 | 9 | 100 | 0.100 | 0.400 | 0.400 | 0.250 | 0.10, 0.25 | 7 |" in text
    assert "| job, all layers | 0.001 | 0 | 4 | 9 | 300 | 0.100 | 0.200 | 0.500 | 0.250 | 0.10, 0.25 | 7 |" in text
    assert "| job, last layer | 0.001 | 0 | 4 | 9 | 50 |  |  | diverged |  |  |  |" in text


def test_a_contender_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--contenders", "job, first layer"])
