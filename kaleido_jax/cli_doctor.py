"""`kaleido doctor`: what this machine offers and what is missing, or the state of a workdir."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import shutil

import kaleido_jax
from kaleido_jax.errors import UserError

# What each extra is for, and one module of each of its distributions that must be importable.
EXTRAS = {
    "data": ("TensorBoard, seqio tasks, TFDS records", ("tensorflow", "seqio", "clu")),
    "annotate": ("making latents for photographs", ("torch", "transformers", "apache_beam")),
    "ui": ("the page in the browser", ("gradio",)),
    "test": ("running the tests", ("pytest", "xdist", "hypothesis")),
}


def run() -> int:
    """Prints the report; returns 0, or 1 if the core install does not work."""
    print(
        f"kaleido_jax {kaleido_jax.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )
    problems = [*_versions(), *_memory(), *_devices()]
    _extras()
    for problem in problems:
        print(f"to mend: {problem}")
    print("nothing to mend" if not problems else f"{len(problems)} to mend")
    return 1 if problems else 0


def check_workdir(workdir: pathlib.Path) -> int:
    """Verifies every checkpoint of a workdir against its manifest and prints what is whole.

    Returns:
      0, or 1 if a checkpoint is damaged or there is none.

    Raises:
      UserError: there is no such workdir.
    """
    from kaleido_jax.checkpoint import Checkpoints

    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is not a workdir: it has no config.json")
    checkpoints = Checkpoints(workdir)
    problems = dict(checkpoints.problems())
    for step, problem in sorted(problems.items()):
        print(f"step {step}: {'whole' if problem is None else f'DAMAGED: {problem}'}")
    whole = [step for step, problem in problems.items() if problem is None]
    for path in checkpoints.leftovers():
        print(f"left over: {path.name} (`kaleido train` removes it when no run is using it)")
    for path in checkpoints.set_aside():
        print(f"set aside: {path} (delete it when nothing of it is needed)")
    for step in sorted(problems.keys() - set(whole)):
        folder = checkpoints.step_folder(step)
        print(f"to mend: put a copy of {folder} in its place, or delete it")
    if not problems:
        print("no checkpoint yet: training starts at step 0")
    elif not whole:
        print("no checkpoint is whole: `kaleido train` goes on only with --start-anew, at step 0")
    else:
        print(f"`kaleido train` goes on from step {max(whole)}")
    return 0 if whole and len(whole) == len(problems) else 1


def _versions() -> list[str]:
    """Prints the versions of the core packages; returns those missing or out of bounds."""
    from packaging.requirements import Requirement

    problems = []
    try:
        lines = importlib.metadata.requires("kaleido_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return ["kaleido_jax is not installed: pip install -c constraints.txt -e ."]
    found = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing: pip install '{requirement}'")
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{requirement.name} {version} is installed, {requirement.specifier} is needed: "
                f"pip install -c constraints.txt '{requirement}'"
            )
    print("versions:", ", ".join(found))
    return problems


def _memory() -> list[str]:
    """Prints memory and disk; returns nothing to mend unless the disk here is almost full."""
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    print(
        f"memory: {_total_memory()}; {os.cpu_count()} CPU cores; {free:.1f} GiB free on disk here"
    )
    return [f"only {free:.2f} GiB are free on disk here"] if free < 1 else []


def _total_memory() -> str:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", file.read(), re.M))
    except OSError:
        return "not known on this system"
    total, available = (int(fields[name]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    return f"{available:.1f} GiB available of {total:.1f} GiB"


def _devices() -> list[str]:
    """Prints jax's devices after a sum on each; returns what failed."""
    try:
        import jax
        import jax.numpy as jnp

        devices = jax.devices()
        for device in devices:
            jax.block_until_ready(jax.device_put(jnp.ones(8), device) + 1)
    except Exception as error:  # whatever a driver raises is the finding
        first = str(error).strip().split("\n")[0]
        return [f"jax finds no working device: {type(error).__name__}: {first}"]
    kinds = {}
    for device in devices:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    print(f"devices: {named} (jax backend {jax.default_backend()})")
    for device in devices:
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            print(f"  {device}: {stats['bytes_limit'] / 2**30:.1f} GiB")
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        return [
            'there is an NVIDIA driver, but jax uses the CPU: pip install "jax[cuda12]" in '
            "the version of jax above"
        ]
    return []


def _extras() -> None:
    """Prints which extras are there; none is needed for demo, train and sample."""
    for name, (purpose, modules) in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        state = "installed" if not missing else f"not installed ({', '.join(missing)} missing)"
        print(f"extra {name} ({purpose}): {state}")
