"""What is told of the programs that a process compiles."""

import threading
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxgrpo import compiles, mesh
from jaxgrpo.model.rms_norm import rms_norm


@pytest.fixture
def empty_disk(tmp_path):
    """Programs are kept in a folder that holds none yet; none of another test is being compiled."""
    for thread in threading.enumerate():
        if thread.name.startswith("compile"):
            thread.join()
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    kept = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)
    jax.config.update("jax_hlo_source_file_canonicalization_regex", None)
    compilation_cache.reset_cache()


def test_a_program_is_compiled_once_and_comes_from_the_disk_after(empty_disk):
    def make():
        def three_of_it(x):
            return x * 3 + 0.125

        return jax.jit(three_of_it)

    x = jax.numpy.arange(5.0)
    found = []
    for _ in range(2):
        before, own = compiles.compiled(), len(compiles._programs)
        make()(x)
        found.append(compiles.compiled().since(before))
        assert [p.name for p in compiles._programs[own:]] == ["three_of_it"]
    assert [(f.programs, f.from_disk) for f in found] == [(1, 0), (1, 1)]
    assert all(f.seconds > 0 for f in found)


def test_the_longest_come_first():
    jax.jit(lambda x: x @ x.T)(jax.numpy.ones((3, 2)))
    seconds = [program["seconds"] for program in compiles.longest(3)]
    assert seconds == sorted(seconds, reverse=True) and seconds
    assert set(compiles.longest(1)[0]) == {"name", "seconds", "from_disk"}


@pytest.mark.parametrize(("said", "kept"), [(None, 0.0), ("2.5", 2.5)])
def test_small_programs_are_kept_too(empty_disk, monkeypatch, said, kept):
    """Unless the environment says otherwise."""
    monkeypatch.setattr(mesh, "default_platform", lambda: "gpu")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    if said is not None:
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", said)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.5)
    mesh.keep_compiled_programs()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == kept  # type: ignore[attr-defined]


def test_a_program_does_not_know_in_which_folder_the_package_lies(empty_disk, monkeypatch):
    """Or its kernels, which hold the paths of their lines, would be others elsewhere."""
    monkeypatch.setattr(mesh, "default_platform", lambda: "gpu")
    mesh.keep_compiled_programs()
    lowered = jax.jit(lambda x: rms_norm(x, x, 1e-6)).lower(jax.numpy.ones(4))
    text = lowered.as_text(debug_info=True)
    assert '"jaxgrpo/model/rms_norm.py"' in text
    assert str(Path(mesh.__file__).parent) not in text
