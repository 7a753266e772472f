"""Which files of a model directory hold its weights."""

from __future__ import annotations

from pathlib import Path

from jaxgrpo.config import ConfigError
from jaxgrpo.model.safe_files import (
    contained,
    open_safetensors,
    read_json_object,
    refuse_pickles,
)


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or the single file; there must not be both, nor shards
    that the index does not name, nor an adapter, which transformers would apply."""
    index = contained(directory, "model.safetensors.index.json")
    single = contained(directory, "model.safetensors")
    if (directory / "adapter_config.json").exists():
        raise ConfigError(
            f"{directory} holds an adapter (adapter_config.json) beside the model; move it to a "
            "directory of its own and name that in lora.adapter"
        )
    files: dict[str, Path] = {}
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{index} has no weight_map")
        files = {name: _shard(directory, index, str(file)) for name, file in weight_map.items()}
    elif not single.is_file():
        raise ConfigError(
            f"{directory} holds neither model.safetensors nor model.safetensors.index.json"
            + refuse_pickles(directory)
        )
    used = {path.name for path in files.values()} or {single.name}
    for other in (single, *sorted(directory.glob("model-*-of-*.safetensors"))):
        if other.name not in used and other.is_file():
            raise ConfigError(
                f"{directory} holds two sets of weights: {other.name}, and what "
                f"{index.name if files else single.name} holds; remove one"
            )
    if not files:
        return dict.fromkeys(open_safetensors(single).keys(), single)
    for file in sorted(set(files.values())):
        for name in open_safetensors(file).keys():  # noqa: SIM118 (no mapping)
            if files.get(name) != file:
                raise ConfigError(f"{file} holds the tensor {name!r:.120}, {index} does not say so")
    return files


def _shard(directory: Path, index: Path, name: str) -> Path:
    """A shard beside its index. A name from a downloaded file is not trusted as a path."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise ConfigError(f"{index} points outside its directory: {name!r}")
    if not name.endswith(".safetensors"):
        raise ConfigError(f"{index} names the shard {name!r}, which is not a safetensors file")
    path = contained(directory, name)
    if not path.is_file():
        raise ConfigError(f"{index} names the shard {name}, which does not exist")
    return path
