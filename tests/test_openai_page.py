"""GET /fine-tuning in a real headless Chromium.

With VLLM_ZO_SCREENSHOTS=DIR the slow test writes the pictures of the docs there.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.openai_server import FLAGS as SERVER_FLAGS
from tests.openai_server import KEY, PREFIX, Server, Servers, create, upload_reviews, wait_for
from tests.test_openai_continual import create as create_continual
from tests.test_openai_rollouts import play, rollout_job
from tests.test_rollout_remote import program, score

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
StaleElementReferenceException = pytest.importorskip("selenium.common").exceptions.StaleElementReferenceException
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1100,1000",
)  # fmt: skip
WAIT_S = 60
DEMO = Path(__file__).parents[1] / "examples" / "demo"


@pytest.fixture
def server(servers: Servers) -> Server:
    return servers.running()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Server]:
    """A server of its own with the demo's model, which learns something."""
    server = Server(str(DEMO / "model"), tmp_path / "state", *SERVER_FLAGS, name="demo").wait_until_ready()
    yield server
    server.kill()


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
    browser.get(f"{server.url}/fine-tuning#{job.id}")
    log_in(browser, KEY)
    until(lambda: "<script>" in text(browser, f"#{job.id} .error"), "the error, as text")
    until(lambda: "<script>" in text(browser, f"#{job.id} [role=region][aria-label=Events]"), "the event, as text")
    assert browser.title == "Fine-tuning" and not browser.find_elements("css selector", f"#{job.id} img")


@pytest.mark.slow
def test_the_page_shows_what_rollouts_said_and_promotes_a_version(server: Server, browser: Any) -> None:
    client = server.client()
    data, held_out = upload_reviews(client, 8), upload_reviews(client, 3, seed=2)
    with program(lambda number, asked: score(play(asked))) as (url, _):
        job = rollout_job(client, data, url, steps=1, validation_file=held_out)
        wait_for(client, job.id, "succeeded")
    said: Any = client.get(f"/fine_tuning/jobs/{job.id}/transcripts", cast_to=object)
    browser.get(f"{server.url}/fine-tuning#{job.id}")
    log_in(browser, KEY)
    shown = f'#{job.id} section[aria-label="Example transcripts"]'
    until(lambda: "after step 1" in text(browser, shown) and "the base model" in text(browser, shown), "both parts")
    for rollout in [one for part in ("base", "newest") for one in said[part]["rollouts"]]:
        assert f"row {rollout['row'] + 1}: reward {rollout['reward']}" in text(browser, shown)
        for turn in rollout["said"]:
            assert f"{turn['role']}: {turn['text']}" in text(browser, shown)

    job = create_continual(client, data)
    until(lambda: len(client.fine_tuning.jobs.checkpoints.list(job.id).data) >= 2, "two versions")
    client.fine_tuning.jobs.pause(job.id)
    wait_for(client, job.id, "paused")
    oldest = client.fine_tuning.jobs.checkpoints.list(job.id).data[-1].fine_tuned_model_checkpoint
    browser.get(f"{server.url}/fine-tuning#{job.id}")
    promote = f"[aria-label='Promote {oldest}']"
    until(lambda: find(browser, promote), "the button")
    browser.execute_script("window.confirm = () => true; document.querySelector(arguments[0]).click()", promote)
    rows = "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => r.innerText)"
    versions = f"#{job.id} section[aria-label='Versions']"
    until(lambda: oldest in (row := browser.execute_script(rows, versions)[-1]) and "live" in row, "the live one")
    assert client.completions.create(model=f"live:{job.id}", prompt="a", max_tokens=1).model == oldest
    client.fine_tuning.jobs.cancel(job.id)


# --- a job from the form to its versions ------------------------------------------------------------------------------


def screenshot(browser: Any, name: str) -> None:
    """The whole page, however long it is."""
    if directory := os.environ.get("VLLM_ZO_SCREENSHOTS"):
        before = browser.get_window_size()
        height = browser.execute_script(
            "return outerHeight - innerHeight + document.querySelector('main').scrollHeight"
        )
        browser.set_window_size(before["width"], height + 40)
        browser.save_screenshot(str(Path(directory) / name))
        browser.set_window_size(before["width"], before["height"])


def values(browser: Any, selector: str) -> list[float]:
    """The heights of a line's points."""
    points = browser.execute_script("return document.querySelector(arguments[0])?.getAttribute('points')", selector)
    return [float(point.split(",")[1]) for point in (points or "").split()]


def steady(look: Any) -> Any:
    """What `look` finds. It looks again where the page has drawn a node anew meanwhile, as it does once a second."""
    while True:
        try:
            return look()
        except StaleElementReferenceException:
            continue


def nameless(browser: Any) -> list[str]:
    """What a screen reader could only call "button" or "edit"."""
    return list(steady(lambda: look_for_nameless(browser)))


def look_for_nameless(browser: Any) -> list[str]:
    found = browser.find_elements("css selector", "button, input, select, textarea, [role=region], svg, table")
    return [one.get_attribute("outerHTML")[:200] for one in found if one.is_displayed() and not one.accessible_name]


