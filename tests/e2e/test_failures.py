"""What can go wrong while a run runs: it ends in one line, keeps what it has, and goes on later."""

import dataclasses
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open

from jaxgrpo.commands.training import EXIT_INTERRUPTED
from jaxgrpo.config_files import load_config
from jaxgrpo.divergence import MAX_BAD_STEPS, MAX_BATCHES
from jaxgrpo.programs import make_programs
from jaxgrpo.records.run_directory import RunDirectory, read_jsonl
from jaxgrpo.run import EMBEDDED_CONFIG, EXIT_ERROR, EXIT_USAGE, guarded, main
from jaxgrpo.session import open_session
from jaxgrpo.tasks.rewards import gsm8k_answer_reward
from jaxgrpo.train import stop_requested, train_session
from tests.devices import few_devices

SETTINGS = [
    "grpo.prompts_per_step=8",
    "grpo.group_size=2",
    "grpo.micro_batches=1",
    "lora.rank=2",
    "lora.target_modules=[q_proj,v_proj]",
    "rollout.max_completion_tokens=16",
    "eval.problems=8",
    "eval.batch_prompts=8",
    "eval.before_training=false",
    "checkpoint_every_steps=1",
    "keep_checkpoints=1",
    "log_completions_every_steps=0",
    "steps=5",
]
GRACE_S = 20.0


class Lab:
    """One model and one set of programs for every run of this module.

    Attributes:
        at: step (from 0) -> what its reward does before it answers.
    """

    def __init__(self):
        config = load_config([EMBEDDED_CONFIG], [*SETTINGS, "run_dir=unused"])
        self.at, self.calls = {}, 0
        with few_devices(1):
            session = open_session(config)
        self.session = dataclasses.replace(session, rewards={"gsm8k_answer": self.reward})
        self.programs = make_programs(session)

    def reward(self, completions, answers, **context):
        if len(completions) > 1:  # one alone is asked for when a culprit is searched
            self.calls += 1
        if action := self.at.get(self.calls - 1):
            action(completions)
        return gsm8k_answer_reward(completions, answers)

    def run(self, run_dir, start=0, programs=None, **changes):
        """Exit code and what was printed; `start` is the step that it begins with."""
        self.calls = start
        config = dataclasses.replace(self.session.config, run_dir=str(run_dir), **changes)
        session, out = self.session.with_config(config), io.StringIO()

        def command():
            with jax.set_mesh(session.mesh):
                done = train_session(
                    session, programs or self.programs, Console(file=out, width=400)
                )
            return EXIT_INTERRUPTED if done.interrupted else 0

        return guarded(command), out.getvalue()


@pytest.fixture(scope="module")
def shared():
    return Lab()


@pytest.fixture
def lab(shared):
    shared.at = {}
    return shared


@pytest.fixture(scope="module")
def undisturbed(shared, tmp_path_factory):
    """The numbers of a run in which nothing happened."""
    path = tmp_path_factory.mktemp("undisturbed")
    assert shared.run(path)[0] == 0
    return numbers(path)


def numbers(run_dir):
    """Everything that a run computed: metrics without times, and the adapter's bytes."""
    times = ("time", "step_time", "throughput/")
    return [
        {k: v for k, v in record.items() if not k.startswith(times)}
        for record in read_jsonl(Path(run_dir) / "metrics.jsonl")
    ], (Path(run_dir) / "adapter" / "adapter_model.safetensors").read_bytes()


def saved(run_dir):
    return [int(p.name) for p in (Path(run_dir) / "checkpoints").iterdir() if p.name.isdecimal()]


def error_line(capsys):
    """The one line on stderr."""
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


@contextmanager
def disk(path, size):
    """A small disk of its own; skips where mounting is not allowed."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def remount(path, options):
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


def test_a_full_disk_ends_with_what_was_saved_and_goes_on_when_there_is_room(
    lab, undisturbed, tmp_path, capsys
):
    with disk(tmp_path / "disk", "4m") as path:

        def fill(_):
            room = shutil.disk_usage(path).free
            with (path / "filler").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, room)

        lab.at = {3: fill}
        code, _ = lab.run(path / "run")
        line = error_line(capsys)
        assert code == EXIT_ERROR
        assert "No space left" in line and "saved up to step 3: mend it and run" in line
        assert saved(path / "run") == [3]
        (path / "filler").unlink()
        lab.at = {}
        code, output = lab.run(path / "run", 3)
        assert code == 0 and "after step 3 of 5" in output
        assert numbers(path / "run") == undisturbed


def test_a_disk_that_becomes_read_only_ends_with_what_was_saved(lab, undisturbed, tmp_path, capsys):
    with disk(tmp_path / "disk", "16m") as path:
        # Files that are open for writing keep a disk from becoming read-only: take it by force.
        lab.at = {2: lambda _: make_read_only(path)}
        code, _ = lab.run(path / "run")
        line = error_line(capsys)
        assert code == EXIT_ERROR and "Read-only file system" in line
        assert "saved up to step 2" in line
        make_writable(path)
        lab.at = {}
        assert lab.run(path / "run", 2)[0] == 0
        assert numbers(path / "run") == undisturbed


def make_read_only(path):
    """A read-only view of the disk over itself: what is opened from now on cannot be written."""
    subprocess.run(["mount", "--bind", path, path], check=True)
    remount(path, "ro,bind")


def make_writable(path):
    subprocess.run(["umount", "-l", path], check=True)


def test_a_read_only_directory_is_named_before_anything_starts(lab, tmp_path, capsys):
    with disk(tmp_path / "disk", "1m") as path:
        remount(path, "ro")
        code, _ = lab.run(path / "run")
        line = error_line(capsys)
        assert code == EXIT_ERROR and f"cannot make {path}/run" in line and "Read-only" in line


def test_a_directory_without_permission_is_named(lab, tmp_path, capsys, monkeypatch):
    """root may write everywhere, so the system's refusal is played."""
    if os.geteuid() == 0:

        def refuse(self, *args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        tmp_path.chmod(0o500)
    code, _ = lab.run(tmp_path / "run")
    line = error_line(capsys)
    assert code == EXIT_ERROR and "cannot make" in line and "Permission denied" in line


def test_permission_that_is_lost_on_the_way_ends_with_what_was_saved(
    lab, undisturbed, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"

    def lose(_):
        if os.geteuid():
            run.chmod(0o500)
            for path in run.iterdir():
                path.chmod(0o500 if path.is_dir() else 0o400)
            return
        opened = os.open

        def refuse(path, flags, *args, **kwargs):
            if flags & (os.O_WRONLY | os.O_RDWR) and str(run) in str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return opened(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "open", refuse)

    lab.at = {2: lose}
    code, _ = lab.run(run)
    monkeypatch.undo()
    line = error_line(capsys)
    assert code == EXIT_ERROR and "Permission denied" in line and "saved up to step 2" in line
    if os.geteuid():
        run.chmod(0o700)
        for path in run.iterdir():
            path.chmod(0o700 if path.is_dir() else 0o600)
    lab.at = {}
    assert lab.run(run, 2)[0] == 0
    assert numbers(run) == undisturbed


def bad(completions):
    raise RuntimeError("the judge is ill")


def sleepy(completions):
    time.sleep(60)


def blow_up(completions):
    re.match(r"(a|a)+$", "a" * 40 + "b")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (bad, "raised RuntimeError('the judge is ill') at test_failures.py:"),
        (sleepy, "did not finish 16 completions in 0.5 s"),
        (blow_up, "did not finish 16 completions in 0.5 s"),
    ],
)
def test_a_reward_that_fails_names_the_completion_and_costs_no_step(
    lab, undisturbed, tmp_path, capsys, action, message
):
    lab.at = {2: action}
    # Saved because the reward failed, not because a checkpoint was due.
    code, _ = lab.run(tmp_path, reward_timeout_s=0.5, checkpoint_every_steps=100)
    line = error_line(capsys)
    assert code == EXIT_USAGE
    assert f"reward 'gsm8k_answer' {message}" in line and "completion 0 does: '" in line
    assert saved(tmp_path) == [2]
    lab.at = {}
    assert lab.run(tmp_path, 2)[0] == 0
    assert numbers(tmp_path) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_within_the_grace_time(lab, undisturbed, tmp_path, number):
    sent = []

    def stop(_):
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    lab.at = {2: stop}
    # As a terminal has it; a background job inherits SIGINT as ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _ = lab.run(tmp_path, checkpoint_every_steps=100)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == EXIT_INTERRUPTED == 130
    assert time.monotonic() - sent[0] < GRACE_S
    assert saved(tmp_path) == [3]  # the step in progress was finished
    lab.at = {}
    assert lab.run(tmp_path, 3)[0] == 0
    assert numbers(tmp_path) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_anything_to_save(number, capsys):
    def starting():
        os.kill(os.getpid(), number)
        time.sleep(30)
        return 0

    # As a terminal has it; a background job inherits SIGINT as ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert guarded(starting) == EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    assert "run the same command again" in capsys.readouterr().err


