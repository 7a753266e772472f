"""The card of an exported adapter: what is needed to prompt it as in training."""

import dataclasses

from jaxgrpo.config import Config, DataConfig
from jaxgrpo.config_files import encode_config
from jaxgrpo.records.model_card import CardFacts, model_card


def card(**data):
    config = dataclasses.replace(Config(), data=DataConfig(**data))
    facts = CardFacts("peft", "Qwen/Qwen3-0.6B", "export", encode_config(config))
    return model_card(facts, "adapter")


def test_the_card_says_what_the_chat_template_was_told():
    told = card(chat_template_kwargs={"enable_thinking": False})
    assert "- prompts: `apply_chat_template(..., enable_thinking=False)`" in told
    assert "enable_thinking: false" in told  # among the settings that are not the defaults
    assert "apply_chat_template" not in card()
