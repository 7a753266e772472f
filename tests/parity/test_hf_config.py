"""config.json and generation_config.json: read as transformers reads them, or refused by name."""

import json
import shutil

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from jaxgrpo.config import ConfigError
from jaxgrpo.model.api import hidden_states, logits
from jaxgrpo.model.hf_config import config_fields, qwen_config
from jaxgrpo.model.presets import PRESETS
from jaxgrpo.model.weights import load_model, read_eos_token_ids, read_qwen_config
from tests.hf_models import make_hf_model

TOLERANCE = 1e-4  # max abs difference of float32 logits, as in test_model.py
DROP = object()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    make_hf_model(path, tie=True)
    return path


@pytest.fixture
def model_dir(made, tmp_path):
    shutil.copytree(made, tmp_path / "model")
    return tmp_path / "model"


def edit(path, changes):
    raw = json.loads(path.read_text()) if path.exists() else {}
    raw = {key: value for key, value in (raw | changes).items() if value is not DROP}
    path.write_text(json.dumps(raw))


# What is written differently, and means something that both can compute.
HONOURED = {
    "base on top": {"rope_parameters": DROP, "rope_theta": 5e5},
    "base in rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "base twice, the same": {
        "rope_parameters": {"type": "default", "rope_theta": 5e5},
        "rope_theta": 5e5,
    },
    "no base at all": {"rope_parameters": DROP},
    "base on top of an empty scaling": {
        "rope_parameters": DROP,
        "rope_scaling": None,
        "rope_theta": 5e5,
    },
    "a scaling of type default": {
        "rope_parameters": DROP,
        "rope_scaling": {"type": "default", "rope_theta": 5e5},
    },
    "a partial rotation of everything": {"partial_rotary_factor": 1.0},
    "the window that is not used": {"sliding_window": 4, "max_window_layers": 0},
    "layer types": {"layer_types": ["full_attention"] * 2},
    "the other name of silu": {"hidden_act": "swish"},
    "the size of a head, said": {"head_dim": 16},
    "another epsilon": {"rms_norm_eps": 1e-2},
    "no epsilon": {"rms_norm_eps": DROP},
    "no dropout": {"attention_dropout": 0},
    "fields of other models": {"attention_bias": False, "num_experts": 4, "unsloth_fixed": True},
}


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_accepted_is_computed_as_transformers_does(model_dir, name):
    edit(model_dir / "config.json", HONOURED[name])
    compare_with_transformers(model_dir)


