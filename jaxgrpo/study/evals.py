"""What a study's evaluations measured: answers as counts, and accuracies per way to measure.
No jax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

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
    return run / "eval" / f"step_{step:06d}.jsonl"


def read_answers(runs: list[Path], step: int, config: StudyConfig) -> Answers | None:
    """The study's outcome of finished runs that were asked the same items; None if one is not."""
    decoding, answer = config.decodings[0], config.study.outcome.answer
    rows = []
    for run in runs:
        path = eval_file(run, step, decoding, config)
        if not (run / "summary.json").is_file() or not path.is_file():
            return None
        records = sorted(read_jsonl(path), key=lambda record: record["index"])
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
