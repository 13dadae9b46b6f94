"""What all measurements share: times, peaks, memory, sweeps over batch sizes, profiles."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pathlib
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kaleido_jax import runlog
from kaleido_jax.errors import UserError

# Dense bfloat16 operations a second of one device, by the beginning of jax's device_kind; makers'
# data sheets. The longest name that fits counts.
PEAKS = {
    "NVIDIA H100": 989e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
}
ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")
_MATRIX = 1024  # side of the product that a CPU's peak is measured with
_PEAK_REPEATS = 7
_MEMORY_KEPT = 0.9  # of what a CPU has free; the rest is for the process itself


class DoesNotFit(Exception):
    """A batch that needs more memory than there is; the message says how much."""


def peak(device_kind: str | None = None) -> tuple[float, str]:
    """(operations a second of all devices together, where the number comes from).

    Args:
      device_kind: of one device; this machine's by default. A kind that PEAKS does not know is
        measured: the best of several float32 products of two matrices, on one device.
    """
    devices = jax.devices()
    kind = devices[0].device_kind if device_kind is None else device_kind
    known = [name for name in PEAKS if kind.startswith(name)]
    if known:
        name = max(known, key=len)
        return PEAKS[name] * len(devices), f"table: {name}, bfloat16, dense"
    # Simulated devices are one processor, however many they are.
    real = 1 if devices[0].platform == "cpu" else len(devices)
    return _matrix_peak() * real, f"measured: float32 product of matrices of side {_MATRIX}"


@functools.cache
def _matrix_peak() -> float:
    a = jnp.ones((_MATRIX, _MATRIX), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    return 2 * _MATRIX**3 / min(timed(lambda: product(a, a))[0] for _ in range(_PEAK_REPEATS))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds until the result of `run` is there, the result)."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def compiled(jitted: Any, *args: Any) -> tuple[Any, float]:
    """(the program for arguments or their shapes, seconds to compile it).

    An answer of jax's persistent cache makes it short; the command line sets none for a bench.
    """
    start = time.perf_counter()
    program = jitted.lower(*args).compile()
    return program, round(time.perf_counter() - start, 3)


def estimate(program: Any) -> int | None:
    """Bytes of a device that the compiler says a program needs, arguments included."""
    sizes = program.memory_analysis()
    if sizes is None:
        return None
    return int(
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def check_fits(program: Any, limit: int) -> None:
    """Raises DoesNotFit where the compiler's estimate is above `limit` bytes; 0 is no limit."""
    needed = estimate(program)
    if needed is not None and jax.devices()[0].platform == "cpu":
        needed *= len(jax.devices())  # simulated devices share the memory
    if limit and needed is not None and needed > limit:
        raise DoesNotFit(f"the compiler asks for {_gib(needed)}, the limit is {_gib(limit)}")


def memory_limit() -> int:
    """Bytes that a program may need: what a CPU has free; 0 where the device itself refuses."""
    if jax.devices()[0].platform != "cpu":
        return 0
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = re.search(r"^MemAvailable:\s+(\d+) kB", file.read(), re.M)
    except OSError:
        return 0
    return int(int(free[1]) * 1024 * _MEMORY_KEPT) if free else 0


def memory(program: Any | None) -> dict[str, Any]:
    """What a program needs: as the device says, and as the compiler and the system say.

    Without a program there is no estimate.

    Returns:
      peak_bytes: the device's largest use since the process began; null where it does not tell.
      estimated_bytes: the compiler's estimate. process_peak_bytes: the process's largest resident
      size on the host.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "estimated_bytes": None if program is None else estimate(program),
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def allocator() -> str:
    """What gives this process its memory: a preloaded library that is known, or 'libc'."""
    try:
        mapped = pathlib.Path("/proc/self/maps").read_text("utf-8")
    except OSError:
        return "unknown"
    return next((name for name in ALLOCATORS if f"/lib{name}" in mapped), "libc")


def environment() -> dict[str, Any]:
    """Versions, and what the figures were measured on."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": round(os.getloadavg()[0], 2),
        "allocator": allocator(),
        "versions": runlog.versions(),
    }


def rates(seconds: float, images: int, operations: int) -> dict[str, Any]:
    """Images and model operations a second, and their share of the peak."""
    top, source = peak()
    return {
        "images_per_second": round(images / seconds, 3),
        "flops_per_second": round(operations / seconds),
        "utilisation": round(operations / seconds / top, 4),
        "peak_flops_per_second": round(top),
        "peak_source": source,
    }


def spread(times: list[float]) -> dict[str, float]:
    """Median, least and most of some seconds."""
    return {
        "median": round(statistics.median(times), 7),
        "min": round(min(times), 7),
        "max": round(max(times), 7),
    }


def fitting(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of `measure`; raises DoesNotFit if memory ran out, whoever noticed."""
    try:
        return measure()
    except DoesNotFit:
        raise
    except MemoryError as error:
        raise DoesNotFit("out of memory on the host") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error).splitlines()[0][:200]) from error


def sweep(
    measure: Callable[[int], dict[str, Any]], first: int, last: int, about: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Figures for batches of first, 2 first, 4 first .. up to `last` or the first that fails.

    Args:
      about: what a line about a batch that does not fit says besides.

    Raises:
      UserError: not even the first batch fits.
    """
    size = first
    while size <= last:
        try:
            yield {**fitting(lambda size=size: measure(size)), "fits": True}
        except DoesNotFit as error:
            yield {**about, "batch_size": size, "fits": False, "reason": str(error)}
            if size == first:
                raise UserError(f"not even a batch of {first} fits: {error}") from error
            return
        gc.collect()  # arrays in cycles would stay on the device
        size *= 2


@contextlib.contextmanager
def profiled(folder: str | os.PathLike | None) -> Iterator[None]:
    """Writes a trace for TensorBoard or Perfetto into a folder, if there is one."""
    if folder is None:
        yield
        return
    with jax.profiler.trace(os.fspath(folder)):
        yield


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
