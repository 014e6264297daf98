"""vLLM's own `/tokenize` in process and without an engine: what a server with these flags feeds a model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.launchers.render.app_state import init_render_app_state
from vllm.entrypoints.serve.tokenize.api_router import router
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_zo.entrypoints.server.plugin import served_chats


class Served:
    """A server's chat side.

    Args:
        flags: of `vllm serve`.
    """

    def __init__(self, model: Path, *flags: str) -> None:
        parser = make_arg_parser(FlexibleArgumentParser())
        args = parser.parse_args(["--model", str(model), "--served-model-name", "m", "--dtype", "float32", *flags])
        self.app = FastAPI()
        self.app.include_router(router)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        asyncio.run(init_render_app_state(config, self.app.state, args))
        self.renderer = self.app.state.online_renderer.renderer
        self.tokenizer = self.renderer.get_tokenizer()
        self.render = served_chats(self.renderer, args)
        self.http = TestClient(self.app)

    def tokenize(self, messages: list[Any], *, answered: bool, **more: Any) -> list[int]:
        """Token ids of a conversation.

        Args:
            answered: its last message is the answer, so that none is asked for.
            more: other fields of the request.
        """
        answer = self.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": not answered, **more})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["tokens"])
