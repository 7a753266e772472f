"""jax with fewer devices than there are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def few_devices(count: int) -> Iterator[None]:
    """Inside, jax has the first `count` of its devices: eight virtual ones on two cores take longer
    than one, to compile and to run."""
    first = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        patch.setattr(jax, "device_count", lambda *_: count)
        yield
