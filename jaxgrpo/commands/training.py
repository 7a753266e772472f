"""`train`, `eval` and `study`."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from jaxgrpo.commands.command import STUDY_CONFIG, Command
from jaxgrpo.config import Config
from jaxgrpo.study.config import StudyConfig

EXIT_INTERRUPTED = 130
OF_TRAINING = (
    "lora",
    "optim",
    "grpo",
    "steps",
    "objective",
    "weight_grad_norms",
    "rewards",
    "rollout.temperature",
    "data.train_split",
    "data.embedded_problems",
)
"""What a checkpoint was trained with, and no evaluation of it can change."""


def run_train(config: Config, console: Console) -> int:
    from jaxgrpo.devices import reach_devices
    from jaxgrpo.processes import joined

    with joined() as first:
        reach_devices()  # while the rest is imported
        from jaxgrpo.train import train

        console = console if first else Console(quiet=True)
        result = train(config, console)
    if result.interrupted:
        console.print("stopped and saved; run the same command again to go on")
        return EXIT_INTERRUPTED
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, found in (("before", result.before), ("after", result.after)):
        if found is not None:
            table.add_row(f"accuracy {name}", found.describe())
    for name, path in result.run.described():
        table.add_row(name, str(path))
    console.print(Panel(table, title="done", expand=False))
    return 0


def run_eval(config: Config, console: Console) -> int:
    from jaxgrpo.evaluate_run import evaluate_run
    from jaxgrpo.processes import joined

    with joined() as first:
        console = console if first else Console(quiet=True)
        result, records = evaluate_run(config, console)
    console.print(f"accuracy {result.describe()}")
    console.print(f"records  {records}", highlight=False, soft_wrap=True)
    return 0


def run_study_command(config: StudyConfig, console: Console) -> int:
    from jaxgrpo.study.arms import run_study
    from jaxgrpo.study.config import Interrupted

    try:
        run_study(config, console)
    except Interrupted:
        console.print("stopped and saved; run the same command again to go on")
        return EXIT_INTERRUPTED
    return 0


TRAIN = Command(
    run_train,
    "train with GRPO, or go on from run_dir's newest checkpoint",
    "Without a CONFIG the embedded model and problems are used: no network, no\n"
    "accelerator. Files are merged left to right, then key=value.\n\n"
    "  run_dir=runs/mine steps=100 seed=1\n"
    "  model.path=DIR_OR_HUB_ID data.path=DIR_OR_HUB_ID\n"
    "  lora.rank=8 lora.plan=plan.json lora.adapter=PEFT_DIR (what to start from)\n"
    "  optim.learning_rate=1e-4 grpo.loss=dapo rewards.my_file:my_reward=1.0\n\n"
    "`settings` prints every setting. Ctrl-C and SIGTERM save and end with 130;\n"
    "the same command again goes on. --dry-run prints settings, plan and memory.",
    "train steps=4 run_dir=runs/try",
    dry_run=True,
)
EVAL = Command(
    run_eval,
    "accuracy: newest checkpoint, else lora.adapter, else base model",
    "  eval.problems=200                      so many problems of the split\n"
    "  eval.samples=4 eval.temperature=0.7    pass@1, pass@2 and pass@4\n"
    "  lora.adapter=DIRECTORY run_dir=NEW     a PEFT adapter, from here or elsewhere\n\n"
    "Problems, completions and verdicts are written to a folder of their own in\n"
    "run_dir/evaluations; run_dir/eval, what training evaluated, stays as it is.",
    "eval runs/try eval.problems=64",
    dry_run=True,
    fixed=OF_TRAINING,
)
STUDY = Command(
    run_study_command,
    "profile, allocate, train the arms, compare, write report.html",
    "Every stage that is done is skipped, so the same command again goes on.\n\n"
    "  run_dir=runs/mine study.arms.seeds=[0,1,2] study.arms.plans=[uniform,inverse]\n\n"
    "Without a CONFIG, two plans on the embedded model. `settings study` prints its\n"
    "settings.",
    "study study.arms.seeds=[0] --dry-run",
    StudyConfig,
    default=STUDY_CONFIG,
    dry_run=True,
)
