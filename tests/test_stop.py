"""Stop rules: the device's table finds a string exactly where the text does."""

import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxgrpo.config import ConfigError
from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.rollout.stop import end_token_ids, make_stop_rules

_QWEN = os.environ.get(
    "JAXGRPO_QWEN_TOKENIZER",
    str(Path(__file__).resolve().parents[2] / "shared" / "data" / "qwen2.5-tokenizer"),
)


@pytest.fixture(scope="module", params=["embedded", "qwen2.5"])
def tokenizer(request):
    if request.param == "embedded":
        return AutoTokenizer.from_pretrained(EMBEDDED_DIR)
    if not Path(_QWEN).is_dir():
        pytest.skip("no Qwen2.5 tokenizer: set JAXGRPO_QWEN_TOKENIZER")
    return AutoTokenizer.from_pretrained(_QWEN)


def _first_stop(rules, tokens):
    state = 0
    for i, token in enumerate(tokens):
        state = rules.transitions[state, token]
        if state == len(rules.transitions) - 1:
            return i
    return None


@pytest.mark.parametrize(
    "stops",
    [["Question:"], ["\n\n"], ["abab", "bac"], ["</answer>", "####"], ["é", "日本"], ["aa", "a b"]],
)
def test_string_is_found_at_the_token_that_completes_it(tokenizer, stops):
    rules = make_stop_rules(tokenizer, (1,), stops, len(tokenizer) + 7)
    texts = [
        "The total is 18.\n\nQuestion: how many?",
        "ababac bac aab ab",
        "x</answ</answer> and #### 7",
        "un café, 日 本 日本語",
        "nothing here",
        "Question Question:Question:",
    ]
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [
            tokenizer.decode(tokens[: i + 1], clean_up_tokenization_spaces=False)
            for i in range(len(tokens))
        ]
        want = next((i for i, p in enumerate(pieces) if any(s in p for s in stops)), None)
        assert _first_stop(rules, tokens) == want, (text, stops)


def test_table_covers_padding_ids_of_the_model(tokenizer):
    rules = make_stop_rules(tokenizer, (1,), ["stop"], len(tokenizer) + 100)
    assert rules.transitions.shape == (6, len(tokenizer) + 100)
    assert (rules.transitions[:, -1] == np.arange(6)).all()


def test_without_stop_strings_there_is_no_table(tokenizer):
    assert make_stop_rules(tokenizer, (1,), [], 10).transitions is None


def test_end_ids_are_the_union_of_all_sources(tokenizer):
    # Both templates end a turn with the tokenizer's own EOS.
    eos = tokenizer.eos_token_id
    assert end_token_ids(tokenizer, {}, ()) == (eos,)
    declared = {"generation_config.json": (2, eos), "config.json": (5,)}
    assert end_token_ids(tokenizer, declared, (3,)) == tuple(sorted({2, 3, 5, eos}))


def test_an_end_that_is_no_token_is_named_with_its_source(tokenizer):
    with pytest.raises(ConfigError, match=r"rollout\.stop_token_ids: 1000000000 is no token id"):
        end_token_ids(tokenizer, {}, (10**9,))
    with pytest.raises(ConfigError, match=r"generation_config\.json: -1 is no token id"):
        end_token_ids(tokenizer, {"generation_config.json": (-1,)}, ())
