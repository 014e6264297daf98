"""Graders: known answers, what templates and formulas refuse, and a python grader that misbehaves."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.graders import FLAGS, Grader, GraderResult, build_grader, sandbox
from vllm_zo.objectives.graders.formula import Formula
from vllm_zo.objectives.graders.python_grader import TIMEOUT_S, PythonGrader
from vllm_zo.objectives.graders.similarity import MAX_CHARACTERS, METRICS
from vllm_zo.objectives.graders.template import Template

EXACT = {
    "type": "string_check",
    "name": "exact",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
}
SIMILAR = {
    "type": "text_similarity",
    "name": "close",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "evaluation_metric": "fuzzy_match",
}
PYTHON = {
    "type": "python",
    "name": "length",
    "source": "def grade(sample, item):\n    return len(sample['output_text'])",
}


def without(spec: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != name}


# --- text graders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "text", "reward"),
    [
        ("eq", "Paris", 1), ("eq", "paris", 0), ("eq", " Paris", 0),
        ("ne", "Paris", 0), ("ne", "paris", 1),
        ("like", "in Paris now", 1), ("like", "in paris now", 0),
        ("ilike", "in PARIS now", 1), ("ilike", "in Lyon", 0),
    ],
)  # fmt: skip
def test_string_check_known_answers(operation: str, text: str, reward: float) -> None:
    result = build_grader({**EXACT, "operation": operation})(text, {"answer": "Paris"})
    assert (result.reward, result.sub_rewards, result.errors) == (reward, {}, {})


@pytest.mark.parametrize(
    ("metric", "reward"),
    [
        # "the cat sat" against "the cat sat down": 11 of 16 characters kept, so 1 - 5 / 27
        ("fuzzy_match", 1 - 5 / 27),
        # 3 of 3 unigrams against 3 of 4: precision 1, recall 3/4
        ("rouge_1", 2 * 0.75 / 1.75),
        # bigrams: 2 of 2 against 2 of 3
        ("rouge_2", 2 * (2 / 3) / (1 + 2 / 3)),
        ("rouge_5", 0.0),
        ("rouge_l", 2 * 0.75 / 1.75),
        # 6 matching n-grams of at most 4 words; the reference has 4 + 3 + 2 + 1 = 10
        ("gleu", 0.6),
    ],
)
def test_similarity_known_answers(metric: str, reward: float) -> None:
    grader = build_grader({**SIMILAR, "evaluation_metric": metric})
    assert grader("the cat sat", {"answer": "the cat sat down"}).reward == pytest.approx(reward)


AS_ROUGE_SCORE = """
import random
from rouge_score.rouge_scorer import RougeScorer
from vllm_zo.objectives.graders.similarity import ROUGE, similarity

rng = random.Random(0)
for metric in ROUGE:
    name = metric.replace("_l", "L").replace("_", "")
    theirs, ours = RougeScorer([name]), similarity("metric", metric)
    for _ in range(200):
        a, b = (" ".join(rng.choices(["a", "b", "The", "d-e", "f."], k=rng.randint(0, 20))) for _ in range(2))
        assert abs(ours(a, b) - theirs.score(b, a)[name].fmeasure) < 1e-12, (metric, a, b)
"""


def test_rouge_has_the_numbers_of_rouge_score() -> None:
    """In a process of its own: rouge-score's scorer imports absl, which takes over the logging of the whole process."""
    subprocess.run([sys.executable, "-c", AS_ROUGE_SCORE], check=True, timeout=60)


@pytest.mark.parametrize("metric", METRICS)
def test_a_similarity_of_long_texts_is_quick_and_of_longer_ones_an_error(metric: str) -> None:
    grader = build_grader({**SIMILAR, "evaluation_metric": metric})
    rng = random.Random(0)
    text, answer = (" ".join(rng.choices("ab", k=MAX_CHARACTERS))[:MAX_CHARACTERS] for _ in range(2))
    started = time.thread_time()  # of this thread alone: neighbours do not count
    assert not grader(text, {"answer": answer}).errors
    assert time.thread_time() - started < 0.5, "at most 0.02 s; quadratic in Python it was 12 s"
    result = grader(text, {"answer": answer + "!"})
    assert f"reference: {MAX_CHARACTERS + 1} characters" in result.errors["other_error"]


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_l"])
def test_similarity_is_1_for_equal_texts_and_less_for_others(metric: str) -> None:
    grader = build_grader({**SIMILAR, "evaluation_metric": metric})
    answer = {"answer": "a rather long and winding road"}
    assert grader(answer["answer"], answer).reward == pytest.approx(1.0)
    assert 0.0 <= grader("something else", answer).reward < 0.5
    assert grader("", answer).reward == 0.0


