"""Children of a test session end with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

SESSION = """
import subprocess, sys
from tests import leash
leash.hold()
engine = "import time, setproctitle; setproctitle.setproctitle('VLLM::EngineCore'); print('up', flush=True); {}"
server = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {engine!r}]); import time; time.sleep(60)"
subprocess.Popen([sys.executable, "-c", server], start_new_session=True)
"""


def test_what_a_killed_session_has_started_ends_with_it() -> None:
    program = SESSION.replace("{}", "time.sleep(60)") + "import time; time.sleep(60)"
    session = subprocess.Popen(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )
    assert session.stdout is not None and session.stdout.readline() == "up\n"
    started = psutil.Process(session.pid).children(recursive=True)
    assert "VLLM::EngineCore" in {process.cmdline()[0].strip() for process in started}
    session.kill()
    session.wait()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
