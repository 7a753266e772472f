"""Commands on one run directory in turn, with edits of their inputs between them.

    python -m tests.fuzz.sequences COUNT DIRECTORY

draws COUNT sequences of train, eval, export, study and edits, and runs the real commands on a tiny
model. Two properties are checked. A command ends with a result, or with one line that says why
not. And what it prints is a function of its inputs, whatever was done in the directory before: the
same command on the same files, settings and checkpoint gave the same numbers in every sequence,
those that began with it in an empty directory included.

Sequences that begin alike are run once up to where they part, and runs of the same settings share
their compiled programs, so that 200 cost some dozens of commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import jaxgrpo.compile_ahead
import jaxgrpo.programs
from jaxgrpo.model.hf_config import qwen_config
from jaxgrpo.model.peft_files import LoraModule, PeftAdapter, write_peft
from jaxgrpo.model.weights import EMBEDDED_DIR, hf_shapes
from jaxgrpo.run import main

REWARD = """
import zlib

def even(completions, answers, **context):
    pairs = zip(completions, answers)
    return [float(zlib.crc32((text + gold).encode("utf-8", "replace")) % 2) for text, gold in pairs]

def odd(completions, answers, **context):
    return [1 - value for value in even(completions, answers)]
"""
COMMON = [
    *("model.path=model", "data.path=data", "rewards.drawn_reward:even=1", "steps=1"),
    *("eval.reward=drawn_reward:even", "lora.rank=2", "grpo.prompts_per_step=2"),
    *("grpo.group_size=2", "grpo.micro_batches=1", "rollout.max_completion_tokens=6"),
    *("eval.batch_prompts=32", "data.max_prompt_tokens=32", "data.prompt_bucket_tokens=32"),
    *("optim.learning_rate=0.05", "log_completions_every_steps=0", "lora.alpha=16"),
]
# What a command may be given besides, drawn with these weights.
VARIANTS = {
    "": 30,
    "eval.problems=16": 4,
    "eval.reward=drawn_reward:odd": 1,
    "eval.max_completion_tokens=3": 2,
    "rollout.max_completion_tokens=5": 1,
    "data.prompt_suffix=!": 1,
    "lora.adapter=adapter": 2,
    "lora.rank=1": 1,
    "optim.learning_rate=0": 1,
    "seed=1": 1,
    "steps=2": 2,
    "data.path=other": 1,
}
COMMANDS = {"train": 10, "eval": 4, "export": 2, "study": 0.2, "eval arm": 0.2, "edit": 9}
EDITED = ("data/train.jsonl", "data/test.jsonl", "model/model.safetensors", "adapter")
STUDY = [
    *("study.profile.objectives=[grpo]", "study.profile.steps=4", "study.probe.scale_rules=[]"),
    *("study.arms.plans=[uniform]", "study.arms.seeds=[0]", "study.allocation.max_rank=4"),
]
ARM = "study/arms/uniform-r2-s0"

Action = tuple[str, str]
"""A command and its variant, or "edit" and what is edited."""


def draw(count: int, seed: int = 0) -> list[tuple[Action, ...]]:
    """`count` sequences of two or three actions that begin with a command."""
    rng = np.random.default_rng(seed)

    def pick(weights: Mapping[str, float]) -> str:
        p = np.array(list(weights.values()), float)
        return str(rng.choice(list(weights), p=p / p.sum()))

    found = []
    for _ in range(count):
        actions: list[Action] = []
        for place in range(int(rng.integers(2, 4))):
            command = pick(COMMANDS)
            while command == "edit" and not place:
                command = pick(COMMANDS)
            if command == "edit":
                actions.append((command, str(rng.choice(EDITED))))
            else:
                actions.append((command, "" if command == "export" else pick(VARIANTS)))
        found.append(tuple(actions))
    return found


def write_inputs(root: Path) -> None:
    """A tiny model, two data sets, an adapter and a reward."""
    model = root / "model"
    shutil.copytree(EMBEDDED_DIR, model, ignore=shutil.ignore_patterns("*.safetensors"))
    raw = json.loads((model / "config.json").read_text())
    raw |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    raw |= {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": None}
    (model / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    config = qwen_config(raw, "float32", "config.json")
    weights = {
        name: rng.normal(size=shape, scale=0.3).astype(np.float32)
        for name, shape in hf_shapes(config).items()
    }
    save_file(weights, model / "model.safetensors")
    for folder, offset in (("data", 0), ("other", 100)):
        (root / folder).mkdir()
        for split, rows in (("train", 16), ("test", 32)):
            write_rows(root / folder / f"{split}.jsonl", range(offset, offset + rows))
    write_adapter(root / "adapter", seed=1)
    (root / "drawn_reward.py").write_text(REWARD)


def write_rows(path: Path, numbers: Iterable[int]) -> None:
    rows = [{"question": f"{path.stem} {n}?", "answer": f"#### {n}"} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_adapter(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 32)), rng.normal(size=(32, 2))
    module = LoraModule(a.astype(np.float32), b.astype(np.float32), scale=1.0)
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    write_peft(path, PeftAdapter("model", dict.fromkeys(names, module)))


def edit(what: str) -> None:
    """Another version of an input, in its place."""
    path = Path(what)
    if path.suffix == ".jsonl":
        first = json.loads(path.read_text().splitlines()[0])
        start = int(first["answer"].split()[1])
        write_rows(path, range(start + 1000, start + 1000 + len(path.read_text().splitlines())))
    elif path.suffix == ".safetensors":
        save_file({name: -tensor for name, tensor in load_file(path).items()}, path)
    else:
        seed = int(load_file(path / "adapter_model.safetensors")[FIRST].sum() > 0) + 2
        shutil.rmtree(path)
        write_adapter(path, seed)


FIRST = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"


def inputs(variant: str) -> tuple[str, ...]:
    """A digest of every file that a command with this variant reads."""
    folder = "other" if variant == "data.path=other" else "data"
    files = [*sorted(Path(folder).iterdir()), Path("model/model.safetensors")]
    if variant == "lora.adapter=adapter":
        files += sorted(Path("adapter").iterdir())
    return tuple(hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files)


@dataclasses.dataclass(frozen=True)
class Before:
    """What the test knows of a directory: by which inputs its checkpoints were made."""

    trained: Any = None
    studied: Any = None


class Player:
    """Runs sequences, and remembers what each command printed for its inputs."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, root / "at"
        self.printed: dict[Any, tuple[Any, list[Action]]] = {}
        self.faults: list[str] = []
        self.commands = self.refused = 0

    def play(self, sequences: list[tuple[Action, ...]]) -> None:
        start = self.root / "start"
        start.mkdir()
        write_inputs(start)
        self._branch(start, sorted(set(sequences)), [], Before())

    def _branch(
        self, here: Path, left: list[tuple[Action, ...]], done: list[Action], before: Before
    ) -> None:
        """Goes on from the directory `here` with every sequence in `left`."""
        for action in dict.fromkeys(sequence[0] for sequence in left):
            rest = [s[1:] for s in left if s[0] == action and len(s) > 1]
            shutil.copytree(here, self.place)
            os.chdir(self.place)
            after = self._act(action, [*done, action], before)
            os.chdir(self.root)
            if rest:
                then = self.root / f"after-{len(done)}"
                self.place.rename(then)
                self._branch(then, rest, [*done, action], after)
                shutil.rmtree(then)
            else:
                shutil.rmtree(self.place)

    def _act(self, action: Action, history: list[Action], before: Before) -> Before:
        command, variant = action
        if command == "edit":
            edit(variant)
            return before
        given = inputs(variant)
        words = [*COMMON, *([variant] if variant else [])]
        if command == "train":
            key = (action, given)
            found = self._run(["train", *words, "run_dir=run"], printed_accuracies, history)
            after = dataclasses.replace(before, trained=key)
        elif command == "eval":
            key = (action, given, before.trained)
            found = self._run(["eval", *words, "run_dir=run"], printed_accuracies, history)
            after = before
        elif command == "export":
            key = (action, before.trained)
            found = self._run(["export", "run", "out=exported"], exported, history)
            after = before
        elif command == "study":
            Path("study.yaml").write_text("{}")
            key = (action, given)
            words = ["study", "study.yaml", *words, *STUDY, "run_dir=study"]
            found = self._run(words, study_result, history)
            after = dataclasses.replace(before, studied=key)
        else:
            key = (action, given, before.studied)
            found = self._run(["eval", *words, f"run_dir={ARM}"], printed_accuracies, history)
            after = before
        if found is None:
            return before
        first, where = self.printed.setdefault(key, (found, history))
        if first != found:
            self.faults.append(f"{history}: {found}, but {first} in {where}")
        return after

    def _run(
        self, words: list[str], read: Callable[[str], Any], history: list[Action]
    ) -> Any | None:
        """What a command printed, as `read` takes it; None if it said why not."""
        self.commands += 1
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(words)
            if code == 0:
                return read(out.getvalue())
        except Exception:
            self.faults.append(f"{history}: {traceback.format_exc(limit=-3)}")
            return None
        self.refused += 1
        lines = [x for x in err.getvalue().splitlines() if not x.startswith("warning: ")]
        if code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
            self.faults.append(f"{history}: exit code {code}, {lines}")
        return None


