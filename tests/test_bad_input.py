"""A user's mistake is one line on stderr, exit code 2, and nothing half-written."""

import json
import shutil

import numpy as np
import pytest

from jaxgrpo.model.peft_files import LoraModule, PeftAdapter, write_peft
from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.run import main


def _write(path, text):
    path.write_text(text)
    return str(path)


def _model(tmp_path, damage):
    """A copy of the embedded model, damaged."""
    target = tmp_path / "model"
    shutil.copytree(EMBEDDED_DIR, target)
    damage(target)
    return f"model.path={target}"


def _edit_json(path, **changes):
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps(raw))


def _plan(tmp_path, ranks):
    return "lora.plan=" + _write(tmp_path / "plan.json", json.dumps(ranks))


# What is wrong -> (arguments from tmp_path, what the line must say).
CASES = {
    "unknown key": (lambda t: ["grpo.grup_size=4"], "did you mean 'group_size'"),
    "unknown section": (lambda t: ["gpro.group_size=4"], "did you mean 'grpo'"),
    "key without its section": (lambda t: ["group_size=4"], "did you mean 'grpo.group_size'"),
    "unknown key in a file": (
        lambda t: [_write(t / "c.yaml", "optim: {learning_rat: 1}")],
        "did you mean 'learning_rate'",
    ),
    "wrong type, int": (lambda t: ["steps=many"], "steps"),
    "wrong type, float": (lambda t: ["optim.learning_rate=fast"], "optim.learning_rate"),
    "wrong type, fraction": (lambda t: ["grpo.group_size=2.5"], "grpo.group_size"),
    "wrong type, bool": (lambda t: ["weight_grad_norms=3"], "weight_grad_norms"),
    "boolean for a number": (lambda t: ["seed=true"], "seed must be a number"),
    "section is not a mapping": (lambda t: ["model=embedded"], "model must be a mapping"),
    "rewards is not a mapping": (lambda t: ["rewards=gsm8k_answer"], "rewards"),
    "empty value": (lambda t: ["steps="], "steps is empty"),
    "unknown loss": (lambda t: ["grpo.loss=ppo"], "grpo, bnpo, dr_grpo, dapo, cispo, gspo"),
    "unknown scale rule": (lambda t: ["lora.scale_rule=sqrt"], "rslora"),
    "unknown correction": (lambda t: ["grpo.importance_correction=tis"], "token_truncate"),
    "group of one": (lambda t: ["grpo.group_size=1"], "at least 2"),
    "no steps": (lambda t: ["steps=0"], "steps must be at least 1"),
    "negative seed": (lambda t: ["seed=-1"], "seed"),
    "greedy training": (lambda t: ["rollout.temperature=0"], "temperature must be > 0"),
    "negative temperature": (lambda t: ["rollout.temperature=-1"], "temperature"),
    "top_p of zero": (lambda t: ["rollout.top_p=0"], "top_p"),
    "min_p of one": (lambda t: ["rollout.min_p=1"], "min_p"),
    "empty stop string": (lambda t: ["rollout.stop_strings=['']"], "empty string"),
    "negative learning rate": (lambda t: ["optim.learning_rate=-1"], "learning_rate"),
    "learning rate not finite": (lambda t: ["optim.learning_rate=.nan"], "learning_rate"),
    "negative kl_coef": (lambda t: ["grpo.kl_coef=-0.1"], "kl_coef"),
    "several greedy samples": (lambda t: ["eval.samples=4"], "eval.temperature > 0"),
    "more micro-batches than rows": (
        lambda t: ["grpo.micro_batches=100000"],
        "is more than the",
    ),
    "batch not divisible by the mesh": (
        lambda t: ["grpo.prompts_per_step=12", "mesh.data=8"],
        "does not divide over the mesh",
    ),
    "mesh of the wrong size": (lambda t: ["mesh.data=5"], "devices"),
    "two open mesh axes": (lambda t: ["mesh.data=-1", "mesh.fsdp=-1"], "at most one"),
    "model axis that does not divide": (
        lambda t: ["mesh.model=8", "mesh.data=1"],
        "does not divide the model's query heads",
    ),
    "unknown target module": (
        lambda t: ["lora.target_modules=[q_prj]"],
        "did you mean 'q_proj'",
    ),
    "no target module": (lambda t: ["lora.target_modules=[]"], "empty"),
    "module named twice": (lambda t: ["lora.target_modules=[q_proj,q_proj]"], "twice"),
    "plan over budget": (lambda t: ["lora.rank=8", "lora.rank_budget=10"], "more than"),
    "plan above max_rank": (lambda t: ["lora.rank=8", "lora.max_rank=4"], "max_rank"),
    "plan of a module that does not exist": (
        lambda t: [_plan(t, {"ranks": {"q_porj": [4] * 8}})],
        "did you mean 'q_proj'",
    ),
    "plan with the wrong number of layers": (
        lambda t: [_plan(t, {"ranks": [4, 4, 4]})],
        "the model has",
    ),
    "plan with fractions": (lambda t: [_plan(t, {"ranks": [4.5] * 8})], "whole numbers"),
    "plan of zeros": (lambda t: [_plan(t, {"ranks": {"q_proj": [0] * 64}})], "layers"),
    "plan file missing": (lambda t: ["lora.plan=nowhere.json"], "does not exist"),
    "plan file not JSON": (lambda t: ["lora.plan=" + _write(t / "p.json", "{")], "JSON"),
    "config file missing": (lambda t: ["train", str(t / "nowhere.yaml")], "does not exist"),
    "config file not YAML": (lambda t: [_write(t / "c.yaml", "a: [1")], "is not YAML"),
    "config file not a mapping": (lambda t: [_write(t / "c.yaml", "- 1")], "must hold a mapping"),
    "unknown command": (lambda t: ["trian"], "did you mean train"),
    "unknown option": (lambda t: ["--steps"], "unknown option"),
    "model path missing": (lambda t: [f"model.path={t}/nowhere"], "is not a directory"),
    "model directory empty": (lambda t: [f"model.path={t}"], "config.json does not exist"),
    "model of another architecture": (
        lambda t: [_model(t, lambda m: _edit_json(m / "config.json", model_type="llama"))],
        "it may be 'qwen2'",
    ),
    "truncated safetensors": (
        lambda t: [
            _model(
                t,
                lambda m: (m / "model.safetensors").write_bytes(
                    (m / "model.safetensors").read_bytes()[:-100]
                ),
            )
        ],
        "not a whole safetensors file",
    ),
    "weights missing": (
        lambda t: [_model(t, lambda m: (m / "model.safetensors").unlink())],
        "holds neither",
    ),
    "config.json not JSON": (
        lambda t: [_model(t, lambda m: (m / "config.json").write_text("{"))],
        "not readable JSON",
    ),
    "more layers than the file has": (
        lambda t: [
            _model(
                t,
                lambda m: _edit_json(m / "config.json", num_hidden_layers=99, layer_types=None),
            )
        ],
        "is missing",
    ),
    "more layers than layer_types": (
        lambda t: [_model(t, lambda m: _edit_json(m / "config.json", num_hidden_layers=99))],
        "layer_types does not name 99 layers",
    ),
    "tokenizer missing": (
        lambda t: [_model(t, lambda m: (m / "tokenizer.json").unlink())],
        "tokenizer",
    ),
    "revision of a directory": (
        lambda t: [_model(t, lambda m: None), "model.revision=main"],
        "needs a hub id",
    ),
    "data path missing": (lambda t: [f"data.path={t}/nowhere.jsonl"], "nowhere.jsonl"),
    "empty data set": (lambda t: ["data.path=" + _write(t / "d.jsonl", "")], "empty"),
    "column missing": (
        lambda t: ["data.path=" + _write(t / "d.jsonl", '{"questoin": "a", "answer": "#### 1"}\n')],
        "questoin",
    ),
    "broken JSON line": (
        lambda t: [
            "data.path=" + _write(t / "d.jsonl", '{"question": "a", "answer": "#### 1"}\n{"que\n')
        ],
        "d.jsonl",
    ),
    "every prompt too long": (lambda t: ["data.max_prompt_tokens=2"], "max_prompt_tokens"),
    "unknown reward": (lambda t: ["rewards={gsm8k_anser: 1.0}"], "did you mean 'gsm8k_answer'"),
    "reward module missing": (lambda t: ["rewards={no.such:thing: 1.0}"], "no module"),
    "reward function missing": (lambda t: ["rewards={math:sqr: 1.0}"], "did you mean"),
    "reward weight not finite": (lambda t: ["rewards={gsm8k_answer: .inf}"], "finite"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(name, tmp_path, capsys, monkeypatch):
    make_arguments, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    code = main([*make_arguments(tmp_path), f"run_dir={run_dir}"])
    captured = capsys.readouterr()
    assert code == 2, captured
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert message in lines[0], lines[0]
    assert "Traceback" not in captured.err + captured.out
    assert not run_dir.exists()


def test_there_are_at_least_forty_cases():
    assert len(CASES) >= 40


def _adapter(tmp_path, damage=lambda path: None, **changes):
    """A small PEFT adapter of the embedded model, damaged."""
    path = tmp_path / "adapter"
    rng = np.random.default_rng(0)
    shapes = (2, 128), (128, 2)
    matrices = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    module = LoraModule(*matrices, scale=1.0)
    write_peft(path, PeftAdapter("embedded", {"model.layers.0.self_attn.o_proj": module}))
    _edit_json(path / "adapter_config.json", **changes)
    damage(path)
    return str(path)


def _pickled(path):
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def _linked(path):
    outside = path.parent / "outside.safetensors"
    (path / "adapter_model.safetensors").rename(outside)
    (path / "adapter_model.safetensors").symlink_to(outside)


def _full(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    return f"out={tmp_path}/full"


def _start(adapter, *settings):
    return ["train", f"lora.adapter={adapter}", *settings]


COMMAND_CASES = {
    "export of nothing": (lambda t: ["export"], "needs a DIRECTORY"),
    "export to nowhere": (lambda t: ["export", str(t)], "needs out=DIRECTORY"),
    "export of what is no run": (
        lambda t: ["export", str(t), "out=o"],
        "neither adapter_config.json nor a whole checkpoint",
    ),
    "export over something": (
        lambda t: ["export", _adapter(t), _full(t)],
        "is there already",
    ),
    "export in an unknown form": (
        lambda t: ["export", str(t), "out=o", "form=mergd"],
        "merged",
    ),
    "export of two": (lambda t: ["export", "a", "b", "out=o"], "takes one source"),
    "merge into another model": (
        lambda t: [
            "export",
            _adapter(t),
            "out=o",
            "form=merged",
            "model="
            + _model(t, lambda m: _edit_json(m / "config.json", hidden_size=64)).split("=")[1],
        ],
        "the adapter's",
    ),
    "compress by nothing": (lambda t: ["compress", _adapter(t), "out=o"], "one of energy="),
    "compress by both": (
        lambda t: ["compress", _adapter(t), "out=o", "energy=1", "rank_budget=1"],
        "one of energy=",
    ),
    "compress to too much": (
        lambda t: ["compress", _adapter(t), "out=o", "energy=2"],
        "(0, 1]",
    ),
    "compress with a typo": (
        lambda t: ["compress", _adapter(t), "out=o", "enrgy=0.9"],
        "did you mean 'energy'",
    ),
    "adapter of another kind": (
        lambda t: _start(_adapter(t, peft_type="ADALORA")),
        "peft_type is 'ADALORA'",
    ),
    "DoRA": (lambda t: _start(_adapter(t, use_dora=True)), "DoRA"),
    "biases": (lambda t: _start(_adapter(t, bias="lora_only")), "bias="),
    "saved modules": (
        lambda t: _start(_adapter(t, modules_to_save=["lm_head"])),
        "modules_to_save",
    ),
    "PiSSA": (lambda t: _start(_adapter(t, init_lora_weights="pissa_niter_4")), "base weights"),
    "adapter as a pickle": (lambda t: _start(_adapter(t, _pickled)), "never read"),
    "adapter as a link": (lambda t: _start(_adapter(t, _linked)), "link out of its directory"),
    "adapter of rank 3": (lambda t: _start(_adapter(t, rank_pattern={}, r=3)), "rank is 3"),
    "adapter and plan": (lambda t: _start("a", "lora.plan=p.json"), "give one of them"),
    "adapter of a module that is not trained": (
        lambda t: _start(_adapter(t), "lora.target_modules=[q_proj]"),
        "lora.target_modules",
    ),
    "pattern that takes for ever": (
        lambda t: _start(_adapter(t, rank_pattern={"(a+)+b": 2})),
        "too complex",
    ),
    "plan edit beyond the model": (lambda t: ["plan", "layers.3-9=4"], "layers 0..7"),
    "plan edit without a rank": (lambda t: ["plan", "q_proj=many"], "rank in 0.."),
    "plan of a projection that does not exist": (lambda t: ["plan", "q_porj=4"], "unknown key"),
    "plan written as something": (lambda t: ["plan", "out=plan.txt"], "none of .json"),
    "plan of zeros": (lambda t: ["plan", "layers=0"], "every rank is 0"),
    "dry run of what has none": (lambda t: ["plan", "--dry-run"], "no --dry-run"),
    "completion of another shell": (lambda t: ["completion", "fish"], "bash and zsh"),
    "chat about nothing": (lambda t: ["chat", "prompt="], "prompt is empty"),
    "a directory that is no run": (lambda t: ["eval", str(t)], "without config.yaml"),
    "no time for rewards": (lambda t: ["reward_timeout_s=-1"], "reward_timeout_s"),
    "weights as pickles": (
        lambda t: [
            _model(
                t,
                lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
            )
        ],
        "never read",
    ),
    "weights as a link": (
        lambda t: [
            _model(
                t,
                lambda m: (
                    (m / "model.safetensors").rename(t / "outside"),
                    (m / "model.safetensors").symlink_to(t / "outside"),
                ),
            )
        ],
        "link out of its directory",
    ),
    "shard outside": (
        lambda t: [
            _model(
                t,
                lambda m: (m / "model.safetensors.index.json").write_text(
                    json.dumps({"weight_map": {"lm_head.weight": "../x.safetensors"}})
                ),
            )
        ],
        "outside its directory",
    ),
    "YAML that makes objects": (
        lambda t: [_write(t / "c.yaml", "steps: !!python/object/apply:os.getcwd []")],
        "is not YAML",
    ),
    "YAML that grows": (
        lambda t: [
            _write(
                t / "c.yaml",
                "a0: &a0 [x, x]\n"
                + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
            )
        ],
        "too large",
    ),
    "YAML that is deep": (lambda t: [_write(t / "c.yaml", "a: " + "[" * 5000)], "nested too deep"),
    "a setting that is deep": (lambda t: ["steps=" + "[" * 5000], "nested too deep"),
}


@pytest.mark.parametrize("name", COMMAND_CASES)
def test_bad_input_of_other_commands(name, tmp_path, capsys, monkeypatch):
    make_arguments, message = COMMAND_CASES[name]
    monkeypatch.chdir(tmp_path)
    arguments = make_arguments(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert message in lines[0], lines[0]
    assert len(lines[0]) < 700
    assert sorted(tmp_path.rglob("*")) == before
