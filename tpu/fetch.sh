#!/usr/bin/env bash
# Copies a run's directory from the first host to runs/ here.
#
#   TPU_NAME=mine ZONE=us-west4-a bash tpu/fetch.sh v5e-16_1.5b
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
name="${1:?name the run, for instance v5e-16_1.5b}"
mkdir -p "$repo/runs"
"${tpu[@]}" scp --recurse "$TPU_NAME:runs/$name" "$repo/runs/" "${place[@]}" --worker=0
echo "runs/$name"