def printed_accuracies(out: str) -> list[str]:
    """Lines with an accuracy, as printed: with interval and number of problems."""
    return [line.strip("│ ") for line in out.splitlines() if "accuracy" in line]


def exported(out: str) -> tuple[str, str]:
    """The exported tensors, and the card beside them."""
    tensors = load_file("exported/adapter_model.safetensors")
    digest = hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors)))
    card = Path("exported/README.md").read_text()
    shutil.rmtree("exported")
    return digest.hexdigest()[:12], card


def study_result(out: str) -> Any:
    """Every arm's accuracy and interval."""
    arms = json.loads(Path("study/results.json").read_text())["arms"]
    return [(arm["name"], arm["accuracy"], arm["n_items"]) for arm in arms]


def share_programs() -> None:
    """Sessions that ask for the same programs get the same ones. Called before anything else of the
    package's device side is imported."""
    make, known = jaxgrpo.programs.make_programs, {}

    @functools.wraps(make)
    def make_programs(session: Any, arms: int = 1) -> Any:
        config = session.config
        asked = (config.rollout, config.eval, config.grpo, config.optim, config.steps)
        rest = (
            config.objective,
            config.weight_grad_norms,
            config.model,
            session.stop.token_ids,
            arms,
        )
        key = repr((asked, rest))
        if key not in known:
            known[key] = make(session, arms)
        return known[key]

    jaxgrpo.programs.make_programs = make_programs
    # It compiles for every session anew.
    jaxgrpo.compile_ahead.compile_ahead = lambda session, programs, **asked: programs


def run(count: int, root: Path) -> int:
    """Plays `count` sequences under `root`; 0 if nothing was found."""
    share_programs()
    # The module of the rewards is found in whatever copy is worked in: all are the same.
    sys.path.insert(0, str(root / "start"))
    player = Player(root)
    player.play(draw(count))
    for fault in player.faults[:20]:
        print(fault)
    print(
        f"{count} sequences, {player.commands} commands, {player.refused} of them refused, "
        f"{len(player.printed)} results, {len(player.faults)} faults"
    )
    return int(bool(player.faults))


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), Path(sys.argv[2]).absolute()))
