#!/usr/bin/env bash
# The gate: format, lint, types, import rules, tests. Run it before every commit.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv test
cd "$repo"
ruff format --check .
ruff check .
pyright
lint-imports
bash scripts/test.sh "$@"
