"""Eight virtual CPU devices, quick compilation, strict numerics, no network; set before jax is
imported."""

import os
from pathlib import Path

from tests.kept_programs import of_this_processor
from tests.quick_compiles import quick_flags

# The last one counts: what is in XLA_FLAGS already goes before quick compilation. Programs for an
# accelerator are compiled as a run's are.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "" if os.environ.get("JAXGRPO_TEST_ACCELERATOR") else quick_flags(),
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_DISABLED"] = "true"
# Two test processes with two torch threads each would fight over two cores.
os.environ["OMP_NUM_THREADS"] = "1"
# jax would take an accelerator's memory in every test process.
if not os.environ.get("JAXGRPO_TEST_ACCELERATOR"):
    os.environ["JAX_PLATFORMS"] = "cpu"

# What compiles once need not compile again: kept between runs, and for the processes that tests
# start. JAXGRPO_TEST_PROGRAMS="" compiles everything anew.
os.environ.setdefault(
    "JAXGRPO_TEST_PROGRAMS",
    os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "programs")),
)
if os.environ["JAXGRPO_TEST_PROGRAMS"]:
    programs = of_this_processor(Path(os.environ["JAXGRPO_TEST_PROGRAMS"]))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

from tests.devices import few_devices

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items):
    backend = jax.default_backend()
    for item in items:
        for kind in ("gpu", "tpu"):
            if kind in item.keywords and backend != kind:
                item.add_marker(pytest.mark.skip(reason=f"no {kind} here"))


@pytest.fixture(scope="module")
def one_device():
    """For tests of what a run does, whatever devices share it."""
    with few_devices(1):
        yield
