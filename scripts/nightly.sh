#!/usr/bin/env bash
# What takes too long for every commit: the slow tests (all meshes, several processes, killed
# studies, slices, the wheel), the fuzz tests at full length, and a crash drill of 50 kills.
# Hours on 2 CPU cores. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv test
cd "$repo"
python -m pytest -m "slow and not gpu and not tpu" "$@"
JAXGRPO_FUZZ=full python -m pytest -m "not gpu and not tpu" tests/fuzz
drill="$(mktemp -d)"
trap 'rm -rf "$drill"' EXIT
python scripts/crash_drill.py "$drill" --kills 50 --steps 60
