"""What all figures share: colours, and how they are written."""

from __future__ import annotations

import pathlib

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, GREY, FAINT = "#202028", "#8a8a94", "#d8d8de"
BASELINE, KALEIDO = "#8c6d1f", "#1f6fb4"
COLOURS = {"baseline": BASELINE, "kaleido": KALEIDO}
DPI = 160
# Words of an SVG become outlines that look alike everywhere; ids do not change from run to run.
_STYLE = {"svg.fonttype": "path", "svg.hashsalt": "kaleido"}


def plain(words: str) -> str:
    """Words of a user as matplotlib draws them literally: between two $ it would read a formula."""
    return words.replace("$", r"\$")


def save(
    figure: Figure, folder: pathlib.Path, name: str, vector: bool = True, dpi: int = DPI
) -> None:
    """Writes NAME.png, and with `vector` NAME.svg, on white; equal figures give equal bytes."""
    FigureCanvasAgg(figure)
    with matplotlib.rc_context(_STYLE):
        figure.savefig(folder / f"{name}.png", dpi=dpi, facecolor="white")
        if vector:
            figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})
