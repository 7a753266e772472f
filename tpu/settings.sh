# Sourced by the scripts beside it: reads the slice's settings from the environment.

set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repo="$(dirname "$here")"

: "${TPU_NAME:?set TPU_NAME, the name of the TPU VM}"
: "${ZONE:?set ZONE, for instance us-west4-a}"
if [ -z "${PROJECT:-}" ]; then
    PROJECT="$(gcloud config get-value project 2>/dev/null)"
fi
: "${PROJECT:?set PROJECT, or a default one with: gcloud config set project NAME}"

tpu=(gcloud compute tpus tpu-vm)
place=(--zone "$ZONE" --project "$PROJECT")

# Runs one command on every host of the slice.
everywhere() {
    "${tpu[@]}" ssh "$TPU_NAME" "${place[@]}" --worker=all --command "$1"
}
