"""An agent of an existing framework as the objective: the loop of Pydantic AI, unmodified, learns when to ask.

    pip install "pydantic-ai-slim[openai]"
    python examples/rollout_agent.py [steps]

The game is that of rollout_game.py, and here the framework plays it. `agent.run` asks the model, gives its answer to
the agent's own check, and where the check wants another answer (`ModelRetry`) it tells the model why and asks again.
Nothing but the client points to the engine: give it to your own agent, and its loop is the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic_ai import Agent, ModelRetry, RunContext, UnexpectedModelBehavior
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings
from pydantic_ai.providers.openai import OpenAIProvider
from rollout_game import ASK, VERDICTS, WORTH
from rollout_training import learn

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}It was{% endif %}{{ message.content }} "
    "{% endfor %}It was"
)
"""The demo model has no chat template of its own. Most models have one."""


@dataclass
class Review:
    verdict: str
    worth: float = WORTH["alone"]


critic = Agent(
    deps_type=Review,
    model_settings=OpenAIChatModelSettings(
        temperature=0, max_tokens=8, extra_body={"structured_outputs": {"choice": [*VERDICTS, ASK]}}
    ),
    retries=1,
)


@critic.output_validator
def check(run: RunContext[Review], output: str) -> str:
    if output == ASK:
        run.deps.worth = WORTH["asked"]
        raise ModelRetry(f"Others say it was{run.deps.verdict} .")
    return output


async def play(client: Any, model: str, row: dict[str, Any]) -> float:
    """One run of the agent. Who asks twice has no verdict."""
    review = Review(VERDICTS[row["label"]])
    asked = OpenAIChatModel(model, provider=OpenAIProvider(openai_client=client))
    try:
        answer = await critic.run(row["sentence"], model=asked, deps=review)
    except UnexpectedModelBehavior:
        return 0.0
    return review.worth if answer.output == review.verdict else 0.0


if __name__ == "__main__":
    settings = {"shaping": "none", "pass_reward": WORTH["asked"]}
    learn(play, "the agent's score", **settings, server={"chat_template": TEMPLATE})
