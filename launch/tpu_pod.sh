#!/usr/bin/env bash
# Trains on a TPU slice: the words of `kaleido train` on every host of it.
#
#   TPU=my-slice ZONE=us-central2-b launch/tpu_pod.sh --config cc12m_64 --workdir /mnt/disk/runs/64 \
#     --config.mesh.preset=tpu-v4-64
#
# TPU      name of the TPU VM; ZONE its zone; PROJECT its project (default: gcloud's).
# KALEIDO  the command on the hosts (default kaleido), as /opt/venv/bin/kaleido.
#
# kaleido_jax and jax[tpu] must be installed on the hosts, and the workdir and the data must lie
# where all of them see them. The training ends with this command; run it again to go on.
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
for name in TPU ZONE; do
  if [ -z "${!name:-}" ]; then
    echo "tpu_pod.sh: set $name; see launch/tpu_pod.sh without arguments" >&2
    exit 2
  fi
done
project=()
if [ -n "${PROJECT:-}" ]; then
  project=(--project="$PROJECT")
fi
# jax itself finds the hosts of a slice.
command="KALEIDO_DISTRIBUTED=auto ${KALEIDO:-kaleido} train$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" "${project[@]}" --worker=all \
  --command="$command"
