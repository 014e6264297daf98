"""GET /fine-tuning in a real headless Chromium."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.openai_server import KEY, Server, Servers, create, upload_reviews, wait_for

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1100,1000",
)  # fmt: skip
WAIT_S = 30


@pytest.fixture
def server(servers: Servers) -> Server:
    return servers.running()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


def until(condition: Any, what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.05)
    return result


def find(browser: Any, selector: str) -> Any:
    return next(iter(browser.find_elements("css selector", selector)), None)


def text(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def log_in(browser: Any, key: str) -> None:
    until(lambda: find(browser, "#login").is_displayed(), "the form")
    find(browser, "#key").send_keys(key)
    find(browser, "#login button").click()


def test_the_page_shows_a_job_live_and_steers_it(server: Server, browser: Any) -> None:
    client = server.client()
    data, validation = upload_reviews(client, 24), upload_reviews(client, 8, seed=2)
    endless = {"steps": 20_000, "eval_interval": 40, "divergence_factor": None, "learning_rate": 1e-4}
    browser.get(f"{server.url}/fine-tuning")
    log_in(browser, "wrong")
    until(lambda: "does not take this key" in text(browser, "#login-error"), "the refusal")
    log_in(browser, KEY)
    until(lambda: not find(browser, "#login").is_displayed(), "the list")

    job = create(client, data, validation_file=validation, hyperparameters=endless)
    card = f"#{job.id}"
    points = "return document.querySelector(arguments[0])?.getAttribute('points')?.split(' ').length ?? 0"
    until(lambda: browser.execute_script(points, f"{card} polyline.train") > 50, "a curve")
    until(lambda: browser.execute_script(points, f"{card} polyline.valid") >= 2, "validation points")
    drawn = browser.execute_script(points, f"{card} polyline.train")
    until(lambda: browser.execute_script(points, f"{card} polyline.train") > drawn, "the curve to grow")
    assert "left" in text(browser, f"{card} .progress") and text(browser, f"{card} .status") == "running"

    def press(verb: str) -> None:
        until(lambda: find(browser, f'{card} button[data-verb="{verb}"]'), f"the button {verb}")
        browser.execute_script("document.querySelector(arguments[0]).click()", f'{card} button[data-verb="{verb}"]')

    press("pause")
    until(lambda: text(browser, f"{card} .status") == "paused", "the pause")
    assert wait_for(client, job.id, "paused")
    press("resume")
    until(lambda: text(browser, f"{card} .status") == "running", "the job to go on")
    browser.execute_script("window.confirm = () => true")
    press("cancel")
    until(lambda: text(browser, f"{card} .status") == "cancelled", "the end")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
    assert [
        entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "401" not in entry["message"]
    ] == []


def test_what_users_name_is_text_and_never_markup(server: Server, browser: Any) -> None:
    client = server.client()
    rows = b'{"sentence": "<img src=x onerror=document.title=1>", "label": "<script>"}\n'
    file = client.files.create(file=("x.jsonl", rows), purpose="fine-tune")
    job = create(client, file.id, hyperparameters={"batch_size": 1})
    browser.get(f"{server.url}/fine-tuning")
    log_in(browser, KEY)
    until(lambda: "<script>" in text(browser, f"#{job.id} .error"), "the error, as text")
    assert browser.title == "Fine-tuning" and not browser.find_elements("css selector", f"#{job.id} img")
