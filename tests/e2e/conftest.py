"""What several end-to-end tests share: a working directory in which a person has begun."""

import shlex

import pytest

from jaxgrpo.run import COMMANDS, main

SMALL = [
    "grpo.prompts_per_step=8",
    "grpo.group_size=4",
    "grpo.micro_batches=1",
    "rollout.max_completion_tokens=32",
    "eval.problems=8",
    "eval.batch_prompts=8",
]
"""A run of the embedded model, made small."""


def example(name):
    """The words of a command's example."""
    words = shlex.split(COMMANDS[name].example)
    assert words[0] == name
    return words


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A working directory in which `train`'s example has run, made small."""
    path = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert main([*example("train"), *SMALL, "optim.learning_rate=0.01", "steps=2"]) == 0
    return path


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place
