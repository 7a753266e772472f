"""SIGKILLs one training run again and again, and checks that nothing of it is lost or left over.

    python scripts/crash_drill.py OUT [--kills 50] [--steps 60] [--seed 0]

Trains the embedded model twice: once undisturbed, and once killed at random moments: while it
loads, compiles, samples, trains, writes checkpoints and evaluates. The finished runs must agree bit
for bit in metrics, norms, completions, evaluations and adapter, and hold the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = [
    "grpo.prompts_per_step=4",
    "grpo.group_size=4",
    "grpo.micro_batches=1",
    "lora.rank=2",
    "rollout.max_completion_tokens=24",
    "eval.problems=8",
    "eval.batch_prompts=8",
    "eval.every_steps=3",
    "checkpoint_every_steps=2",
    "log_completions_every_steps=0",
]
TIMES = ("time", "step_time", "throughput/")


def start(run_dir: Path, steps: int) -> subprocess.Popen:
    """The run, or its continuation."""
    command = [sys.executable, "-m", "jaxgrpo.run", "train", *SETTINGS]
    log = (run_dir.parent / f"{run_dir.name}.log").open("a")
    return subprocess.Popen(
        [*command, f"steps={steps}", f"run_dir={run_dir}"], stdout=log, stderr=log
    )


def kill_at_random(run_dir: Path, steps: int, rng: random.Random) -> bool:
    """Starts the run and kills it; False if it had finished before."""
    process = start(run_dir, steps)
    # Half of the kills strike anywhere, most of that being start-up; half in the loop itself.
    log = run_dir / "metrics.jsonl"
    if rng.random() < 0.5:
        before = log.stat().st_size if log.exists() else 0
        while process.poll() is None and not (log.exists() and log.stat().st_size > before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 3))
    else:
        time.sleep(rng.uniform(0, 15))
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def content(run_dir: Path) -> dict[str, object]:
    """What a run has to say, without times: file -> records or bytes."""
    found: dict[str, object] = {}
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir).as_posix()
        if not path.is_file() or name.startswith(("tensorboard/", ".lock")):
            continue
        if name == "config.yaml":
            found[name] = path.read_text().replace(str(run_dir), "RUN")
        elif name == "summary.json":
            found[name] = without_times(json.loads(path.read_text()))
        elif name == "metrics.jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.open()]
        elif name.startswith("checkpoints/"):
            found["/".join(name.split("/")[:2])] = None  # orbax names its files at random
        elif name.endswith("README.md"):
            found[name] = None  # names its run directory
        else:
            found[name] = path.read_bytes()
    return found


def without_times(record: dict) -> dict:
    kept = {key: value for key, value in record.items() if not key.startswith(TIMES)}
    for name in ("peak_memory_bytes", "compiled", "start"):
        kept.pop(name, None)
    if "last_step" in kept:
        kept["last_step"] = without_times(kept["last_step"])
    return kept


def compare(undisturbed: Path, killed: Path) -> list[str]:
    """What differs, one line each."""
    one, other = content(undisturbed), content(killed)
    lines = [f"only in one of them: {name}" for name in sorted(one.keys() ^ other.keys())]
    lines += [
        f"differs: {name}" for name in sorted(one.keys() & other.keys()) if one[name] != other[name]
    ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    undisturbed, killed = (args.out.absolute() / name for name in ("undisturbed", "killed"))
    rng = random.Random(args.seed)
    if start(undisturbed, args.steps).wait():
        print(f"the undisturbed run failed; see {undisturbed}.log")
        return 1
    kills = 0
    while kills < args.kills and kill_at_random(killed, args.steps, rng):
        kills += 1
        steps = [int(p.name) for p in (killed / "checkpoints").glob("*") if p.name.isdecimal()]
        print(f"kill {kills}: saved up to step {max(steps, default=0)}", flush=True)
    if start(killed, args.steps).wait():
        print(f"the killed run does not finish; see {killed}.log")
        return 1
    differences = compare(undisturbed, killed)
    for line in differences:
        print(line)
    tracebacks = (args.out / "killed.log").read_text().count("Traceback")
    print(f"{kills} kills, {len(differences)} differences, {tracebacks} tracebacks")
    return 1 if differences or tracebacks else 0


if __name__ == "__main__":
    sys.exit(main())
