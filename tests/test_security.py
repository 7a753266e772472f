"""SECURITY.md, promise by promise: directories full of traps, and none of them springs."""

import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgrpo.config import ConfigError
from jaxgrpo.config_files import load_config
from jaxgrpo.model import safe_files
from jaxgrpo.model.peft_files import LoraModule, PeftAdapter, read_peft, write_peft
from jaxgrpo.model.weights import _HUB_FILES, EMBEDDED_DIR, load_model
from jaxgrpo.run import main
from tests.test_layout import ROOT

PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl")


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def sprung(tmp_path):
    """The file that any trap makes when it springs."""
    return tmp_path / "sprung"


@pytest.fixture
def model(tmp_path, sprung):
    """A copy of the embedded model with a trap of every kind in it."""
    path = tmp_path / "model"
    shutil.copytree(EMBEDDED_DIR, path)
    code = f"open({str(sprung)!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil", "modeling_qwen2", "tokenizer", "__init__", "sitecustomize", "conftest"):
        (path / f"{name}.py").write_text(code)
    for name in PICKLES:
        (path / name).write_bytes(pickle.dumps(Trap(sprung)))
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    change(path / "config.json", auto_map=auto)
    change(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    return path


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(capsys, words, message):
    """The command ends with one line that says so."""
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and message in line, line


def make_adapter(path, **changes):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 128), (128, 2)))
    write_peft(path, PeftAdapter("m", {"model.layers.0.self_attn.o_proj": LoraModule(a, b, 1.0)}))
    change(path / "adapter_config.json", **changes)
    return path


def test_1_and_2_no_pickle_is_opened_and_no_code_runs(model, sprung):
    """In a process of its own, which reports every file of the directory that it opens."""
    code = (
        "import sys\nfrom jaxgrpo.run import main\nseen = set()\n"
        "def hook(event, args):\n"
        "    if event == 'open' and isinstance(args[0], str): seen.add(args[0])\n"
        "    if event == 'pickle.find_class': seen.add('UNPICKLED ' + '.'.join(args))\n"
        "sys.addaudithook(hook)\n"
        f"code = main(['check', 'model.path={model}'])\n"
        f"opened = sorted(p for p in seen if p.startswith({str(model)!r}) or 'UNPICKLED' in p)\n"
        "print('\\n'.join(['OPENED', *opened]))\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    opened = done.stdout.partition("OPENED\n")[2].split("\n")
    assert any(name.endswith("config.json") for name in opened), done.stderr
    assert [n for n in opened if n.endswith((".py", ".pyc")) or n.endswith(PICKLES)] == []
    assert not any("UNPICKLED" in name for name in opened)
    assert not sprung.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_1_a_pickle_alone_is_refused_by_name(model, sprung, capsys, name):
    for other in (set(PICKLES) - {name}) | {"model.safetensors"}:
        (model / other).unlink()
    refused(capsys, ["check", f"model.path={model}"], f"{name} may be a pickle")
    assert not sprung.exists()


def test_1_an_adapter_as_a_pickle_is_refused(tmp_path, sprung):
    path = make_adapter(tmp_path / "adapter")
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ConfigError, match=r"adapter_model\.bin may be a pickle"):
        read_peft(path)
    assert not sprung.exists()


def test_1_a_pickle_under_the_name_of_safetensors_is_refused(model, sprung, capsys):
    (model / "model.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    refused(capsys, ["check", f"model.path={model}"], "not a whole safetensors file")
    assert not sprung.exists()


def test_2_the_hub_is_asked_for_no_code_and_no_pickle():
    import fnmatch

    for name in (*PICKLES, "modeling.py", "a/b.py", "run.sh", "lib.so", "x.zip"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in _HUB_FILES), name


def test_2_nothing_in_the_package_trusts_remote_code_or_unpickles():
    found = []
    banned = r"trust_remote_code\s*=\s*True|\bpickle\.loads?|allow_pickle\s*=\s*True|torch\.load"
    for path in (ROOT / "jaxgrpo").rglob("*.py"):
        found += re.findall(banned, path.read_text(encoding="utf-8"))
        found += re.findall(r"(?<![\w.])(?:eval|exec)\(", path.read_text(encoding="utf-8"))
    assert found == []


def test_2_a_chat_template_runs_in_a_sandbox(model, sprung, capsys):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__ }}"
    (model / "chat_template.jinja").write_text(template)
    refused(capsys, ["check", f"model.path={model}"], "'__class__' of 'str' object is unsafe")


