"""Several processes of one training: who they are, by the variables that their launcher set.

`detect` only reads an environment; `start` acts on it, once, before anything asks jax for its
devices. One process alone needs none of this.

    KALEIDO_COORDINATOR     HOST:PORT of process 0, a port that is free there
    KALEIDO_PROCESS_COUNT   of all machines together
    KALEIDO_PROCESS_INDEX   of this process, from 0
    KALEIDO_LOCAL_DEVICES   numbers of this machine's GPUs that are this process's; default: all
    KALEIDO_DISTRIBUTED     'auto': what jax finds out by itself (a TPU slice over several hosts)

Slurm, Open MPI and an indexed Kubernetes job tell the count or the index too, so those need not be
set there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from kaleido_jax.errors import UserError

PORT = 12321
_OURS = ("COORDINATOR", "PROCESS_COUNT", "PROCESS_INDEX")

# Launcher -> variables of (count, index, index on this machine, processes on this machine). The
# first launcher that tells an index is believed: mpirun starts its helpers by srun, so processes
# of Open MPI see Slurm's variables of the helpers too.
_LAUNCHERS = {
    "Open MPI": (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "Slurm": (
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
    ),
    "Kubernetes": ("", "JOB_COMPLETION_INDEX", "", ""),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `jax.distributed.initialize` is told.

    Attributes:
      launcher: who said so, for people.
      coordinator: HOST:PORT of process 0; None, as the next two, where jax finds out by itself.
      count, index: of processes.
      local_devices: numbers of the GPUs of this machine that this process takes; None is all.
    """

    launcher: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    local_devices: tuple[int, ...] | None = None


def detect(environ: Mapping[str, str]) -> Settings | None:
    """The settings that an environment asks for; None where one process trains alone.

    Raises:
      UserError: variables that are set by half or do not fit each other, naming them.
    """
    mode = environ.get("KALEIDO_DISTRIBUTED", "")
    if mode not in ("", "auto"):
        raise UserError(f"KALEIDO_DISTRIBUTED is {mode!r}; it must be 'auto' or not be set")
    ours = any(environ.get(f"KALEIDO_{name}") for name in _OURS)
    if mode == "auto" or (environ.get("TPU_WORKER_HOSTNAMES", "").count(",") and not ours):
        return Settings("TPU")
    launcher, count, index, place, near = _from_launcher(environ)
    coordinator = environ.get("KALEIDO_COORDINATOR", "")
    stated_count = _number(environ, "KALEIDO_PROCESS_COUNT")
    stated_index = _number(environ, "KALEIDO_PROCESS_INDEX")
    if coordinator or stated_count is not None or stated_index is not None:
        launcher = f"KALEIDO_*, {launcher}" if launcher else "KALEIDO_*"
    count = count if stated_count is None else stated_count
    index = index if stated_index is None else stated_index
    if launcher == "Kubernetes":
        return None  # a job of its own: nothing says that there are others
    if count == 1 or not launcher:
        return None
    if not coordinator:
        coordinator = _coordinator(environ, launcher, count, near)
    for name, value in (("PROCESS_COUNT", count), ("PROCESS_INDEX", index)):
        if value is None:
            raise UserError(
                f"KALEIDO_COORDINATOR is set and KALEIDO_{name} is not; several processes need both"
            )
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:]+):\d+", coordinator):
        raise UserError(f"KALEIDO_COORDINATOR is {coordinator!r}; it must be HOST:PORT")
    if not 0 <= index < count:
        raise UserError(
            f"KALEIDO_PROCESS_INDEX is {index}; of {count} processes it is 0 to {count - 1}"
        )
    return Settings(launcher, coordinator, count, index, _local_devices(environ, place, near))


def start(environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Joins the other processes, if there are any; waits up to five minutes for them.

    Args:
      say: receives a line of how many there are, in the first process.

    Raises:
      UserError: as `detect`.
    """
    settings = detect(environ)
    if settings is None:
        return
    import jax

    # The only collectives of CPU processes that need nothing installed.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if settings.coordinator is None:
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(
            settings.coordinator,
            settings.count,
            settings.index,
            local_device_ids=settings.local_devices,
            # jax's own reading of Slurm gives each process one GPU, even one process per machine.
            cluster_detection_method="deactivate",
        )
    if jax.process_index() == 0:
        say(
            f"{jax.process_count()} processes ({settings.launcher}), "
            f"{jax.local_device_count()} devices in this one, {jax.device_count()} in all"
        )


def _from_launcher(
    environ: Mapping[str, str],
) -> tuple[str, int | None, int | None, int | None, int | None]:
    """(launcher, count, index, index on this machine, processes on this machine)."""
    for launcher, names in _LAUNCHERS.items():
        count_name, index_name = names[:2]
        if index_name in environ and (not count_name or count_name in environ):
            return launcher, *(_number(environ, name) if name else None for name in names)
    return "", None, None, None, None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """A number, None where it is not set; Slurm's '8(x4)' is the 8 of each of 4 machines."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    match = re.match(r"(\d+)($|[(,])", text)
    if not match:
        raise UserError(f"{name} is {text!r}; it must be a whole number")
    return int(match[1])


def _coordinator(
    environ: Mapping[str, str], launcher: str, count: int | None, near: int | None
) -> str:
    """Where process 0 is, as the launcher tells."""
    if launcher == "Slurm" and environ.get("SLURM_STEP_NODELIST"):
        # 'node[003-007,9],other' begins with node003; jobs of one machine differ in their port.
        match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", environ["SLURM_STEP_NODELIST"])
        port = PORT + (_number(environ, "SLURM_JOB_ID") or 0) % 4096
        return f"{match[1]}{match[2] or ''}:{port}"
    if launcher == "Open MPI" and near == count:
        return f"127.0.0.1:{PORT}"
    raise UserError(
        f"several processes ({launcher}) and KALEIDO_COORDINATOR is not set; set it to HOST:PORT "
        "of the first one"
    )


def _local_devices(
    environ: Mapping[str, str], place: int | None, near: int | None
) -> tuple[int, ...] | None:
    text = environ.get("KALEIDO_LOCAL_DEVICES", "")
    if text:
        if not re.fullmatch(r"\d+(,\d+)*", text):
            raise UserError(f"KALEIDO_LOCAL_DEVICES is {text!r}; it must be numbers, as 0,1")
        return tuple(map(int, text.split(",")))
    # One process on a machine takes all; of several each the one of its number.
    return (place,) if place is not None and near is not None and near > 1 else None
