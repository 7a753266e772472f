"""Which arms the earlier reports of a study compared, so that what came after a look is told. No
jax."""

from __future__ import annotations

import json

from jaxgrpo.records.run_directory import atomic_write_json
from jaxgrpo.study.config import StudyConfig, StudyFiles, arm_label, list_arms
from jaxgrpo.study.result_types import Later


def note_report(config: StudyConfig) -> None:
    """Adds the arms of this report to reports.json, unless one of the same arms was made before.

    A design has no need of it: its looks are planned, and nothing can be added.
    """
    reports, now = _reports(config), [arm.name for arm in list_arms(config)]
    if config.study.design is None and set(now) not in map(set, reports):
        atomic_write_json(StudyFiles(config.run_dir).reports, {"arms": [*reports, now]})


def later_arms(config: StudyConfig) -> Later | None:
    """What is compared now and was not in the first report, and what was and no longer is."""
    reports, arms = _reports(config), list_arms(config)
    if config.study.design is not None or not reports:
        return None
    now = {arm.name for arm in arms}
    first, ever = set(reports[0]), set().union(*reports)
    groups = {arm.group for arm in arms if arm.name in first}
    new = [arm for arm in arms if arm.name not in first]
    found: Later = {
        "seeds": sorted({arm.seed for arm in new if arm.group in groups}),
        "arms": list(dict.fromkeys(arm_label(a, config) for a in new if a.group not in groups)),
        "left_out": sorted(ever - now),
        "reports": len(reports) + (now not in map(set, reports)),
    }
    return found if new or found["left_out"] else None


def _reports(config: StudyConfig) -> list[list[str]]:
    path = StudyFiles(config.run_dir).reports
    return json.loads(path.read_text(encoding="utf-8"))["arms"] if path.is_file() else []
