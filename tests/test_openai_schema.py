"""Requests made from our own OpenAPI schema: whatever is sent, the server answers as documented, never with a 5xx."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from tests.openai_server import KEY, Servers
from vllm_zo.entrypoints.server.plugin import ROUTERS

EXAMPLES, MANY = 15, 200
"""Requests made up for each route: in the short test, in the slow one."""


@schemathesis.serializer("application/jsonl")
def as_lines(_: schemathesis.SerializationContext, value: Any) -> bytes:
    """A body of JSON lines; what is no list is one line."""
    lines = value if isinstance(value, list) else [value]
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)


def our_schema() -> Any:
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    return schemathesis.openapi.from_dict(app.openapi())


SCHEMA = our_schema()
OPERATIONS = [(path, method) for path, methods in SCHEMA.raw_schema["paths"].items() for method in methods]


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=[f"{method} {path}" for path, method in OPERATIONS])
def test_no_request_ends_in_a_server_error(servers: Servers, path: str, method: str) -> None:
    ask(servers, path, method, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=[f"{method} {path}" for path, method in OPERATIONS])
def test_none_of_many_requests_ends_in_a_server_error(servers: Servers, path: str, method: str) -> None:
    ask(servers, path, method, MANY)


def ask(servers: Servers, path: str, method: str, examples: int) -> None:
    server = servers.running()
    url, told = server.url, len(server.log.read_text(errors="replace"))

    @settings(
        max_examples=examples,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=SCHEMA[path][method.upper()].as_strategy())
    def check(case: Any) -> None:
        response = case.call(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        case.validate_response(response, checks=(not_a_server_error, response_schema_conformance))

    check()
    assert "Traceback" not in server.log.read_text(errors="replace")[told:]


def test_the_schema_covers_every_route_of_ours(servers: Servers) -> None:
    paths = servers.running().http().get("/openapi.json").json()["paths"]
    operations = {(method, path) for path, methods in paths.items() for method in methods if path.startswith("/v1/")}
    wanted = {
        ("post", "/v1/files"), ("get", "/v1/files"), ("get", "/v1/files/{file_id}"), ("delete", "/v1/files/{file_id}"),
        ("get", "/v1/files/{file_id}/content"), ("post", "/v1/fine_tuning/jobs"), ("get", "/v1/fine_tuning/jobs"),
        ("get", "/v1/fine_tuning/jobs/{job_id}"), ("post", "/v1/fine_tuning/jobs/{job_id}/cancel"),
        ("post", "/v1/fine_tuning/jobs/{job_id}/pause"), ("post", "/v1/fine_tuning/jobs/{job_id}/resume"),
        ("get", "/v1/fine_tuning/jobs/{job_id}/events"), ("get", "/v1/fine_tuning/jobs/{job_id}/checkpoints"),
        ("get", "/v1/models"), ("get", "/v1/models/{name}"), ("delete", "/v1/models/{name}"),
        ("get", "/v1/fine_tuning/checkpoints/{name}/content"),
        ("get", "/v1/fine_tuning/checkpoints/{name}/permissions"),
        ("post", "/v1/fine_tuning/alpha/graders/validate"), ("post", "/v1/fine_tuning/alpha/graders/run"),
    }  # fmt: skip
    assert wanted <= operations
