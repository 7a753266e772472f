"""Weights and adapters from anywhere: read as what they are, or refused in one line."""

import json
import re
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from jaxgrpo.config import MODULES, ConfigError
from jaxgrpo.model.adapters import stack_adapter
from jaxgrpo.model.peft_files import LoraModule, PeftAdapter, read_peft, write_peft
from jaxgrpo.model.weights import EMBEDDED_DIR, check_tensor_names, hf_module, load_model
from tests.fuzz.amounts import amount, fuzz
from tests.fuzz.test_config_fuzz import SCALARS, VALUES, one_line

NAMES = [f"model.layers.{i}.{hf_module(m)}" for i in (0, 1, 7, 10) for m in MODULES]


ATTENTION = [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1, 7) for m in "qo"]


@pytest.fixture(scope="module")
def model():
    """Shapes of the embedded model."""
    from jaxgrpo.model.weights import read_qwen_config

    return read_qwen_config(EMBEDDED_DIR, "float32")


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "F8_E4M3", "BOOL", "X", ""])
        | SCALARS,
        "shape": st.lists(
            st.integers(-2, 70) | st.sampled_from([2**31, 2**63, 10**30]), max_size=4
        ),
        "data_offsets": st.lists(st.integers(-9, 300) | st.integers(), max_size=3),
    }
)
HEADERS = st.dictionaries(
    st.sampled_from(
        ["__metadata__", "model.norm.weight", *(f"{name}.weight" for name in NAMES)]
        + [f"base_model.model.{name}.lora_{s}.weight" for name in NAMES for s in "AB"]
    )
    | st.text(max_size=12),
    ENTRIES | VALUES,
    max_size=5,
).map(lambda raw: json.dumps(raw, default=str).encode("utf-8", "surrogatepass"))


@st.composite
def safetensors_files(draw):
    """Headers of every kind, with lengths that are true or not."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.binary(max_size=64))
    header = draw(HEADERS) if kind < 3 else b'{"a": ' + b"[" * draw(st.integers(0, 4000))
    true = len(header)
    length = draw(st.sampled_from([true, true, true, 0, true + 1, 2**24 + 1, 2**40, 2**64 - 1]))
    return struct.pack("<Q", length) + header + draw(st.binary(max_size=300))


def test_safetensors_headers(tmp_path, model):
    directory = tmp_path / "model"
    shutil.copytree(EMBEDDED_DIR, directory)
    adapter = tmp_path / "adapter"
    some = LoraModule(np.ones((1, 128), np.float32), np.ones((128, 1), np.float32), 1.0)
    write_peft(adapter, PeftAdapter("m", {NAMES[0]: some}))

    @given(safetensors_files())
    def run(data):
        (directory / "model.safetensors").write_bytes(data)
        (adapter / "adapter_model.safetensors").write_bytes(data)
        for read in (
            lambda: check_tensor_names(directory, model),
            lambda: load_model(directory, "float32"),
            lambda: read_peft(adapter),
        ):
            with pytest.raises(ConfigError) as caught:
                read()
            one_line(caught.value)

    fuzz(run, 2000)


def test_shard_indexes_and_model_settings(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(EMBEDDED_DIR, directory)
    settings = json.loads((directory / "config.json").read_text())
    shards = st.sampled_from(["model.safetensors", "../x", "a/b", "", ".", "x.bin", "\0"]) | SCALARS
    index = st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.text(max_size=9), shards, max_size=3) | VALUES}
    )
    changes = st.dictionaries(st.sampled_from(sorted(settings)), VALUES, max_size=3)

    @given(index | VALUES, changes)
    def run(raw, changed):
        (directory / "model.safetensors.index.json").write_text(json.dumps(raw, default=str))
        (directory / "config.json").write_text(json.dumps(settings | changed, default=str))
        with pytest.raises(ConfigError) as caught:
            load_model(directory, "float32")
        one_line(caught.value)

    fuzz(run, 1000)


DAMAGES = st.sampled_from(
    ["rank", "shape", "dtype", "side", "extra", "infinite", "pattern", "kind", "key", "value"]
)


@st.composite
def adapters(draw):
    """The files of an adapter that PEFT could have made, with up to two things wrong."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    ranks = draw(st.dictionaries(st.sampled_from(ATTENTION), st.integers(1, 4), max_size=4))
    damages = draw(st.lists(DAMAGES, max_size=2))
    tensors = {}
    for name, rank in ranks.items():
        for side, shape in (("A", (rank, 128)), ("B", (128, rank))):
            if "shape" in damages:
                shape = draw(st.sampled_from([(128, 128), (rank,), (0, 128), (1, 1, 1), (2, 64)]))
            side = draw(st.sampled_from("ABE")) if "side" in damages else side
            dtype = draw(st.sampled_from([np.float16, np.float64, np.int8, bool]))
            array = 9 * rng.normal(size=shape)
            if "infinite" in damages:
                array = array * draw(st.sampled_from([np.inf, np.nan, 1e300]))
            with np.errstate(all="ignore"):
                array = array.astype(dtype if "dtype" in damages else np.float32)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = array
    if "extra" in damages:
        tensors[draw(st.text(max_size=9))] = np.ones((1, 1), np.float32)
    keys = st.sampled_from([".*", "(a+)+$", "o_proj", "[", "(" * 200, "a{1,99999999}", "(?i)x"])
    patterns = {re.escape(name): rank for name, rank in ranks.items()}
    if "pattern" in damages:
        odd = st.dictionaries(keys | st.text(max_size=8), st.integers(-1, 5) | SCALARS, max_size=3)
        patterns = draw(odd | VALUES)
    config = {
        "peft_type": "LORA",
        "r": draw(st.integers(0, 4) | SCALARS) if "rank" in damages else 2,
        "lora_alpha": draw(st.integers(1, 99)),
        "rank_pattern": patterns,
        "alpha_pattern": draw(st.sampled_from([None, {"o_proj": 3}, {".*q_proj": 0.5}])),
        "use_rslora": draw(st.booleans()),
        "bias": "none",
        "init_lora_weights": draw(st.sampled_from([True, "gaussian", "eva"])),
    }
    if "kind" in damages:
        config["peft_type"] = draw(st.sampled_from(["ADALORA", None, "IA3"]) | SCALARS)
    if "key" in damages:
        config[draw(st.sampled_from(["use_dora", "modules_to_save", "bias", "new"]))] = draw(VALUES)
    if "value" in damages:
        config[draw(st.sampled_from(sorted(config)))] = draw(VALUES)
    return json.dumps(config, default=str), save(tensors)


def test_adapters(tmp_path, model):
    path = tmp_path / "adapter"
    path.mkdir()
    read = []

    @given(adapters())
    def run(files):
        config, tensors = files
        (path / "adapter_config.json").write_text(config)
        (path / "adapter_model.safetensors").write_bytes(tensors)
        try:
            adapter = read_peft(path)
            stack_adapter(adapter, model, "adapter")
        except ConfigError as error:
            one_line(error)
            return
        # What was accepted is what it says, and comes back from a file of ours.
        read.append(adapter)
        write_peft(tmp_path / "again", adapter)
        again = read_peft(tmp_path / "again")
        assert again.modules.keys() == adapter.modules.keys()
        for name, module in adapter.modules.items():
            size = np.abs(module.delta()).max() + 1e-6
            np.testing.assert_allclose(
                again.modules[name].delta(), module.delta(), rtol=0, atol=1e-5 * size
            )

    fuzz(run, 1000)
    assert len(read) >= amount(1000) // 5