@pytest.mark.slow  # a server of its own, and some minutes of training
@pytest.mark.timeout(900)
def test_a_job_is_made_watched_asked_and_tidied_up_on_the_page_behind_a_prefix(demo: Server, browser: Any) -> None:
    client = demo.client()
    browser.get(f"{demo.url}{PREFIX}/fine-tuning")
    log_in(browser, KEY)
    until(lambda: not find(browser, "#login").is_displayed(), "the list")

    # The form, by keyboard but for the files.
    find(browser, "#new").send_keys("\n")
    until(lambda: find(browser, "#create").is_displayed(), "the form")
    assert browser.switch_to.active_element.get_attribute("id") == "train", "it takes the focus"
    until(lambda: text(browser, "#model option") == "demo", "the model")
    assert not find(browser, "#grader").is_displayed() and nameless(browser) == []
    find(browser, "#train").send_keys(str(DEMO / "reviews" / "train.jsonl"))
    find(browser, "#validation").send_keys(str(DEMO / "reviews" / "validation.jsonl"))
    find(browser, "#suffix").send_keys("form")
    find(browser, "#task").send_keys("Classification")
    until(lambda: find(browser, "#template").is_displayed(), "the fields of the task")
    find(browser, "#recipe").send_keys("A quick look")
    assert find(browser, "#hyperparameters").get_attribute("value") == '{"steps":100}'
    screenshot(browser, "fine-tuning-form.png")
    find(browser, "#hyperparameters").clear()
    find(browser, "#hyperparameters").send_keys('{"steps": 1}{')
    find(browser, "#start").send_keys("\n")
    until(lambda: "Hyperparameters:" in text(browser, "#create-error"), "the reason, before anything is uploaded")
    find(browser, "#hyperparameters").clear()
    find(browser, "#hyperparameters").send_keys('{"steps": 400}')
    find(browser, "#start").send_keys("\n")
    job_id = until(lambda: browser.current_url.partition("#")[2], "the job's own view")
    card = f"#{job_id}"

    # It runs: speed, a smooth curve over the raw one, a button that keeps its focus.
    until(lambda: "tokens/s" in text(browser, f"{card} .progress"), "the speed")
    until(lambda: len(values(browser, f"{card} polyline.raw")) > 100, "a curve")
    raw, mean = (values(browser, f"{card} polyline.{kind}") for kind in ("raw", "train:not(.raw)"))
    jumps = [statistics.fmean(abs(b - a) for a, b in itertools.pairwise(line)) for line in (raw, mean)]
    assert jumps[1] < jumps[0] / 2, jumps
    assert "on average now" in steady(lambda: find(browser, f"{card} svg").accessible_name)
    pause = until(lambda: find(browser, f'{card} button[data-verb="pause"]'), "the button")
    browser.execute_script("arguments[0].focus()", pause)
    time.sleep(2.5)  # two polls
    assert browser.switch_to.active_element.accessible_name == f"Pause job {job_id}"
    assert nameless(browser) == []
    bar = find(browser, f"{card} [role=progressbar]")
    assert bar.accessible_name and int(bar.get_attribute("aria-valuenow")) > 0

    # It has ended: configuration, evaluations, versions, events, and two answers side by side.
    job = wait_for(client, job_id, "succeeded", timeout_s=270)
    until(lambda: text(browser, f"{card} .status") == "succeeded", "the end")
    assert (job.model, job.suffix) == ("demo", "form")
    rows = (
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    configuration = dict(browser.execute_script(rows, f"{card} [role=region][aria-label=Configuration]"))
    assert configuration["steps"] == "400" and configuration["training_file"] == job.training_file
    evaluations = browser.execute_script(rows, f"{card} .evaluations")
    assert [row[0] for row in evaluations] == ["400", "300", "200", "100", "0"]
    assert max(float(row[2]) for row in evaluations[:-1]) > float(evaluations[-1][2]), "it has learnt something"
    versions = f'{card} section[aria-label="Versions"]'
    until(lambda: len(browser.execute_script(rows, versions)) == 4, "the versions")
    prompt = find(browser, f"{card} section textarea")
    prompt.send_keys("a warm and clever story It was")
    find(browser, f"{card} section form button").send_keys("\n")
    until(lambda: len(text(browser, f"{card} .said.newest").strip(" .")) > 3, "an answer")
    said = [text(browser, f"{card} .said.{which}") for which in ("base", "newest")]
    for model, shown in zip(("demo", f"job:{job_id}"), said, strict=True):
        again = client.completions.create(
            model=model, prompt="a warm and clever story It was", max_tokens=64, temperature=0
        )
        assert again.choices[0].text == shown
    screenshot(browser, "fine-tuning-job.png")
    browser.execute_script("window.confirm = () => true")
    oldest = client.fine_tuning.jobs.checkpoints.list(job_id).data[-1].fine_tuned_model_checkpoint
    browser.execute_script(f"document.querySelector('[aria-label=\"Delete {oldest}\"]').click()")
    until(lambda: browser.execute_script(rows, versions)[-1][-1] == "deleted", "the version to go")
    assert oldest not in {model.id for model in client.models.list()}

    # Dark and light.
    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    find(browser, "#theme").send_keys("\n")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before
    screenshot(browser, "fine-tuning-dark.png")
    assert [entry for entry in browser.get_log("browser") if "401" not in entry["message"]] == []
