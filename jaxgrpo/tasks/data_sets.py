"""A data set -> problems: files, the hub, the embedded generator; which gold answers are usable.

Floor 0: no jax.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo.config import DEV_SPLIT, EMBEDDED, ConfigError, DataConfig, suggestion
from jaxgrpo.tasks.answers import gold_answer
from jaxgrpo.tasks.math_boxed import gold_math_answer
from jaxgrpo.tasks.problems import make_problems

_SUFFIXES = (".jsonl", ".json", ".parquet")
EMBEDDED_EVAL_PROBLEMS = 512
DEV_SEED = 20_260_000
"""Of the draw of `data.dev_problems`."""


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer; `index` is its row in the data set."""

    question: str
    answer: str
    index: int


def load_problems(config: DataConfig, split: str) -> list[Problem]:
    """Reads one split of `data.path`; `dev` and train_split divide the training problems.

    A directory is searched for SPLIT.jsonl, .json or .parquet; a single file is used for either
    split.

    Raises:
        ConfigError: a missing path, split or column, a broken line, or an empty data set; a row
            without text in a column, but for an answer that `data.drop_rows_without_answer` allows
            to be missing, which is "" here.
    """
    if config.dev_problems and split in (DEV_SPLIT, config.train_split):
        return _divided(config, split)
    return _read_split(config, split)


def _divided(config: DataConfig, split: str) -> list[Problem]:
    """The part of the training problems that is held out, or the rest, each in file order."""
    problems = _read_split(config, config.train_split)
    if config.dev_problems >= len(problems):
        raise ConfigError(
            f"data.dev_problems={config.dev_problems} leaves none of the {len(problems)} training "
            "problems to train on"
        )
    # One draw for every seed of a run, so that no run trains on what another is judged by.
    drawn = np.random.default_rng(DEV_SEED).permutation(len(problems))[: config.dev_problems]
    held_out = set(drawn.tolist())
    return [p for p in problems if (p.index in held_out) == (split == DEV_SPLIT)]


def _read_split(config: DataConfig, split: str) -> list[Problem]:
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
        answered = isinstance(answer, str | int | float) and answer == answer  # nan is not
        if not answered and config.drop_rows_without_answer:
            answer = ""
        elif not answered:
            raise ConfigError(f"{where}: row {index} has no answer in '{config.answer_column}'")
        problems.append(Problem(question, str(answer), index))
    return problems


_GOLD_READERS = {"gsm8k_answer": gold_answer, "math_boxed": gold_math_answer}


def answered_problems(
    problems: Sequence[Problem], split: str, rewards: Sequence[str], config: DataConfig
) -> tuple[list[Problem], list[str]]:
    """The problems whose gold answers the rewards can compare with, and a line on the others.

    Of a user's own rewards nothing is known: any text is an answer to them.

    Raises:
        ConfigError: there are others and `data.drop_rows_without_answer` is not set, or nothing
            else.
    """
    kept, dropped = [], []
    for problem in problems:
        trouble = _answer_trouble(problem, rewards, config)
        if trouble is None:
            kept.append(problem)
        elif config.drop_rows_without_answer:
            dropped.append(problem.index)
        else:
            raise ConfigError(
                f"{split}: row {problem.index}: {trouble}; "
                "data.drop_rows_without_answer=true leaves such rows out"
            )
    if not kept:
        raise ConfigError(
            f"{split}: no row's '{config.answer_column}' holds an answer that "
            f"{' or '.join(rewards)} could compare with"
        )
    if not dropped:
        return kept, []
    rows = ", ".join(map(str, dropped[:8])) + (", ..." if len(dropped) > 8 else "")
    return kept, [
        f"{split}: {len(dropped)} of {len(problems)} rows have no gold answer to compare with and "
        f"were left out (data.drop_rows_without_answer): {rows}"
    ]


def _answer_trouble(problem: Problem, rewards: Sequence[str], config: DataConfig) -> str | None:
    if config.drop_rows_without_answer and not problem.answer.strip():
        return "no answer"
    for reward in rewards:
        try:
            _GOLD_READERS.get(reward, str)(problem.answer)
        except ValueError as error:
            return str(error)
    return None


def _embedded(config: DataConfig, split: str) -> list[Mapping[str, Any]]:
    _refuse_hub_settings(config, "the embedded problems are generated")
    if split not in ("train", "test"):
        raise ConfigError(f"the embedded problems have splits train and test, not '{split}'")
    count = config.embedded_problems if split == "train" else EMBEDDED_EVAL_PROBLEMS
    return list(make_problems(split, count))


def _read(config: DataConfig, split: str) -> list[Mapping[str, Any]]:
    path = Path(config.path).expanduser()
    if path.exists():
        _refuse_hub_settings(config, f"{path} is local")
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


def _refuse_hub_settings(config: DataConfig, why: str) -> None:
    """A part or a version of the hub's data sets, named beside problems that have neither."""
    for name in ("name", "revision"):
        value = getattr(config, name)
        if value is not None:
            raise ConfigError(f"data.{name}={value} needs a hub id as data.path; {why}")


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