OUTSIDE = [
    "../secret.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    ".",
    "",
    "a\0b",
    7,
    None,
]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_3_a_shard_index_stays_in_its_directory(model, tmp_path, capsys, shard):
    (model / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capsys, ["check", f"model.path={model}"], "index")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "shard.safetensors"]
)
def test_3_links_out_of_a_directory_are_refused(model, tmp_path, capsys, name):
    if name == "shard.safetensors":
        names = load_file(model / "model.safetensors")
        (model / "model.safetensors").rename(model / name)
        index = {"weight_map": dict.fromkeys(names, name)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / name).rename(tmp_path / "outside")
    (model / name).symlink_to(tmp_path / "outside")
    refused(capsys, ["check", f"model.path={model}"], "link out of its directory")


def test_3_links_of_the_hubs_cache_are_followed(model, tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(EMBEDDED_DIR, snapshot)
    (snapshot / "model.safetensors").rename(cache / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    load_model(snapshot, "float32")


@pytest.mark.parametrize("size", [2**24 + 1, 2**40, 2**63, 2**64 - 1])
def test_4_a_header_beyond_measure_is_refused_at_once(model, capsys, size):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", size) + b"{" * 100)
    start = time.thread_time()  # other processes and threads may have the processor
    refused(capsys, ["check", f"model.path={model}"], "header of")
    assert time.thread_time() - start < 5


def test_4_a_json_file_beyond_measure_is_refused(model, capsys):
    with (model / "config.json").open("r+b") as file:
        file.truncate(safe_files.MAX_JSON_BYTES + 1)  # sparse: it takes no room
    refused(capsys, ["check", f"model.path={model}"], "is larger than")


def test_4_tensors_that_overlap_or_lie_are_refused(model, capsys):
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model.safetensors")
    data = (model / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + data[8 + size :]
    )
    refused(capsys, ["check", f"model.path={model}"], "not a whole safetensors file")


@pytest.mark.parametrize(
    "text",
    [
        "steps: !!python/object/apply:os.system ['touch SPRUNG']",
        "steps: !!python/name:os.system",
        "steps: !!python/module:antigravity",
        "!!python/object/new:os.system ['touch SPRUNG']",
        "steps: !custom 3",
        "run_dir: " + "[" * 10_000,
        "a: &a [x]\n" + "".join(f"b{i}: &b{i} [{'*a, ' * 9}*a]\n" for i in range(20_000)),
        "x" * (2**20 + 1),
    ],
    ids=["apply", "name", "module", "new", "custom", "deep", "many", "large"],
)
def test_5_yaml_makes_no_objects_and_does_not_grow(tmp_path, sprung, capsys, text):
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("SPRUNG", str(sprung)))
    refused(capsys, ["check", str(path)], "")
    if len(text) < 1000:  # and as a setting of the command line
        with pytest.raises(ConfigError):
            load_config([], [text.replace(": ", "=", 1).replace("SPRUNG", str(sprung))])
    assert not sprung.exists()


def test_6_plans_and_patterns_are_data(tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text('{"ranks": "__import__(\'os\')"}')
    refused(capsys, ["plan", f"lora.plan={plan}"], "")
    adapter = make_adapter(tmp_path / "adapter", rank_pattern={"(a+)+b": 2})
    refused(capsys, ["check", f"lora.adapter={adapter}"], "too complex")


def test_7_a_data_set_with_a_script_runs_no_script(tmp_path, sprung, capsys):
    data = tmp_path / "sums"
    data.mkdir()
    for name in ("sums.py", "dataset.py", "__init__.py"):
        (data / name).write_text(f"open({str(sprung)!r}, 'w')")
    refused(capsys, ["check", f"data.path={data}"], "holds no train.jsonl")
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n')
    assert main(["check", f"data.path={data}", "eval.batch_prompts=8"]) == 0
    assert not sprung.exists()


def test_8_no_reward_evaluates_a_completion(sprung):
    from jaxgrpo.tasks.rewards import REWARDS, load_reward

    call = f"__import__('os').system('touch {sprung}')"
    texts = [rf"\boxed{{{call}}}", f"#### {call}", f"<answer>{call}</answer>", f"answer is {call}"]
    texts += [rf"\boxed{{\text{{{call}}}}}", rf"\boxed{{{sprung}}}"]
    context = {"completion_lengths": [1] * len(texts), "max_completion_tokens": 9}
    for name in REWARDS:
        if name == "math_boxed":
            pytest.importorskip("math_verify")
        load_reward(name)(texts, ["5"] * len(texts), **context)
    assert not sprung.exists()
