"""A study on another family than the embedded model's: plans, profile and norms are the same."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jaxgrpo.config import MODULES
from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.run import main
from tests.hf_models import make_hf_model

PLANS = ["uniform", "proportional", "eva"]
# Whatever is sampled, completions of a group differ in it.
REWARD = """
def vowels(completions, answers, **context):
    return [sum(letter in "aeiou" for letter in text) / 8 for text in completions]
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Model directory and study directory."""
    place = tmp_path_factory.mktemp("qwen3")
    model = place / "model"
    make_hf_model(model, "qwen3", tie=True, hidden=32, vocab=640)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(EMBEDDED_DIR / name, model / name)
    (place / "letters.py").write_text(REWARD)
    settings = {
        "run_dir": str(place / "study"),
        "steps": 2,
        "log_completions_every_steps": 0,
        "model": {"path": str(model)},
        "lora": {"rank": 2, "alpha": 4},
        "data": {"max_prompt_tokens": 56, "prompt_bucket_tokens": 56},
        "rollout": {"max_completion_tokens": 8},
        "grpo": {"prompts_per_step": 8, "group_size": 4},
        "eval": {"problems": 8, "batch_prompts": 8},
        "mesh": {"data": 8},
        "rewards": {"letters:vowels": 1.0},
        "study": {
            "profile": {"objectives": ["grpo"], "steps": 4, "calibration_batches": 1},
            "allocation": {"min_rank": 1, "max_rank": 4},
            "probe": {"scale_rules": [], "draws": 2, "layer_draws": 0},
            "arms": {"plans": PLANS, "scale_rules": ["constant"], "seeds": [0]},
        },
    }
    (place / "study.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        assert main(["study", str(place / "study.yaml")]) == 0
    return model, place / "study"


def test_every_plan_is_trained_at_the_budget(study):
    results = json.loads((study[1] / "results.json").read_text())
    arms = {arm["plan"]: arm for arm in results["arms"]}
    assert list(arms) == PLANS
    assert len({arm["trainable_parameters"] for arm in arms.values()}) == 1
    assert all(set(arm["ranks"]) == set(MODULES) for arm in arms.values())


def test_every_projection_has_norms_at_every_step(study):
    (arm,) = (study[1] / "arms").glob("uniform-*")
    records = read_jsonl(arm / "layer_grad_norms.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        for module in MODULES:
            norms = np.asarray(record["l2"][module]["b"])
            assert norms.shape == (2,) and (norms > 0).all(), module


def test_peft_loads_what_an_arm_trained(study):
    model, root = study
    (arm,) = (root / "arms").glob("proportional-*")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, arm / "adapter")
    trained = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert trained and all(p.abs().sum() > 0 for p in trained)
