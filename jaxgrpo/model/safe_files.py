"""Reading files that came from elsewhere: a model or an adapter directory is data, never trusted.

safetensors and JSON only. A name is not trusted as a path, a link may not lead out of its
directory, and a header is measured before it is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16", which safetensors asks for)
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgrpo.config import ConfigError

MAX_HEADER_BYTES = 16 * 2**20
"""A model of 10,000 tensors has a header of one or two megabytes."""
MAX_JSON_BYTES = 64 * 2**20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def contained(directory: Path, name: str) -> Path:
    """`directory`/`name`, once it is certain that this is a file of that directory.

    Links inside the directory are followed, and those of the hub's cache into its own blobs.

    Raises:
        ConfigError: the name is a path, or a link leads elsewhere.
    """
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise ConfigError(f"{directory} names a file outside of itself: {name!r}")
    path, home = directory / name, directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path} cannot be followed: {error}") from None
    if not any(real.is_relative_to(root) for root in allowed):
        raise ConfigError(f"{path} is a link out of its directory; copy the file there instead")
    return path


def refuse_pickles(directory: Path) -> str:
    """What to say of a directory without safetensors: pickles are named, because they can run code
    when they are read."""
    found = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    return (
        f"; {found[0]} may be a pickle, which can run code and is never read: convert it to "
        "safetensors"
        if found
        else ""
    )


def open_safetensors(path: Path) -> Any:
    """An open safetensors file with numpy tensors.

    Raises:
        ConfigError: it is not a whole one, or its header is beyond any model's.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ConfigError(
                f"{path} is not a whole safetensors file: a header of {size:,} bytes, more than "
                f"{MAX_HEADER_BYTES:,}"
            )
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a whole safetensors file: {error}") from None


def read_tensor(reader: Any, name: str, path: Path) -> np.ndarray:
    """One tensor of `open_safetensors`; a ConfigError names what cannot be read."""
    try:
        return reader.get_tensor(name)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        # The last four: numpy does not have every type that safetensors has (float8).
        raise ConfigError(f"tensor {name!r} in {path} is unreadable: {error!r}") from None


_PLAIN_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What weights are stored in, by numpy's names."""


def tensor_reader(path: Path) -> Callable[[str], np.ndarray]:
    """What reads a file's tensors by name, from several threads at once: safetensors' own reading
    keeps the interpreter for itself meanwhile.

    Raises:
        ConfigError: as `open_safetensors`; reading, as `read_tensor`.
    """
    opened = open_safetensors(path)  # which has looked at every place in the header
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))

    def read(name: str) -> np.ndarray:
        entry = header.get(name, {})
        if entry.get("dtype") not in _PLAIN_TYPES:
            return read_tensor(opened, name, path)
        start, end = entry["data_offsets"]
        found = np.fromfile(path, np.uint8, end - start, offset=8 + size + start)
        if len(found) != end - start:
            raise ConfigError(f"tensor {name!r} in {path} is unreadable: the file has become short")
        return found.view(_PLAIN_TYPES[entry["dtype"]]).reshape(entry["shape"])

    return read


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a ConfigError says what is wrong with it."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return raw
