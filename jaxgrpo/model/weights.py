"""Hugging Face safetensors -> the stacked tree of `api.py`. safetensors only, never pickle.

A directory holds model.safetensors, or model.safetensors.index.json with its shards. Kernels are
transposed on the way in: Hugging Face stores [out, in], this package [in, out].
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jaxgrpo.config import EMBEDDED, MODULES, ConfigError
from jaxgrpo.devices import device_of
from jaxgrpo.mesh import sharding
from jaxgrpo.model.api import base_logical_axes
from jaxgrpo.model.hf_config import check_generation_config, eos_token_ids, qwen_config
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.model.safe_files import contained, read_json_object, tensor_reader
from jaxgrpo.model.tensor_files import tensor_files
from jaxgrpo.records.progress import Stage
from jaxgrpo.types import Tree

EMBEDDED_DIR = Path(__file__).resolve().parent.parent / "assets" / "embedded"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt")


def resolve_model_dir(
    path: str, revision: str | None = None, files: Sequence[str] = _HUB_FILES
) -> Path:
    """The local directory of `embedded`, a directory, or a hub id (fetched or from the cache).

    Args:
        files: patterns of what is fetched; no file of code, and no pickle, is among them.

    Raises:
        ConfigError: no such directory, not a hub id, or the hub cannot serve it.
    """
    if path == EMBEDDED and revision is not None:
        raise ConfigError(f"model.revision={revision} needs a hub id; the embedded model is local")
    if path == EMBEDDED:
        return EMBEDDED_DIR
    local = Path(path).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ConfigError(f"model.revision={revision} needs a hub id; {path} is a directory")
        return local
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or local.exists()
    if looks_local:
        raise ConfigError(f"model.path: {path} is not a directory; give a directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(
            f"model.path: {path}{at} is neither a directory nor a model of the hub's: {reason}"
        ) from None


def read_qwen_config(directory: Path, dtype: str) -> QwenConfig:
    """Shapes and constants, from config.json.

    Raises:
        ConfigError: no model of a kind that is computed here; the field is named.
    """
    path = contained(directory, "config.json")
    return qwen_config(read_json_object(path), dtype, f"{directory}/config.json")


def read_eos_token_ids(directory: Path) -> dict[str, tuple[int, ...]]:
    """File -> the ids that end a completion by it: generation_config.json's and config.json's.

    Raises:
        ConfigError: no ids, or generation_config.json asks for what sampling does not do.
    """
    found = {}
    for name in ("generation_config.json", "config.json"):
        path = contained(directory, name)
        if path.is_file():
            raw, where = read_json_object(path), f"{directory}/{name}"
            found[where] = eos_token_ids(raw, where)
            if name == "generation_config.json":
                check_generation_config(raw, where)
    return found


SAMPLED_CHUNKS, CHUNK_BYTES = 256, 64 * 2**10


def weights_sha256(directory: Path) -> str:
    """A digest of the tensor files: of all bytes up to 16 MiB a file, of 256 pieces spread over
    larger ones, so that it costs no time. Other weights differ nearly everywhere."""
    digest = hashlib.sha256()
    for file in sorted(set(tensor_files(directory).values())):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        step = max(CHUNK_BYTES, size // SAMPLED_CHUNKS)
        with file.open("rb") as opened:
            for start in range(0, size, step):
                opened.seek(start)
                digest.update(opened.read(CHUNK_BYTES))
    return digest.hexdigest()


def check_tensor_names(directory: Path, config: QwenConfig) -> dict[str, Path]:
    """Tensor name -> file, after checking from the headers alone that none is missing or extra.

    Raises:
        ConfigError: as `load_model`, for everything but shapes and contents.
    """
    files = tensor_files(directory)
    _check_names(hf_shapes(config), files, config, directory)
    return files


def load_model(
    directory: Path,
    dtype: str,
    mesh: Mesh | None = None,
    console: Console | None = None,
) -> tuple[QwenConfig, Tree]:
    """Reads config and weights, each leaf sharded over `mesh` as soon as it is complete.

    Args:
        console: where the progress is shown.

    Raises:
        ConfigError: a missing, extra, misshaped or truncated tensor or file, naming it; an index
            that points outside its directory; a tied head that is not the embedding.
    """
    config = read_qwen_config(directory, dtype)
    if mesh is not None:
        config = dataclasses.replace(config, device=device_of(mesh))
    files = check_tensor_names(directory, config)
    read, shapes, done = make_reader(config, files), hf_shapes(config), 0
    _check_tied_head(config, files, read)
    stage = Stage("loading", len(shapes), console or Console(quiet=True))
    with stage, ThreadPoolExecutor() as threads:

        def stacked(names: Sequence[str], transpose: bool) -> np.ndarray:
            nonlocal done
            shape = shapes[names[0]][:: -1 if transpose else 1]
            whole = np.empty((len(names), *shape), config.compute_dtype)
            for _ in threads.map(lambda name, to: _copy(read(name), to, transpose), names, whole):
                done += 1
                stage.update(done, "tensors")
            return whole

        return config, _build(config, stacked, mesh)


def _copy(tensor: np.ndarray, to: np.ndarray, transpose: bool) -> None:
    """In parts that stay in a core's cache when rows become columns. As integers: numpy copies
    bfloat16 one thread at a time."""
    bits = f"u{to.itemsize}"
    tensor, to = (tensor.T if transpose else tensor).view(bits), to.view(bits)
    for start in range(0, to.shape[-1], 256):
        part = np.s_[..., start : start + 256]
        to[part] = tensor[part]


def _check_tied_head(
    config: QwenConfig, files: dict[str, Path], read: Callable[[str], np.ndarray]
) -> None:
    """transformers unties a head that differs from the embedding, whatever config.json says; here
    the two have to agree."""
    if config.tie_word_embeddings and "lm_head.weight" in files:
        head, embed = read("lm_head.weight"), read("model.embed_tokens.weight")
        if not np.array_equal(head, embed):
            raise ConfigError(
                f"{files['lm_head.weight']}: lm_head.weight is not model.embed_tokens.weight, but "
                "config.json says tie_word_embeddings: true"
            )


def make_reader(config: QwenConfig, files: dict[str, Path]) -> Callable[[str], np.ndarray]:
    """Tensor name -> its array in the compute dtype, of the shape that config.json says."""
    readers = {file: tensor_reader(file) for file in set(files.values())}
    expected = hf_shapes(config)
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]

    def read(name: str) -> np.ndarray:
        tensor = readers[files[name]](name)
        if tensor.shape != expected[name]:
            raise ConfigError(
                f"tensor {name} in {files[name]} has shape {tensor.shape}, config.json says "
                f"{expected[name]}"
            )
        return tensor.astype(config.compute_dtype, copy=False)

    return read


def _build(
    config: QwenConfig, stacked: Callable[[Sequence[str], bool], np.ndarray], mesh: Mesh | None
) -> Tree:
    """Leaf by leaf, so that the host holds one at a time; laid out as the device wants it, or a
    leaf would be turned around in one thread on its way."""
    axes = base_logical_axes(config)

    def put(array: np.ndarray, logical: Sequence[str]) -> jax.Array:
        if mesh is None:
            return jax.numpy.asarray(array)
        where = sharding(mesh, logical)
        try:
            return jax.make_array_from_callback(array.shape, where, lambda index: array[index])
        except ValueError as error:
            raise ConfigError(
                f"mesh {dict(mesh.shape)}: an array {dict(zip(logical, array.shape, strict=True))} "
                f"does not divide over it: {str(error).splitlines()[0]}"
            ) from None

    def stack(suffix: str, logical: Sequence[str], transpose: bool) -> jax.Array:
        names = [f"model.layers.{i}.{suffix}" for i in range(config.num_layers)]
        return put(stacked(names, transpose), logical)

    def single(name: str, logical: Sequence[str]) -> jax.Array:
        return put(stacked([name], False)[0], logical)

    layers: Tree = {}
    for module, leaves in axes["layers"].items():
        hf = hf_module(module)
        if "scale" in leaves:
            layers[module] = {"scale": stack(f"{hf}.weight", leaves["scale"], False)}
            continue
        layers[module] = {"kernel": stack(f"{hf}.weight", leaves["kernel"], True)}
        if "bias" in leaves:
            layers[module]["bias"] = stack(f"{hf}.bias", leaves["bias"], False)
    base: Tree = {
        "embed_tokens": single("model.embed_tokens.weight", axes["embed_tokens"]),
        "layers": layers,
        "norm": {"scale": single("model.norm.weight", axes["norm"]["scale"])},
    }
    if not config.tie_word_embeddings:
        base["lm_head"] = single("lm_head.weight", axes["lm_head"])
    return base


def hf_module(module: str) -> str:
    """`q_proj` -> `self_attn.q_proj`, `up_proj` -> `mlp.up_proj`; a layer's own norms stay."""
    if module in _ATTENTION:
        return f"self_attn.{module}"
    return f"mlp.{module}" if module in MODULES else module


