"""Text and tokens: the tokenizer, questions to prompts, golds to tokens, completions to text.

A question and a gold answer are text whatever they spell: only the chat template makes turns. A
completion's text is what the policy sampled, without what ended it.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from jaxgrpo.config import ConfigError, DataConfig
from jaxgrpo.types import FINISH_LENGTH, FINISH_STOP_STRING, FINISH_STOP_TOKEN, Rollout


def load_tokenizer(directory: Path) -> Any:
    """The directory's tokenizer; never runs code from it.

    Raises:
        ConfigError: no tokenizer, one without a chat template or an end token, or with two chat
            templates that differ.
    """
    # transformers advises to install PyTorch where it is not; no model of its own is used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Not AutoTokenizer, whose import brings torch, seconds of every start. Of what it chooses from
    # these are all that there is here: tokenizer.json as it stands, or the vocabulary of both
    # families, for whose class transformers reads the files of all its models.
    kind: Any
    if (directory / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        kind = PreTrainedTokenizerFast
    elif (directory / "vocab.json").is_file():
        from transformers import Qwen2Tokenizer

        kind = Qwen2Tokenizer
    else:
        raise ConfigError(f"{directory} has no tokenizer (tokenizer.json)")
    try:
        # Several versions take any local directory whose config.json has no transformers_version
        # for a Mistral with a wrong pattern; False says that nothing is to be mended.
        tokenizer = kind.from_pretrained(directory, fix_mistral_regex=False)
    except Exception as error:  # tokenizers raises bare Exceptions on malformed files
        reason = str(error).strip() or type(error).__name__
        raise ConfigError(f"{directory}: the tokenizer does not load: {reason}") from None
    if not tokenizer.chat_template:
        raise ConfigError(f"{directory}: the tokenizer has no chat template")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{directory}: the tokenizer has no end-of-sequence token")
    if tokenizer.split_special_tokens:
        raise ConfigError(
            f"{directory}: split_special_tokens would take the chat template's own tokens apart; "
            "take it out of tokenizer_config.json"
        )
    _check_chat_template(directory)
    # It only warns, and of lengths that data.max_prompt_tokens and the caps have a say in here.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def _check_chat_template(directory: Path) -> None:
    """Raises ConfigError if the two files that may hold the chat template hold different ones."""
    template, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if template.is_file() and settings.is_file():
        inside = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
        if inside is not None and inside != template.read_text(encoding="utf-8"):
            raise ConfigError(
                f"{directory}: tokenizer_config.json and chat_template.jinja hold different chat "
                "templates; remove one"
            )


ANSWER = "0123456789"
"""An answer to find again in what a chat template makes of it."""


def turn_marks(tokenizer: Any) -> tuple[str, ...]:
    """What makes turns, as text: tokens that the chat template writes, begin, end and padding.

    What it writes between a prompt and its answer is the answer's and makes no turn: `<think>`.
    """
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    prompt = _render_turns(tokenizer, "x") or ""
    written = _render_turns(tokenizer, "x", ANSWER) or ""
    if written.startswith(prompt) and ANSWER in written:
        written = prompt + written[written.rindex(ANSWER) :]
    found = {mark for mark in tokenizer.get_added_vocab() if mark in written and mark.strip()}
    return tuple(sorted(found | {mark for mark in named if mark}, key=len, reverse=True))


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The token that the chat template ends the assistant's turn with, if it ends it with one."""
    rendered = _render_turns(tokenizer, "x", ANSWER)
    if rendered is None or ANSWER not in rendered:
        return None
    rest = rendered[rendered.rindex(ANSWER) + len(ANSWER) :].lstrip()
    added = tokenizer.get_added_vocab()
    marks = [mark for mark in added if mark.strip() and rest.startswith(mark)]
    return added[max(marks, key=len)] if marks else None


def _render_turns(tokenizer: Any, *turns: str) -> str | None:
    """A question, as a prompt, or with its answer through the chat template; None if it fails."""
    roles = ("user", "assistant")[: len(turns)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    ends = len(turns) == 1
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ends)
    except Exception:  # a template is a program: it raises what it likes
        return None


def render_prompt(question: str, tokenizer: Any, config: DataConfig) -> str:
    """System prompt (if any) and question through the tokenizer's chat template."""
    messages = [{"role": "user", "content": question + config.prompt_suffix}]
    if config.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise ConfigError(f"the chat template does not render: {error!r}") from None


