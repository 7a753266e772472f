#!/usr/bin/env bash
# Copies the repository, as git knows it, to every host of the slice and installs it there.
#
#   TPU_NAME=mine ZONE=us-west4-a bash tpu/sync.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
archive="$(mktemp --suffix=.tgz)"
trap 'rm -f "$archive"' EXIT
(cd "$repo" && git ls-files -z --cached --others --exclude-standard |
    tar --null --files-from=- --ignore-failed-read -czf "$archive")
"${tpu[@]}" scp "$archive" "$TPU_NAME:jaxgrpo.tgz" "${place[@]}" --worker=all
everywhere 'mkdir -p jaxgrpo && tar -xzf jaxgrpo.tgz -C jaxgrpo && cd jaxgrpo &&
    { [ -x .venv/bin/python ] || python3 -m venv .venv; } &&
    .venv/bin/python -m pip install --quiet --upgrade pip &&
    .venv/bin/python -m pip install --quiet --editable ".[tpu]"'
