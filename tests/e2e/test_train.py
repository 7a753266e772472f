"""Whole runs on the embedded model: they learn, resume bit for bit, and write what they say."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import chex
import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxgrpo import compiles
from jaxgrpo.config_files import load_config
from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.run import EMBEDDED_CONFIG, main
from jaxgrpo.train import train
from tests.e2e.conftest import SMALL

RUN = [
    *SMALL,
    "lora.rank=4",
    "eval.problems=16",
    "eval.batch_prompts=16",
    "checkpoint_every_steps=2",
    "mesh.data=1",
    "mesh.model=1",
    "mesh.fsdp=8",
]


def _train(run_dir, *overrides):
    config = load_config([EMBEDDED_CONFIG], [*RUN, f"run_dir={run_dir}", *overrides])
    return train(config, Console(file=open(os.devnull, "w")))


def _adapter(run_dir):
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def _metrics(run_dir, drop=("time/", "throughput/", "step_time", "time")):
    records = read_jsonl(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.startswith(drop)} for record in records]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One uninterrupted run of four steps."""
    run_dir = tmp_path_factory.mktemp("straight")
    _train(run_dir, "steps=4")
    return run_dir


def test_resumed_equals_uninterrupted_bit_for_bit(straight, tmp_path):
    _train(tmp_path, "steps=2")
    _train(tmp_path, "steps=4")
    chex.assert_trees_all_equal(_adapter(straight), _adapter(tmp_path))
    steps = [m for m in _metrics(straight) if "loss" in m]
    assert steps == [m for m in _metrics(tmp_path) if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4]
    norms = [(run / "layer_grad_norms.jsonl").read_text() for run in (straight, tmp_path)]
    assert norms[0] == norms[1]


def test_everything_is_compiled_in_the_first_step(straight):
    """Steps of other lengths run the same programs; the summary says what was compiled and when."""
    steps = [m for m in read_jsonl(straight / "metrics.jsonl") if "loss" in m]
    compiled = [m["time/programs_compiled"] for m in steps]
    assert compiled[0] > 0 and not any(compiled[1:]), compiled
    whole = json.loads((straight / "summary.json").read_text())
    phases = ("prompts", "weights", "sampler", "train_step", "first_step")
    # Of the process' first run, which may be another test's.
    assert all(whole["start"][phase] > 0 for phase in phases)
    summary = whole["compiled"]
    assert list(summary["by_step"]) == ["1"]
    assert summary["programs"] >= summary["by_step"]["1"]["programs"] == compiled[0]
    assert summary["programs"] >= summary["from_disk"] >= steps[0]["time/programs_from_disk"]
    # Of the whole process, which has run other tests.
    assert "train_step" in {program.name for program in compiles._programs}
    assert summary["longest"] and set(summary["longest"][0]) == {"name", "seconds", "from_disk"}


def test_killed_run_goes_on_to_the_same_numbers(straight, tmp_path):
    """SIGKILL after the first checkpoint; nothing that was half-written is taken for whole."""
    arguments = [*RUN, f"run_dir={tmp_path}", "steps=4"]
    process = subprocess.Popen([sys.executable, "-m", "jaxgrpo.run", *arguments], env=_env())
    deadline = time.monotonic() + 240
    while not (tmp_path / "checkpoints" / "2").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a line cut short is allowed to be reported
        _train(tmp_path, "steps=4")
    chex.assert_trees_all_equal(_adapter(straight), _adapter(tmp_path))


