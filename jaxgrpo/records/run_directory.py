"""The run directory: files that are whole or absent, and a lock.

Floor 0, no jax. A process can be killed at any moment and a disk can fill up; neither may leave a
half-written file that a later run takes for a whole one. In a job of several processes only the
first one writes here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import socket
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, cast

# -------------------------------------------------------------------------------------------------
# Values as plain JSON


def _plain(value: Any, hashing: bool = False) -> Any:
    """`value` as JSON's own types; arrays and array scalars become lists and numbers.

    JSON has no nan or infinity: a file holds null instead, a hash keeps them apart.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return {"non-finite": repr(value)} if hashing else None
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [member.name for member in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), hashing) for name in names}
    if isinstance(value, Mapping):
        plain = {str(key): _plain(item, hashing) for key, item in value.items()}
        if len(plain) != len(value):
            raise TypeError(f"two keys read the same as text: {list(value)}")
        return plain
    if isinstance(value, list | tuple):
        return [_plain(item, hashing) for item in value]
    tolist = getattr(value, "tolist", None)
    if tolist is not None:  # numpy and jax, without importing either
        return _plain(tolist(), hashing)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r:.80}")


def _encoded(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(_plain(value), indent=indent, ensure_ascii=False) + "\n"
    # Half a surrogate pair has no UTF-8, but its backslash escape is what JSON writes for it.
    return text.encode("utf-8", "backslashreplace")


def hash_inputs(inputs: Any) -> str:
    """The sha256 of `inputs` as canonical JSON: only the order of keys does not matter."""
    text = json.dumps(_plain(inputs, hashing=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# -------------------------------------------------------------------------------------------------
# Whole files


def _named(error: OSError, path: Path) -> OSError:
    """The same error, saying which file could not be written."""
    return OSError(error.errno, f"cannot write {path}: {error.strerror or error}")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a disk that is nearly full takes a part before it refuses
        view = view[os.write(descriptor, view) :]


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that is, at every moment, either the old one or the whole new one.

    Raises:
        OSError: the write failed (disk full, no such folder); the old file is untouched.
    """
    path = Path(path)
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(descriptor, data)
            # Without this a crash of the machine can leave the new name with no content.
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _named(error, path) from error
        raise
    # Makes the new name itself durable; some network file systems cannot sync a folder.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write_bytes` of a text in UTF-8."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`atomic_write_bytes` of a value as indented JSON; nan and infinity become null."""
    atomic_write_bytes(path, _encoded(value, indent=2))


# -------------------------------------------------------------------------------------------------
# Growing files of one JSON object per line


def _record(line: bytes) -> dict[str, Any] | None:
    """The object a line holds, or None when it holds no whole one."""
    try:
        record = json.loads(line)
    except ValueError:  # also what a character cut in half raises
        return None
    return record if isinstance(record, dict) else None


def _mend_end(descriptor: int, path: Path) -> None:
    """Makes the file end at a line's end, dropping what a killed writer left of its last line."""
    size = os.fstat(descriptor).st_size
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        step = min(start, 1 << 16)
        start -= step
        tail = os.pread(descriptor, step, start) + tail
    tail = tail[tail.rfind(b"\n") + 1 :]
    if not tail:
        return
    if _record(tail) is not None:  # only the newline is missing
        _write_all(descriptor, b"\n")
        return
    warnings.warn(f"{path}: dropped a last line cut short ({len(tail)} bytes)", stacklevel=3)
    os.ftruncate(descriptor, size - len(tail))


def append_jsonl(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Appends one JSON object as one line; nan and infinity become null.

    A last line that an earlier, killed writer left unfinished is removed first (with a warning).
    One writer at a time: `RunDirectory.lock`. Not synced to the disk line by line: a killed process
    loses nothing, a machine that loses power may lose the last lines.

    Raises:
        OSError: the write failed; the file is as it was.
    """
    path = Path(path)
    line = _encoded(dict(record))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _mend_end(descriptor, path)
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, line)
            except BaseException:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _named(error, path) from error


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a file; a last line that was cut short is left out with a warning.

    Raises:
        ValueError: another line is not a JSON object, so the file was damaged, not interrupted.
    """
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number == len(lines):  # whole lines end in a newline, so this one has no end
            warnings.warn(f"{path}:{number}: ignored a last line cut short", stacklevel=2)
        else:
            raise ValueError(f"{path}:{number}: not a JSON object: {line[:60]!r}")
    return records


# -------------------------------------------------------------------------------------------------
# One run


class RunLockedError(RuntimeError):
    """Another process writes to this run directory."""


class DivergedError(RuntimeError):
    """Training cannot go on by itself; one line on what to look at."""


# Where a path's name in the folder is not its name here.
_FILE_NAMES = {
    "config": "config.yaml",
    "metrics": "metrics.jsonl",
    "layer_grad_norms": "layer_grad_norms.jsonl",
    "summary": "summary.json",
}


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The files of one run, by name.

    Attributes:
        root: the folder, as a path or as text; made absolute, so that it does not depend on the
            working directory.
        config: the resolved config.
        metrics: one line per training step.
        layer_grad_norms: one line per step with the gradient norms of every layer.
        tensorboard: event files.
        checkpoints: one folder per saved step.
        adapter: the trained adapter in PEFT's format.
        eval: what training evaluated by itself.
        evaluations: those made by hand, a folder for each policy and settings; made when one is.
        completions: sampled completions with their rewards.
        bad_batches: batches of steps whose loss was not finite or exploded; made when there is one.
        summary: what the finished run found.
    """

    root: Path
    config: Path = field(init=False, repr=False)
    metrics: Path = field(init=False, repr=False)
    layer_grad_norms: Path = field(init=False, repr=False)
    tensorboard: Path = field(init=False, repr=False)
    checkpoints: Path = field(init=False, repr=False)
    adapter: Path = field(init=False, repr=False)
    eval: Path = field(init=False, repr=False)
    evaluations: Path = field(init=False, repr=False)
    completions: Path = field(init=False, repr=False)
    bad_batches: Path = field(init=False, repr=False)
    summary: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Derives the paths from `root`, which may be given as text."""
        root = Path(self.root).expanduser().absolute()
        object.__setattr__(self, "root", root)
        for path in dataclasses.fields(self):
            if not path.init:
                object.__setattr__(self, path.name, root / _FILE_NAMES.get(path.name, path.name))

    def create(self) -> RunDirectory:
        """Makes the folders that are missing; returns itself.

        Raises:
            OSError: a folder cannot be made, for instance because a file has its name.
        """
        for folder in (self.root, *self._folders()):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(error.errno, f"cannot make {folder}: {error.strerror}") from error
        return self

    def described(self) -> list[tuple[str, Path]]:
        """What a person looks for after a run, and where it is."""
        return [
            ("TensorBoard", self.tensorboard),
            ("metrics", self.metrics),
            ("per-layer norms", self.layer_grad_norms),
            ("completions", self.completions),
            ("evaluation", self.eval),
            ("adapter (PEFT)", self.adapter),
        ]

    def _folders(self) -> tuple[Path, ...]:
        return (self.tensorboard, self.checkpoints, self.adapter, self.eval, self.completions)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process until the block or the process ends, however it ends.

        Files that a killed writer left unfinished are removed. A forked child that outlives this
        process keeps the run held.

        Raises:
            RunLockedError: another process holds it.
        """
        path = self.root / ".lock"
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise _named(error, path) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise RunLockedError(
                    f"{self.root} is being written by another process ({holder}); "
                    "wait for it, stop it, or choose another run directory"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise _named(error, path) from error
                warnings.warn(f"{path}: this file system has no locks; going on", stacklevel=3)
            # The file stays when the lock goes: removing it would let two processes lock two files.
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            for folder in (self.root, *self._folders()):
                for unfinished in folder.glob(".*.tmp"):
                    unfinished.unlink(missing_ok=True)
            yield
