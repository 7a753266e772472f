#!/usr/bin/env bash
# Trains 60 steps on real data and holds four figures of the run against the runs of the same weights
# in scripts/gate_bounds.json:
#   bash scripts/gate_gsm8k.sh MODEL DATA [key=value ...]
# MODEL and DATA as model.path and data.path; the run is kept in runs/gate unless run_dir says else.
# Exit code: 0 within the bounds, 1 outside, 2 a mistake in the call, 3 no runs of these weights.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash scripts/gate_gsm8k.sh MODEL DATA [key=value ...]" >&2
    exit 2
fi
model="$1" data="$2"
shift 2
run_dir=runs/gate
for setting in "$@"; do
    case "$setting" in run_dir=*) run_dir="${setting#run_dir=}" ;; esac
done
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python -m jaxgrpo.run train "$repo/configs/gsm8k_1.5b.yaml" model.path="$model" data.path="$data" \
    steps=60 eval.every_steps=0 optim.learning_rate=1e-4 run_dir="$run_dir" "$@"
python "$repo/scripts/gate_figures.py" "$run_dir" "$model" "$repo/scripts/gate_bounds.json"
