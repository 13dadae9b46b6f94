"""Training runs of the toy for fault tests: in this process, and in others that can be killed."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from kaleido_jax import config as config_lib
from kaleido_jax.train import TrainState

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CONFIG = "tests/faults/toy.py"
PATIENCE = 240  # seconds after which a test gives a process up


def toy(*overrides: str) -> ConfigDict:
    """The config of CONFIG, as `start` gives it to processes."""
    return config_lib.load_config(str(ROOT / CONFIG), overrides)


def start(
    workdir: pathlib.Path,
    *overrides: str,
    config: pathlib.Path | str = CONFIG,
    wrapper: Sequence[str] = (),
    place: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> subprocess.Popen:
    """Starts `kaleido train` in a process of its own, its output in WORKDIR.log.

    Of several processes, process I writes WORKDIR and I with .log behind.
    """
    words = [*wrapper, sys.executable, "-m", "tests.faults.child", *place, "train"]
    words += ["--config", str(config), "--workdir", str(workdir)]
    words += [f"--config.{override}" for override in overrides]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with open(f"{workdir}{''.join(place)[:1]}.log", "ab") as log:
        return subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def wait_for(what: Callable[[], Any], process: subprocess.Popen, log: pathlib.Path | str) -> Any:
    """What `what` gives once it is true; fails where the process ends before."""
    until = time.monotonic() + PATIENCE
    while not (found := what()):
        if process.poll() is not None or time.monotonic() > until:
            text = pathlib.Path(log).read_text()
            pytest.fail(f"waited in vain, status {process.returncode}:\n{text}")
        time.sleep(0.002)
    return found


def steps_logged(workdir: pathlib.Path) -> int:
    """How many lines metrics.jsonl has."""
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill(process: subprocess.Popen) -> None:
    """kill -9, for good."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without the speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_state(a: TrainState, b: TrainState) -> None:
    """Equal to the bit: parameters, average, optimizer, step."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