def test_regex_searches_in_linear_time_whatever_the_pattern() -> None:
    grader = build_grader({"type": "regex", "name": "r", "input": "{{sample.output_text}}", "pattern": r"^\d+$"})
    assert grader("17", {}).reward == 1.0
    assert grader("17 ", {}).reward == 0.0
    endless = build_grader(
        {"type": "regex", "name": "r", "input": "{{sample.output_text}}", "pattern": r"(?:(?:a|b|ab)+?)+?c"}
    )
    started = time.thread_time()
    result = endless("ab" * 4000, {})
    assert time.thread_time() - started < 1.0, "0.01 s; a library that backtracks takes longer than anybody waits"
    assert result.reward == 0.0 and not result.errors


def test_output_is_read_as_json_where_the_template_asks_for_it() -> None:
    grader = build_grader({**EXACT, "input": "{{sample.output_json.city.name}}"})
    assert grader('{"city": {"name": "Paris"}}', {"answer": "Paris"}).reward == 1.0
    result = grader("Paris", {"answer": "Paris"})
    assert result.reward == 0.0 and "not JSON" in result.errors["sample_parse_error"]


def test_a_missing_field_is_an_error_flag_and_the_fields_are_known_beforehand() -> None:
    grader = build_grader(EXACT)
    assert grader.item_fields == {"answer"}
    result = grader("Paris", {"reference": "Paris"})
    assert result.reward == 0.0 and "has no 'answer'; it has 'reference'" in result.errors["invalid_variable_error"]


# --- multi ------------------------------------------------------------------------------------------------------------


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    return {"type": "multi", "name": "both", "graders": graders, "calculate_output": formula}


def test_multi_combines_its_graders_and_reports_each() -> None:
    grader = build_grader(multi("0.25 * exact + 0.75 * close ^ 2", exact=EXACT, close=SIMILAR))
    result = grader("abcd", {"answer": "abcx"})
    assert result.sub_rewards == {"exact": 0.0, "close": pytest.approx(0.75)}
    assert result.reward == pytest.approx(0.75 * 0.75**2)
    assert grader.item_fields == {"answer"}


@pytest.mark.parametrize("formula", ["1 / exact", "log(exact)", "exp(1000 - exact)", "(0 - 8) ^ 0.5 + exact"])
def test_a_formula_without_value_is_an_error_flag(formula: str) -> None:
    result = build_grader(multi(formula, exact=EXACT))("no", {"answer": "yes"})
    assert result.reward == 0.0 and result.errors.keys() == {"formula_parse_error"}
    assert result.sub_rewards == {"exact": 0.0}


def test_a_failing_part_fails_the_whole() -> None:
    grader = build_grader(multi("exact + close", exact=EXACT, close={**SIMILAR, "reference": "{{item.other}}"}))
    result = grader("yes", {"answer": "yes"})
    assert result.reward == 0.0 and result.errors["invalid_variable_error"].startswith("close: ")
    assert result.sub_rewards["exact"] == 1.0


@pytest.mark.parametrize(
    ("formula", "value"),
    [("-a + 2 * b", 4.5), ("2 ^ 3 ^ 1", 8.0), ("min(a, b, 7) + max(a, b)", 3.0), ("floor(b / 2) + ceil(a)", 2.0)],
)
def test_formula_known_answers(formula: str, value: float) -> None:
    assert Formula.parse("f", formula, ["a", "b"])({"a": 0.5, "b": 2.5}) == pytest.approx(value)


@pytest.mark.parametrize(
    "formula",
    ["__import__('os')", "a.real", "a[0]", "lambda: a", "'a'", "True", "a if a else b", "min(*a)", "a; b", "min(a)",
     "abs(a, b)", "c", "", "(" * 300, "-" * 900 + "a", "+".join(["a"] * 400), "9" * 900 + "!",
     "a +", "a == b", "pow(a, b)", "1e400000j"],
)  # fmt: skip
def test_formula_refuses_everything_but_arithmetic(formula: str) -> None:
    with pytest.raises(ConfigError, match="calculate_output"):
        Formula.parse("calculate_output", formula, ["a", "b"])


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag",
    ["item.__class__", "item.a.__init__", "item", "sample", "item['a']", "item.a()", "item.a|upper", "item.a + 1",
     "config.key", "sample.output_text.__class__", "sample.choices", "sample.output_text.upper", "", "item._a"],
)  # fmt: skip
def test_a_template_reads_names_and_nothing_else(tag: str) -> None:
    with pytest.raises(ConfigError, match="grader.input"):
        build_grader({**EXACT, "input": f"{{{{{tag}}}}}"})


