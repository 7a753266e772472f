"""The wheel, installed outside a clone: it trains, studies, evaluates and exports by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig

import pytest

from tests.e2e.conftest import SMALL
from tests.test_layout import ROOT, tracked_files


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `jaxgrpo` of an environment that holds the wheel alone, and an empty folder.

    What it depends on is lent from this environment; jaxgrpo is not, since a folder that a .pth
    file names has its own .pth files, an editable install's too, left unread.
    """
    root = tmp_path_factory.mktemp("wheel")
    for path in tracked_files():
        copy = root / "clone" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root), "./clone"]
    subprocess.run([*pip, *build], check=True, cwd=root)
    shutil.rmtree(root / "clone")
    (wheel,) = root.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "env"], check=True)
    python = root / "env" / "bin" / "python"
    into = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *into], check=True)
    (packages,) = (root / "env" / "lib").glob("*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (root / "empty").mkdir()

    def run(*words):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["XLA_FLAGS"] = ""
        command = [root / "env" / "bin" / words[0], *words[1:]]
        done = subprocess.run(
            command, cwd=root / "empty", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("python", "-c", "import jaxgrpo; print(jaxgrpo.__file__)")
    assert where.startswith(str(packages))
    assert (packages / "jaxgrpo" / "py.typed").is_file()
    return run, root / "empty"


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_and_folder_does_all_there_is(installed):
    run, here = installed
    assert "jaxgrpo" in run("jaxgrpo", "--version")
    run("jaxgrpo")
    assert not list(here.iterdir()), "help writes nothing"
    assert "lora.rank=16" in run("jaxgrpo", "settings", "lora")
    assert "proportional" in run("jaxgrpo", "study", "--dry-run")
    run("jaxgrpo", "train", "steps=2", *SMALL)
    summary = json.loads((here / "runs" / "embedded" / "summary.json").read_text())
    assert summary["versions"]["jaxgrpo"]
    assert "after step 2" in run("jaxgrpo", "eval", *SMALL)
    run("jaxgrpo", "export", "runs/embedded", "out=merged", "form=merged")
    assert (here / "merged" / "model.safetensors").is_file()