def test_an_interrupt_inherited_as_ignored_stays_so_and_sigterm_stops():
    """A script's background job is not meant to end when something else is interrupted."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requested() as event:
            os.kill(os.getpid(), signal.SIGINT)
            assert not event.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            assert event.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def poisoned(lab, steps):
    """Programs whose batches hold a NaN in those updates (from 0)."""
    seen = []

    def train_step(state, base, plan, batch, schedule):
        if len(seen) in steps:
            advantages = batch.advantages * np.float32("nan")
            batch = dataclasses.replace(batch, advantages=advantages)
        seen.append(batch)
        return lab.programs.train_step(state, base, plan, batch, schedule)

    return dataclasses.replace(lab.programs, train_step=train_step)


def test_a_loss_that_is_no_number_is_caught_and_its_batch_kept(lab, tmp_path):
    code, output = lab.run(tmp_path, programs=poisoned(lab, {1, 3}))
    assert code == 0
    assert "step 2: the loss is nan; batches to inspect are in" in output
    batches = sorted((tmp_path / "bad_batches").iterdir())
    assert [path.name for path in batches] == ["step_000002.safetensors", "step_000004.safetensors"]
    with safe_open(batches[0], "numpy") as file:
        assert file.metadata() == {"trouble": "the loss is nan", "step": "2"}
        assert {"packing.tokens", "packing.member", "advantages"} <= set(file.keys())
        assert file.get_tensor("advantages").shape == (16,)
    # Its update was left out: the adapter is still made of numbers.
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "numpy") as file:
        assert all(np.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118


def test_a_run_that_does_not_recover_stops_before_its_good_checkpoint_is_lost(
    lab, tmp_path, capsys
):
    code, _ = lab.run(tmp_path, programs=poisoned(lab, set(range(2, 99))), steps=40)
    line = error_line(capsys)
    assert code == EXIT_ERROR and f"the last {MAX_BAD_STEPS} steps went wrong" in line
    assert saved(tmp_path) == [2]
    assert len(list((tmp_path / "bad_batches").iterdir())) == MAX_BATCHES


def test_what_the_evaluation_cannot_judge_costs_no_step(lab, tmp_path, capsys):
    def no_judge(completions, answers, **context):
        raise RuntimeError("no")

    evaluation = dataclasses.replace(lab.session.config.eval, reward="mine:no_judge", every_steps=2)
    whole, lab.session = lab.session, dataclasses.replace(lab.session, eval_reward=no_judge)
    try:
        code, _ = lab.run(tmp_path, checkpoint_every_steps=100, eval=evaluation)
    finally:
        lab.session = whole
    assert code == EXIT_USAGE
    assert "reward 'mine:no_judge' raised RuntimeError('no')" in error_line(capsys)
    assert saved(tmp_path) == [2]


def test_two_runs_of_one_directory_are_refused(lab, tmp_path, capsys):
    inner = []
    # The second one is this same process' in the middle of the first one's step.
    lab.at = {1: lambda _: inner.append(main([*SETTINGS, f"run_dir={tmp_path}"]))}
    assert lab.run(tmp_path, steps=2)[0] == 0
    assert inner == [EXIT_USAGE]
    assert "is being written by another process" in error_line(capsys)


def test_a_run_that_is_refused_loads_and_compiles_nothing(lab, tmp_path, capsys, monkeypatch):
    assert lab.run(tmp_path, steps=1)[0] == 0

    def too_late(*_, **__):
        raise AssertionError("refused too late")

    monkeypatch.setattr("jaxgrpo.session.load_model", too_late)
    monkeypatch.setattr("jaxgrpo.train.compile_ahead", too_late)
    again = [*SETTINGS, f"run_dir={tmp_path}", "optim.learning_rate=0.5"]
    assert main(again) == EXIT_USAGE
    assert "optim.learning_rate" in error_line(capsys)
    with RunDirectory(tmp_path).lock():
        assert main(again) == EXIT_USAGE
    assert "is being written by another process" in error_line(capsys)
