"""Pictures of part two: the grid of Figures 1 and 7, latents drawn on pictures, mode coverage."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from kaleido_jax.demo.shapes import Drawn, Shapes
from kaleido_jax.figures.grids import by_guidance
from kaleido_jax.figures.style import BASELINE, COLOURS, FAINT, GREY, INK, save
from kaleido_jax.latents import panel

GRID_CAPTIONS = (0, 1, 3)  # numbers in Shapes.captions
GRID_COLUMNS, GRID_ROWS = 4, 2  # pictures of one cell
PANEL_CAPTIONS, PANELS_EACH, PANEL_WEIGHT = (0, 2), 4, 4.0
_LABELS = {"baseline": "baseline", "kaleido": "Kaleido"}


def pictures_of(drawn: Drawn, caption: int, captions: int, count: int) -> list[int]:
    """Numbers of the first `count` pictures of one caption, or fewer where there are fewer."""
    each = len(drawn.images) // captions
    return list(range(caption * each, caption * each + min(count, each)))


def grid(result: Shapes) -> Figure:
    """Columns: guidance weights. For each caption a row of the baseline and a row of Kaleido."""
    captions = [number for number in GRID_CAPTIONS if number < len(result.captions)]

    def cell(drawn: Drawn, number: int) -> UInt8[np.ndarray, "n h w 3"]:
        count = GRID_COLUMNS * GRID_ROWS
        return drawn.images[pictures_of(drawn, number, len(result.captions), count)]

    pictures = {
        model: {weight: [cell(drawn, n) for n in captions] for weight, drawn in by_weight.items()}
        for model, by_weight in result.drawn.items()
    }
    texts = [result.captions[number] for number in captions]
    return by_guidance(texts, pictures, GRID_COLUMNS, GRID_ROWS)


def curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Effective modes over guidance, one panel for each factor of `shapes.table`."""
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    figure = Figure(figsize=(2.75 * len(factors), 3.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(factors)))
    for ax, factor in zip(axes, factors, strict=True):
        _curve(ax, factor, [row for row in rows if row["factor"] == factor])
    axes[0].set_ylabel("effective number of modes", fontsize=11, color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return figure


def _curve(ax: Axes, factor: str, rows: Sequence[dict[str, Any]]) -> None:
    weights = [row["guidance"] for row in rows]
    data = [row["data"] for row in rows]
    ax.plot(weights, data, ":", color=GREY, lw=1.6, label="data, and theory with z")
    theory = [row["theory"] for row in rows]
    ax.plot(weights, theory, "--", color=BASELINE, lw=1.2, label="theory without z (Eq. 6)")
    for model in ("baseline", "kaleido"):
        ax.errorbar(
            weights,
            [row[model] for row in rows],
            yerr=[row[f"{model}_error"] for row in rows],
            fmt="o-",
            ms=5,
            lw=2,
            elinewidth=1,
            color=COLOURS[model],
            label=f"{_LABELS[model]}, measured",
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(weights, [f"{weight:g}" for weight in weights])
    ax.minorticks_off()
    ax.set_xlabel("guidance", fontsize=10, color=INK)
    ax.set_title(factor.replace(" x ", " × "), fontsize=12, color=INK)
    top = np.nanmax([[row["data"], row["baseline"], row["kaleido"]] for row in rows])
    ax.set_ylim(0.9, max(1.5, 1 + 1.15 * (top - 1)))
    ax.grid(axis="y", color=FAINT, lw=0.7)
    ax.tick_params(colors=INK, labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def write(result: Shapes, rows: Sequence[dict[str, Any]], folder: pathlib.Path) -> list[dict]:
    """Writes shapes.png, coverage.png, coverage.svg and panels/*.png.

    Returns:
      The panels as {"file", "caption", "latents"}, in order.
    """
    save(grid(result), folder, "shapes", vector=False, dpi=120)
    save(curves(rows), folder, "coverage")
    return panels(result, folder)


def panels(result: Shapes, folder: pathlib.Path) -> list[dict]:
    """Kaleido's pictures with their latents on them and under them, into folder/panels."""
    drawn = result.drawn["kaleido"][PANEL_WEIGHT]
    (folder / "panels").mkdir()
    found = []
    for caption in PANEL_CAPTIONS:
        for number in pictures_of(drawn, caption, len(result.captions), PANELS_EACH):
            document = drawn.documents[number]
            name = f"panels/{len(found)}.png"
            Image.fromarray(panel(drawn.images[number], document.latents)).save(folder / name)
            found.append({"file": name, "caption": document.caption, "latents": document.latents})
    return found
