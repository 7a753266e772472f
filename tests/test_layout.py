"""What the tree itself promises: a ground floor without jax, no dumping grounds, no machine's
paths, a small package, configurations that hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgrpo
from jaxgrpo.config import Config
from jaxgrpo.config_files import load_config
from jaxgrpo.study.config import StudyConfig
from tests.kept_programs import of_this_processor

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(jaxgrpo.__file__).parent
GROUND_FLOOR = (
    "config",
    "rank_plan",
    "records.run_directory",
    "tasks.answers",
    "tasks.math_notation",
    "tasks.problems",
    "tasks.quantities",
    "tasks.rewards",
)
CONFIGS = sorted([*ROOT.glob("configs/*.yaml"), *PACKAGE.glob("assets/*.yaml")])

# A meta path finder that refuses is the same as a machine where these are not installed.
REFUSE_JAX = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Refuse())
"""
WITHOUT_JAX = REFUSE_JAX + "importlib.import_module(sys.argv[1])"


def tracked_files():
    """What git tracks, or would after `git add`; all files where there is no git."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed if name and (path := ROOT / name).is_file()]


def run_without_jax(module):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX, f"jaxgrpo.{module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("module", GROUND_FLOOR)
def test_the_ground_floor_imports_where_there_is_no_jax(module):
    done = run_without_jax(module)
    assert done.returncode == 0, done.stderr


def test_a_higher_floor_does_not():
    """Shows that the test above can fail."""
    done = run_without_jax("mesh")
    assert done.returncode != 0 and "No module named 'jax" in done.stderr


def test_no_file_is_a_dumping_ground():
    names = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py"}
    assert not [path for path in tracked_files() if path.name in names]


def test_no_file_holds_a_path_of_one_machine():
    # Put together, so that this file does not hold one either.
    folders = "|".join(("work", "home", "root", "Users"))
    pattern = re.compile(rf"(?<![\w./}}>~])/(?:{folders})(?![-\w])")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path.suffix in (".safetensors",) or path.name == "tokenizer.json":
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_programs_kept_by_another_processor_are_left_alone(tmp_path):
    assert of_this_processor(tmp_path / "new") == tmp_path / "new"
    assert of_this_processor(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "processor").write_text("another")
    inside = of_this_processor(tmp_path)
    assert inside.parent == tmp_path and len(inside.name) == 12


def test_what_ships_with_the_package_is_small():
    size = sum(path.stat().st_size for path in (PACKAGE / "assets").rglob("*") if path.is_file())
    assert size <= 8 * 2**20


def test_every_package_folder_is_a_package():
    """setuptools leaves a folder without __init__.py out of the wheel."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_there_are_configurations():
    names = {path.name for path in CONFIGS}
    assert {"embedded.yaml", "gsm8k_1.5b.yaml"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_configuration_decodes_and_begins_with_its_command(path):
    cls = StudyConfig if path.name.startswith("study") else Config
    config = load_config([path], cls=cls)
    assert config.run_dir.startswith("runs/")
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.match(r"# python -m jaxgrpo\.", first), first
    # The command names the file itself, except the one that runs when none is named.
    named = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT / "configs") else ""
    assert named in first, first
