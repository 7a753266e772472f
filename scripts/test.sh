#!/usr/bin/env bash
# Sets up and runs the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv test
cd "$repo"
exec python -m pytest -m "not slow and not gpu and not tpu" -n 2 "$@"