def test_interrupted_run_saves_and_says_so(tmp_path):
    arguments = [*RUN, f"run_dir={tmp_path}", "steps=500", "checkpoint_every_steps=400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxgrpo.run", *arguments],
        env=_env(),
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while len(_lines(tmp_path / "metrics.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "run the same command again" in output
    (step,) = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert int(step) >= 2


def _lines(path):
    return path.read_text().splitlines() if path.exists() else []


def _env():
    # Compiled as here: its numbers are compared bit for bit.
    return os.environ | {"JAX_PLATFORMS": "cpu"}


def test_a_finished_run_is_not_trained_again(straight):
    before = (straight / "adapter" / "adapter_model.safetensors").read_bytes()
    result = _train(straight, "steps=4")
    assert not result.interrupted
    assert (straight / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert [m["step"] for m in _metrics(straight) if "loss" in m] == [1, 2, 3, 4]


def test_every_step_has_trls_metrics_and_every_layers_norms(straight):
    record = next(m for m in read_jsonl(straight / "metrics.jsonl") if "loss" in m)
    for name in (
        "loss", "grad_norm", "learning_rate", "entropy", "reward", "reward_std",
        "frac_reward_zero_std", "rewards/gsm8k_answer/mean", "completions/mean_length",
        "completions/clipped_ratio", "completions/max_terminated_length", "num_tokens",
        "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean",
        "clip_ratio/region_mean", "step_time", "throughput/tokens_per_s",
    ):  # fmt: skip
        assert name in record, name
    assert record["sampling/sampling_logp_difference/max"] < 1e-3
    norms = read_jsonl(straight / "layer_grad_norms.jsonl")[1]
    total = sum(np.square(v).sum() for m in norms["l2"].values() for v in m.values())
    second = [m for m in read_jsonl(straight / "metrics.jsonl") if "loss" in m][1]
    np.testing.assert_allclose(np.sqrt(total), second["grad_norm"], rtol=1e-5)
    assert len(list((straight / "tensorboard").glob("events.*"))) >= 1
    completions = read_jsonl(straight / "completions" / "step_000001.jsonl")
    assert len(completions) == 32
    assert {"prompt", "completion", "reward", "advantage", "tokens"} <= set(completions[0])


def test_adapter_loads_in_peft_and_completes_as_our_sampler_does(straight):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_DIR)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_DIR, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, straight / "adapter").eval()
    records = read_jsonl(straight / "eval" / "step_000004.jsonl")
    for record in records[:8]:
        inputs = tokenizer(record["prompt"], return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == record["completions"][0]


@pytest.mark.parametrize(
    "overrides",
    [
        ("grpo.num_iterations=2", "grpo.loss=gspo", "grpo.kl_coef=0.05"),
        (
            "grpo.micro_batches=2",
            "grpo.mask_truncated_completions=true",
            "grpo.loss=dr_grpo",
            "eval.samples=2",
            "eval.temperature=1.0",
            "rollout.stop_strings=['####']",
        ),
        ("grpo.importance_correction=sequence_mask",),
    ],
    ids=["inner-iterations", "micro-batches-sampled-eval", "sequence-correction"],
)
def test_every_part_of_the_objective_runs_in_the_loop(tmp_path, overrides):
    result = _train(tmp_path, "steps=2", *overrides)
    assert all(np.isfinite(value) for value in result.metrics.values())
    assert result.metrics["grpo/skipped_updates"] == 0
    if any("stop_strings" in word for word in overrides):
        sampled, evaluated = _stopped_texts(tmp_path)
        assert sampled and evaluated
        assert all(text.endswith("####") for text in [*sampled, *evaluated])


def _stopped_texts(run):
    """What training and evaluation recorded of completions that a stop string ended."""
    stop = "stop_string"
    sampled = [
        record["completion"]
        for path in sorted((run / "completions").glob("*.jsonl"))
        for record in read_jsonl(path)
        if record["finish_reason"] == stop
    ]
    evaluated = [
        text
        for path in sorted((run / "eval").glob("*.jsonl"))
        for record in read_jsonl(path)
        for text, reason in zip(record["completions"], record["finish_reasons"], strict=True)
        if reason == stop
    ]
    return sampled, evaluated


def test_a_rank_plan_file_is_realised(tmp_path):
    plan = tmp_path / "plan.json"
    ranks = [0, 1, 2, 3, 4, 5, 6, 7]
    plan.write_text(json.dumps({"ranks": {"q_proj": ranks, "down_proj": ranks[::-1]}}))
    _train(tmp_path / "run", "steps=2", f"lora.plan={plan}", "lora.scale_rule=rslora")
    tensors = _adapter(tmp_path / "run")
    for layer in range(8):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"
        assert (tensors[name].shape[0] if name in tensors else 0) == ranks[layer]
    norms = read_jsonl(tmp_path / "run" / "layer_grad_norms.jsonl")[-1]["l2"]
    assert norms["q_proj"]["b"][0] == 0 and min(norms["q_proj"]["b"][1:]) > 0
    assert not any(v for v in norms["up_proj"]["b"])


def test_another_configuration_may_not_resume_a_run(straight, capsys):
    code = main([*RUN, f"run_dir={straight}", "steps=4", "optim.learning_rate=0.5"])
    assert code == 2
    assert "optim.learning_rate was 0.001, is 0.5" in capsys.readouterr().err


def test_two_processes_may_not_write_one_run(tmp_path, capsys):
    from jaxgrpo.records.run_directory import RunDirectory

    with RunDirectory(tmp_path).create().lock():
        code = main([*RUN, f"run_dir={tmp_path}", "steps=1"])
    assert code == 2
    assert "another process" in capsys.readouterr().err


def test_grpo_raises_accuracy(tmp_path):
    """The embedded default, cut short: fifteen points on problems it never saw."""
    words = ["steps=25", f"run_dir={tmp_path}", "eval.problems=256", "checkpoint_every_steps=99"]
    command = [sys.executable, "-m", "jaxgrpo.run", "train", *words]
    # One device, as its reader has it.
    subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": ""}, stdout=subprocess.PIPE)
    summary = json.loads((tmp_path / "summary.json").read_text())
    before, after = (summary[f"eval_{when}"]["eval/accuracy"] for when in ("before", "after"))
    assert 0.35 <= before <= 0.65
    assert after - before >= 0.15
