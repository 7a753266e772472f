"""Every command that README.md, docs/ and --help show is one that works.

What is local is run, at least with --dry-run; what needs the hub, an accelerator or an hour is read
as it would be. A command of a kind that is not known here fails: say here how it is checked.
"""

import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from jaxgrpo.commands.command import PROGRAM, Command, parse_settings, setting_names
from jaxgrpo.config import EMBEDDED, Config
from jaxgrpo.config_files import load_config
from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.run import COMMANDS, main
from jaxgrpo.tasks.problems import make_problems
from tests.e2e.conftest import example
from tests.test_layout import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = ("python ", "bash ", "pip ", "jaxgrpo ", "tensorboard ", "JAXGRPO_", "CUDA_", "JAX_")


def commands_of(page):
    """Those in blocks of bash, and those in line; a comment ends one, a backslash goes on."""
    text = page.read_text(encoding="utf-8")
    found = []
    for kind, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL):
        if kind == "bash":
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.split(" #")[0].strip() for line in lines]
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for code in re.findall(r"`([^`]+)`", outside):
        code = " ".join(code.replace("\\|", "|").split())
        if code.startswith(STARTS) and " " in code:
            found.append(code)
    return [line for line in dict.fromkeys(found) if line and not line.startswith("#")]


SHOWN = [(page.name, line) for page in PAGES for line in commands_of(page)]


def test_commands_are_found():
    names = [name for name, _ in SHOWN]
    assert names.count("README.md") >= 8 and names.count("own_tasks.md") >= 3
    assert any(line.startswith("bash scripts/quickstart.sh") for _, line in SHOWN)


@pytest.fixture
def clone(here, monkeypatch):
    """A working directory as the README's reader has it, with a run in runs/embedded."""
    for name in ("configs", "scripts", "jaxgrpo"):
        if not (here / name).exists():
            (here / name).symlink_to(ROOT / name)
    for name in ("embedded", "first"):
        if not (here / "runs" / name).exists():
            (here / "runs" / name).symlink_to(here / "runs" / "try")
    (here / "rows").mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows = (json.dumps(row) + "\n" for row in make_problems(split, 64))
        (here / "rows" / f"{split}.jsonl").write_text("".join(rows))
    (here / "docs").mkdir(exist_ok=True)
    monkeypatch.syspath_prepend(here)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/own_tasks.md").read_text(), re.DOTALL)
    (here / "sums.py").write_text(code[1])
    return here


@pytest.mark.parametrize(("page", "line"), SHOWN, ids=[line for _, line in SHOWN])
def test_a_command_that_is_shown_works(page, line, clone):
    check(line, clone)


def check(line, here):
    line = re.sub(r"^((JAXGRPO|CUDA|JAX)_\w+=\S+ )+", "", line)
    words = shlex.split(line)
    if words[:1] == ["jaxgrpo"]:
        return check_run(words[1:], here)
    if words[:3] == ["python", "-m", "jaxgrpo.run"]:
        return check_run(words[3:], here)
    if words[0] == "python" and words[1].startswith("scripts/"):
        return check_script(words[1:], here)
    if words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if "/" in word), line
        return None
    if words == ["python", "sums.py"]:
        return subprocess.run([sys.executable, "sums.py"], check=True, cwd=here)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), line
        return subprocess.run(["bash", "-n", ROOT / words[1]], check=True)
    if words[:2] == ["pip", "install"]:
        return check_extras(words[2:])
    if words[0] == "tensorboard":
        return None
    raise AssertionError(f"how is this checked? {line}")


def check_run(words, here):
    """A line with dots or brackets is a synopsis: its command is there, and so are its options."""
    synopsis = any("..." in word or "[" in word for word in words if "=" not in word)
    words = [word for word in words if "..." not in word and not word.startswith("[")]
    name = words[0] if words and words[0] in COMMANDS else None
    assert name or not words or "=" in words[0] or (here / words[0]).exists() or synopsis, words
    if synopsis:
        return
    words = [re.sub(r"^data.path=DIR\w*$", f"data.path={here / 'rows'}", word) for word in words]
    words = [re.sub(r"=DIR\w*$", f"={EMBEDDED_DIR}", word) for word in words]
    command: Command = COMMANDS[name or "train"]
    rest = [word for word in words[1 if name else 0 :] if word != "--dry-run"]
    settings = parse_settings(name or "train", command, rest)
    if name == "bench" and "bench.preset=embedded" not in rest:
        return  # of 1.5B shapes, on an accelerator
    if not command.dry_run:
        out = [w for w in rest if w.startswith("out=")]
        if not out or not (here / out[0].removeprefix("out=")).exists():
            assert main(words) == 0
    elif isinstance(settings, Config) and is_local(settings):
        assert main([*(words[:1] if name else []), *rest, "--dry-run"]) == 0


def is_local(config):
    paths = (config.model.path, config.data.path)
    return all(path == EMBEDDED or path.startswith((".", "/")) for path in paths)


def check_script(words, here):
    """The one that takes seconds is run; of the others the options are there."""
    name, *rest = words
    if "plot_run" not in name:
        code = (ROOT / name).read_text(encoding="utf-8")
        assert [w for w in rest if w.startswith("--") and f'"{w}"' not in code] == []
        return
    done = subprocess.run(
        [sys.executable, ROOT / name, *rest], cwd=here, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def check_extras(words):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if found := re.fullmatch(r"(\.|jaxgrpo)(?:\[([\w,]+)\])?", word):
            for extra in (found[2] or "").split(","):
                assert not extra or extra in project["optional-dependencies"], word
        else:
            assert word == "-e", word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_links_that_are_shown_exist(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        (tmp_path / "c.yaml").write_text(block)
        load_config([tmp_path / "c.yaml"])
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("name", COMMANDS)
def test_settings_in_a_commands_help_are_its_own(name, clone):
    """What stands at the start of an indented line is an argument, up to two spaces."""
    command = COMMANDS[name]
    for line in command.help.splitlines():
        if not line.startswith("  "):
            continue
        shown = re.split(r"\s{3,}|\s\(", line.strip())[0]
        words = [w for w in shlex.split(shown) if "=" in w and not w.startswith("rewards.")]
        words = [w for w in words if not w.endswith("=...")]
        known = set(setting_names(command.config))
        assert {w[:-1] for w in words if w.endswith("=")} <= known
        words = [w for w in words if not w.endswith("=")]
        words = [w.replace("DIR_OR_HUB_ID", EMBEDDED) for w in words]
        if name == "train":  # alternatives may stand on one line
            for word in words:
                parse_settings(name, command, [word])
        elif name in ("export", "compress"):
            words = [w for w in words if not w.startswith("out=")]
            parse_settings(name, command, ["runs/try", "out=new", *words, *needed(name, words)])
        elif name not in (
            "plan",
            "settings",
            "completion",
        ):  # `plan` has edits of its own, and tests of them
            parse_settings(name, command, words)


def needed(name, words):
    """What `compress` cannot do without."""
    amounts = ("energy=", "rank_budget=", "parameters=")
    return (
        ["energy=0.9"]
        if name == "compress" and not any(word.startswith(amounts) for word in words)
        else []
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eval", "bench"])
def test_examples_that_take_a_while(name, clone):
    assert main(example(name)) == 0


def test_the_program_is_called_as_it_is_shown():
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM.split()[-1], "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and PROGRAM in done.stdout
