"""A judge as the objective: the demo model learns to give short verdicts, as a function that reads them judges.

    python examples/rollout_format.py [steps]

The model continues "... It was". The judge wants one word and a full stop, and gives less the more words there are: 1
for " great.", a half for " very good.", nothing for what does not end. Partial credit matters: a format that the model
never hits by chance would teach it nothing. In your program the judge may be anything: a parser, a test suite, another
model.
"""

from __future__ import annotations

from typing import Any

from rollout_training import learn


def judge(verdict: str) -> float:
    """From 0 to 1: one over the number of words before the first full stop."""
    words, stop, _ = verdict.partition(".")
    return 1 / len(words.split()) if stop and words.split() else 0.0


async def play(client: Any, model: str, row: dict[str, Any]) -> float:
    answer = await client.completions.create(
        model=model, prompt=f"{row['sentence']} It was", max_tokens=5, temperature=1.0
    )
    return judge(answer.choices[0].text)


if __name__ == "__main__":
    learn(play, "the judge")