def compare_with_transformers(model_dir):
    config, base = load_model(model_dir, "float32")
    theirs = AutoConfig.from_pretrained(model_dir)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.rms_norm_eps == theirs.rms_norm_eps
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    ours = logits(config, base, hidden_states(config, base, None, jnp.asarray(tokens)))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(input_ids=torch.tensor(tokens)).logits.numpy()
    chex.assert_trees_all_close(np.asarray(ours), want, atol=TOLERANCE, rtol=0)


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
THETA = {"rope_theta": 1e6}
# What is written -> what the line names.
REFUSED = [
    ({"rope_scaling": {"type": "yarn", **YARN}}, "rope scaling 'yarn'"),
    ({"rope_scaling": {"rope_type": "yarn", **YARN}}, "rope scaling 'yarn'"),
    ({"rope_scaling": {"type": "default", "rope_type": "yarn", **YARN}}, "'yarn'"),
    ({"rope_parameters": {"type": "yarn", **YARN, **THETA}}, "rope scaling 'yarn'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}}, "'linear'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA}}, "'dynamic'"),
    ({"rope_parameters": {"rope_type": "llama3", **YARN, **THETA}}, "'llama3'"),
    ({"rope_parameters": {"rope_type": None, **THETA}}, "rope scaling None"),
    ({"rope_parameters": {"factor": 2.0, **THETA}}, "rope_parameters.factor 2.0"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", **THETA}}}, "full_attention"),
    ({"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "sliding_attention"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5, **THETA}}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"mrope_section": [2, 3, 3]}}, "mrope_section"),
    ({"rope_parameters": THETA, "rope_theta": 1e4}, "1e+06 and rope_theta 10000 contradict"),
    ({"rope_parameters": THETA, "rope_scaling": {"rope_theta": 1e4}}, "contradict each other"),
    ({"rope_parameters": {"rope_theta": None}}, "rope_parameters.rope_theta"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta"),
    ({"rope_parameters": DROP, "rope_theta": None}, "'rope_theta' is None"),
    ({"rope_parameters": "yarn"}, "rope_parameters must be a mapping"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "use_sliding"),
    ({"use_sliding_window": "no"}, "use_sliding_window 'no'"),
    ({"use_sliding_window": None}, "use_sliding_window None"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"is_causal": False}, "is_causal False"),
    ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ({"attention_dropout": False}, "attention_dropout False"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"hidden_act": None}, "hidden_act None"),
    ({"head_dim": 32}, "config.json says (128, 64)"),
    ({"head_dim": 15}, "heads of 15 dimensions"),
    ({"head_dim": "16"}, "'head_dim' is '16'"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ({"rms_norm_eps": None}, "rms_norm_eps"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"num_key_value_heads": DROP}, "be a multiple of 32 kv heads"),
    ({"num_attention_heads": True}, "num_attention_heads"),
    ({"vocab_size": 128.0}, "vocab_size"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ({"per_layer_config": {"0": {"sliding_window": 4}}}, "per_layer_config"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures"),
    ({"model_type": ["qwen2"]}, "model_type"),
    ({"model_type": "llama"}, "'llama'; it may be 'qwen2' (Qwen2 and Qwen2.5) or 'qwen3' (dense"),
    ({"model_type": "qwen3"}, "architectures ['Qwen2ForCausalLM'] is not supported, only ['Qwen3"),
    ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "'qwen3_moe'; it"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(model_dir, changes, message):
    edit(model_dir / "config.json", changes)
    with pytest.raises(ConfigError) as caught:
        load_model(model_dir, "float32")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def made_qwen3(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    make_hf_model(path, "qwen3", tie=True)
    return path


@pytest.fixture
def qwen3_dir(made_qwen3, tmp_path):
    shutil.copytree(made_qwen3, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": DROP, "rope_theta": 5e5, "rope_scaling": None},
        {"attention_bias": False, "rms_norm_eps": 1e-2, "sliding_window": 4},
        {"attention_bias": DROP, "architectures": DROP, "head_dim": 32},
    ],
    ids=["base on top", "no bias, said", "as little as may be"],
)
def test_what_is_accepted_of_qwen3_is_computed_as_transformers_does(qwen3_dir, changes):
    edit(qwen3_dir / "config.json", changes)
    compare_with_transformers(qwen3_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias True is not supported, only False"),
        ({"attention_bias": None}, "attention_bias None"),
        ({"head_dim": None}, "'head_dim' is missing"),
        # transformers' own size where none is named.
        ({"head_dim": DROP}, "config.json says (512, 64)"),
        ({"use_sliding_window": True, "sliding_window": 4}, "use_sliding_window True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", **YARN}}, "rope scaling 'yarn'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "only ['Qwen3ForCausalLM']"),
        ({"model_type": "qwen2", "architectures": DROP}, "k_proj.bias is missing"),
    ],
)
def test_what_is_not_computed_of_qwen3_is_refused_by_name(qwen3_dir, changes, message):
    edit(qwen3_dir / "config.json", changes)
    with pytest.raises(ConfigError) as caught:
        load_model(qwen3_dir, "float32")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_size_of_a_head_is_transformers_own_where_none_is_named(qwen3_dir):
    edit(qwen3_dir / "config.json", {"head_dim": DROP})
    theirs = AutoConfig.from_pretrained(qwen3_dir).head_dim
    assert read_qwen_config(qwen3_dir, "float32").head_dim == theirs == 128


@pytest.mark.parametrize("name", PRESETS)
def test_the_published_shapes_are_transformers_of_the_same_fields(name):
    """Read back from either, and as many parameters, counted without making any."""
    preset, fields = PRESETS[name], config_fields(PRESETS[name])
    theirs = AutoConfig.for_model(**fields)
    for raw in (fields, theirs.to_dict()):
        assert qwen_config(raw, preset.dtype, name) == preset
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert sum(p.numel() for p in model.parameters()) == preset.num_parameters


def test_as_many_kv_heads_as_queries_where_the_key_is_empty(model_dir):
    edit(model_dir / "config.json", {"num_key_value_heads": None})
    assert AutoConfig.from_pretrained(model_dir).num_key_value_heads == 4
    assert read_qwen_config(model_dir, "float32").num_kv_heads == 4


@pytest.mark.parametrize("value", [2, [2], [2, 3], [], None, DROP])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ends_are_read_as_transformers_reads_them(model_dir, file, value):
    (model_dir / "generation_config.json").unlink()
    edit(model_dir / file, {"eos_token_id": value})
    if file == "config.json":
        theirs = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model_dir))
    else:
        edit(model_dir / "config.json", {"eos_token_id": None})
        theirs = GenerationConfig.from_pretrained(model_dir)
    want = theirs.eos_token_id
    want = want if isinstance(want, list) else [] if want is None else [want]
    found = [one for ids in read_eos_token_ids(model_dir).values() for one in ids]
    assert found == want


