"""Evaluation: its statistics against counting, its verdicts, and a whole one on disk."""

from __future__ import annotations

import io
import itertools
import json
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxgrpo.config import ConfigError, EvalConfig, MeshConfig, RolloutConfig
from jaxgrpo.config_files import load_config
from jaxgrpo.evaluate import (
    EvalPlace,
    EvalResult,
    EvalTask,
    eval_metrics,
    evaluate,
    judge,
    judge_gsm8k,
    pass_at_k,
    read_eval,
)
from jaxgrpo.evaluate_run import start_policy
from jaxgrpo.mesh import make_mesh
from jaxgrpo.model.api import make_decode_weights
from jaxgrpo.model.weights import EMBEDDED_DIR, load_model
from jaxgrpo.rollout.engine import make_generate
from jaxgrpo.rollout.stop import make_stop_rules
from jaxgrpo.stats import wilson_interval
from jaxgrpo.tasks.data import PromptSource
from jaxgrpo.tasks.data_sets import load_problems
from jaxgrpo.tasks.rewards import gsm8k_answer_reward
from jaxgrpo.tasks.texts import load_tokenizer
from jaxgrpo.types import FINISH_LENGTH, FINISH_STOP_TOKEN, PromptBatch, Rollout


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_counts_the_draws_that_hold_a_right_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(itertools.combinations([i < c for i in range(n)], k))
            share = Fraction(sum(any(draw) for draw in draws), len(draws))
            assert pass_at_k(n, c, k) == pytest.approx(float(share), abs=1e-12)


TEXTS = [
    *("It is 5.\n#### 5", "So the answer is 5."),
    *("#### 6", "I do not know."),
    *("#### 5", "#### 5"),
]


def batch_and_rollout():
    """Two problems with two completions each; a third one fills the batch."""
    batch = PromptBatch(
        tokens=np.zeros((3, 4), np.int32),
        mask=np.ones((3, 4), bool),
        texts=["p0", "p1", "p2"],
        answers=["... #### 5", "... #### 5.0", "... #### 5"],
        indices=[7, 9, 0],
    )
    reasons = [FINISH_STOP_TOKEN, FINISH_LENGTH, *[FINISH_STOP_TOKEN] * 4]
    rollout = Rollout(
        tokens=np.zeros((6, 8), np.int32),
        mask=np.zeros((6, 8), bool),
        logprobs=np.zeros((6, 8), np.float32),
        lengths=np.array([4, 8, 2, 6, 1, 1]),
        finish_reasons=np.array(reasons),
    )
    return batch, rollout


def judged():
    batch, rollout = batch_and_rollout()
    return judge_gsm8k(batch, 2, TEXTS, rollout, 2)


def test_any_reward_can_say_what_is_right():
    seen = {}

    def reward(completions, answers, **context):
        seen.update(context, answers=answers)
        return [1, 0.5, None, 1.5, 0, 0]

    config = load_config([], ["eval.samples=2", "eval.temperature=1", "eval.reward=mine:reward"])
    batch, rollout = batch_and_rollout()
    first, second = judge(batch, 2, TEXTS, rollout, reward, config)
    assert first["correct"] == [True, False] and second["correct"] == [False, True]
    assert first["rewards"] == [1.0, 0.5] and second["rewards"] == [None, 1.5]
    assert seen["answers"][:3] == ["... #### 5", "... #### 5", "... #### 5.0"]
    assert seen["completion_lengths"] == [4, 8, 2, 6, 1, 1] and seen["prompts"][2] == "p1"
    json.dumps([first, second], allow_nan=False)
    metrics = eval_metrics([first, second], 2)
    assert metrics["eval/accuracy"] == 0.5 and "eval/lm_eval_strict" not in metrics
    with pytest.raises(ConfigError, match=r"'mine:reward' raised .*; completion 0 does: 'It is 5"):
        judge(batch, 2, TEXTS, rollout, raising, config)


def raising(completions, answers, **context):
    raise RuntimeError("no")


def test_each_sample_of_each_real_problem_is_judged():
    first, second = judged()
    assert first["index"] == 7 and second["index"] == 9
    assert first["completions"] == ["It is 5.\n#### 5", "So the answer is 5."]
    assert first["extracted"] == ["5", "5"] and first["correct"] == [True, True]
    assert first["lm_eval_strict"] == [True, False]
    assert first["lm_eval_flexible"] == [True, True]
    assert second["extracted"] == ["6", None] and second["correct"] == [False, False]
    assert first["tokens"] == [4, 8] and second["tokens"] == [2, 6]
    assert first["finish_reasons"] == ["stop_token", "length"]
    json.dumps([first, second])


def test_metrics_of_records_made_by_hand():
    metrics = eval_metrics(judged(), 2)
    assert metrics["eval/accuracy"] == 0.5
    assert metrics["eval/problems"] == 2.0
    assert metrics["eval/lm_eval_strict"] == 0.25
    assert metrics["eval/mean_length"] == 5.0
    assert metrics["eval/clipped_ratio"] == 0.25
    assert metrics["eval/pass@1"] == 0.5 and metrics["eval/pass@2"] == 0.5
    # Four completions, but only two problems to be sure by.
    low_high = (metrics["eval/accuracy_low"], metrics["eval/accuracy_high"])
    interval = wilson_interval(1, 2)
    assert low_high == (interval.low, interval.high)


