"""Over the noise: what the network makes of its condition, and what sampling from there keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kaleido_jax.figures.style import BASELINE, FAINT, GREY, KALEIDO

METRICS = ("box_iou", "blob_iou", "hue", "shade", "shape", "voken")
_ERROR = "error, "


def draw(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] = METRICS) -> Figure:
    """Two panels over sigma / alpha, or only the first where no detector saw anything.

    Args:
      rows: of `evaluate.by_noise.rows`.
      metrics: a detector's measures to draw, those that are there.
    """
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["measure"], []).append(row)
    errors = [name for name in lines if name.startswith(_ERROR)]
    seen = [name for name in metrics if name in lines]
    figure = Figure(figsize=(5.2 if not seen else 10.0, 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 2 if seen else 1))
    words = {"own": "own condition", "other": "another picture's", "none": "none"}
    for name, colour in zip(errors, (KALEIDO, BASELINE, GREY), strict=True):
        _line(axes[0], lines[name], words[name.removeprefix(_ERROR)], colour)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("squared error of the clean picture")
    for i, name in enumerate(seen):
        _line(axes[1], lines[name], name, f"C{i}")
    if seen:
        axes[1].set_ylabel("after sampling from there")
        if all(row["value"] <= 1 for name in seen for row in lines[name]):  # angles are more
            axes[1].set_ylim(top=1.02)
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xlabel("noise, sigma / alpha of the highest resolution")
        ax.grid(color=FAINT, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9)
    return figure


def _line(ax: Axes, rows: Sequence[Mapping[str, Any]], label: str, colour: str) -> None:
    rows = [row for row in rows if row["level"] and np.isfinite(row["value"])]
    x = [row["noise"] for row in rows]
    values = np.array([row["value"] for row in rows])
    reach = np.abs(np.array([(row["low"], row["high"]) for row in rows]).T - values)
    ax.errorbar(x, values, np.nan_to_num(reach), fmt="o-", color=colour, label=label, ms=4)
