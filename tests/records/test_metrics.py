"""Metrics on disk, in TensorBoard and on a screen, read back from where they were written."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from jaxgrpo.config import ConfigError
from jaxgrpo.records.heat_map import heat_map
from jaxgrpo.records.metrics import MetricWriter, completions_table
from jaxgrpo.records.progress import ProgressBar, Stage
from jaxgrpo.records.run_directory import RunDirectory, read_jsonl
from jaxgrpo.records.tracking import WandbTracker, check_wandb

LAYERS = 4
STEP = {"reward": 0.5, "throughput/tokens_per_s": 1234.0, "completions/mean_length": 20.0}


def norms(scale=1.0):
    values = np.arange(1, LAYERS + 1) * scale
    view = {"q_proj": {"a": values, "b": values * 10}}
    return {"l2": view, "rms": view, "rank_free": view}


def board_events(run):
    """(tag, step) -> the summary value. An event file is of records: length, 4 bytes, payload, 4
    bytes."""
    found = {}
    for path in sorted(run.tensorboard.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            found |= {(value.tag, event.step): value for value in event.summary.value}
    return found


def board_scalars(run):
    """(tag, step) -> value."""
    return {key: value.simple_value for key, value in board_events(run).items()}


def shown(renderable, width=200):
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None).print(renderable)
    return file.getvalue()


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run").create()


def test_every_step_is_a_record_with_its_time(run):
    with MetricWriter(run) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 0.25 * step, "reward": 1.0})
    first, second = read_jsonl(run.metrics)
    assert (first["step"], first["loss"], first["reward"]) == (1, 0.25, 1.0)
    assert second["step"] == 2 and second["time"] >= first["time"] > 1e9
    assert not run.layer_grad_norms.exists()


def test_records_stay_valid_json_when_values_are_not_finite(run):
    values = {"loss": math.nan, "grad_norm": math.inf, "kl": np.float32("-inf"), "reward": 1.0}
    with MetricWriter(run) as writer:
        writer.write(3, values)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (line,) = run.metrics.read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert record["loss"] is None and record["grad_norm"] is None and record["kl"] is None
    assert record["nonfinite"] == ["grad_norm", "kl", "loss"]
    assert record["reward"] == 1.0
    assert math.isnan(board_scalars(run)["loss", 3])


def test_a_finite_step_has_no_list_of_bad_values(run):
    with MetricWriter(run) as writer:
        writer.write(1, {"loss": np.float32(0.5)})
    assert "nonfinite" not in read_jsonl(run.metrics)[0]


def test_layer_norms_are_in_their_file_in_all_views(run):
    with MetricWriter(run) as writer:
        writer.write(7, {"loss": 0.5}, norms())
    (record,) = read_jsonl(run.layer_grad_norms)
    assert record["step"] == 7
    assert set(record) == {"step", "l2", "rms", "rank_free"}
    assert record["l2"]["q_proj"] == {"a": [1.0, 2.0, 3.0, 4.0], "b": [10.0, 20.0, 30.0, 40.0]}


def test_tensorboard_holds_metrics_and_every_layer_norm(run):
    with MetricWriter(run) as writer:
        writer.write(1, {"loss": 0.5, "reward": 0.25}, norms())
        writer.write(2, {"loss": 0.125}, norms(2.0))
    scalars = board_scalars(run)
    assert scalars["reward", 1] == 0.25 and scalars["loss", 2] == 0.125
    assert scalars["grad_norm/q_proj/a/layer_03", 1] == 4.0
    assert scalars["grad_norm/q_proj/a/layer_03", 2] == 8.0
    assert scalars["grad_norm/q_proj/b/layer_00", 2] == 20.0
    assert len([name for name, _ in scalars if name.startswith("grad_norm/")]) == 2 * 2 * LAYERS


def test_rewinding_drops_what_came_after(run):
    with MetricWriter(run) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)}, norms())
    with MetricWriter(run) as writer:
        writer.rewind(3)
        writer.write(4, {"loss": 40.0}, norms())
    assert [(r["step"], r["loss"]) for r in read_jsonl(run.metrics)] == [
        *((step, float(step)) for step in (1, 2, 3)),
        (4, 40.0),
    ]
    assert [record["step"] for record in read_jsonl(run.layer_grad_norms)] == [1, 2, 3, 4]


def test_rewinding_past_a_line_that_a_killed_writer_left(run):
    with MetricWriter(run) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 1.0})
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    with MetricWriter(run) as writer:
        with pytest.warns(UserWarning, match="cut short"):
            writer.rewind(1)
        writer.write(2, {"loss": 2.0})
    assert [record["loss"] for record in read_jsonl(run.metrics)] == [1.0, 2.0]


def test_rewinding_a_run_without_records_does_nothing(run):
    with MetricWriter(run) as writer:
        writer.rewind(0)
    assert not run.metrics.exists()


def test_completions_survive_half_characters_and_numbers_that_are_not(run):
    record = {
        "completion": "caf\udcc3 \ud83d 日本 \u2028 \x00",
        "reward": math.nan,
        "rewards": {"gsm8k_answer": math.inf, "format": 1.0},
    }
    with MetricWriter(run) as writer:
        writer.write_completions(12, [record, record])
    path = run.completions / "step_000012.jsonl"
    lines = path.read_bytes().decode("utf-8").split("\n")
    assert len(lines) == 3 and lines[2] == ""
    back = json.loads(lines[0])
    assert back["completion"] == record["completion"]
    assert back["reward"] is None
    assert back["rewards"] == {"gsm8k_answer": None, "format": 1.0}


def completion(text, reward=1.0, advantage=0.5, prompt="1+1?"):
    return {
        "prompt": prompt,
        "completion": text,
        "answer": "2",
        "reward": reward,
        "advantage": advantage,
        "tokens": 3,
        "finish_reason": "stop_token",
    }


@pytest.mark.parametrize(
    "text",
    [
        "[bold]2[/bold]",
        "[/red] 2",
        "[link=https://x.org]2",
        r"\[2]",
        r"\\[a] 2",
        "[[2]]",
        "2\\",
        ":100:",
    ],
)
def test_brackets_in_a_completion_are_text(text):
    assert text in shown(completions_table(1, [completion(text, prompt=text)]))


def test_control_characters_cannot_reach_the_terminal():
    text = shown(completions_table(1, [completion("a\x1b[31mred\x07\x9b\u202e\rb\x00")]))
    assert "red" in text
    assert not set("\x1b\x07\x9b\u202e\r\x00") & set(text)


def test_the_table_shows_the_best_and_the_worst():
    records = [completion(f"text-{i}", float(i), float(-i)) for i in range(9)]
    table = completions_table(40, records, rows=4)
    text = shown(table)
    assert "completions at step 40" in text
    assert [i for i in range(9) if f"text-{i}" in text] == [0, 1, 7, 8]
    assert text.index("text-8") < text.index("text-7") < text.index("text-1")
    assert "8.00" in text and "-8.00" in text and "5.00" not in text


def test_long_prompts_keep_their_end_and_long_completions_their_start():
    record = completion("start" + "c" * 400 + "finish", prompt="begin" + "p" * 400 + "question")
    text = shown(completions_table(1, [record]), width=2000)
    assert "question" in text and "begin" not in text
    assert "start" in text and "finish" not in text


def test_a_reward_that_is_not_a_number_is_still_shown():
    assert "nan" in shown(completions_table(1, [completion("x", math.nan, math.nan)]))


def test_without_a_terminal_progress_is_plain_lines():
    file = io.StringIO()
    console = Console(file=file, width=200)
    with ProgressBar(steps=5, start=2, console=console, every_s=1e9) as bar:
        for done in (3, 4, 5):
            bar.after(done, STEP)
        bar.print("note")
    lines = file.getvalue().splitlines()
    # The first step of this process, the last of the run, and no more than asked for between.
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == [
        "step 3/5",
        "step 5/5",
    ]
    assert "reward 0.500  1,234 tok/s  20 tok/completion" in lines[0]
    assert lines[-1] == "note" and "\x1b" not in file.getvalue()


def test_plain_lines_come_as_often_as_asked():
    file = io.StringIO()
    with ProgressBar(4, 0, Console(file=file, width=200), every_s=0.0) as bar:
        for done in range(1, 5):
            bar.after(done, STEP)
    assert file.getvalue().count("step ") == 4


def test_on_a_terminal_there_is_a_bar():
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=True)
    with ProgressBar(steps=4, start=1, console=console) as bar:
        bar.after(2, STEP)
    assert "training" in file.getvalue() and "2/4" in file.getvalue()
    assert "step 2/4" not in file.getvalue()


def test_a_person_sees_heat_maps_texts_and_settings(run):
    settings = {"seed": 3, "rewards": {"gsm8k_answer": 1.0}, "lora.plan": None, "run_dir": "x"}
    with MetricWriter(run, settings) as writer:
        records = [completion(f"<b>{i}</b> # x", float(i)) for i in range(9)]
        writer.write_samples(20, norms() | {"weight": {}}, records)
        writer.write_result(40, {"eval/accuracy": 0.5})
    assert all(path.is_file() for path in run.tensorboard.iterdir())
    found = board_events(run)
    picture = Image.open(io.BytesIO(found["heat_map/l2", 20].image.encoded_image_string))
    assert picture.width > 300 and len(picture.getcolors(10**6)) > LAYERS
    assert ("heat_map/rank_free", 20) in found and ("heat_map/weight", 20) not in found
    texts = [tag for tag, _ in found if tag.startswith("completions/")]
    assert len(texts) == 4  # the two best and the two worst
    (text,) = found["completions/0/text_summary", 20].tensor.string_val
    # In a block of code, so that neither markup nor markdown of a model is obeyed.
    assert "\n    <b>8</b> # x" in text.decode()
    start = found["_hparams_/session_start_info", 0].metadata.plugin_data.content
    assert b"seed" in start and b"gsm8k_answer" in start and b"lora.plan" in start
    assert b"run_dir" not in start
    assert found["eval/accuracy", 40].simple_value == 0.5


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_heat_map_of_what_is_no_number_is_white(bad):
    good = heat_map({"q_proj": {"a": [1.0, 2.0, 3.0]}}, "t")
    some = heat_map({"q_proj": {"a": [1.0, bad, 3.0]}}, "t")
    none = heat_map({"q_proj": {"a": [bad] * 3}}, "t")
    assert good.shape == some.shape and good.dtype == np.uint8
    white = [int((picture == 255).all(-1).sum()) for picture in (good, some, none)]
    assert white[0] < white[1] < white[2]


def test_a_stage_is_a_bar_on_a_terminal_and_lines_elsewhere():
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, width=120, force_terminal=terminal)
        with Stage("loading", 4, console, every_s=0.0) as stage:
            for done in range(1, 5):
                stage.update(done, "9 tok/s")
        assert ("\x1b" in file.getvalue()) is terminal
        assert ("loading 3/4  9 tok/s  0 s left\n" in file.getvalue()) is not terminal
    with Stage("quick", 4, Console(file=(file := io.StringIO()))) as stage:
        stage.update(4)
    assert file.getvalue() == ""  # over before a line was due


def test_a_stage_is_heard_while_its_first_part_takes_long():
    """Elsewhere than on a terminal, where the bar's clock moves by itself."""
    file = io.StringIO()
    with Stage("evaluating", 512, Console(file=file, width=120), every_s=0.05) as stage:
        stage.say("compiling and sampling the first batch")
        deadline = time.monotonic() + 20
        while file.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    first, second = file.getvalue().splitlines()[:2]
    assert first == "evaluating 0/512  compiling and sampling the first batch, 0 s so far"
    assert second.startswith("evaluating 0/512  compiling")
    after = file.getvalue()
    time.sleep(0.12)
    assert file.getvalue() == after


