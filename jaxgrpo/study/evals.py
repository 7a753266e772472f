"""What a study's evaluations measured: answers as counts, and accuracies per way to measure.
No jax."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from jaxgrpo.config import ConfigError
from jaxgrpo.identity import first_difference
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.study.config import StudyConfig
from jaxgrpo.study.result_types import Answer, Decoding, Measure

_KEYS: dict[Answer, str] = {
    "reward": "correct",
    "strict": "lm_eval_strict",
    "flexible": "lm_eval_flexible",
}


@dataclass(frozen=True)
class Answers:
    """How often each item was answered rightly, over the seeds of one arm.

    Attributes:
        counts: whole numbers [S, N], each at most `samples`.
    """

    counts: np.ndarray
    samples: int

    @property
    def cells(self) -> np.ndarray:
        """[S, N] in [0, 1]."""
        return self.counts / self.samples


def eval_file(run: Path, step: int, decoding: Decoding, config: StudyConfig) -> Path:
    """Where a run keeps the verdicts of one evaluation."""
    name = "greedy" if config.eval.also_greedy and decoding == "greedy" else "step"
    return run / "eval" / f"{name}_{step:06d}.jsonl"


class Questions:
    """What the arms of a study were asked: the same questions in the same way, or they do not
    compare. Items are paired by question, wherever in a file they stand."""

    def __init__(self) -> None:
        self._first: tuple[str, dict[tuple, int], dict] | None = None

    def in_order(self, path: Path) -> list[dict]:
        """The records of one evaluation, in the order of the first that was read.

        Raises:
            ConfigError: it was not made as the first one was.
        """
        records, made_with = _by_question(read_jsonl(path)), _made_with(path)
        if self._first is None:
            places = {question: place for place, question in enumerate(records)}
            self._first = (path.parents[1].name, places, made_with)
        name, places, alike = self._first
        different = first_difference(alike, made_with)
        if different or records.keys() != places.keys():
            raise ConfigError(
                f"the arms {name} and {path.parents[1].name} were not evaluated alike "
                f"({different or 'other questions'}), so they do not compare; choose another "
                "run_dir, or remove the older arm"
            )
        return [records[question] for question in places]


def _by_question(records: list[dict]) -> dict[tuple, dict]:
    """A question that is asked several times is told by its occurrence."""
    seen: Counter[tuple] = Counter()
    found = {}
    for record in records:
        question = (record["prompt"], record["answer"])
        found[(*question, seen[question])] = record
        seen[question] += 1
    return found


def _made_with(path: Path) -> dict:
    """What an evaluation was made with, but for whose it is."""
    path = path.with_suffix(".json")
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    made_with = recorded.get("made_with") or {}
    return {key: value for key, value in made_with.items() if key not in ("policy", "seed")}


def read_answers(
    runs: list[Path], step: int, config: StudyConfig, questions: Questions
) -> Answers | None:
    """The study's outcome of finished runs that were asked the same items; None if one is not.

    Raises:
        ConfigError: they were not asked the same `questions`.
    """
    decoding, answer = config.decodings[0], config.study.outcome.answer
    rows = []
    for run in runs:
        path = eval_file(run, step, decoding, config)
        if not (run / "summary.json").is_file() or not path.is_file():
            return None
        records = questions.in_order(path)
        if _KEYS[answer] not in records[0]:
            return None
        rows.append([record[_KEYS[answer]] for record in records])
    verdicts = np.asarray(rows, np.int64)  # [S, N, samples]
    return Answers(verdicts.sum(axis=2), verdicts.shape[2])


def measures(runs: list[Path], step: int, config: StudyConfig) -> list[Measure]:
    """Every way to measure the finished runs, the study's own outcome among them."""
    found: list[Measure] = []
    for decoding in config.decodings:
        paths = [eval_file(run, step, decoding, config) for run in runs]
        if not all(path.is_file() for path in paths):
            continue
        records = [read_jsonl(path) for path in paths]
        clipped = [
            float(np.mean([[r == "length" for r in x["finish_reasons"]] for x in rows]))
            for rows in records
            if "finish_reasons" in rows[0]
        ]
        length = [
            float(np.mean([x["tokens"] for x in rows])) for rows in records if "tokens" in rows[0]
        ]
        for answer in get_args(Answer):
            key = _KEYS[answer]
            if key in records[0][0]:
                found.append(
                    {
                        "decoding": decoding,
                        "answer": answer,
                        "per_seed": [float(np.mean([x[key] for x in rows])) for rows in records],
                        "clipped_ratio": clipped,
                        "mean_length": length,
                    }
                )
    return found