def test_a_template_walks_dictionaries_and_never_attributes() -> None:
    class Item(dict):  # type: ignore[type-arg]
        secret = "seen"

    result = build_grader({**EXACT, "input": "{{item.secret}}"})("", Item(answer="seen"))
    assert result.reward == 0.0 and "no 'secret'" in result.errors["invalid_variable_error"]


def test_values_are_inserted_as_they_are() -> None:
    template = Template.parse("t", "{{item.a}}|{{ sample.output_text }}|{{item.n}}|{{item.d}}")
    item = {"a": "{{item.n}}", "n": 3, "d": {"k": ["é"]}}
    assert template.render("{{item.a}}", item) == '{{item.n}}|{{item.a}}|3|{"k": ["é"]}'
    assert template.item_fields == {"a", "n", "d"}


# --- python -----------------------------------------------------------------------------------------------------------


def test_python_is_refused_unless_allowed() -> None:
    with pytest.raises(ConfigError, match="grader.type='python' is not allowed"):
        build_grader(PYTHON)
    with pytest.raises(ConfigError, match="grader.graders.p.type='python' is not allowed"):
        build_grader(multi("p", p=PYTHON))


def test_python_grader_runs_in_one_child_process(isolation: str) -> None:
    grader = build_grader(
        {
            "type": "python",
            "name": "p",
            "source": (
                "import os\nprint('noise on stdout')\n"
                "def grade(sample, item):\n    print('more')\n    return os.getpid() if item.get('pid') else 0.25"
            ),
        },
        allow_python=True,
    )
    first, second = grader("x", {"pid": 1}).reward, grader("y", {"pid": 1}).reward
    assert first == second != os.getpid()
    assert grader("x", {}).reward == 0.25


@pytest.fixture(params=["bubblewrap", "no bubblewrap"])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which a grader's process is started."""
    if request.param == "no bubblewrap":
        monkeypatch.setattr(sandbox, "why_open", lambda: "as if it were not installed")
    elif (why := sandbox.why_open()) is not None:
        pytest.skip(why)
    return str(request.param)


def graded(body: str, timeout_s: float = TIMEOUT_S) -> GraderResult:
    """What a grader with this body says of a text; the same grader must then answer a harmless call.

    Args:
        timeout_s: for the body alone. On a busy machine an answer may take more than a second.
    """
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    source = f"import os, sys\ndef grade(sample, item):\n    if item['ok']: return 1.0\n{lines}"
    grader = PythonGrader("bad", source, timeout_s=timeout_s)
    result = grader("x", {"ok": False})
    grader.timeout_s = TIMEOUT_S
    assert grader("x", {"ok": True}).reward == 1.0
    grader.close()
    return result


ANSWERS = 3
"""The descriptor of the pipe, which the source can find."""


@pytest.mark.parametrize(
    ("body", "flag", "message"),
    [
        ("raise KeyError('x')", "python_grader_runtime_error", "KeyError"),
        ("return 'much'", "python_grader_runtime_error", "ValueError"),
        ("return 10 ** 400", "python_grader_runtime_error", "OverflowError"),
        ("return float('nan')", "python_grader_runtime_error", "returned nan"),
        ("sys.exit(3)", "python_grader_runtime_error", "SystemExit"),
        ("return len('x' * (8 << 30))", "python_grader_runtime_error", "MemoryError"),
        ("f = open('f', 'wb', 0)\nf.seek(1 << 30)\nf.write(b'x')", "python_grader_runtime_error", "File too large"),
        ("os._exit(3)", "python_grader_server_error", "process ended (status 3)"),
        ("while True: pass", "unresponsive_reward_error", "did not answer within 1 s"),
        (f"os.write({ANSWERS}, b'[1]\\n')", "python_grader_runtime_error", "it wrote b'[1]\\n"),
        (f"os.write({ANSWERS}, b'{{\"value\": 1')\nwhile True: pass", "unresponsive_reward_error", "within 1 s"),
        (f"a = {ANSWERS}\nwhile True: os.write(a, b'x' * 9999)", "python_grader_server_error", "longer than 65536 b"),
    ],
)
def test_a_python_grader_that_misbehaves_is_an_error_that_names_it_and_the_next_call_works(
    isolation: str, body: str, flag: str, message: str
) -> None:
    result = graded(body, 1.0 if flag == "unresponsive_reward_error" else TIMEOUT_S)
    assert result.reward == 0.0 and result.errors.keys() == {flag}, result
    assert message in result.errors[flag] and "python grader 'bad'" in result.errors[flag]
    assert flag in FLAGS


