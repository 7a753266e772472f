"""The command line: python -m jaxgrpo.run [COMMAND] [CONFIG.yaml ...] [key=value ...]."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from glob import glob
from typing import Any

from rich.console import Console

from jaxgrpo import __version__, start_phases  # noqa: F401  (from here on it counts)
from jaxgrpo.commands.bench import BENCH
from jaxgrpo.commands.chat import CHAT
from jaxgrpo.commands.check import CHECK
from jaxgrpo.commands.command import (
    EMBEDDED_CONFIG,
    PROGRAM,
    Command,
    command_help,
    nearest_command,
    parse_settings,
)
from jaxgrpo.commands.completion import make_completion
from jaxgrpo.commands.compress import COMPRESS
from jaxgrpo.commands.export import EXPORT
from jaxgrpo.commands.plan import PLAN, dry_run
from jaxgrpo.commands.settings import SETTINGS
from jaxgrpo.commands.sweep import SWEEP
from jaxgrpo.commands.training import EVAL, EXIT_INTERRUPTED, STUDY, TRAIN
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.out_of_memory import out_of_memory_line
from jaxgrpo.records.run_directory import DivergedError, RunLockedError

__all__ = ["COMMANDS", "EMBEDDED_CONFIG", "entry_point", "main"]

EXIT_ERROR, EXIT_USAGE = 1, 2

BACKGROUND = ("compile", "beside")
"""What the names of threads begin with that nobody waits for at the end: those that compile
(compile_ahead.py) and that read what needs no device (session.py)."""

QUIET_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""Answers that libtpu would otherwise ask a cloud's metadata server for."""

COMMANDS: dict[str, Command] = {
    "train": TRAIN,
    "eval": EVAL,
    "study": STUDY,
    "sweep": SWEEP,
    "check": CHECK,
    "plan": PLAN,
    "export": EXPORT,
    "compress": COMPRESS,
    "chat": CHAT,
    "bench": BENCH,
}
COMMANDS["settings"] = SETTINGS
COMMANDS["completion"] = make_completion(COMMANDS)


def usage() -> str:
    """What --help prints."""
    rows = "\n".join(f"  {name:<11}{command.summary}" for name, command in COMMANDS.items())
    return (
        f"{PROGRAM} [COMMAND] [CONFIG.yaml | RUN_DIR ...] [key=value ...]\n\n{rows}\n\n"
        "Settings without a COMMAND train; without a CONFIG, the embedded model on\n"
        "embedded problems. COMMAND --help says more. Settings are key=value, for\n"
        "instance lora.rank=8 optim.learning_rate=1e-4; --dry-run shows what they come\n"
        "to; --version says which this is.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 done, 2 the user's mistake, 1 another failure, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and words[0] in COMMANDS else None
    if words == ["--version"] and name is None:
        print(f"jaxgrpo {__version__}")
        return 0
    alone = name is None and not words
    if alone or any(word in ("-h", "--help") for word in words) or words[:1] == ["help"]:
        print(usage() if name is None else command_help(name, COMMANDS[name]), end="")
        return 0
    # Native libraries would otherwise interleave their own log lines with the progress bar.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    quiet_libtpu()
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        return guarded(lambda: run_command(name, words))


def run_command(name: str | None, words: list[str]) -> int:
    """Parses and runs."""
    for word in words if name is None else ():
        if near := nearest_command(word, list(COMMANDS)):
            raise ConfigError(f"'{word}' is neither a command nor a file; did you mean {near}?")
    command, console = COMMANDS[name or "train"], Console()
    if "--dry-run" not in words:
        return command.run(parse_settings(name or "train", command, words), console)
    if not command.dry_run:
        able = ", ".join(other for other, c in COMMANDS.items() if c.dry_run)
        raise ConfigError(f"{name} has no --dry-run; {able} have")
    words = [word for word in words if word != "--dry-run"]
    config: Config = parse_settings(name or "train", command, words)
    return dry_run(config, console)


def guarded(run: Callable[[], int]) -> int:
    """Runs with every expected failure as one line and an exit code of its own."""
    main_thread = threading.current_thread() is threading.main_thread()
    # Before there is anything to save, SIGTERM ends the process as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, terminated) if main_thread else None
    try:
        return run()
    except (ConfigError, RunLockedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (OSError, DivergedError) as error:
        text = " ".join(str(error).split())
        print(f"error: {text}", file=sys.stderr)
        return EXIT_ERROR
    except RuntimeError as error:  # jax's own is one
        line = out_of_memory_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def terminated(*_: object) -> None:
    raise KeyboardInterrupt


def quiet_libtpu() -> None:
    """Where libtpu is installed but no TPU is, keeps jax from trying it, with pages of warnings."""
    if not glob("/dev/accel*") and not glob("/dev/vfio/[0-9]*"):
        for name, value in QUIET_LIBTPU.items():
            os.environ.setdefault(name, value)


def show_warning(message: Any, category: Any, filename: str, *_: Any, **__: Any) -> None:
    """A warning as one line, without the line of code it comes from."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def entry_point() -> None:
    """What the `jaxgrpo` command runs."""
    code = main()
    if any(thread.name.startswith(BACKGROUND) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry_point()
