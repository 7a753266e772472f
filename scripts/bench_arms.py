"""How much arms gain by being trained side by side: steps of one arm, and of several together.

    python scripts/bench_arms.py [--arms K] [--steps N] [--out FILE] [CONFIG.yaml] [key=value ...]

Trains N steps (default 8) of the configuration, or of a study's arms, without evaluations and
checkpoints, by itself and as K arms (default 4) that differ in their seed, each in a process of its
own on the same device. It prints the median step after the second, what it is for each arm, and the
peak memory beside what the formula says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import load_config
from jaxgrpo.study.config import StudyConfig

ROOT = Path(__file__).resolve().parent.parent
QUIET = (
    *("eval.before_training=false", "eval.after_training=false", "eval.every_steps=0"),
    *("checkpoint_every_steps=1000000", "log_completions_every_steps=0"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="CONFIG or key=value")
    args = parser.parse_intermixed_args()
    files = [word for word in args.settings if "=" not in word]
    words = [word for word in args.settings if "=" in word]
    try:
        config = load_config(
            files or [ROOT / "jaxgrpo" / "assets" / "embedded.yaml"],
            [*words, f"steps={args.steps}", *QUIET],
            StudyConfig,
        ).plain()
        if args.run is not None:
            args.out.write_text(json.dumps(run(config, args.run)))
            return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found: dict[str, Any] = {}
    for arms in (1, args.arms):
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "figures.json"
            ours = ["--run", str(arms), "--steps", str(args.steps), "--out", str(out)]
            command = [sys.executable, __file__, *ours, *args.settings]
            if subprocess.run(command, check=False).returncode:
                return 1
            found[str(arms)] = json.loads(out.read_text())
    for arms, figures in found.items():
        parts = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value)
        print(f"{arms} arms: {parts}")
    one, many = found["1"], found[str(args.arms)]
    times = args.arms * one["step_s"] / many["step_s"]
    print(f"{args.arms} arms together make {times:.2f} times the steps of one after another")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def run(config: Config, arms: int) -> dict[str, float | None]:
    """The figures of so many arms that differ in their seed."""
    import jax
    from rich.console import Console

    from jaxgrpo.ahead.memory import foretell
    from jaxgrpo.ahead.shapes import remat_of_run
    from jaxgrpo.devices import peak_memory
    from jaxgrpo.programs import make_programs
    from jaxgrpo.session import open_session
    from jaxgrpo.train import train_arms, train_session

    session = open_session(config)
    with tempfile.TemporaryDirectory() as directory, jax.set_mesh(session.mesh):
        sessions = [
            session.with_config(
                dataclasses.replace(config, seed=seed, run_dir=f"{directory}/{seed}")
            )
            for seed in range(arms)
        ]
        programs, console = make_programs(session, arms), Console(quiet=True)
        if arms == 1:
            train_session(sessions[0], programs, console)
        else:
            for result in train_arms(sessions, programs, console):
                if isinstance(result, Exception):
                    raise result
        lines = (Path(directory) / "0" / "metrics.jsonl").read_text().splitlines()
    steps = [step for step in map(json.loads, lines) if "loss" in step][1:]
    seconds = statistics.median(b["time"] - a["time"] for a, b in pairwise(steps))
    model = session.model_config
    sizes, remat = dict(session.mesh.shape), remat_of_run(config, model, arms)
    foretold = foretell(config, model, session.plan, sizes, remat, arms).peak
    peak = peak_memory()
    return {
        "step_s": seconds,
        "step_s_per_arm": seconds / arms,
        "rollout_s": statistics.median(step["time/rollout_s"] for step in steps[1:]),
        "train_s": statistics.median(step["time/train_s"] for step in steps[1:]),
        "peak_gib": peak / 2**30 if peak else None,
        "foretold_gib": foretold / 2**30,
    }


if __name__ == "__main__":
    sys.exit(main())
