#!/usr/bin/env bash
# Creates a TPU slice if there is none of this name, copies the repository to every host, installs
# it and starts training in the background.
#
#   TPU_NAME=mine ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=my-bucket \
#       bash tpu/launch.sh tpu/v5e-16_1.5b.yaml [key=value ...]
#
# TYPE     the slice, as `gcloud compute tpus accelerator-types list` names it
# VERSION  the software of its hosts; the default suits TYPE
# BUCKET   a bucket that all hosts mount at ~/runs, where run_dir lies; slices of one host need none
# SPOT=1   asks for a slice that may be taken away: run the same command again to go on
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
: "${TYPE:?set TYPE, for instance v5litepod-16}"
config="${1:?name a configuration, for instance tpu/v5e-16_1.5b.yaml}"
shift
[ -f "$repo/$config" ] || { echo "error: $config is not a file of the repository" >&2; exit 2; }
case "$TYPE" in
v5litepod-*) version=v2-alpha-tpuv5-lite ;;
v5p-*) version=v2-alpha-tpuv5 ;;
v6e-*) version=v2-alpha-tpuv6e ;;
*) echo "error: TYPE=$TYPE is none of v5litepod-N, v5p-N, v6e-N" >&2; exit 2 ;;
esac

if ! "${tpu[@]}" describe "$TPU_NAME" "${place[@]}" >/dev/null 2>&1; then
    "${tpu[@]}" create "$TPU_NAME" "${place[@]}" --accelerator-type "$TYPE" \
        --version "${VERSION:-$version}" ${SPOT:+--spot}
fi
bash "$here/sync.sh"
if [ -n "${BUCKET:-}" ]; then
    everywhere "command -v gcsfuse >/dev/null || {
            echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -c -s) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
            curl -sS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
            sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse; }
        mkdir -p ~/runs && { mountpoint -q ~/runs || gcsfuse --implicit-dirs $BUCKET ~/runs; }"
fi
# The same line on every host: they find each other.
words=""
[ $# -eq 0 ] || words="$(printf '%q ' "$@")"
name="$(basename "$config" .yaml)"
everywhere "cd ~/jaxgrpo && nohup .venv/bin/python -m jaxgrpo.run train $config \
    run_dir=\$HOME/runs/$name $words >~/train.log 2>&1 </dev/null & sleep 1; echo started"
echo "follow it with: gcloud compute tpus tpu-vm ssh $TPU_NAME ${place[*]} --worker=0 --command 'tail -f train.log'"
