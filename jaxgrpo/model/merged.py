"""Adapters folded into the weights: a whole Hugging Face model directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from jaxgrpo.config import ConfigError
from jaxgrpo.model.peft_files import PeftAdapter
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.model.safe_files import contained, read_json_object
from jaxgrpo.model.weights import check_tensor_names, hf_shapes, make_reader
from jaxgrpo.records.run_directory import atomic_write_bytes, atomic_write_json

MAX_SHARD_BYTES = 2 * 2**30
# What belongs to a model besides its weights; no file of code is ever copied.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def save_merged(
    directory: Path,
    adapter: PeftAdapter,
    model_dir: Path,
    config: QwenConfig,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes base + scale * B A as safetensors in `config.dtype`, with tokenizer and settings.

    The sum is taken in float32 and rounded once. The index comes last: a directory with several
    shards and no index is one that was not finished.

    Raises:
        ConfigError: the adapter has a module that the model does not have, or of another shape.
        OSError: naming the file that could not be written.
    """
    _check_fits(adapter, config, model_dir)
    directory.mkdir(parents=True, exist_ok=True)
    settings = read_json_object(contained(model_dir, "config.json"))
    for key in {"dtype", "torch_dtype"} & settings.keys() or {"torch_dtype"}:
        settings[key] = config.dtype
    for name in _COPIED:
        if (model_dir / name).exists():
            shutil.copyfile(contained(model_dir, name), directory / name)
    weight_map = _write_shards(directory, _merged(adapter, model_dir, config), max_shard_bytes)
    if len(set(weight_map.values())) > 1:
        total = sum(
            np.prod(shape, dtype=np.int64) * config.compute_dtype.itemsize
            for name, shape in hf_shapes(config).items()
            if name in weight_map
        )
        index = {"metadata": {"total_size": int(total)}, "weight_map": weight_map}
        atomic_write_json(directory / "model.safetensors.index.json", index)
    atomic_write_json(directory / "config.json", settings)


def _check_fits(adapter: PeftAdapter, config: QwenConfig, model_dir: Path) -> None:
    shapes = hf_shapes(config)
    for name, lora in adapter.modules.items():
        want = shapes.get(f"{name}.weight")
        if want != (lora.b.shape[0], lora.a.shape[1]):
            raise ConfigError(
                f"the adapter's {name!r:.120} is {(lora.b.shape[0], lora.a.shape[1])}, the model "
                f"{model_dir} has {'no such module' if want is None else want}"
            )


def _merged(
    adapter: PeftAdapter, model_dir: Path, config: QwenConfig
) -> Iterator[tuple[str, np.ndarray]]:
    read = make_reader(config, check_tensor_names(model_dir, config))
    for name in hf_shapes(config):
        tensor = read(name)
        lora = adapter.modules.get(name.removesuffix(".weight"))
        if lora is not None and lora.rank:
            tensor = (tensor.astype(np.float32) + lora.delta()).astype(config.compute_dtype)
        yield name, tensor


def _write_shards(
    directory: Path, tensors: Iterator[tuple[str, np.ndarray]], max_shard_bytes: int
) -> dict[str, str]:
    """Tensor name -> file, one shard in memory at a time."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        path = directory / f".shard-{len(shards)}.partial"
        atomic_write_bytes(path, save(held, {"format": "pt"}))
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > max_shard_bytes:
            flush()
        held[name] = np.ascontiguousarray(tensor)
    flush()
    weight_map = {}
    for number, names in enumerate(shards):
        # The name says how many there are, which is known at the end only.
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        (directory / f".shard-{number}.partial").replace(directory / file)
        weight_map |= dict.fromkeys(names, file)
    return weight_map
