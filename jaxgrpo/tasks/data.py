"""Problems -> prompts: reading a data set, a deterministic order, padding.

Which problems a step sees follows from (seed, step) alone: epoch e is a permutation drawn from
(seed, e), and step k takes its next slice. Resuming therefore needs no iterator state.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo.config import EMBEDDED, ConfigError, DataConfig, suggestion
from jaxgrpo.tasks.answers import gold_answer
from jaxgrpo.tasks.math_boxed import gold_math_answer
from jaxgrpo.tasks.problems import make_problems
from jaxgrpo.tasks.texts import tokenize_prompts
from jaxgrpo.types import PromptBatch

_SUFFIXES = (".jsonl", ".json", ".parquet")
EMBEDDED_EVAL_PROBLEMS = 512


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer; `index` is its row in the data set."""

    question: str
    answer: str
    index: int


def load_problems(config: DataConfig, split: str) -> list[Problem]:
    """Reads one split of `data.path`.

    A directory is searched for SPLIT.jsonl, .json or .parquet; a single file is used for either
    split.

    Raises:
        ConfigError: a missing path, split or column, a broken line, an empty data set, or a gold
            answer that no completion could match.
    """
    rows = _embedded(config, split) if config.path == EMBEDDED else _read(config, split)
    where = f"data.path {config.path} ({split})"
    if not rows:
        raise ConfigError(f"{where} is empty")
    for column in (config.prompt_column, config.answer_column):
        if column not in rows[0]:
            raise ConfigError(
                f"{where} has no column '{column}'; {suggestion(column, list(rows[0]))}"
            )
    problems = []
    for index, row in enumerate(rows):
        question, answer = row.get(config.prompt_column), row.get(config.answer_column)
        if not isinstance(question, str) or not question.strip():
            raise ConfigError(f"{where}: row {index} has no text in '{config.prompt_column}'")
        if not isinstance(answer, str | int | float) or answer != answer:
            raise ConfigError(f"{where}: row {index} has no answer in '{config.answer_column}'")
        problems.append(Problem(question, str(answer), index))
    return problems


_GOLD_READERS = {"gsm8k_answer": gold_answer, "math_boxed": gold_math_answer}


def check_gold_answers(problems: Sequence[Problem], where: str, reward: str) -> None:
    """Raises ConfigError on the first gold answer in which the reward finds nothing to compare
    with; of a user's own rewards nothing is known."""
    if reward not in _GOLD_READERS:
        return
    for problem in problems:
        try:
            _GOLD_READERS[reward](problem.answer)
        except ValueError as error:
            raise ConfigError(f"{where}: row {problem.index}: {error}") from None


def _embedded(config: DataConfig, split: str) -> list[Mapping[str, Any]]:
    if split not in ("train", "test"):
        raise ConfigError(f"the embedded problems have splits train and test, not '{split}'")
    count = config.embedded_problems if split == "train" else EMBEDDED_EVAL_PROBLEMS
    return list(make_problems(split, count))


def _read(config: DataConfig, split: str) -> list[Mapping[str, Any]]:
    path = Path(config.path).expanduser()
    if path.is_dir():
        found = [path / f"{split}{suffix}" for suffix in _SUFFIXES]
        files = [file for file in found if file.is_file()]
        if not files:
            raise ConfigError(
                f"data.path: {path} holds no {split}.jsonl, {split}.json or {split}.parquet"
            )
        path = files[0]
    if path.is_file():
        return _read_file(path)
    looks_local = (
        config.path.startswith((".", "/", "~"))
        or path.suffix in _SUFFIXES
        or config.path.count("/") > 1
    )
    if looks_local:
        near = _nearest(path)
        raise ConfigError(f"data.path: {path} does not exist{near}")
    return _read_hub(config, split)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.iterdir() if p.suffix in _SUFFIXES or p.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _read_file(path: Path) -> list[Mapping[str, Any]]:
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"data.path: {path} is none of {', '.join(_SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            # Read as a table: `datasets` would first copy the file into its cache.
            import pyarrow.parquet

            return shortest_floats(pyarrow.parquet.read_table(path))
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.path: {path} is unreadable: {' '.join(str(error).split())}"
        ) from None
    rows = _json_rows(path, text)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ConfigError(f"data.path: {path}: record {number} is not an object")
    return rows


def _json_rows(path: Path, text: str) -> list[Any]:
    if path.suffix == ".json":
        try:
            rows = json.loads(text) if text.strip() else []
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"data.path: {path} is not JSON: {error}") from None
        if not isinstance(rows, list):
            raise ConfigError(f"data.path: {path} must hold a list of objects")
        return rows
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"data.path: {path}:{number} is not JSON: {error}") from None
    return rows


