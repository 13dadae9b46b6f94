"""What generation gives back, and how it is written to a folder."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

import kaleido_jax
from kaleido_jax import beside, checkpoint
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument, panel, save_document, save_png

# A grid beyond this many pictures helps nobody and costs memory.
GRID_PICTURES = 256
GRID_GAP = 2


@dataclasses.dataclass(frozen=True)
class Output:
    """Pictures and what made them, in the same order.

    Attributes:
      images: uint8 pictures.
      samples: the same in model space, about [-1, 1]; the result itself where the data are not
        pictures (the 2-D toy).
      documents: one per picture.
      warnings: one line for each document whose latents were not as the decoder meant them.
    """

    images: UInt8[np.ndarray, "n h w c"]
    samples: Float[np.ndarray, "n h w c"]
    documents: list[LatentDocument]
    warnings: list[str]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a batch of pictures is, and how they look so far.

    Attributes:
      pictures: their numbers among those asked for.
      step: denoising steps taken, of `num_steps`.
      num_steps: of the whole.
      preview: uint8 pictures, the clean images that the last step predicted.
    """

    pictures: list[int]
    step: int
    num_steps: int
    preview: UInt8[np.ndarray, "n h w c"]


def to_uint8(
    samples: Float[np.ndarray, "n h w c"], centre: float, scale: float
) -> UInt8[np.ndarray, "n h w c"]:
    """The inverse of diffusion.normalize: round(x * scale + centre), clipped to 0..255."""
    return np.clip(np.round(samples * scale + centre), 0, 255).astype(np.uint8)


def grid(
    images: UInt8[np.ndarray, "n h w 3"], columns: int | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Pictures side by side on white, at most GRID_PICTURES; about square without `columns`."""
    images = images[:GRID_PICTURES]
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    columns = min(columns, count)
    shape = (rows * (height + GRID_GAP) - GRID_GAP, columns * (width + GRID_GAP) - GRID_GAP)
    sheet = np.full((*shape, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + GRID_GAP), (i % columns) * (width + GRID_GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


def check_folder(folder: str | os.PathLike, but: Collection[str] = ()) -> pathlib.Path:
    """Raises UserError if `folder` cannot become an output folder: it must be new or empty.

    Files named in `but` may lie there.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a new folder")
    try:
        if folder.exists() and any(path.name not in but for path in folder.iterdir()):
            raise UserError(f"{folder} already holds files; name a new or empty folder")
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error
    return folder


def write_outputs(
    output: Output,
    folder: str | os.PathLike,
    sheets: Mapping[str, UInt8[np.ndarray, "h w 3"]] | None = None,
) -> pathlib.Path:
    """Writes pictures, documents, panels and a grid; all of the folder appears at once.

        000000.png         the picture with its document inside
        000000.json        the document
        panels/000000.png  the picture with its latents drawn on it (where there are any)
        grid.png           all pictures, one row per prompt where there are several
        samples.npy        in place of all PNGs where the data are not RGB pictures
        manifest.json      versions, counts, warnings, and a SHA-256 per file

    Args:
      sheets: further pictures by file name.

    Raises:
      UserError: the folder already holds something or cannot be written.
    """
    folder = check_folder(folder)
    try:
        with beside.new_folder(folder) as temporary:
            for name, sheet in (sheets or {}).items():
                Image.fromarray(sheet).save(temporary / name)
            _write(output, temporary)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def write_picture(
    folder: pathlib.Path, number: int, image: UInt8[np.ndarray, "h w c"], document: LatentDocument
) -> None:
    """Writes a document, its panel and last its picture, each beside its place and renamed.

    Where the data are not RGB pictures there is the document alone.
    """
    name = f"{number:06d}"
    save_document(folder / f"{name}.json", document)
    if image.shape[-1] != 3:
        return
    if document.latents:
        (folder / "panels").mkdir(exist_ok=True)
        with beside.new_file(folder / "panels" / f"{name}.png") as temporary:
            Image.fromarray(panel(image, document.latents)).save(temporary, format="PNG")
    save_png(folder / f"{name}.png", image, document)


def _write(output: Output, folder: pathlib.Path) -> None:
    pictures = output.images.shape[-1] == 3
    for i, document in enumerate(output.documents):
        write_picture(folder, i, output.images[i], document)
    if pictures:
        sheet = grid(output.images, _pictures_per_prompt(output.documents))
        Image.fromarray(sheet).save(folder / "grid.png")
    else:
        np.save(folder / "samples.npy", output.samples, allow_pickle=False)
    first = output.documents[0]
    manifest = {
        "version": 1,
        "made_by": f"kaleido_jax {kaleido_jax.__version__}",
        "model_config_hash": first.model_config_hash,
        "checkpoint_hash": first.checkpoint_hash,
        "pictures": len(output.documents),
        "warnings": output.warnings,
        "files": checkpoint.hash_files(folder),
    }
    checkpoint.write_json(folder / "manifest.json", manifest)


def _pictures_per_prompt(documents: list[LatentDocument]) -> int | None:
    """Length of the runs of one caption if there are several of equal length above 1."""
    captions = [document.caption for document in documents]
    starts = [i for i in range(len(captions)) if i == 0 or captions[i] != captions[i - 1]]
    lengths = {b - a for a, b in zip(starts, [*starts[1:], len(captions)], strict=True)}
    return lengths.pop() if len(starts) > 1 and len(lengths) == 1 and lengths != {1} else None
