"""Compares the project with the reference numbers: `python -m tests.parity FOLDER`.

`--through checkpoint` or `--through export` writes the weights to our files and reads them first.

Every file of a known format in FOLDER is read (its format is the beginning of its name), and a
line says how far each output is off. The exit status is 1 if any is off by more than its
format's tolerance or any file cannot be read, 2 if there is nothing to read.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tests.carried import WAYS, through

Outputs = Mapping[str, tuple[np.ndarray, np.ndarray]]

# Beginning of the name: function path -> {output: (got, want)}. The longest match counts.
CHECKS = {
    "mdm_unet": "tests.parity_mdm:check_unet",
    "mdm_nested": "tests.parity_mdm:check_nested",
    "mdm_loss": "tests.parity_loss:check_loss",
    "mdm_sampler": "tests.parity_sampling:check_sampler",
    "mdm_sample.": "tests.parity_sampling:check_sample",
    "mdm_sample_": "tests.parity_sampling:check_sample",
    "solver": "tests.parity_sampling:check_solver",
    "guidance": "tests.parity_sampling:check_guidance",
    "t5_": "tests.parity_t5:check_t5",
    "t5x_": "tests.parity_t5:check_t5x",
    "inception": "tests.parity_metrics:check_inception",
    "metrics": "tests.parity_metrics:check_metrics",
}
# Largest error relative to the output's standard deviation.
TOLERANCE = 2e-4
TOLERANCES = {
    "mdm_sampler": 1e-5,
    "mdm_sample.": 2e-3,
    "mdm_sample_": 2e-3,
    "solver": 1e-4,
    "guidance": 1e-5,
    "metrics": 1e-5,
}


def format_of(path: pathlib.Path) -> str | None:
    """The format of a file or folder by its name, None if it has none of ours."""
    if path.suffix != ".npz" and not path.is_dir():
        return None
    matching = [p for p in CHECKS if path.name.startswith(p)]
    return max(matching, key=len, default=None)


def entries(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Files and folders of a known format, by name."""
    return (path for path in sorted(folder.iterdir()) if format_of(path))


def errors(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """Largest absolute error, and the same relative to the standard deviation of `want`.

    An output without spread (a single number) is measured against its largest magnitude. A
    different shape or a value that is not finite is infinitely far off.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return np.inf, np.inf
    if not want.size:
        return 0.0, 0.0
    absolute = float(np.abs(got - want).max())
    scale = float(want.std()) or float(np.abs(want).max()) or 1.0
    return absolute, absolute / scale


def compute(path: pathlib.Path) -> Outputs:
    """Our outputs and the reference's for one file."""
    return _function(CHECKS[format_of(path)])(path)


def _function(name: str) -> Any:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def report(path: pathlib.Path) -> tuple[bool, str]:
    """(whether the file holds, its line)."""
    kind = format_of(path)
    tolerance = TOLERANCES.get(kind, TOLERANCE)
    try:
        outputs = compute(path)
    except Exception as error:  # whatever a broken file makes of itself is a failure, not an end
        return False, f"{path.name}: FAILED {type(error).__name__}: {error}"
    if not outputs:
        return False, f"{path.name}: FAILED no outputs"
    parts, holds = [], True
    for name, (got, want) in outputs.items():
        absolute, relative = errors(got, want)
        fits = relative <= tolerance  # False for NaN
        mark = "" if fits else " FAILED"
        holds = holds and fits
        parts.append(f"{name} abs {absolute:.1e} rel {relative:.1e}{mark}")
    verdict = f"{'ok' if holds else 'FAILED'} (<= {tolerance:g})"
    return holds, f"{path.name}: {verdict} {', '.join(parts)}"


def main(arguments: Sequence[str]) -> int:
    """Runs every file of a folder; returns the exit status."""
    arguments, way = list(arguments), None
    if "--through" in arguments[:-1]:
        place = arguments.index("--through")
        _, way = arguments[place : place + 2]
        del arguments[place : place + 2]
    wrong = way is not None and way not in WAYS
    if len(arguments) != 1 or wrong or not pathlib.Path(arguments[0]).is_dir():
        usage = f"python -m tests.parity FOLDER (of reference files) [--through {'|'.join(WAYS)}]"
        print(f"usage: {usage}", file=sys.stderr)
        return 2
    paths = list(entries(pathlib.Path(arguments[0])))
    if not paths:
        print(f"{arguments[0]} holds no reference files", file=sys.stderr)
        return 2
    failed = 0
    for path in paths:
        with through(way):
            holds, line = report(path)
        failed += not holds
        print(line, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
