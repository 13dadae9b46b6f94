#!/usr/bin/env bash
# Trains on this machine, in one process or several: the words of `kaleido train`.
#
#   launch/local.sh WORDS OF kaleido train
#   launch/local.sh --config cc12m_64 --workdir runs/64 --config.mesh.preset=gpu-8
#   PROCESSES=2 DEVICES=4 launch/local.sh --config shapes --workdir runs/shapes
#
# PROCESSES  how many processes share the training (default 1, which is all that most machines
#            want). GPUs are divided among them.
# DEVICES    on a CPU: how many devices each process simulates (default 1).
# GRACE      seconds that the others get to end when one has failed (default 30).
#
# Run it again to go on, with any number of processes. Ctrl-C and SIGTERM reach all of them.
# Set KALEIDO to use another command than the `kaleido` on the path.
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
count=${PROCESSES:-1}
if [ -n "${DEVICES:-}" ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi
if [ "$count" -eq 1 ]; then
  exec "${KALEIDO:-kaleido}" train "$@"
fi

port=$((20000 + RANDOM % 12000)) # below the range from which connections get theirs
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  port=$((port + 1))
done
export KALEIDO_COORDINATOR=127.0.0.1:$port KALEIDO_PROCESS_COUNT=$count

gpus=0
if command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus | wc -l)
fi
share=$((gpus / count))
if [ $((share * count)) -ne "$gpus" ]; then
  echo "local.sh: $gpus GPUs cannot be divided among $count processes" >&2
  exit 2
fi

pids=()
for ((i = 0; i < count; i++)); do
  if [ "$share" -gt 0 ]; then
    KALEIDO_LOCAL_DEVICES=$(seq -s, $((i * share)) $(((i + 1) * share - 1)))
    export KALEIDO_LOCAL_DEVICES
  fi
  KALEIDO_PROCESS_INDEX=$i "${KALEIDO:-kaleido}" train "$@" &
  pids+=("$!")
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM

status=0
while [ -n "$(jobs -rp)" ]; do
  code=0
  wait -n || code=$?
  if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
    status=$code
    # The others would wait for it: ask them to end, then make them.
    kill -TERM "${pids[@]}" 2>/dev/null || true
    (sleep "${GRACE:-30}" && kill -KILL "${pids[@]}" 2>/dev/null) >/dev/null 2>&1 &
    reaper=$!
    disown
  fi
done
for pid in "${pids[@]}"; do # one that failed just before all were done
  code=0
  wait "$pid" || code=$?
  [ "$status" -ne 0 ] || status=$code
done
if [ -n "${reaper:-}" ]; then # later these numbers may be other processes'
  kill "$reaper" 2>/dev/null || true
fi
exit "$status"