def records_with(correct):
    n = len(correct[0])
    rest = {"lm_eval_strict": [0] * n, "lm_eval_flexible": [0] * n, "tokens": [1] * n}
    return [{"correct": row, **rest, "finish_reasons": ["stop_token"] * n} for row in correct]


def test_pass_at_k_is_averaged_over_problems_for_powers_of_two():
    metrics = eval_metrics(records_with([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5]), 5)
    names = sorted(name for name in metrics if "pass@" in name)
    assert names == ["eval/pass@1", "eval/pass@2", "eval/pass@4"]
    assert metrics["eval/pass@1"] == pytest.approx(metrics["eval/accuracy"]) == pytest.approx(0.2)
    assert metrics["eval/pass@2"] == pytest.approx((2 / 5 + 7 / 10) / 3)
    assert metrics["eval/pass@4"] == pytest.approx((4 / 5 + 1) / 3)
    assert not [name for name in eval_metrics(records_with([[1]]), 1) if "pass@" in name]


def test_a_result_describes_itself():
    records = records_with([[1]] * 149 + [[0]] * 51)
    text = EvalResult(eval_metrics(records, 1), records).describe()
    assert text == "74.5%  (95 % interval 68.0% to 80.0%, 200 problems)"


@pytest.fixture(scope="module")
def run_eval():
    """Evaluates the embedded model on its first six problems, four at a time."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model, base = load_model(EMBEDDED_DIR, "float32", mesh)
    weights = make_decode_weights(model, base, None)
    tokenizer = load_tokenizer(EMBEDDED_DIR)
    stop = make_stop_rules(tokenizer, [tokenizer.eos_token_id], (), model.vocab_size)
    common = ["eval.problems=6", "eval.batch_prompts=4", "rollout.max_completion_tokens=48"]
    # One bucket, so that both evaluations of a kind run in one program.
    common += ["data.max_prompt_tokens=64", "data.prompt_bucket_tokens=64"]
    programs = {}

    def run(directory, step, samples=1, temperature=0.0, seed=0):
        changes = [f"eval.samples={samples}", f"eval.temperature={temperature}", f"seed={seed}"]
        config = load_config([], common + changes)
        assert isinstance(config.eval, EvalConfig)
        if (samples, temperature) not in programs:
            rollout = RolloutConfig(max_completion_tokens=48, temperature=temperature)
            programs[samples, temperature] = make_generate(model, rollout, stop, samples)
        prompts = PromptSource(load_problems(config.data, "test"), tokenizer, config.data)
        task = EvalTask(config, prompts, tokenizer, gsm8k_answer_reward, mesh)
        place = EvalPlace(directory, "", step)
        console = Console(file=io.StringIO())
        return evaluate(programs[samples, temperature], weights, task, place, console)

    return run


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_greedy_evaluation_is_whole_and_on_disk(run_eval, tmp_path):
    result = run_eval(tmp_path, step=40)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_000040.json",
        "step_000040.jsonl",
    ]
    assert read(tmp_path / "step_000040.jsonl") == result.records
    kept = json.loads((tmp_path / "step_000040.json").read_text())
    assert kept.pop("made_with") == result.made_with and kept == result.metrics
    assert read_eval(tmp_path, 40) == result
    # Six of two batches of four: the filling of the second is not counted.
    assert [record["index"] for record in result.records] == list(range(6))
    assert result.metrics["eval/problems"] == 6.0
    assert all(len(record["completions"]) == 1 for record in result.records)
    right = sum(record["correct"][0] for record in result.records)
    assert result.metrics["eval/accuracy"] == pytest.approx(right / 6)
    assert right > 0, "the embedded model answers some"
    assert not [name for name in result.metrics if "pass@" in name]
    for record in result.records:
        assert "####" in record["completions"][0] or record["finish_reasons"] == ["length"]


def test_two_evaluations_draw_the_same_noise_for_the_same_problem(run_eval, tmp_path):
    first = run_eval(tmp_path, step=0, samples=2, temperature=1.0)
    later = run_eval(tmp_path, step=80, samples=2, temperature=1.0)
    assert first.records == later.records
    other = run_eval(tmp_path, step=80, samples=2, temperature=1.0, seed=1)
    assert first.records != other.records
    assert {"eval/pass@1", "eval/pass@2"} <= set(first.metrics)
    assert first.metrics["eval/pass@1"] <= first.metrics["eval/pass@2"]
    assert [len(record["correct"]) for record in first.records] == [2] * 6
    # The two samples of a problem are two draws.
    assert any(record["completions"][0] != record["completions"][1] for record in first.records)


def test_the_base_model_is_known_by_its_weights(tmp_path):
    policies = []
    for change in (b"", b"", b"x"):
        file = tmp_path / "model.safetensors"
        file.write_bytes((EMBEDDED_DIR / "model.safetensors").read_bytes()[:-1] + (change or b"y"))
        session: Any = SimpleNamespace(adapter=None, model_dir=tmp_path)
        policies.append(start_policy(session))
    assert policies[0] == policies[1] != policies[2]
    assert all(policy.startswith("the base model (sha256 ") for policy in policies)
