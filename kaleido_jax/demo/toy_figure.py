"""The picture of Figure 3: points by class, a row per model, a column per guidance weight."""

from __future__ import annotations

import pathlib

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kaleido_jax.data import toy as data
from kaleido_jax.demo.toy import Points, Shares, Toy, mode_shares
from kaleido_jax.figures.style import GREY, INK, save

CLASS_COLOURS = ("#c4442b", "#2166ac")
ROWS = {"baseline": "baseline\np(x | c)", "kaleido": "Kaleido\np(z | c) p(x | z, c)"}
X_LIMITS, Y_LIMITS = (-1.75, 1.75), (-1.15, 0.95)


def draw(result: Toy) -> Figure:
    """Columns: the data, then each guidance weight; the share of each mode beside its centre."""
    weights = list(next(iter(result.samples.values())))
    columns = 1 + len(weights)
    figure = Figure(figsize=(2.6 * columns, 3.5), layout="constrained")
    axes = figure.subplots(len(ROWS), columns, sharex=True, sharey=True)
    for row, (model, label) in enumerate(ROWS.items()):
        panels = [result.data, *(result.samples[model][w] for w in weights)]
        for column, (ax, points) in enumerate(zip(axes[row], panels, strict=True)):
            _panel(ax, points, mode_shares(points))
            if row == 0:
                title = "data" if column == 0 else f"guidance {weights[column - 1]:g}"
                ax.set_title(title, fontsize=12, color=INK, pad=6)
        axes[row][0].set_ylabel(label, fontsize=11, color=INK, labelpad=8)
    return figure


def _panel(ax: Axes, points: Points, shares: Shares) -> None:
    for group, own in enumerate(points):
        ax.scatter(*own.T, s=5, c=CLASS_COLOURS[group], alpha=0.35, linewidths=0, rasterized=True)
    for group, centres in enumerate(data.CENTRES):
        for mode, (x, y) in enumerate(centres):
            ax.plot(x, y, "+", color="white", ms=10, mew=3.2, zorder=4)
            ax.plot(x, y, "+", color=INK, ms=8, mew=1.4, zorder=5)
            above = mode == 0
            ax.annotate(
                f"{shares[group, mode]:.0%}",
                # Near modes lie side by side: their numbers lean outwards.
                (x if above else x + np.sign(x) * 0.16, y + (0.36 if above else -0.42)),
                ha="center",
                va="bottom" if above else "top",
                fontsize=10,
                fontweight="bold",
                color=CLASS_COLOURS[group],
            )
    ax.set(xlim=X_LIMITS, ylim=Y_LIMITS, xticks=[], yticks=[], aspect="equal")
    for spine in ax.spines.values():
        spine.set(color=GREY, linewidth=0.8)


def write(result: Toy, folder: pathlib.Path) -> None:
    """Writes toy.png and toy.svg."""
    save(draw(result), folder, "toy")
