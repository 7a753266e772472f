"""A device without room: one line that says what was asked for, who holds it, what takes less."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxgrpo import devices
from jaxgrpo.config import ConfigError
from jaxgrpo.out_of_memory import gpu_holders, out_of_memory_line
from jaxgrpo.run import EXIT_ERROR, guarded


def ask_for_too_much() -> int:
    jax.block_until_ready(jnp.zeros(10**13))
    return 0


def make_nvidia_smi(directory: Path, says: str, code: int = 0) -> None:
    tool = directory / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {code}\n")
    tool.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tools := tmp_path / "tools").mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tools


def test_too_little_memory_is_one_line_with_what_to_set(path, capsys):
    make_nvidia_smi(path, "")
    assert guarded(ask_for_too_much) == EXIT_ERROR
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("error: the device is out of memory: 37252.90 GiB more were asked for")
    for setting in ("grpo.micro_batches", "model.remat=full", "eval.batch_prompts", "--dry-run"):
        assert setting in line


def test_who_holds_the_device_is_named(path, capsys):
    make_nvidia_smi(path, f"4242, /opt/a,b/python3, 40960\n{os.getpid()}, python, 20\n77, x, [N/A]")
    assert gpu_holders() == [(4242, "python3", 40960.0)]
    assert guarded(ask_for_too_much) == EXIT_ERROR
    line = capsys.readouterr().err
    assert "python3 (pid 4242) holds 40.0 GiB" in line and "CUDA_VISIBLE_DEVICES" in line


def test_an_nvidia_smi_that_fails_names_nobody(path):
    make_nvidia_smi(path, "4242, python3, 40960", code=9)
    assert gpu_holders() == []


def test_a_device_that_cannot_start_for_lack_of_memory(path):
    make_nvidia_smi(path, "")
    text = "Unable to initialize backend 'cuda': INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    assert text in (out_of_memory_line(RuntimeError(text)) or "")


def test_other_failures_stay_what_they_are():
    assert out_of_memory_line(RuntimeError("INVALID_ARGUMENT: shapes")) is None

    def fail() -> int:
        raise RuntimeError("INVALID_ARGUMENT: shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        guarded(fail)


def test_a_gpu_that_jax_did_not_get_is_an_error_and_not_a_slow_run(monkeypatch):
    monkeypatch.setattr(devices, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setattr(devices, "CUDA_PLUGINS", ("jax",))
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_platforms", None)
        with pytest.raises(ConfigError, match="JAX_PLATFORMS=cpu to run on the processor"):
            devices.check_gpu_is_used()
        monkeypatch.setattr(devices, "CUDA_PLUGINS", ("no_such_module",))
        devices.check_gpu_is_used()
        monkeypatch.setattr(devices, "CUDA_PLUGINS", ("jax",))
        jax.config.update("jax_platforms", "cpu")
        devices.check_gpu_is_used()
    finally:
        jax.config.update("jax_platforms", platforms)
