#!/usr/bin/env bash
# Trains a config and its baseline side by side on this machine, half of the CPU cores each.
#
#   launch/compare.sh CONFIG FOLDER [--config.a.b=VALUE ...]
#   launch/compare.sh shapes runs/shapes --config.train.num_steps=2000
#
# Writes FOLDER/kaleido, FOLDER/baseline (latents=()) and their logs. Run it again to go on.
# Set KALEIDO to use another command than the `kaleido` on the path.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
config=$1
folder=$2
shift 2
kaleido=${KALEIDO:-kaleido}
mkdir -p "$folder"

cores=$(nproc)
half=$((cores / 2))
pin() { # pin FIRST LAST COMMAND...
  if [ "$half" -ge 1 ] && command -v taskset >/dev/null; then
    exec taskset -c "$1-$2" "${@:3}"
  fi
  exec "${@:3}"
}

(pin 0 $((half - 1)) "$kaleido" train --config "$config" --workdir "$folder/kaleido" "$@") \
  >>"$folder/kaleido.log" 2>&1 &
first=$!
(pin "$half" $((cores - 1)) "$kaleido" train --config "$config" --workdir "$folder/baseline" "$@" \
  --config.latents='()') >>"$folder/baseline.log" 2>&1 &
second=$!
trap 'kill "$first" "$second" 2>/dev/null || true' TERM
trap : INT # Ctrl-C reaches both by itself; a second signal would end them without saving

for pid in "$first" "$second"; do # a signal ends `wait` before they have saved
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
done
status=0
wait "$first" || { status=$?; echo "kaleido failed; see $folder/kaleido.log" >&2; }
wait "$second" || { status=$?; echo "baseline failed; see $folder/baseline.log" >&2; }
exit "$status"
