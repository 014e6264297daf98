"""The bell that workers hear between layers."""

from __future__ import annotations

import subprocess
import sys

from vllm_zo.doorbell import Doorbell, listen


def test_a_bell_that_rang_is_heard_until_the_request_is_answered() -> None:
    bell = Doorbell()
    rung = listen(bell.path)
    assert not rung()
    bell.ring()
    assert rung()
    bell.renew()
    assert rung(), "the request is on its way to the scheduler"
    bell.answer()
    assert rung(), "until it is renewed"
    bell.renew()
    assert not rung()


def test_one_that_the_engine_refuses_on_its_way_is_forgotten() -> None:
    bell = Doorbell()
    rung = listen(bell.path)
    bell.ring()
    bell.renew()
    assert rung()
    bell.renew()
    assert not rung(), "the engine has taken in what came before the last step"
    bell.answer()  # late: it counts once
    bell.ring()
    bell.renew()
    assert rung()


def test_another_process_hears_it() -> None:
    bell = Doorbell()
    bell.ring()
    code = f"from vllm_zo.doorbell import listen; print(listen({bell.path!r})(), listen('/proc/0/fd/0')())"
    heard = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert heard.stdout == "True False\n", "a bell that is not there never rings"
    assert "training does not stop between layers" in heard.stderr
