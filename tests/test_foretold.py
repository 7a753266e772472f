"""What is told by formula (`--dry-run`) and from compiled programs (`check --devices`) agrees."""

import json
import re

import pytest

from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.run import main

SIZES = {
    "embedded": ({}, []),
    "wide": (
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4},
        ["grpo.prompts_per_step=8", "grpo.micro_batches=4", "lora.rank=4"],
    ),
    "qwen3": (
        {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "head_dim": 64,
            "num_hidden_layers": 4,
        },
        ["grpo.prompts_per_step=8", "grpo.micro_batches=4", "lora.rank=4"],
    ),
    "large head, long rows": (
        {"vocab_size": 12800, "num_hidden_layers": 6, "num_attention_heads": 8},
        ["grpo.prompts_per_step=4", "grpo.micro_batches=4", "rollout.max_completion_tokens=200"],
    ),
}


@pytest.fixture
def model_of(tmp_path):
    """A directory that says what a model's shapes are; neither command reads weights."""

    def write(changes):
        config = json.loads((EMBEDDED_DIR / "config.json").read_text()) | changes
        layers = config["num_hidden_layers"]
        config |= {"layer_types": ["full_attention"] * layers, "max_window_layers": layers}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return f"model.path={tmp_path}"

    return write


def told(capsys, *words):
    assert main(list(words)) == 0
    return " ".join(capsys.readouterr().out.split())


def number(pattern, text):
    found = re.search(pattern, text)
    assert found is not None, (pattern, text)
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("remat", ["auto", "products"])
@pytest.mark.parametrize("name", list(SIZES))
def test_formula_and_compiled_programs_agree(capsys, model_of, name, remat):
    """Memory of every program within 10 %, operations within 5 %, and the same `model.remat`."""
    changes, settings = SIZES[name]
    words = [model_of(changes), "mesh.data=1", *settings, f"model.remat={remat}"]
    dry, checked = (
        told(capsys, *words, "--dry-run"),
        told(capsys, "check", "--devices", "1", *words),
    )
    policies = [re.search(r"remat (\w+)", text.split("mesh.data")[-1]) for text in (dry, checked)]
    assert policies[0] and policies[1] and policies[0][1] == policies[1][1]
    phases = []
    for program in ("layout", "rollout", "train"):
        compiled = number(rf"all while {program} runs ([0-9.,]+)", checked)
        foretold = number(rf"all while {program} runs ([0-9.,]+)", dry)
        assert foretold == pytest.approx(compiled, rel=0.1), program
        phases.append(compiled)
    assert number(r"peak ([0-9.,]+)", dry) == pytest.approx(max(phases), rel=0.1)
    for program in ("rollout", "train"):
        compiled = number(rf"{program} ([0-9.]+) [0-9.]+ [0-9.]+", checked)
        assert number(rf"{program} ([0-9.e+-]+)", dry.split("TFLOP")[-1]) == pytest.approx(
            compiled, rel=0.05
        )


@pytest.mark.parametrize("devices", [1, 2])
def test_of_several_arms_too(capsys, devices):
    """Each of two devices samples and trains two of them, and has the states of all."""
    words = ["grpo.prompts_per_step=4", "grpo.group_size=4"]
    said = told(capsys, "check", "--devices", str(devices), "--arms", "4", *words)
    assert "4 arms of 448 ranks" in said
    memory, programs = said.split("per device and run")
    rows = [(memory, rf"all while {name} runs", 0.1) for name in ("layout", "rollout", "train")]
    for text, row, within in (*rows, (programs, "rollout", 0.01)):
        compiled, foretold = number(rf"{row} (\S+)", text), number(rf"{row} \S+ (\S+)", text)
        assert foretold == pytest.approx(compiled, rel=within), row