@pytest.mark.parametrize(
    "body",
    [
        "os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import socket; socket.create_connection(('127.0.0.1', 22))",
        "os.setsid()",
        "os.sched_setaffinity(0, range(os.cpu_count()))",
        "os.kill(os.getppid(), 0)",
    ],
)
def test_a_python_grader_is_one_process_on_one_core_without_network(isolation: str, body: str) -> None:
    result = graded(f"{body}\nreturn 1.0")
    assert "PermissionError" in result.errors["python_grader_runtime_error"]


def test_a_python_grader_may_have_threads_and_import_what_is_installed(isolation: str) -> None:
    body = (
        "import threading, numpy\nseen = []\nt = threading.Thread(target=lambda: seen.append(numpy.ones(3).sum()))\n"
        "t.start(); t.join()\nreturn seen[0]"
    )
    assert graded(body).reward == 3.0


def test_a_python_grader_sees_none_of_our_variables(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert graded("return float('secret' in os.environ.values())").reward == 0.0


def test_nothing_of_a_python_grader_runs_between_its_calls(isolation: str) -> None:
    """A thread that it leaves behind counts only while a call is answered: the process is stopped otherwise."""
    source = (
        "import threading, time\ncount = 0\ndef run():\n    global count\n    while True:\n        count += 1\n"
        "        time.sleep(0.01)\nthreading.Thread(target=run, daemon=True).start()\n"
        "def grade(sample, item): return count"
    )
    grader = PythonGrader("busy", source)
    first = grader("x", {}).reward
    time.sleep(1.0)
    assert grader("x", {}).reward <= first + 20, "100 more if it had run meanwhile"
    grader.close()


def test_nothing_is_left_of_a_python_grader_that_is_gone(isolation: str) -> None:
    grader = PythonGrader("g", "import os\ndef grade(sample, item): return os.getpid()")
    grader("x", {})
    assert grader._sandbox is not None
    session = grader._sandbox._process.pid
    del grader
    deadline = time.monotonic() + 5.0  # the kernel takes a moment to end what it has sent SIGKILL
    while alive := [p for p in psutil.process_iter() if p.pid == session or _session(p.pid) == session]:
        assert time.monotonic() < deadline, alive


def test_a_python_grader_ends_with_its_engine_also_where_that_is_killed(isolation: str) -> None:
    program = (
        "import sys\nfrom vllm_zo.objectives.graders import python_grader, sandbox\n"
        f"if {isolation == 'no bubblewrap'}: sandbox.why_open = lambda: 'as if it were not installed'\n"
        "grader = python_grader.PythonGrader('g', 'def grade(sample, item):\\n    while item: pass\\n    return 1.0')\n"
        "grader('x', {}); print(grader._sandbox._process.pid, flush=True); grader('x', {'a': 1})"
    )
    engine = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    grader = psutil.Process(int(engine.stdout.readline()))
    deadline = time.monotonic() + 10.0
    while grader.status() == psutil.STATUS_STOPPED:  # until it is asked again
        assert time.monotonic() < deadline
    engine.kill()
    engine.wait()
    grader.wait(30)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


@pytest.mark.skipif(sandbox.why_open() is not None, reason=str(sandbox.why_open()))
def test_with_bubblewrap_a_python_grader_sees_no_process_and_no_file_of_others(tmp_path: Path) -> None:
    secret = tmp_path / "data.jsonl"
    secret.write_text("secret")
    assert graded(f"return float(os.path.exists({str(secret)!r}))").reward == 0.0
    assert graded("return float(any(p.isdigit() and int(p) > 9 for p in os.listdir('/proc')))").reward == 0.0
    for path in ("/usr/x", "/dev/shm/x", "/x", f"{sys.prefix}/x"):
        assert "OSError" in graded(f"open({path!r}, 'w')").errors["python_grader_runtime_error"]
    assert graded("open('mine', 'w').write('x')\nreturn float(os.listdir('.').count('mine'))").reward == 1.0


def test_a_python_grader_outlives_the_thread_that_called_it_first() -> None:
    """Each group's rewards are scored in a thread of their own; the kernel ends a child with the thread it is from."""
    grader = PythonGrader(
        "g", "import os\ndef grade(sample, item): return os.getpid() + (sample['output_text'] == 'y')"
    )
    pids: list[float] = []
    thread = threading.Thread(target=lambda: pids.append(grader("x", {}).reward))
    thread.start()
    thread.join()
    assert not grader("y", {}).errors
    grader.close()


@pytest.mark.parametrize(("source", "message"), [("x = 1", "no function grade"), ("1 / 0", "ZeroDivisionError")])
def test_a_python_grader_that_does_not_load_says_why(source: str, message: str) -> None:
    result = PythonGrader("bad", source)("x", {})
    assert message in result.errors["python_grader_runtime_error"]


# --- specifications that cannot work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact", "grader='exact': expected a grader"),
        ({}, "unknown grader.type None"),
        ({**EXACT, "type": "string_chek"}, "did you mean 'string_check'"),
        (without(EXACT, "reference"), "grader.reference is missing"),
        (without(EXACT, "name"), "grader.name is missing"),
        ({**EXACT, "name": ""}, "grader.name=''"),
        ({**EXACT, "input": 3}, "grader.input=3"),
        ({**EXACT, "input": "{{item.a"}, "do not match"),
        ({**EXACT, "operation": "equals"}, "unknown grader.operation 'equals'"),
        ({**EXACT, "pass_threshold": 1}, "unknown field of grader"),
        (
            {**SIMILAR, "evaluation_metric": "cosine"},
            "evaluation_metric='cosine' is not available: it compares embeddi",
        ),
        ({**SIMILAR, "evaluation_metric": "meteor"}, "WordNet"),
        ({**SIMILAR, "evaluation_metric": "rouge_6"}, "did you mean 'rouge_"),
        ({"type": "regex", "name": "r", "input": "x", "pattern": "("}, "grader.pattern"),
        ({"type": "regex", "name": "r", "input": "x", "pattern": 7}, "grader.pattern"),
        ({"type": "regex", "name": "r", "input": "x", "pattern": "(?=a)"}, "no look-around"),
        ({"type": "regex", "name": "r", "input": "x", "pattern": r"(a)\1"}, "no look-around"),
        ({"type": "regex", "name": "r", "input": "x", "pattern": "(((a{99}){99}){99}){9}"}, "not a regular expression"),
        ({"type": "regex", "name": "r", "input": "x", "pattern": "a" * 2000}, "at most 1000 characters"),
        ({**EXACT, "input": "{" * 100_000}, "grader.input: at most 65536 characters"),
        ({**SIMILAR, "evaluation_metric": ["rouge_l"]}, "unknown grader.evaluation_metric ['rouge_l']"),
        ({**EXACT, "operation": {}}, "unknown grader.operation {}"),
        ({**multi("a", a=EXACT), "graders": {f"g{i}": EXACT for i in range(100)}}, "at most 32 graders"),
        ({"type": "score_model", "name": "j", "model": "m"}, "asks a second model to judge"),
        ({"type": "label_model", "name": "j"}, "asks a second model to judge"),
        ({**PYTHON, "source": "def grade("}, "grader.source: not Python"),
        ({**PYTHON, "source": "#" * (257 << 10)}, "at most 256 KiB"),
        ({**PYTHON, "image_tag": "2025"}, "grader.image_tag"),
        (multi("a", a={**EXACT, "operation": "is"}), "unknown grader.graders.a.operation"),
        (multi("a", a=multi("b", b=EXACT)), "cannot hold another"),
        ({**multi("a", a=EXACT), "graders": {}}, "grader.graders"),
        (multi("exakt", exact=EXACT), "did you mean 'exact'"),
    ],
)
def test_a_specification_that_cannot_work_names_field_value_and_fix(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_grader(spec, allow_python=True)
    assert message in str(caught.value)


def test_every_grader_is_a_grader() -> None:
    for spec in (EXACT, SIMILAR, PYTHON, multi("e", e=EXACT)):
        assert isinstance(build_grader(spec, allow_python=True), Grader)
