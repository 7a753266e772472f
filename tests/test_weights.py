"""Checkpoint loading: every defect is one clear line that names it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgrpo.config import ConfigError
from jaxgrpo.model.weights import load_model, resolve_model_dir
from tests.hf_models import make_hf_model


@pytest.fixture
def model_dir(tmp_path):
    make_hf_model(tmp_path, tie=True)
    return tmp_path


def _rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def _set_config(path, **changes):
    raw = json.loads((path / "config.json").read_text())
    raw.update(changes)
    (path / "config.json").write_text(json.dumps(raw))


NAME = "model.layers.1.mlp.up_proj.weight"


def test_missing_tensor_is_named(model_dir):
    _rewrite(model_dir, lambda tensors: tensors.pop(NAME))
    with pytest.raises(ConfigError, match=f"{NAME} is missing"):
        load_model(model_dir, "float32")


def test_extra_tensor_is_named(model_dir):
    _rewrite(model_dir, lambda tensors: tensors.update({"model.extra": np.zeros(2, np.float32)}))
    with pytest.raises(ConfigError, match=r"model\.extra is not one"):
        load_model(model_dir, "float32")


def test_misshaped_tensor_is_named(model_dir):
    _rewrite(model_dir, lambda tensors: tensors.update({NAME: np.zeros((3, 2), np.float32)}))
    with pytest.raises(ConfigError, match=rf"{NAME} .*\(3, 2\)"):
        load_model(model_dir, "float32")


@pytest.mark.parametrize("keep", [0, 5, 500, -7])
def test_truncated_file_is_named(model_dir, keep):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        load_model(model_dir, "float32")


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".."]
)
def test_index_pointing_outside_is_refused(model_dir, target):
    index = {"weight_map": {NAME: target}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="points outside its directory"):
        load_model(model_dir, "float32")


def test_missing_shard_is_named(model_dir):
    index = {"weight_map": {NAME: "model-00001-of-00002.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="model-00001-of-00002"):
        load_model(model_dir, "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_attention_heads": 5}, "query heads"),
        ({"vocab_size": "many"}, "many"),
    ],
)
def test_unsupported_config_is_named(model_dir, change, message):
    _set_config(model_dir, **change)
    with pytest.raises(ConfigError, match=message):
        load_model(model_dir, "float32")


@pytest.mark.parametrize("style", ["rope_theta", "rope_parameters"])
def test_rope_theta_is_read_in_both_spellings(model_dir, style):
    raw = json.loads((model_dir / "config.json").read_text())
    raw.pop("rope_parameters", None)
    raw.pop("rope_theta", None)
    raw[style] = 5e5 if style == "rope_theta" else {"rope_theta": 5e5, "rope_type": "default"}
    (model_dir / "config.json").write_text(json.dumps(raw))
    assert load_model(model_dir, "float32")[0].rope_theta == 5e5


def test_second_copy_of_a_tied_head_is_ignored(model_dir):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    _rewrite(model_dir, add)
    assert "lm_head" not in load_model(model_dir, "float32")[1]


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_missing_model_path_is_named(path):
    with pytest.raises(ConfigError, match="is not a directory"):
        resolve_model_dir(path)


def test_hub_id_that_cannot_be_reached_is_one_line():
    with pytest.raises(ConfigError, match="nobody/nothing at revision v1") as error:
        resolve_model_dir("nobody/nothing", "v1")
    assert "\n" not in str(error.value)


def test_revision_of_a_local_model_is_refused(model_dir):
    for path in (str(model_dir), "embedded"):
        with pytest.raises(ConfigError, match="needs a hub id"):
            resolve_model_dir(path, "main")
