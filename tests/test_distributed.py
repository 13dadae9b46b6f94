"""Who the processes of one training are: environments in, settings or one clear line out."""

from __future__ import annotations

import pytest

from kaleido_jax.distributed import PORT, Settings, detect
from kaleido_jax.errors import UserError

OURS = {
    "KALEIDO_COORDINATOR": "10.0.0.1:9000",
    "KALEIDO_PROCESS_COUNT": "4",
    "KALEIDO_PROCESS_INDEX": "3",
}
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x8)",
    "SLURM_STEP_NODELIST": "gpu[007-010,012],login",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({}, None),
        (OURS, Settings("KALEIDO_*", "10.0.0.1:9000", 4, 3)),
        (OURS | {"KALEIDO_LOCAL_DEVICES": "2,3"},
         Settings("KALEIDO_*", "10.0.0.1:9000", 4, 3, (2, 3))),
        (OURS | {"KALEIDO_PROCESS_COUNT": "1", "KALEIDO_PROCESS_INDEX": "0"}, None),
        # One process on each machine takes all of its GPUs, of several each takes one.
        (SLURM, Settings("Slurm", f"gpu007:{PORT + 4}", 8, 5)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_LOCALID": "1"},
         Settings("Slurm", f"gpu007:{PORT + 4}", 8, 5, (1,))),
        (SLURM | {"SLURM_STEP_NODELIST": "a,b"}, Settings("Slurm", f"a:{PORT + 4}", 8, 5)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        # Inside an allocation, but not started by srun.
        ({"SLURM_JOB_ID": "4100", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        (SLURM | {"KALEIDO_COORDINATOR": "head:1"}, Settings("KALEIDO_*, Slurm", "head:1", 8, 5)),
        (MPI, Settings("Open MPI", f"127.0.0.1:{PORT}", 4, 2, (2,))),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "KALEIDO_COORDINATOR": "head:1"}, Settings("KALEIDO_*, Open MPI", "head:1", 4, 2)),
        ({"JOB_COMPLETION_INDEX": "1"}, None),
        ({"JOB_COMPLETION_INDEX": "1", "KALEIDO_PROCESS_COUNT": "2",
          "KALEIDO_COORDINATOR": "train-workers-0-0.train:9000"},
         Settings("KALEIDO_*, Kubernetes", "train-workers-0-0.train:9000", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}, Settings("TPU")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (OURS | {"TPU_WORKER_HOSTNAMES": "t0,t1"}, Settings("KALEIDO_*", "10.0.0.1:9000", 4, 3)),
        # mpirun in Slurm's allocation: srun starts its helpers, one on each machine.
        (SLURM | MPI, Settings("Open MPI", f"127.0.0.1:{PORT}", 4, 2, (2,))),
        ({"KALEIDO_DISTRIBUTED": "auto"}, Settings("TPU")),
    ],
)  # fmt: skip
def test_an_environment_tells_who_we_are(environ, settings):
    assert detect(environ) == settings


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"KALEIDO_COORDINATOR": "a:1"}, "KALEIDO_PROCESS_COUNT is not"),
        ({"KALEIDO_COORDINATOR": "a:1", "KALEIDO_PROCESS_COUNT": "2"}, "PROCESS_INDEX is not"),
        ({"KALEIDO_PROCESS_COUNT": "2", "KALEIDO_PROCESS_INDEX": "0"}, "COORDINATOR is not set"),
        (OURS | {"KALEIDO_PROCESS_INDEX": "4"}, "INDEX is 4; of 4 processes it is 0 to 3"),
        (OURS | {"KALEIDO_PROCESS_INDEX": "-1"}, "INDEX is '-1'; it must be a whole number"),
        (OURS | {"KALEIDO_PROCESS_COUNT": "two"}, "COUNT is 'two'; it must be a whole number"),
        (OURS | {"KALEIDO_COORDINATOR": "host"}, "'host'; it must be HOST:PORT"),
        (OURS | {"KALEIDO_LOCAL_DEVICES": "0-3"}, "'0-3'; it must be numbers, as 0,1"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, r"\(Open MPI\) and KALEIDO_COORDINATOR is not"),
        ({"KALEIDO_DISTRIBUTED": "yes"}, "'yes'; it must be 'auto' or not be set"),
    ],
)
def test_variables_set_by_half_are_named(environ, message):
    with pytest.raises(UserError, match=message):
        detect(environ)