def _check_template_kwargs(tokenizer: Any, config: DataConfig) -> None:
    """Jinja takes any name and says nothing of one that no template reads."""
    if not config.chat_template_kwargs:
        return
    try:
        # Its words alone: a template may have blocks that only transformers can parse.
        words = jinja2.Environment().lex(tokenizer.get_chat_template())
        names = sorted({word for _, kind, word in words if kind == "name"})
    except (jinja2.TemplateError, ValueError) as error:
        raise ConfigError(f"the chat template does not render: {error!r}") from None
    for name in config.chat_template_kwargs:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"data.chat_template_kwargs: the model's chat template does not read {name!r}{hint}"
            )


def tokenize_prompts(
    questions: Sequence[str], tokenizer: Any, config: DataConfig
) -> tuple[list[str], list[list[int]]]:
    """Prompts as text and as tokens.

    A turn mark inside a question is encoded as the characters it consists of. The system prompt and
    the suffix are the user's own words and encoded as the tokenizer does.

    Raises:
        ConfigError: the chat template does not render, or does not read what it is told.
    """
    _check_template_kwargs(tokenizer, config)
    marks = turn_marks(tokenizer)
    texts, cuts = [], []
    for question in questions:
        shielded, cut = shield(question, marks)
        texts.append(render_prompt(shielded, tokenizer, config))
        cuts.append(cut)
    return _encode(tokenizer, texts, cuts)


def shield(text: str, marks: Sequence[str]) -> tuple[str, str]:
    """`text` with a character that does not occur in it inside every mark, and that character; or
    the text itself and "" if it has none."""
    if not any(mark in text for mark in marks):
        return text, ""
    cut = next(c for c in map(chr, range(0xE000, 0x110000)) if c not in text)
    for mark in marks:
        text = text.replace(mark, mark[:1] + cut + mark[1:])
    return text, cut


def _encode(
    tokenizer: Any, texts: Sequence[str], cuts: Sequence[str]
) -> tuple[list[str], list[list[int]]]:
    """The texts without their cuts, and their tokens, none of which goes over a cut."""
    # The template writes every special token itself.
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    plain = list(texts)
    for row, (text, cut) in enumerate(zip(texts, cuts, strict=True)):
        if cut:
            parts = tokenizer(text.split(cut), add_special_tokens=False)["input_ids"]
            plain[row], ids[row] = text.replace(cut, ""), [i for part in parts for i in part]
    return plain, ids


def completion_texts(tokenizer: Any, rollout: Rollout, stop_strings: Sequence[str]) -> list[str]:
    """What was sampled as text [B]: what rewards, evaluation, tables, records and chat see.

    The ending token is left out, no other token is. A stop string stays, and what the last token
    holds after it does not, as with vLLM's include_stop_str_in_output.
    """
    rows = []
    for tokens, length, reason in zip(
        rollout.tokens, rollout.lengths, rollout.finish_reasons, strict=True
    ):
        rows.append(tokens[: int(length) - (reason == FINISH_STOP_TOKEN)].tolist())
    texts = tokenizer.batch_decode(
        rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return [
        end_at_stop(text, stop_strings) if reason == FINISH_STOP_STRING else text
        for text, reason in zip(texts, rollout.finish_reasons, strict=True)
    ]


def end_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """`text` up to and with the stop string that is complete first."""
    ends = [text.find(stop) + len(stop) for stop in stop_strings if stop in text]
    return text[: min(ends)] if ends else text


def gold_completions(tokenizer: Any, answers: Sequence[str], width: int) -> Rollout:
    """Gold answers as if they had been sampled: tokens, the token that ends the assistant's turn,
    padding to `width`.

    A turn mark inside an answer is encoded as characters, as in a question. An answer that is
    longer is cut, and counts as truncated.
    """
    marks = turn_marks(tokenizer)
    _, encoded = _encode(tokenizer, *zip(*(shield(text, marks) for text in answers), strict=True))
    end = end_of_turn_id(tokenizer)
    rows = [[*ids, tokenizer.eos_token_id if end is None else end] for ids in encoded]
    tokens = np.zeros((len(rows), width), np.int32)
    lengths = np.array([min(len(ids), width) for ids in rows], np.int32)
    for row, (ids, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens[row, :length] = ids[:length]
    cut = [len(ids) > width for ids in rows]
    return Rollout(
        tokens=tokens,  # type: ignore[arg-type]
        mask=np.arange(width) < lengths[:, None],  # type: ignore[arg-type]
        logprobs=np.zeros(tokens.shape, np.float32),  # type: ignore[arg-type]
        lengths=lengths,  # type: ignore[arg-type]
        finish_reasons=np.where(cut, FINISH_LENGTH, FINISH_STOP_TOKEN),  # type: ignore[arg-type]
    )
