"""Pictures of part three: losses of both runs, and what the model draws so early."""

from __future__ import annotations

import pathlib

from matplotlib.figure import Figure
from PIL import Image

from kaleido_jax.demo.scratch import Scratch
from kaleido_jax.figures.grids import mosaic
from kaleido_jax.figures.style import FAINT, INK, KALEIDO, save

COLUMNS = 4


def draw(result: Scratch) -> Figure:
    """Both losses over steps, the second run as rings on the first."""
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    for ax, name, title in zip(
        figure.subplots(1, 2),
        ("loss_dm", "loss_ar"),
        ("denoising loss", "latents: nats per token"),
        strict=True,
    ):
        points = [
            [(row["step"], row[name]) for row in rows] for rows in (result.losses, result.resumed)
        ]
        ax.plot(*zip(*points[0], strict=True), "-", color=KALEIDO, lw=1.6, label="unbroken run")
        ax.plot(
            *zip(*points[1], strict=True),
            "o",
            mfc="none",
            color=INK,
            ms=4.5,
            mew=0.9,
            label="stopped and gone on with",
        )
        ax.axvline(result.stop, color=INK, lw=0.8, ls=":")
        ax.set_title(title, fontsize=11, color=INK)
        ax.set_xlabel("step", fontsize=10, color=INK)
        ax.grid(axis="y", color=FAINT, lw=0.7)
        ax.tick_params(colors=INK, labelsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def write(result: Scratch, folder: pathlib.Path) -> None:
    """Writes scratch.png, scratch.svg and scratch_samples.png."""
    save(draw(result), folder, "scratch")
    rows = -(-len(result.images) // COLUMNS)
    Image.fromarray(mosaic(result.images, COLUMNS, rows)).save(folder / "scratch_samples.png")