def hf_shapes(config: QwenConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this config must hold, by its Hugging Face name."""
    embed, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, embed),
        "model.norm.weight": (embed,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, embed)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for module, (in_features, out_features) in config.module_shapes.items():
            shapes[f"{prefix}{hf_module(module)}.weight"] = (out_features, in_features)
            if config.qkv_bias and module in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{prefix}{hf_module(module)}.bias"] = (out_features,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (embed,)
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            shapes[f"{prefix}{hf_module(norm)}.weight"] = (config.head_dim,)
    return shapes


def _check_names(
    expected: dict[str, tuple[int, ...]],
    files: dict[str, Path],
    config: QwenConfig,
    directory: Path,
) -> None:
    missing = sorted(set(expected) - set(files))
    if missing:
        raise ConfigError(
            f"{directory}: tensor {missing[0]} is missing"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )
    # Old exports carry the rotary table, and a tied head's second copy of the embedding.
    extra = sorted(
        name
        for name in set(files) - set(expected)
        if not name.endswith("rotary_emb.inv_freq")
        and not (name == "lm_head.weight" and config.tie_word_embeddings)
    )
    if extra:
        raise ConfigError(
            f"{directory}: tensor {extra[0]} is not one of this {config.num_layers}-layer model's"
            + (f" (and {len(extra) - 1} more)" if len(extra) > 1 else "")
        )
