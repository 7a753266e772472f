"""Commands on one run directory in turn: results belong to the inputs shown beside them, or one
line says why not. In full with the rest of the fuzz, JAXGRPO_FUZZ=full."""

import os
import subprocess
import sys
from pathlib import Path

from tests.fuzz.amounts import FULL
from tests.processes import environment

ROOT = Path(__file__).resolve().parents[2]


def test_what_a_command_prints_is_a_function_of_its_inputs(tmp_path):
    """200 sequences, in full 2,000; in a process of its own, with one device as users have it."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.sequences", "2000" if FULL else "200", str(tmp_path)],
        env=environment(1) | kept,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout
