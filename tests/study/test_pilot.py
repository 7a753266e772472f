"""The pilot's page says what its record does."""

import json
from pathlib import Path

from scripts.pilot_table import tables

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_the_tables_of_the_record():
    record = json.loads((ROOT / "docs/study_qwen/pilot.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/study_qwen/README.md").read_text(encoding="utf-8")
    assert tables(record) in page