def test_the_bar_says_what_a_step_does_and_what_is_compiled():
    file = io.StringIO()
    with ProgressBar(4, 2, Console(file=file, width=120)) as bar:
        for step in (2, 3):
            for phase in ("rollout", "reward", "train"):
                bar.at(phase, step)
            bar.after(step + 1, STEP)
    lines = file.getvalue().splitlines()
    assert [line for line in lines if not line.startswith("step")] == [
        "compiling the rollout program",
        "compiling the train program",
    ]
    file = io.StringIO()
    with ProgressBar(4, 0, Console(file=file, width=120, force_terminal=True)) as bar:
        bar.at("rollout", 1)
    assert "training: rollout" in file.getvalue()


def test_the_bar_fits_eighty_columns():
    for phase, done in (("rollout", 0), ("train", 1)):
        file = io.StringIO()
        with ProgressBar(1000, 0, Console(file=file, width=80, force_terminal=True)) as bar:
            bar.at(phase, done)
            if done:
                bar.after(999, STEP | {"throughput/tokens_per_s": 54321.0})
        last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).strip().splitlines()[-1]
        assert len(last.strip()) <= 80 and "…" not in last, last
        assert ("reward 0.500  54,321 tok/s" if done else "compiling the rollout") in last


def test_wandb_gets_what_tensorboard_gets(run, monkeypatch):
    """Offline: what it would send lies in run_dir/wandb; a resumed run is the same one."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    settings = {"wandb_project": "tests", "seed": 3}
    with MetricWriter(run, settings) as writer:
        writer.write(1, {"loss": 0.5}, norms())
        writer.write_samples(1, norms(), [completion("x", 1.0)])
        writer.write_result(1, {"eval/accuracy": 0.5})
    (log,) = (run.root / "wandb").glob("offline-run-*/run-*.wandb")
    name, deadline = (run.root / "wandb_id").read_text(), time.monotonic() + 20
    # A process of wandb's own writes it.
    while b"eval/accuracy" not in (data := log.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for part in ("loss", "grad_norm/q_proj/a/layer_03", "heat_map/l2", "eval/accuracy", name):
        assert part.encode() in data, part
    with MetricWriter(run, settings) as writer:
        writer.write(2, {"loss": 0.25})
    assert (run.root / "wandb_id").read_text() == name


def test_wandb_that_is_not_installed_or_does_not_start_is_one_line(run, monkeypatch):
    check_wandb(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxgrpo\[wandb\]'"):
        check_wandb("tests")
    monkeypatch.undo()
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key\nconfigured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"does not start \(No API key configured\.\)"):
        WandbTracker("tests", run.root, {})
