"""`kaleido train --dry-run`: what a run will take, as tables for people or JSON for machines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from kaleido_jax import config as config_lib
from kaleido_jax import dry_run, flops, memory_plan
from kaleido_jax.train import Trainer

STATE = {
    "params": "trained parameters",
    "frozen": "frozen parameters",
    "opt_state": "optimizer",
    "ema": "average",
    "gradients": "gradients, within a step",
    "batch": "batch",
}


def run(
    config: ConfigDict,
    *,
    compiled: bool = True,
    every_parameter: bool = False,
    as_json: bool = False,
) -> None:
    """Prints the config on stdout and the tables on stderr, or with `as_json` all as one object.

    Args:
      compiled: compile the step for its memory; minutes for a large model.
      every_parameter: list every array of parameters, not groups of them.

    Raises:
      UserError: a model that the config cannot build, a batch that the devices cannot share.
    """
    trainer = Trainer(config)
    leaves = dry_run.parameters(trainer)
    report: dict[str, Any] = {
        "config": config.to_dict(),
        "mesh": dict(trainer.mesh.shape),
        "parameters": _groups(leaves, every_parameter),
        "parameters_by_part": _by_part(leaves),
        "bytes_per_device": dry_run.state_bytes(trainer),
    }
    say = _silent if as_json else _to_stderr
    say(_heading(config, trainer, leaves))
    say(_parameter_table(report))
    say(_state_table(report["bytes_per_device"]))
    report["flops_per_image"] = dry_run.operations(trainer)
    say(_operation_table(report["flops_per_image"], config.train.batch_size))
    if compiled:
        say("compiling the step for its memory (minutes for a large model) ..")
        report["memory_per_device"] = memory_plan.plan(trainer)
        say(_memory_lines(report["memory_per_device"]))
    text = json.dumps(report) + "\n" if as_json else config_lib.to_json(config)
    print(text, end="")


def _to_stderr(text: str) -> None:
    print(text + "\n", file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    del text


def _groups(leaves: Iterable[dry_run.Leaf], every_parameter: bool) -> list[dict[str, Any]]:
    """Rows of the table of parameters: one for each array, or for each group of alike ones."""
    groups: dict[tuple[str, bool], list[dry_run.Leaf]] = {}
    for leaf in leaves:
        name = leaf.name if every_parameter else _group(leaf.name)
        groups.setdefault((name, leaf.trained), []).append(leaf)
    rows = []
    for (name, trained), group in groups.items():
        largest = max(group, key=lambda leaf: leaf.size)
        rows.append(
            {
                "name": name,
                "part": largest.part,
                "arrays": len(group),
                "parameters": sum(leaf.size for leaf in group),
                "largest": list(largest.shape),
                "sharding": largest.sharding,
                "dtype": "/".join(sorted({leaf.dtype for leaf in group})),
                "trained": trained,
                "bytes_per_device": sum(leaf.local_bytes for leaf in group),
            }
        )
    return rows


def _group(name: str) -> str:
    """'denoiser/inner/trunk/up_*' of a parameter's name: levels and layers make one group."""
    modules = name.split("/")[:-1]
    return re.sub(r"_\d+(?=/|$)", "_*", "/".join(modules[: 3 + modules.count("inner")]))


def _by_part(leaves: Iterable[dry_run.Leaf]) -> dict[str, dict[str, int]]:
    parts: dict[str, dict[str, int]] = {}
    for leaf in leaves:
        row = parts.setdefault(leaf.part, {"trained": 0, "frozen": 0, "bytes_per_device": 0})
        row["trained" if leaf.trained else "frozen"] += leaf.size
        row["bytes_per_device"] += leaf.local_bytes
    return parts


def _heading(config: ConfigDict, trainer: Trainer, leaves: Sequence[dry_run.Leaf]) -> str:
    devices = trainer.mesh.devices
    counts = [sum(leaf.size for leaf in leaves if leaf.trained == kind) for kind in (True, False)]
    axes = " x ".join(f"{name} {size}" for name, size in trainer.mesh.shape.items())
    t = config.train
    return "\n".join(
        [
            f"parameters: {counts[0]:,} trained, {counts[1]:,} frozen",
            f"devices: {devices.size} ({devices.flat[0].device_kind}), mesh {axes}",
            f"steps: {t.num_steps:,} of {t.batch_size:,} examples, "
            f"{t.batch_size / devices.size:g} for each device",
        ]
    )


def _parameter_table(report: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            f"{row['arrays']:,}",
            f"{row['parameters']:,}",
            str(row["largest"]),
            row["sharding"],
            row["dtype"],
            "trained" if row["trained"] else "frozen",
            _bytes(row["bytes_per_device"]),
        ]
        for row in report["parameters"]
    ]
    parts = [
        [part, f"{row['trained'] + row['frozen']:,}", _bytes(row["bytes_per_device"])]
        for part, row in report["parameters_by_part"].items()
    ]
    title = ["parameters", "arrays", "number", "largest", "sharding", "type", "", "per device"]
    return f"{table(title, rows)}\n\n{table(['part', 'parameters', 'per device'], parts)}"


def _state_table(sizes: dict[str, int]) -> str:
    rows = [[label, _bytes(sizes[name])] for name, label in STATE.items()]
    return table(["memory", "per device"], rows)


def _operation_table(counts: dict[str, dict[str, float]], batch_size: int) -> str:
    total = {kind: flops.useful(found) for kind, found in counts.items()}
    rows = [
        [part, *(f"{counts[kind].get(part, 0) / 1e9:,.2f}" for kind in counts)]
        for part in counts["training"]
    ]
    rows.append(["total, without recomputed", *(f"{total[kind] / 1e9:,.2f}" for kind in counts)])
    whole = total["training"] * batch_size / 1e12
    return (
        table(["GFLOP per image", "forward", "forward + backward"], rows)
        + f"\na step of {batch_size:,} images: {whole:,.2f} TFLOP"
    )


def _memory_lines(found: dict[str, Any]) -> str:
    names = ("arguments", "results", "temporaries", "total")
    rows = [[name, _bytes(found[name])] for name in names]
    title = [f"planned by the {found['compiler'].upper()} compiler", "per device"]
    return table(title, rows) + f"\ncompiled in {found['seconds']:,.0f} s"


def _bytes(number: float) -> str:
    """'16.3 GB', in powers of ten; small numbers in full."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f} B"


def table(title: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: numbers and byte counts to the right, words to the left."""
    widths = [max(len(row[i]) for row in [title, *rows]) for i in range(len(title))]
    right = [all(re.match(r"[\d.,]+( \w+)?$", row[i]) for row in rows) for i in range(len(title))]
    lines = [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [title, *rows]
    ]
    return "\n".join(lines)
