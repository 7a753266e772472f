"""docs/own_tasks.md is true: its ten lines run as they stand, and MATH's form can be learnt."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from jaxgrpo.commands.command import PROGRAM
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.run import main
from jaxgrpo.tasks.problems import make_problems
from tests.test_layout import ROOT

SMALL = [
    "rollout.max_completion_tokens=32",
    "eval.problems=16",
    "eval.batch_prompts=16",
]
BLOCKS = re.findall(
    r"```(\w+)\n(.*?)```", (ROOT / "docs" / "own_tasks.md").read_text("utf-8"), re.DOTALL
)


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """A directory with the ten lines and the data that they write, and the command for it."""
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    assert sum(bool(line.strip()) for line in code.splitlines()) == 10
    (tmp_path / "sums.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sums", raising=False)
    make, command = next(text for kind, text in BLOCKS if kind == "bash").splitlines()
    assert make == "python sums.py" and command.startswith(PROGRAM)
    subprocess.run([sys.executable, "sums.py"], check=True)
    return shlex.split(command.removeprefix(PROGRAM))


def accuracy(run_dir, step):
    return json.loads((run_dir / "eval" / f"step_{step:06d}.json").read_text())["eval/accuracy"]


def test_ten_lines_are_a_task(sums, tmp_path):
    assert main(["eval", *sums[1:], *SMALL]) == 0
    (records,) = (tmp_path / "runs/sums/evaluations").glob("*/step_000000.jsonl")
    record = json.loads(records.open().readline())
    assert record["prompt"].count("How many in total?") == 1
    # Judged by the function of the ten lines, and by nothing else.
    right = record["completions"][0].split()[-1:] == [record["answer"]]
    assert record["correct"] == [right] and "lm_eval_strict" not in record


@pytest.mark.slow
def test_ten_lines_are_learnt(sums, tmp_path):
    assert main(sums) == 0
    before, after = (accuracy(tmp_path / "runs" / "sums", step) for step in (0, 30))
    assert after > before + 0.1, (before, after)


def write_math(directory):
    """Problems of the embedded kind in MATH's form: problem, solution with a box."""
    for split, count in (("train", 512), ("test", 64)):
        with (directory / f"{split}.jsonl").open("w") as file:
            for row in make_problems(split, count):
                solution = re.sub(r"#### (.*)$", r"\\boxed{\1}", row["answer"])
                print(json.dumps({"problem": row["question"], "solution": solution}), file=file)


MATH = [
    str(ROOT / "jaxgrpo" / "assets" / "embedded.yaml"),
    "data.prompt_column=problem",
    "data.answer_column=solution",
    "eval.reward=math_boxed",
    "rewards.math_boxed=1",
]


def test_the_math_configuration_reads_rows_of_its_form(tmp_path, capsys):
    pytest.importorskip("math_verify")
    write_math(tmp_path)
    settings = [str(ROOT / "configs" / "math_1.5b.yaml"), "model.path=embedded"]
    settings += [f"data.path={tmp_path}", "data.name=null", "lora.rank=4"]
    assert main(["check", *settings]) == 0
    assert "512 training and 64 evaluation prompts" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "a", "solution": "b\nc"}))
    assert main(["check", *settings]) == 2
    assert "test: row 0: gold answer has nothing in \\boxed{}" in capsys.readouterr().err


@pytest.mark.slow
def test_boxed_answers_are_learnt(tmp_path):
    """The embedded model never boxes anything; a few supervised steps show it how, GRPO goes on."""
    pytest.importorskip("math_verify")
    write_math(tmp_path)
    where = [f"data.path={tmp_path}", "optim.learning_rate=1e-2", "grpo.prompts_per_step=8"]
    first, then = (f"run_dir={tmp_path}/{name}" for name in ("sft", "grpo"))
    assert main(["train", *MATH, *where, first, "objective=sft", "steps=40"]) == 0
    assert accuracy(tmp_path / "sft", 0) == 0
    assert accuracy(tmp_path / "sft", 40) > 0.5
    start = [f"lora.adapter={tmp_path}/sft/adapter", "optim.learning_rate=1e-3", "steps=15"]
    # After so few steps the bytes of \boxed are the likeliest ones, but by little.
    start.append("rollout.temperature=0.3")
    assert main(["train", *MATH, *where, *start, then]) == 0
    assert accuracy(tmp_path / "grpo", 15) > 0.5
    rewards = [r.get("reward", 0.0) for r in read_jsonl(tmp_path / "grpo" / "metrics.jsonl")]
    assert max(rewards) > 0.5