def _read_hub(config: DataConfig, split: str) -> list[Mapping[str, Any]]:
    # Imported here: it takes seconds, and local files do not need it.
    import datasets

    try:
        table = datasets.load_dataset(
            config.path, config.name, split=split, revision=config.revision
        )
    except Exception as error:  # the library raises its own, the hub's, and the network's errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"data.path: {config.path} is neither a file nor a data set of the hub's: {reason}"
        ) from None
    return shortest_floats(table.with_format("arrow")[:])  # type: ignore[union-attr,arg-type]


def shortest_floats(table: Any) -> list[Mapping[str, Any]]:
    """The rows of an Arrow table. What is stored in half or single precision becomes the number
    that was written there: the float32 0.1 is 0.1 and not 0.10000000149011612."""
    rows = table.to_pylist()
    for column in table.schema:
        narrow = {"halffloat": np.float16, "float": np.float32}.get(str(column.type))
        if narrow is not None:
            for row in rows:
                value = row[column.name]
                row[column.name] = None if value is None else float(str(narrow(value)))
    return rows


class PromptSource:
    """The prompts of one split, tokenized once, in a deterministic order.

    Attributes:
        dropped: how many problems were left out because their prompt is too long.
    """

    def __init__(self, problems: Sequence[Problem], tokenizer: Any, config: DataConfig) -> None:
        self._config = config
        questions = [problem.question for problem in problems]
        texts, ids = tokenize_prompts(questions, tokenizer, config)
        kept = [i for i, tokens in enumerate(ids) if len(tokens) <= config.max_prompt_tokens]
        if not kept:
            shortest = min(len(tokens) for tokens in ids)
            raise ConfigError(
                f"every prompt is longer than data.max_prompt_tokens={config.max_prompt_tokens}; "
                f"the shortest has {shortest} tokens"
            )
        self.dropped = len(ids) - len(kept)
        self._problems = [problems[i] for i in kept]
        self._texts = [texts[i] for i in kept]
        self._tokens = [ids[i] for i in kept]
        # One width for all batches of the split, so that no later one needs another program.
        self._slots = config.padded(max(len(tokens) for tokens in self._tokens))

    def __len__(self) -> int:
        return len(self._problems)

    @property
    def dropped_message(self) -> str:
        """One line on what was left out."""
        return (
            f"{self.dropped} of {self.dropped + len(self)} prompts are longer than "
            f"data.max_prompt_tokens={self._config.max_prompt_tokens} and were left out"
        )

    def batch(self, seed: int, step: int, count: int) -> PromptBatch:
        """The `count` prompts of `step`. A batch may span epochs; within one nothing repeats."""
        positions = np.arange(step * count, (step + 1) * count)
        epochs, places = np.divmod(positions, len(self))
        orders = {epoch: self._order(seed, int(epoch)) for epoch in np.unique(epochs)}
        return self._pad([int(orders[e][i]) for e, i in zip(epochs, places, strict=True)])

    def sequential(self, start: int, count: int, total: int) -> tuple[PromptBatch, int]:
        """Prompts start..start+count of the first `total`, for evaluation.

        The last batch is filled up with prompts from the front, so that every batch has one shape.

        Returns:
            The batch, and how many of its prompts count.
        """
        real = min(count, total - start)
        rows = [*range(start, start + real), *(i % total for i in range(count - real))]
        return self._pad(rows), real

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def _pad(self, rows: Sequence[int]) -> PromptBatch:
        slots = self._slots
        tokens = np.zeros((len(rows), slots), np.int32)
        mask = np.zeros((len(rows), slots), bool)
        for i, row in enumerate(rows):
            ids = self._tokens[row]
            tokens[i, slots - len(ids) :] = ids
            mask[i, slots - len(ids) :] = True
        return PromptBatch(
            tokens=tokens,
            mask=mask,
            texts=[self._texts[row] for row in rows],
            answers=[self._problems[row].answer for row in rows],
            indices=[self._problems[row].index for row in rows],
        )


def train_rows(
    prompts: PromptBatch, completion_tokens: Any, lengths: Any, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [B, S + C] of prompt, completion and padding without gaps, and prompt lengths [B]."""
    rows, width = completion_tokens.shape
    slots = prompts.tokens.shape[1]
    tokens = np.zeros((rows, slots + width), np.int32)
    prompt_lengths = np.repeat(prompts.mask.sum(axis=1), group_size).astype(np.int32)
    for row in range(rows):
        start, length = int(prompt_lengths[row]), int(lengths[row])
        tokens[row, :start] = prompts.tokens[row // group_size, slots - start :]
        tokens[row, start : start + length] = completion_tokens[row, :length]
    return tokens, prompt_lengths
