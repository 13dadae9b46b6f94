#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster: the words of `kaleido train`, one process on each machine.
#
#   sbatch launch/slurm.sh --config cc12m_64 --workdir /shared/runs/64 --config.mesh.preset=a100-64
#   sbatch --nodes=1 --gpus-per-node=4 launch/slurm.sh --config shapes --workdir /shared/runs/shapes
#
# The workdir and the data must lie where all machines see them. Before the time limit every process
# gets SIGTERM, saves and ends; the job then queues again and goes on where it stopped.
# --ntasks-per-node=8 gives each process one GPU instead.
# Set KALEIDO to use another command than the `kaleido` on the path, KALEIDO_COORDINATOR=HOST:PORT
# where machines reach one another by other names than Slurm's.
#SBATCH --job-name=kaleido
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
# One process that ends early ends them all: the others would wait for it.
status=0
srun --kill-on-bad-exit=1 "${KALEIDO:-kaleido}" train "$@" || status=$?
if [ "$status" -eq 75 ]; then # ended by a signal, and saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
