"""What ends a completion: token ids, and strings matched on the device as tokens are sampled.

A stop string may span tokens or end inside one. An Aho-Corasick automaton over bytes (Aho and
Corasick 1975), composed with every token's bytes, gives one table [states, V]: the decode loop
follows it with one gather a token and never needs to turn tokens into text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrpo.config import ConfigError


@dataclass(frozen=True)
class StopRules:
    """Ends of a completion.

    Attributes:
        token_ids: a completion ends with any of these.
        transitions: int32 [states, V]: state -> state after a token, or None without stop strings.
            State 0 is the start; the last state is "a stop string has been seen".
    """

    token_ids: tuple[int, ...]
    transitions: np.ndarray | None = None


def end_token_ids(
    tokenizer: Any, generation_config: dict | None, extra: Sequence[int]
) -> tuple[int, ...]:
    """The tokenizer's EOS, generation_config.json's, and the configuration's own, sorted.

    Raises:
        ConfigError: an id outside the vocabulary, or none at all.
    """
    ids = set(extra)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    declared = (generation_config or {}).get("eos_token_id")
    if declared is not None:
        ids |= set(declared) if isinstance(declared, list) else {declared}
    size = len(tokenizer)
    wrong = [i for i in sorted(ids) if not 0 <= i < size]
    if wrong:
        raise ConfigError(f"rollout.stop_token_ids: {wrong[0]} is no token id (0..{size - 1})")
    if not ids:
        raise ConfigError("no token ends a completion: give rollout.stop_token_ids")
    return tuple(sorted(int(i) for i in ids))


def make_stop_rules(
    tokenizer: Any, token_ids: Sequence[int], stop_strings: Sequence[str], vocab_size: int
) -> StopRules:
    """Builds the table for `stop_strings`; `vocab_size` is the model's, padding ids included.

    Raises:
        ConfigError: stop strings with a tokenizer whose tokens are not byte strings.
    """
    if not stop_strings:
        return StopRules(tuple(token_ids))
    patterns = [text.encode() for text in stop_strings]
    step = _automaton(patterns)
    end = len(step) - 1
    transitions = np.zeros((len(step), vocab_size), np.int32)
    transitions[end] = end
    # Byte by byte over all tokens at once: only tokens long enough take part in a round.
    tokens = token_bytes(tokenizer, vocab_size)
    lengths = np.array([len(token) for token in tokens])
    states = np.repeat(np.arange(len(step))[:, None], vocab_size, axis=1)
    for i in range(int(lengths.max())):
        active = np.flatnonzero(lengths > i)
        column = np.array([tokens[token][i] for token in active])
        states[:, active] = step[states[:, active], column[None, :]]
    return StopRules(tuple(token_ids), states.astype(np.int32))


def _automaton(patterns: Sequence[bytes]) -> np.ndarray:
    """int [states, 256]; the last state is reached once any pattern has been seen, and kept."""
    trie: list[dict[int, int]] = [{}]
    ends: set[int] = set()
    for pattern in patterns:
        node = 0
        for byte in pattern:
            if byte not in trie[node]:
                trie[node][byte] = len(trie)
                trie.append({})
            node = trie[node][byte]
        ends.add(node)
    accept = len(trie)
    step = np.zeros((accept + 1, 256), np.int64)
    step[accept] = accept
    fail = [0] * len(trie)
    queue = [0]
    for node in queue:
        if node in ends or fail[node] in ends:
            ends.add(node)
        for byte in range(256):
            child = trie[node].get(byte)
            fallback = 0 if node == 0 else step[fail[node], byte]
            if child is None:
                step[node, byte] = fallback
            else:
                fail[child] = int(fallback)
                step[node, byte] = child
                queue.append(child)
    final = [*range(accept), accept]
    for node in ends:
        final[node] = accept
    return np.asarray(final)[step]


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """Every token's bytes, for byte-level BPE tokenizers; ids without a token are empty.

    Raises:
        ConfigError: a tokenizer of another kind.
    """
    table = _byte_of_character()
    added = tokenizer.get_added_vocab()
    tokens = [b""] * vocab_size
    for text, index in tokenizer.get_vocab().items():
        if text in added:
            tokens[index] = text.encode()
            continue
        if any(character not in table for character in text):
            raise ConfigError(
                "rollout.stop_strings needs a byte-level BPE tokenizer (as Qwen2.5 has); token "
                f"{index} {text!r} is not made of bytes. Use rollout.stop_token_ids"
            )
        tokens[index] = bytes(table[character] for character in text)
    return tokens


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 is itself, the rest from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    positions = [text.find(stop) for stop in stop_strings]
    found = [position for position in positions if position >= 0]
    return text[: min(found)] if found else text
