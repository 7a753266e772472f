#!/usr/bin/env bash
# Deletes the slice, and with it what is on its hosts' disks. Asks first; YES=1 does not.
#
#   TPU_NAME=mine ZONE=us-west4-a bash tpu/delete.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
"${tpu[@]}" delete "$TPU_NAME" "${place[@]}" ${YES:+--quiet}
