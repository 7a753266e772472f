"""The embedded model is an ordinary Hugging Face Qwen2 directory, small enough to ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jaxgrpo
from jaxgrpo.tasks.problems import make_problems
from jaxgrpo.tasks.rewards import extract_answer, gold_answer

transformers = pytest.importorskip("transformers")

MODEL_DIR = Path(jaxgrpo.__file__).parent / "assets" / "embedded"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    torch = pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def _prompt(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_directory_is_complete_and_small():
    names = {path.name for path in MODEL_DIR.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 8_000_000


def test_shape_is_that_of_a_small_qwen2():
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    # Enough layers that a rank plan has something to decide, and grouped queries as in Qwen2.5.
    assert config["num_hidden_layers"] >= 8
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"]


def test_transformers_loads_every_weight(model):
    names = dict(model.named_parameters())
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    bias = names["model.layers.0.self_attn.q_proj.bias"]
    assert bias.abs().max() > 0


def test_special_tokens(tokenizer):
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert len(tokenizer) <= config["vocab_size"]
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1


def test_chat_template_renders_chatml(tokenizer):
    assert _prompt(tokenizer, "1+1?") == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "#### 2"},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n#### 2<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "text", ["Tom has 12 eggs.\n#### 12", "  two  spaces\n\n\ttab", "\u00e9\u4e2d\U0001f600", "007"]
)
def test_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_every_digit_is_its_own_token(tokenizer):
    tokens = tokenizer.tokenize("1234 567*89=50463")
    digits = [token for token in tokens if any(character.isdigit() for character in token)]
    assert digits == list("123456789") + list("50463")


def test_prompts_and_solutions_are_short(tokenizer):
    for problem in make_problems("test", 300):
        prompt = _prompt(tokenizer, problem["question"])
        assert len(tokenizer.encode(prompt, add_special_tokens=False)) <= 64
        solution = problem["answer"] + "<|im_end|>"
        assert len(tokenizer.encode(solution, add_special_tokens=False)) <= 56


def test_greedy_accuracy_leaves_room_to_improve(model, tokenizer):
    torch = pytest.importorskip("torch")
    problems = make_problems("test", 128, seed=5)
    inputs = tokenizer(
        [_prompt(tokenizer, problem["question"]) for problem in problems],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=64,
            do_sample=False,
        )
    texts = tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = [
        extract_answer(text) == gold_answer(problem["answer"])
        for text, problem in zip(texts, problems, strict=True)
    ]
    # Wider than the 35 to 65 % of the training script: 128 problems are few.
    assert 0.25 <= sum(right) / len(right) <= 0.75
