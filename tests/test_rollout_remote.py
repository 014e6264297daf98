"""Programs behind a URL: what they are sent, and what becomes of every answer. The program is a real HTTP server."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.test_rollout import described, until
from vllm_zo import ConfigError, Rollout
from vllm_zo.entrypoints.llm.rollouts import remote
from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollout, OpenedRollouts
from vllm_zo.entrypoints.llm.rollouts.pool import RolloutPool
from vllm_zo.entrypoints.llm.rollouts.remote import RemoteProgram
from vllm_zo.entrypoints.llm.rollouts.transcripts import Transcripts
from vllm_zo.entrypoints.server.jobs.rollouts import check_host
from vllm_zo.entrypoints.server.plugin import own_address
from vllm_zo.entrypoints.server.settings import ServerSettings
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives import EncodedExample

Answer = tuple[int, bytes, dict[str, str]]
Asked = tuple[dict[str, Any], Any, bytes]


@contextmanager
def program(answer: Callable[[int, Any], Answer]) -> Iterator[tuple[str, list[Asked]]]:
    """A web server that answers POST number n with `answer(n, what was asked)`: status, body, headers.

    Yields its URL, and what it was sent: JSON, headers, body.
    """
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((json.loads(body), self.headers, body))
            status, reply, headers = answer(len(asked), asked[-1][0])
            self.send_response(status)
            for name, value in {"Content-Length": str(len(reply)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/play", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def score(value: Any) -> Answer:
    return 200, json.dumps({"score": value}).encode(), {}


def played(url: str, rollout: OpenedRollout | None = None) -> Any:
    async def main() -> Any:
        one = RemoteProgram(Rollout(url=url, timeout_s=5), "http://zo.example")
        try:
            return await one.play(rollout or OpenedRollout("probe:job/0/1", "p", seed=2**62 + 1), {"task": "é", "n": 3})
        finally:
            await one.close()

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)


def test_a_program_is_sent_the_row_and_where_its_probe_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = OpenedRollout("probe:job/0/1", "p", seed=2**62 + 1)
    with program(lambda number, asked: score(0.5)) as (url, sent):
        assert played(url, rollout) == 0.5
        assert "X-VLLM-ZO-Signature" not in sent[0][1]
        monkeypatch.setenv(remote.SECRET, "between us")
        played(url, rollout)
    asked, headers, body = sent[1]
    assert asked == {
        "row": {"task": "é", "n": 3}, "base_url": f"http://zo.example/rollouts/{rollout.token}/v1",
        "model": "probe:job/0/1", "seed": (2**62 + 1) % 2**53,
    }  # fmt: skip
    moment, _, digest = headers["X-VLLM-ZO-Signature"].partition(",v1=")
    expected = hmac.new(b"between us", moment.removeprefix("t=").encode() + b"." + body, hashlib.sha256).hexdigest()
    assert digest == expected
    assert rollout.token not in headers["Idempotency-Key"], "the token opens the probe"


def test_a_program_that_is_busy_is_asked_again_with_the_same_key_and_the_same_turns() -> None:
    rollout = OpenedRollout("probe:job/0/1", "p", seed=7)
    seeds = []

    def busy_twice(number: int, asked: Any) -> Answer:
        seeds.append([rollout.next_seed(), rollout.next_seed()])
        return (503, b"", {}) if number < 3 else score(1)

    with program(busy_twice) as (url, sent):
        assert played(url, rollout) == 1
    assert len({headers["Idempotency-Key"] for _, headers, _ in sent}) == 1 and len(sent) == 3
    assert seeds[0] == seeds[1] == seeds[2]
    with program(lambda number, asked: (429, b"", {})) as (url, sent):
        with pytest.raises(RuntimeError, match=r"answered 429 \(4 tries\)"):
            played(url, rollout)
        assert len(sent) == remote.TRIES


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, b"good", {}), r"answered 'good': expected \{\"score\": a number\}"),
        ((200, b"[1]", {}), "expected"),
        ((200, b'{"reward": 1}', {}), "expected"),
        ((500, b"it broke", {}), "answered 500: it broke"),
        ((302, b"", {"Location": "http://169.254.169.254/"}), "answered 302: redirects are not followed"),
        ((200, b" " * (remote.MAX_ANSWER + 1), {}), "answered more than 65536 bytes"),
    ],
    ids=["text", "list", "name", "error", "redirect", "large"],
)
def test_any_other_answer_fails_the_rollout_at_once(answer: Answer, message: str) -> None:
    with program(lambda number, asked: answer) as (url, sent):
        with pytest.raises(RuntimeError, match=message):
            played(url)
        assert len(sent) == 1


def test_a_program_that_is_down_fails_the_rollout_after_some_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # must not matter
    with program(lambda number, asked: score(1)) as (url, _):
        assert played(url) == 1
    with pytest.raises(RuntimeError, match=r"cannot be reached: ConnectError: .*\(4 tries\)"):
        played(url)


def test_a_program_of_each_bad_kind_costs_the_rollouts_that_it_had_and_no_other(tmp_path: Path) -> None:
    """Down, slow, NaN, text, null: through the pool that plays them, as the engine is told of them."""
    ended = threading.Event()

    def slow() -> Answer:
        ended.wait(20)
        return score(1)

    replies: dict[str, Callable[[], Answer]] = {
        "good": lambda: score(1), "nan": lambda: score(math.nan), "text": lambda: score("0.5"),
        "null": lambda: score(None), "huge": lambda: (200, b'{"score": 1e999}', {}), "slow": slow,
    }  # fmt: skip

    async def main(url: str) -> dict[str, Any]:
        rows = [EncodedExample((), columns={"kind": kind}) for kind in replies]
        objective, opened = Rollout(url=url, timeout_s=2), OpenedRollouts()
        one, transcripts = RemoteProgram(objective, "http://zo.example"), Transcripts(JobDir(tmp_path))
        pool = RolloutPool(objective, one.play, opened, rows, [], transcripts, lambda: None)
        pool.take({"group": "g", "rollouts": [described(n) for n in range(len(rows))]})
        await until(lambda: not pool.playing)
        await one.close()
        return {list(replies)[answer[2]]: answer[3:] for answer in pool.take_answers()}

    with program(lambda number, asked: replies[asked["row"]["kind"]]()) as (url, _):
        got = asyncio.run(main(url))
        ended.set()
    assert got["good"] == (1.0, "")
    assert math.isnan(got["nan"][0]) and math.isinf(got["huge"][0]), "the engine refuses what is not finite"
    assert "returned '0.5': expected a number" in got["text"][1] and "returned None" in got["null"][1]
    assert got["slow"][0] is None and ("timeout_s=2" in got["slow"][1] or "ReadTimeout" in got["slow"][1])
    down = asyncio.run(main(url))
    assert all(reward is None for reward, _ in down.values())
    assert all("cannot be reached" in error or "timeout_s=2" in error for _, error in down.values())


def test_a_server_posts_to_the_hosts_of_its_flag_only() -> None:
    allowed = ("grader.example", "127.0.0.1:9000")
    for url in ("https://grader.example/a", "http://GRADER.example:81/", "http://127.0.0.1:9000"):
        check_host(Rollout(url=url), allowed)
    for url in (
        "http://127.0.0.1:9001/",
        "http://127.0.0.1/",
        "http://grader.example.evil/",
        "http://a.grader.example",
    ):
        with pytest.raises(ConfigError, match="posts rollouts to grader.example, 127.0.0.1:9000 only; the flag"):
            check_host(Rollout(url=url), allowed)
    with pytest.raises(ConfigError, match="to no host only"):
        check_host(Rollout(url="http://grader.example/"), ())
    with pytest.raises(ConfigError, match="server: the rollouts of this job ask this server"):
        check_host(Rollout(url="http://grader.example/", server={"chat_template": "x"}), allowed)


@pytest.mark.parametrize(
    "url", ["ftp://host/", "host/path", "http://", "http://user@host/", "http://host:x/", "http://host:0/", "", 3]
)
def test_a_url_that_is_none_is_refused(url: Any) -> None:
    with pytest.raises(ConfigError, match="url="):
        Rollout(url=url)
    with pytest.raises(ConfigError, match="play, url: give exactly one"):
        Rollout("os:system", url="http://host/")


def test_settings_of_the_server() -> None:
    with pytest.raises(ConfigError, match="rollout_hosts=.*expected names of hosts"):
        ServerSettings(rollout_hosts=("http://host/",))
    with pytest.raises(ConfigError, match="url='host'"):
        ServerSettings(rollout_base_url="host")
    given = {"zo_server": {"rollout_hosts": ["host:1"], "rollout_base_url": "http://zo:8000"}}
    assert ServerSettings.from_config(given).rollout_hosts == ("host:1",)
    for host, ssl, address in (
        (None, None, "http://127.0.0.1:8000"), ("0.0.0.0", None, "http://127.0.0.1:8000"),
        ("::1", "cert", "https://[::1]:8000"), ("zo.example", None, "http://zo.example:8000"),
    ):  # fmt: skip
        assert own_address(SimpleNamespace(host=host, port=8000, ssl_certfile=ssl)) == address  # type: ignore[arg-type]
