"""Pictures in rows and columns, with their captions in vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from kaleido_jax.figures.style import COLOURS, GREY, INK, plain

_ENLARGED, _GAP = 96, 4  # pixels
_FRAME = 190  # grey: white pictures would run into the paper
Images = UInt8[np.ndarray, "n h w 3"]


def mosaic(images: Images, columns: int, rows: int) -> UInt8[np.ndarray, "height width 3"]:
    """Enlarged, framed pictures side by side; places without a picture stay white."""
    step = _ENLARGED + 2 + _GAP
    sheet = np.full((rows * step - _GAP, columns * step - _GAP, 3), 255, np.uint8)
    for number, image in enumerate(images[: rows * columns]):
        large = Image.fromarray(image).resize((_ENLARGED, _ENLARGED), Image.Resampling.BICUBIC)
        top, left = number // columns * step, number % columns * step
        sheet[top : top + _ENLARGED + 2, left : left + _ENLARGED + 2] = _FRAME
        sheet[top + 1 : top + _ENLARGED + 1, left + 1 : left + _ENLARGED + 1] = np.asarray(large)
    return sheet


def show(ax: Axes, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """A picture without axes."""
    ax.imshow(image)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def by_guidance(
    captions: Sequence[str],
    pictures: Mapping[str, Mapping[float, Sequence[Images]]],
    columns: int,
    rows: int,
) -> Figure:
    """Figures 1 and 7: for each caption a row of each model, guidance weights side by side.

    Args:
      pictures: of each model and weight, those of each caption.
      columns, rows: pictures of one cell.
    """
    weights = list(next(iter(pictures.values())))
    width, height = 0.725 * columns * len(weights) + 0.5, 0.86 * rows * len(pictures)
    figure = Figure(figsize=(width, height * len(captions)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(captions), 1, hspace=0.03))
    for number, (caption, part) in enumerate(zip(captions, parts, strict=True)):
        part.suptitle(f"“{plain(caption)}”", fontsize=13, color=INK, style="italic")
        axes = part.subplots(len(pictures), len(weights), squeeze=False)
        for row, (model, by_weight) in enumerate(pictures.items()):
            for column, (weight, cells) in enumerate(by_weight.items()):
                show(axes[row][column], mosaic(cells[number], columns, rows))
                if row == 0:
                    axes[row][column].set_title(f"guidance {weight:g}", fontsize=11, color=INK)
            label = {"kaleido": "Kaleido"}.get(model, model)
            colour = COLOURS.get(model, INK)
            axes[row][0].set_ylabel(label, fontsize=12, color=colour, fontweight="bold")
    return figure


def panels(
    images: Sequence[UInt8[np.ndarray, "h w 3"]], titles: Sequence[str], columns: int
) -> Figure:
    """Pictures with their latents on them, a title over each; heights may differ."""
    rows = -(-len(images) // columns)
    tallest = [
        max(image.shape[0] / image.shape[1] for image in images[r * columns : (r + 1) * columns])
        for r in range(rows)
    ]
    figure = Figure(figsize=(2.6 * columns, 2.6 * sum(tallest) + 0.35 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=tallest).reshape(-1)
    for ax in axes[len(images) :]:
        ax.set_visible(False)
    for ax, image, title in zip(axes, images, titles, strict=False):
        show(ax, image)
        ax.set_anchor("N")
        ax.set_title(plain(title), fontsize=9, color=GREY, wrap=True)
    return figure
