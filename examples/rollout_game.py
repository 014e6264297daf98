"""An agent's own code as the objective: a guessing game of two turns, with a tool that the model learns to call.

    python examples/rollout_game.py [steps]

The model reads a review and guesses its verdict, or asks "like what ?". Then the environment calls its tool, which
knows what others have said, and the model guesses again. The score is 1 for a right guess without the tool, 0.9 for
one with it, and 0 for a wrong one. `play` is the whole agent: a loop around the unmodified OpenAI client, without a
gradient in sight. The engine trains the model to score higher: when to ask, and to believe the answer.
"""

from __future__ import annotations

from typing import Any

from rollout_training import learn

VERDICTS = [" terrible", " great"]
ASK = " like what"
WORTH = {"alone": 1.0, "asked": 0.9}
"""The score of a right guess, without the tool and with it."""


class Game:
    """The environment of one game. Its only tool is `ask`."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.verdict = VERDICTS[row["label"]]
        self.text = f"{row['sentence']} It was"
        self.worth = WORTH["alone"]

    def ask(self) -> None:
        """The tool: what others have said. It is right, and not free."""
        self.text += f"{ASK} ? Others say it was{self.verdict} . It was"
        self.worth = WORTH["asked"]

    def score(self, guess: str) -> float:
        return self.worth if guess == self.verdict else 0.0


async def play(client: Any, model: str, row: dict[str, Any]) -> float:
    """One game; its score is the reward."""
    game = Game(row)
    answer = await say(client, model, game.text, [*VERDICTS, ASK])
    if answer == ASK:
        game.ask()
        answer = await say(client, model, game.text, VERDICTS)
    return game.score(answer)


async def say(client: Any, model: str, prompt: str, choices: list[str]) -> str:
    answer = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=8,  # the grammar ends an answer; it may be written in several tokens
        temperature=0,
        extra_body={"structured_outputs": {"choice": choices}},
    )
    return str(answer.choices[0].text)


if __name__ == "__main__":
    # Not z-scored: that would make the tool's price weigh as much as a wrong guess, in every game that all probes win.
    learn(play, "score", shaping="none", pass_reward=WORTH["asked"])
