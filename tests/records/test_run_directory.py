"""The run directory under the things that happen to it: kills, full disks, a second process."""

import dataclasses
import enum
import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrpo.records import run_directory
from jaxgrpo.records.run_directory import RunDirectory

REPOSITORY = Path(__file__).parents[2]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts Python code in a process of its own that can import the package."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(number: int):
    def failing(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return failing


def test_atomic_writes(tmp_path: Path):
    run_directory.atomic_write_text(tmp_path / "a", "é\n")
    run_directory.atomic_write_text(str(tmp_path / "a"), "ü\n")
    run_directory.atomic_write_bytes(tmp_path / "b", b"\x00\xff")
    run_directory.atomic_write_bytes(tmp_path / "empty", b"")
    run_directory.atomic_write_json(tmp_path / "c", {"x": [1, math.nan], "é": Path("p")})
    assert (tmp_path / "a").read_text("utf-8") == "ü\n"
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert (tmp_path / "empty").read_bytes() == b""
    assert json.loads((tmp_path / "c").read_text("utf-8")) == {"x": [1, None], "é": "p"}
    assert names(tmp_path) == ["a", "b", "c", "empty"]


def test_written_files_have_the_users_usual_permissions(tmp_path: Path):
    (tmp_path / "usual").touch()
    run_directory.atomic_write_text(tmp_path / "ours", "x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
    assert len(modes) == 1


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    path = tmp_path / "a.json"
    run_directory.atomic_write_json(path, {"old": 1})
    monkeypatch.setattr(run_directory.os, step, fail(errno.ENOSPC))
    with pytest.raises(OSError, match=r"cannot write .*a\.json: No space left") as error:
        run_directory.atomic_write_json(path, {"new": 2})
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any):
        raise KeyboardInterrupt

    run_directory.atomic_write_text(tmp_path / "a", "old")
    monkeypatch.setattr(run_directory.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_directory.atomic_write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_write_into_no_folder_names_the_file(tmp_path: Path):
    with pytest.raises(OSError, match=r"cannot write .*absent/a: No such file"):
        run_directory.atomic_write_text(tmp_path / "absent" / "a", "x")
    with pytest.raises(OSError, match=r"cannot write .*absent/a: No such file"):
        run_directory.append_jsonl(tmp_path / "absent" / "a", {})


def test_a_value_that_is_not_json_writes_nothing(tmp_path: Path):
    with pytest.raises(TypeError, match="cannot write a set as JSON"):
        run_directory.atomic_write_json(tmp_path / "a", {"x": {1}})
    with pytest.raises(TypeError, match="two keys read the same"):
        run_directory.append_jsonl(tmp_path / "a", {"x": {1: 0, "1": 0}})
    assert names(tmp_path) == []


KILLED_WRITER = """
import itertools, sys
from jaxgrpo.records import run_directory
root = sys.argv[1]
for count in itertools.count():
    run_directory.atomic_write_json(f"{root}/whole.json", {"count": count, "pad": "x" * 2_000_000})
    run_directory.append_jsonl(f"{root}/lines.jsonl", {"count": count, "pad": "y" * 300_000})
    print(count, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011])
def test_a_writer_killed_at_any_moment_leaves_whole_records(tmp_path: Path, delay: float):
    writer = start(KILLED_WRITER, tmp_path)
    assert writer.stdout is not None
    finished = -1
    for _ in range(3):
        finished = int(writer.stdout.readline())
    time.sleep(delay)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert whole["count"] >= finished
    assert len(whole["pad"]) == 2_000_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_directory.append_jsonl(tmp_path / "lines.jsonl", {"count": "after"})
    counts = [record["count"] for record in run_directory.read_jsonl(tmp_path / "lines.jsonl")]
    assert counts[:-1] == list(range(len(counts) - 1))
    assert len(counts) - 1 > finished
    assert counts[-1] == "after"
    # What the killed writer left lying about goes with the next lock.
    with RunDirectory(tmp_path).lock():
        assert names(tmp_path) == [".lock", "lines.jsonl", "whole.json"]


@given(cut=st.integers(0, 200))
def test_a_last_line_cut_anywhere_is_dropped_and_mended(
    tmp_path_factory: pytest.TempPathFactory, cut: int
):
    path = tmp_path_factory.mktemp("run") / "m.jsonl"
    records = [{"step": step, "note": "é" * step, "x": {"y": [1.5, None]}} for step in range(3)]
    for record in records:
        run_directory.append_jsonl(path, record)
    whole = path.read_bytes()
    cut = min(cut, len(whole))
    path.write_bytes(whole[:cut])
    # A record whose newline alone was lost is whole.
    kept = (whole[:cut] + b"\n").count(b"}}\n")
    torn = whole[:cut].count(b"\n") + bool(whole[:cut].rpartition(b"\n")[2]) > kept
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_directory.read_jsonl(path) == records[:kept]
        run_directory.append_jsonl(path, {"step": "next"})
    assert len(caught) == 2 * torn
    assert all("cut short" in str(warning.message) for warning in caught)
    assert run_directory.read_jsonl(path) == [*records[:kept], {"step": "next"}]


def test_mending_finds_the_end_of_a_line_far_back(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 300_000)
    with pytest.warns(UserWarning, match="dropped a last line cut short"):
        run_directory.append_jsonl(path, {"c": 2})
    assert run_directory.read_jsonl(path) == [{"a": 1}, {"c": 2}]


@pytest.mark.parametrize("line", ['{"b": ', "[1, 2]", "7", '{"b": 1}{"c": 2}', "\x00\x00"])
def test_a_damaged_middle_line_is_an_error(tmp_path: Path, line: str):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"c": 3}}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: not a JSON object"):
        run_directory.read_jsonl(path)
    path.write_text(f'{{"a": 1}}\n{line}\n')  # a whole line: it was written so, not interrupted
    with pytest.raises(ValueError, match=r"m\.jsonl:2: not a JSON object"):
        run_directory.read_jsonl(path)


def test_jsonl_keeps_line_separators_inside_strings(tmp_path: Path):
    record = {"text": "a\nb\r\u2028\u0085c\x00\ud800", "inf": math.inf}
    run_directory.append_jsonl(tmp_path / "m", record)
    assert run_directory.read_jsonl(tmp_path / "m") == [record | {"inf": None}]
    (tmp_path / "empty").touch()
    assert run_directory.read_jsonl(tmp_path / "empty") == []
    with pytest.raises(FileNotFoundError):
        run_directory.read_jsonl(tmp_path / "absent")


SMALL_DISK = """
import resource, sys
from jaxgrpo.records import run_directory
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for name, write in (("a", run_directory.append_jsonl), ("b", run_directory.atomic_write_json)):
    write(f"{sys.argv[1]}/{name}", {"small": 1})
    try:
        write(f"{sys.argv[1]}/{name}", {"large": "x" * 5000})
    except OSError as error:
        print(error)
"""


def test_a_write_that_no_longer_fits_changes_nothing(tmp_path: Path):
    output, errors = start(SMALL_DISK, tmp_path).communicate()
    assert not errors
    assert output.splitlines() == [
        f"[Errno {errno.EFBIG}] cannot write {tmp_path / name}: File too large" for name in "ab"
    ]
    assert run_directory.read_jsonl(tmp_path / "a") == [{"small": 1}]
    assert json.loads((tmp_path / "b").read_text()) == {"small": 1}
    assert names(tmp_path) == ["a", "b"]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Inputs:
    rank: int
    path: Path
    colours: tuple[Colour, ...] = ()


class Array:
    def tolist(self) -> list[float]:
        return [1.0, 2.0]


def test_hash_inputs():
    assert run_directory.hash_inputs({}) == (
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )
    same = [
        {"rank": 8, "path": "p", "colours": ["red"]},
        {"colours": ("red",), "path": Path("p"), "rank": 8},
        Inputs(8, Path("p"), (Colour.RED,)),
    ]
    assert len({run_directory.hash_inputs(value) for value in same}) == 1
    assert run_directory.hash_inputs(Array()) == run_directory.hash_inputs([1.0, 2.0])
    different = [None, 0, 0.0, False, "0", "", [], {}, math.nan, math.inf, -math.inf, [0], "é"]
    assert len({run_directory.hash_inputs(value) for value in different}) == len(different)
    with pytest.raises(TypeError, match="cannot write a object"):
        run_directory.hash_inputs(object())


def test_run_directory_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(Path("runs/one")).create()
    assert repr(run) == f"RunDirectory(root={run.root!r})"
    assert run.create() == run
    assert run.root == tmp_path / "runs" / "one"
    assert names(run.root) == ["adapter", "checkpoints", "completions", "eval", "tensorboard"]
    files = [run.config, run.metrics, run.layer_grad_norms]
    assert [path.relative_to(run.root).as_posix() for path in files] == [
        "config.yaml",
        "metrics.jsonl",
        "layer_grad_norms.jsonl",
    ]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot make .*file: File exists"):
        RunDirectory(tmp_path / "file").create()


HOLDER = """
import sys
from jaxgrpo.records.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read() if len(sys.argv) > 2 else __import__("time").sleep(600)
"""


def test_only_one_process_holds_a_run(tmp_path: Path):
    run = RunDirectory(tmp_path).create()
    holder = start(HOLDER, tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    message = rf"being written by another process \(pid {holder.pid} on .*choose another"
    with pytest.raises(run_directory.RunLockedError, match=message), run.lock():
        pytest.fail("two processes held one run")
    holder.kill()
    holder.communicate()
    with (
        run.lock(),
        pytest.raises(run_directory.RunLockedError, match=str(os.getpid())),
        run.lock(),
    ):
        pytest.fail("one run was held twice")
    with run.lock():
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_directory.fcntl, "flock", fail(errno.ENOLCK))
    with pytest.warns(UserWarning, match="has no locks"), RunDirectory(tmp_path).lock():
        pass
    monkeypatch.setattr(run_directory.fcntl, "flock", fail(errno.EIO))
    with pytest.raises(OSError, match="cannot write"), RunDirectory(tmp_path).lock():
        pass
    with (
        pytest.raises(OSError, match=r"cannot write .*\.lock"),
        RunDirectory(tmp_path / "absent").lock(),
    ):
        pass
