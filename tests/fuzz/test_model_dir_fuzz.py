"""Model directories from anywhere: what their files say is honoured, or refused in one line."""

import json
import shutil
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrpo.config import ConfigError, DataConfig
from jaxgrpo.model.weights import (
    EMBEDDED_DIR,
    check_tensor_names,
    read_eos_token_ids,
    read_qwen_config,
)
from jaxgrpo.rollout.stop import end_token_ids, make_stop_rules
from jaxgrpo.session import check_vocabulary
from jaxgrpo.tasks.data import Problem, PromptSource
from jaxgrpo.tasks.texts import gold_completions, load_tokenizer
from tests.fuzz.amounts import fuzz
from tests.fuzz.test_config_fuzz import VALUES, one_line

IDS = st.integers(-2, 700) | st.sampled_from([2**31, 2**63, 10**30])
FIELDS = {
    "config.json": [
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "head_dim"),
        *("tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "layer_types"),
        *("use_sliding_window", "attention_dropout", "is_causal", "partial_rotary_factor"),
        *("quantization_config", "per_layer_config", "architectures", "eos_token_id"),
        "attention_bias",
    ],
    "generation_config.json": [
        *("eos_token_id", "pad_token_id", "temperature", "suppress_tokens", "num_beams"),
        *("stop_strings", "min_length", "forced_eos_token_id", "sequence_bias"),
    ],
    "tokenizer_config.json": [
        *("eos_token", "bos_token", "pad_token", "unk_token", "chat_template", "tokenizer_class"),
        *("additional_special_tokens", "added_tokens_decoder", "split_special_tokens"),
        *("clean_up_tokenization_spaces", "model_max_length", "add_prefix_space", "auto_map"),
        *("padding_side", "truncation_side", "add_bos_token", "extra_special_tokens"),
    ],
    "tokenizer.json": [
        *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"),
        *("post_processor", "decoder", "model"),
    ],
}
WORDS = st.sampled_from(
    [
        *("<|im_end|>", "<|endoftext|>", "</s>", "", "llama", "silu", "gelu", "yarn"),
        *("qwen2", "qwen3", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2Tokenizer"),
        *("full_attention", "sliding_attention", "x" * 300),
        *("{{ messages[0].content }}", "{% for m in messages %}{{ m.content }}<|im_end|>"),
        *("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "{{ 1/0 }}"),
    ]
)
ROPE = st.dictionaries(
    st.sampled_from(["type", "rope_type", "rope_theta", "factor", "full_attention"]),
    st.sampled_from(["default", "yarn", 1e4, 1e6, None, 0, {}, {"rope_theta": 1e4}]),
    max_size=3,
)
TOKENS = st.fixed_dictionaries(
    {"content": WORDS, "special": st.booleans()}, optional={"id": IDS, "lstrip": st.booleans()}
)
CONTENTS = VALUES | WORDS | IDS | st.lists(IDS | WORDS, max_size=3) | ROPE | TOKENS


@st.composite
def damages(draw):
    """File -> its fields that are other than they should be, or what it holds instead."""
    found = {}
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=2)):
        fields = st.dictionaries(st.sampled_from(FIELDS[name]), CONTENTS, min_size=1, max_size=2)
        whole = st.sampled_from(["", "{", "[]", "null", '"x"', "[" * 3000, "{}", '{"a": NaN}'])
        found[name] = draw(fields | fields | fields | whole)
    return found


@pytest.fixture
def model_dir(tmp_path):
    shutil.copytree(EMBEDDED_DIR, tmp_path / "model")
    return tmp_path / "model"


def open_directory(directory) -> None:
    """What every command does with a model directory before it loads the weights."""
    config = read_qwen_config(directory, "float32")
    check_tensor_names(directory, config)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config)
    ids = end_token_ids(tokenizer, read_eos_token_ids(directory), ())
    assert ids and all(0 <= one < len(tokenizer) for one in ids)
    make_stop_rules(tokenizer, ids, ("####",), config.vocab_size)
    prompts = PromptSource([Problem("1+1?<|im_end|>", "#### 2", 0)], tokenizer, DataConfig())
    assert prompts.sequential(0, 1, 1)[0].texts
    gold_completions(tokenizer, ["#### 2<|im_end|>"], 16)


def test_files_of_a_model_directory(model_dir):
    originals = {name: (EMBEDDED_DIR / name).read_text() for name in FIELDS}

    @given(damages())
    def run(damage):
        for name, text in originals.items():
            what = damage.get(name, {})
            if isinstance(what, dict):
                what = json.dumps(json.loads(text) | what, default=str)
            (model_dir / name).write_bytes(what.encode("utf-8", "surrogatepass"))
        try:
            open_directory(model_dir)
        except ConfigError as error:
            one_line(error)

    fuzz(run, 1000, deadline_s=20.0)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_of_a_wrong_kind_alone(model_dir, name):
    """Not drawn: each field, each kind of value."""
    text = (EMBEDDED_DIR / name).read_text()
    write = partial((model_dir / name).write_text)
    for field in FIELDS[name]:
        for value in (None, True, 3, -1.5, "x", [], [None], [[2]], {}, {"a": [1]}):
            write(json.dumps(json.loads(text) | {field: value}))
            try:
                open_directory(model_dir)
            except ConfigError as error:
                one_line(error)