@pytest.mark.parametrize("value", [[2, None], "2", [[2]], {"a": 2}, True, [True], 2.0, [2.5]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ends_that_are_no_token_ids_are_one_line(model_dir, file, value):
    edit(model_dir / file, {"eos_token_id": value})
    with pytest.raises(ConfigError) as caught:
        read_eos_token_ids(model_dir)
    assert f"{file}: eos_token_id is" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}, None),
        ({"num_beams": 1, "guidance_scale": 1.0, "min_length": 0, "suppress_tokens": []}, None),
        ({"suppress_tokens": [3]}, "suppress_tokens"),
        ({"begin_suppress_tokens": [3]}, "begin_suppress_tokens"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"num_beams": 4}, "num_beams"),
        ({"min_new_tokens": 5}, "min_new_tokens"),
        ({"stop_strings": ["x"]}, "give rollout.stop_strings"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
    ],
)
def test_what_generation_config_would_force_is_refused_by_name(model_dir, changes, refused):
    edit(model_dir / "generation_config.json", changes)
    if refused is None:
        read_eos_token_ids(model_dir)
        return
    with pytest.raises(ConfigError, match=refused):
        read_eos_token_ids(model_dir)


def two_sets(path):
    index = {"weight_map": dict.fromkeys(load_file(path / "model.safetensors"), "a.safetensors")}
    shutil.copyfile(path / "model.safetensors", path / "a.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def left_over_shard(path):
    shutil.copyfile(path / "model.safetensors", path / "model-00001-of-00002.safetensors")


def tensor_off_the_index(path):
    two_sets(path)
    (path / "model.safetensors").unlink()
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.norm.weight")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(path / "a.safetensors", path / "b.safetensors")
    index["weight_map"]["model.norm.weight"] = "b.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter_beside(path):
    (path / "adapter_config.json").write_text("{}")


def another_head(path):
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (two_sets, "holds two sets of weights: model.safetensors"),
        (left_over_shard, "holds two sets of weights: model-00001-of-00002.safetensors"),
        (tensor_off_the_index, "does not say so"),
        (adapter_beside, "adapter_config.json"),
        (another_head, "lm_head.weight is not model.embed_tokens.weight"),
    ],
)
def test_two_sources_that_may_differ_are_refused(model_dir, damage, message):
    damage(model_dir)
    with pytest.raises(ConfigError) as caught:
        load_model(model_dir, "float32")
    assert message in str(caught.value)
