"""What ends a completion: token ids, and strings matched on the device as tokens are sampled.

A stop string may span tokens or end inside one. An Aho-Corasick automaton over bytes (Aho and
Corasick 1975), composed with every token's bytes, gives one table [states, V]: the decode loop
follows it with one gather a token and never needs to turn tokens into text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrpo.config import ConfigError
from jaxgrpo.tasks.texts import end_of_turn_id


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
    tokenizer: Any, declared: Mapping[str, Sequence[int]], extra: Sequence[int]
) -> tuple[int, ...]:
    """Every token that ends a completion, sorted: the tokenizer's EOS, the token with which the
    chat template ends the assistant's turn, what the model's files declare, and the
    configuration's own.

    A base model's EOS may be another than its template's end of turn; without the second a
    completion would go on into turns that nobody asked for.

    Args:
        declared: file -> the ids that it names.

    Raises:
        ConfigError: an id outside the vocabulary.
    """
    sources = {**declared, "rollout.stop_token_ids": extra}
    size = len(tokenizer)
    for where, ids in sources.items():
        for one in ids:
            if not 0 <= one < size:
                raise ConfigError(f"{where}: {one} is no token id (0..{size - 1})")
    found = {one for ids in sources.values() for one in ids}
    ends = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)} - {None}
    return tuple(sorted(found | ends))


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
                "rollout.stop_strings needs a byte-level BPE tokenizer (as Qwen has); token "
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
