"""`sweep`: a study's arms as tasks of Ray."""

from __future__ import annotations

from rich.console import Console

from jaxgrpo.commands.command import STUDY_CONFIG, Command
from jaxgrpo.commands.training import EXIT_INTERRUPTED
from jaxgrpo.study.sweep import SweepConfig


def run(config: SweepConfig, console: Console) -> int:
    from jaxgrpo.study.config import Interrupted
    from jaxgrpo.study.sweep import run_sweep

    try:
        run_sweep(config, console)
    except Interrupted:
        console.print("stopped and saved; run the same command again to go on")
        return EXIT_INTERRUPTED
    return 0


SWEEP = Command(
    run,
    "a study's arms as tasks of Ray, or in turn without it",
    "Takes a study's configuration. Arms whose worker was lost go on from their own\n"
    "checkpoint; the same command again goes on with what is missing.\n\n"
    "  sweep.models=[Qwen/Qwen2.5-0.5B-Instruct,Qwen/Qwen2.5-1.5B-Instruct]\n"
    "  sweep.gpus=1                 what a task gets; also cpus and tpus\n"
    "  study.together=4             a task trains so many arms side by side\n"
    "  sweep.hosts=4 sweep.tpus=4   a task over several hosts, through JaxTrainer\n"
    "  sweep.address=auto           the Ray cluster around, and not a local one\n"
    "  sweep.engine=sequential      one study after another, as study does\n\n"
    "`settings sweep` prints its settings.",
    "sweep sweep.engine=sequential --dry-run",
    SweepConfig,
    default=STUDY_CONFIG,
    dry_run=True,
)
