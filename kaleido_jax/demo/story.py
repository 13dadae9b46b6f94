"""The demo from beginning to end: three parts, then the page, all in one folder."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import matplotlib

import kaleido_jax
from kaleido_jax import generate, runlog
from kaleido_jax.data import toy as toy_data
from kaleido_jax.demo import (
    folder,
    page,
    scratch,
    scratch_figure,
    shapes,
    shapes_figure,
    toy,
    toy_figure,
)
from kaleido_jax.demo.checks import Check
from kaleido_jax.demo.progress import Progress, clock_text
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate.results import plain
from kaleido_jax.figures import tables

# Seconds of each part on two CPU cores without an accelerator.
EXPECTED = {"toy": 100.0, "shapes": 130.0, "scratch": 60.0, "page": 10.0}
QUICK = {"toy": 30.0, "shapes": 25.0, "scratch": 25.0, "page": 5.0}
MAX_SEED = 2**32 - 2


def run(
    out: str | os.PathLike,
    quick: bool,
    seed: int,
    say: Callable[[str], None],
    overwrite: bool,
    models: Mapping[str, str | os.PathLike] | None,
) -> pathlib.Path:
    """See `kaleido_jax.demo.run`."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"--seed is {seed}; it must be between 0 and {MAX_SEED}")
    target = folder.check(out, overwrite)
    pipes = shapes.open_models(models or {model: shapes.shipped(model) for model in shapes.MODELS})
    temporary = folder.begin(target)
    try:
        checks, progress = _tell(temporary, quick, seed, say, pipes)
        kept = folder.replace(temporary, target)
    except OSError as error:
        raise UserError(f"--out {target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if kept:
        say(f"the folder that was there is now {kept}")
    if quick:
        say("quick: a few steps of everything, so no claim is judged")
    for check in [] if quick else checks:
        say(check.line())
    say(f"done in {clock_text(progress.elapsed)}: open {target / 'index.html'}")
    return target / "index.html"


def _tell(
    place: pathlib.Path,
    quick: bool,
    seed: int,
    say: Callable[[str], None],
    pipes: Mapping[str, generate.Pipeline],
) -> tuple[list[Check], Progress]:
    """All parts into `place`, which at the end holds the results and nothing else."""
    runs = place / "runs"
    progress = Progress(say, QUICK if quick else EXPECTED)
    progress.start("toy", "two models of points, trained from scratch")
    points = toy.run(runs / "toy", quick, seed, progress.note)
    toy_figure.write(points, place)
    progress.start("shapes", "trained models of shapes draw at rising guidance")
    pictures = shapes.run(pipes, quick, seed, progress.note)
    coverage = shapes.table(pictures)
    panels = shapes_figure.write(pictures, coverage, place)
    progress.start("scratch", "a short training of shapes")
    short = scratch.run(runs / "scratch", quick, seed, progress.note)
    scratch_figure.write(short, place)
    progress.start("page", "writing the page")
    shutil.rmtree(runs)

    checks = [*toy.checks(points), *shapes.checks(coverage), *scratch.checks(short)]
    shares = toy.rows(points)
    tables.write_csv(place / "toy.csv", shares)
    tables.write_csv(place / "coverage.csv", coverage)
    tables.write_csv(place / "scratch.csv", scratch.rows(short))
    results = {
        "made_by": folder.MADE_BY,
        "version": kaleido_jax.__version__,
        "command": f"kaleido demo --seed {seed}{' --quick' if quick else ''}",
        "quick": quick,
        "seed": seed,
        "versions": runlog.versions() | {"matplotlib": matplotlib.__version__},
        "machine": machine(),
        "checks": [check.as_dict() for check in checks],
        "toy": {
            "weights": toy.WEIGHTS,
            "steps": points.steps,
            "batch_size": points.batch_size,
            "samples": points.data.shape[1],
            "centres": toy_data.CENTRES.tolist(),
            "shares": shares,
        },
        "shapes": {
            "weights": shapes.WEIGHTS,
            "captions": pictures.captions,
            "settings": pictures.settings,
            "factors": list(dict.fromkeys(row["factor"] for row in coverage)),
            "table": coverage,
            "readable": shapes.readable(pictures),
            "followed": shapes.followed(pictures),
            "panel_weight": shapes_figure.PANEL_WEIGHT,
        },
        "scratch": {
            "steps": short.steps,
            "stop": short.stop,
            "losses": short.losses,
            "resumed": short.resumed,
        },
    }
    progress.finish()
    results["seconds"] = progress.seconds | {"all": round(progress.elapsed, 1)}
    (place / "index.html").write_text(page.build(results, checks, panels), "utf-8")
    results["files"] = files(place)
    text = json.dumps(plain(results, digits=6), indent=1, allow_nan=False)
    (place / folder.RESULTS).write_text(text + "\n", "utf-8")
    return checks, progress


def machine() -> dict[str, Any]:
    """What it ran on, in general words."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "devices": ", ".join(sorted({device.device_kind for device in jax.devices()})),
    }


def files(place: pathlib.Path) -> Sequence[str]:
    """Every file of a folder by its relative path."""
    return sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
