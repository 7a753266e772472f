#!/usr/bin/env bash
# Sets up and trains the embedded model: bash scripts/quickstart.sh
# Arguments go to `python -m jaxgrpo.run`, e.g. bash scripts/quickstart.sh train my.yaml steps=10
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv ""
cd "$repo"
exec python -m jaxgrpo.run "${@:-train}"
