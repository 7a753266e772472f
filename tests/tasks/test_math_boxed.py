r"""The reward for \boxed{} answers: what is equal, and what must not stop a run."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from jaxgrpo.tasks import math_boxed
from jaxgrpo.tasks.answers import boxed_answer
from jaxgrpo.tasks.math_boxed import WorkerPool, gold_math_answer, math_boxed_reward
from jaxgrpo.tasks.rewards import REWARDS, combine_rewards, load_reward
from tests.test_layout import REFUSE_JAX, ROOT

pytest.importorskip("math_verify")

EQUAL = [
    ("5", "5"),
    ("5", "x=5"),
    ("5", r"5 \text{ apples}"),
    ("5", "$5$"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "1/2"),
    ("x^2+2x+1", "(x+1)^2"),
    ("(1,2)", "(1, 2)"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"2\sqrt{2}", r"\sqrt8"),
    ("12345", "12,345"),
    (r"\text{Tuesday}", "Tuesday"),
    (r"\text{(B)}", "B"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]
DIFFERENT = [
    ("5", "6"),
    ("5", "1, 2, 5"),
    ("5", "3 or 5"),
    ("5", "5, 6"),
    ("5", "5\n6"),
    ("5", ""),
    ("5", "٥٥"),
    ("(1,2)", "(2,1)"),
    (r"\pi", "3.14159"),
    ("x+1", "y+1"),
    ("5", "(" * 150),
    ("5", r"\frac{\frac{\frac{"),
    ("5", "\x00\ud800"),
]


def boxed(text):
    return rf"So it is \boxed{{{text}}}."


def test_what_is_the_same_mathematical_object():
    golds, given = zip(*EQUAL, strict=True)
    rewards = math_boxed_reward([boxed(text) for text in given], golds)
    assert [pair for pair, reward in zip(EQUAL, rewards, strict=True) if reward != 1.0] == []


def test_what_is_not():
    golds, given = zip(*DIFFERENT, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of these takes three seconds
        rewards = math_boxed_reward([boxed(text) for text in given], golds)
    assert [pair for pair, reward in zip(DIFFERENT, rewards, strict=True) if reward != 0.0] == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5} no, \boxed{6}", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{5} \boxed{ }", "5"),
        (r"\boxed{5} \boxed{6", "5"),
        (r"\boxed{5}<|im_end|>\boxed{6}", "5"),
        (r"\boxed{5}" + "\nQuestion: two?\n" + r"\boxed{6}", "5"),
        (r"\fbox{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_whole_box_counts(text, answer):
    assert boxed_answer(text) == answer


def test_a_gold_answer_is_boxed_or_short():
    assert gold_math_answer(r"so \boxed{\frac{3}{4}}$.") == r"\frac{3}{4}"
    assert gold_math_answer(" $12$ ") == "12"
    for nothing in ("", "a\nb", r"\boxed{}", r"it is \boxed{5"):
        with pytest.raises(ValueError, match="gold answer has nothing"):
            gold_math_answer(nothing)


def test_a_comparison_that_hangs_is_killed_named_and_wrong(monkeypatch):
    monkeypatch.setattr(math_boxed, "_pool", WorkerPool(2, timeout_s=0.5))
    hanging = [boxed("9^{9^{9^9}}"), boxed("100000000!!")]
    completions = [boxed("4"), hanging[0], boxed("2+3"), hanging[1], hanging[0], boxed("10/2")]
    start = time.monotonic()
    with pytest.warns(UserWarning, match="hung or crashed") as caught:
        rewards = math_boxed_reward(completions, ["5"] * 6)
    assert rewards == [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert time.monotonic() - start < 15
    # The same pair is compared, and told, once.
    assert sorted("9^{9" in str(warning.message) for warning in caught) == [False, True]
    math_boxed._pool.close()


def test_a_process_that_crashes_costs_its_own_comparison_alone():
    pool = WorkerPool(1)
    assert pool.verify([("5", "3+2")]) == [True]
    (worker,) = pool._workers
    os.kill(worker.process.pid, signal.SIGSEGV)
    assert pool.verify([("5", "3+2"), ("5", "7-2"), ("5", "3+3")]) in (
        [None, True, False],  # it died with the first, or had been seen dead before
        [True, True, False],
    )
    pool.close()
    assert worker.process.returncode == -signal.SIGSEGV


def test_a_time_limit_from_outside_leaves_no_process(monkeypatch):
    pool = WorkerPool(2, timeout_s=60)
    monkeypatch.setattr(math_boxed, "_pool", pool)
    pool.verify([("5", "3+2"), ("5", "2+3")])
    with pytest.raises(ValueError, match=r"did not finish 1 completions.*completion 0 does"):
        combine_rewards(
            {"math_boxed": math_boxed_reward}, [1.0], [boxed("9^{9^{9^9}}")], ["5"], timeout_s=0.5
        )
    assert pool._workers == []
    assert math_boxed_reward([boxed("2+3")], ["5"]) == [1.0]
    pool.close()


def test_processes_end_when_whoever_asked_is_killed():
    code = (
        "import os, signal\nfrom jaxgrpo.tasks import math_boxed\n"
        "pool = math_boxed.WorkerPool(1)\npool.verify([('5', '2+3')])\n"
        "print(pool._workers[0].process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    pid, deadline = int(done.stdout), time.monotonic() + 10
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_cannot_start_says_how_to_see_why(monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(math_boxed, "_WORKER", broken)
    with pytest.raises(ValueError, match=r"does not start; try: .*worker\.py"):
        WorkerPool(1).verify([("5", "2+3")])


def test_without_the_package_the_reward_says_what_to_install(monkeypatch):
    assert load_reward("math_boxed") is REWARDS["math_boxed"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxgrpo\[math\]'"):
        load_reward("math_boxed")


def test_it_needs_no_jax():
    code = REFUSE_JAX + (
        "from jaxgrpo.tasks.math_boxed import math_boxed_reward\n"
        r"assert math_boxed_reward([r'\boxed{2+3}'], ['5']) == [1.0]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
