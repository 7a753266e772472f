"""A study's runs in small: what its analysis and its report read, without weights and texts.

    python scripts/pack_study.py RUN_DIR OUT.tar.xz

The archive holds what `python -m jaxgrpo.run study RUN_DIR` needs to analyse the study again and to
go on with it: settings, plans, design, summaries, metrics, norms, and of every evaluation the
questions and verdicts. Left out are checkpoints, adapters, TensorBoard's files, reports and what
the model wrote. Norms are rounded to 4 digits, and of an arm's the plain ones alone are kept; those
of profiles that plans are made from are as they were. The same runs give the same bytes. Prints the
runs that are finished.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from jaxgrpo.config_files import read_yaml
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.study.config import StudyConfig

LEFT_OUT = {"checkpoints", "adapter", "tensorboard", "completions"}
LEFT_OUT |= {"report.html", "report.md", "results.json"}  # which the study makes of the rest
TEXTS = {"completions", "extracted"}
DIGITS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if not (args.run_dir / "config.yaml").is_file():
        print(f"error: {args.run_dir} holds no study: it has no config.yaml", file=sys.stderr)
        return 2
    with tarfile.open(args.out, "w:xz") as archive:
        for name, data in files(args.run_dir):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    for run in sorted(finished(args.run_dir)):
        print(run)
    return 0


def files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of what is kept, in the order of names."""
    study = read_yaml(root / "config.yaml", StudyConfig).get("study", {})
    # Which views plans are made from: the settings say, and of equalised ones it is the weight.
    exact = {study.get("allocation", {}).get("view", "l2"), "weight"}
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.is_file() and path.name != ".lock" and not LEFT_OUT & set(inside.parts):
            yield str(inside), small(path, inside, exact)


def small(path: Path, inside: Path, exact: set[str]) -> bytes:
    """A file's content as it is kept; `exact`: the views of profiles that are not rounded."""
    if path.suffix == ".jsonl" and path.parent.name == "eval":
        return lines({k: v for k, v in x.items() if k not in TEXTS} for x in read_jsonl(path))
    if path.name == "layer_grad_norms.jsonl":
        views = {"step", "l2"} if inside.parts[0] == "arms" else None
        whole = exact if inside.parts[0] == "profiles" else set()
        return lines(
            {
                k: v if k in whole else rounded(v)
                for k, v in record.items()
                if not views or k in views
            }
            for record in read_jsonl(path)
        )
    return path.read_bytes()


def lines(records: Iterator[dict]) -> bytes:
    return "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in records).encode()


def rounded(x: object) -> object:
    if isinstance(x, float):
        return float(f"{x:.{DIGITS}g}")
    if isinstance(x, list):
        return [rounded(y) for y in x]
    return {k: rounded(y) for k, y in x.items()} if isinstance(x, dict) else x


def finished(root: Path) -> Iterator[str]:
    for path in root.rglob("summary.json"):
        yield str(path.parent.relative_to(root))


if __name__ == "__main__":
    sys.exit(main())
