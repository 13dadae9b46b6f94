"""A session of edits as a folder: a tree of pictures that can be made again to the same bytes.

    session.json   {"version": 1, "made_by": .., "pictures": [entry, ..]}
    000000.png     picture 0 with its document inside, and so on

An entry says how its picture was made; all before it may be its parents:

    {"made": "drawn", "together": [0, 1, 2], "batch_size": 4}   rendered in one batch
    {"made": "opened"}                                          came from elsewhere, kept as it is
    {"made": "edited", "parent": 0, "step": [["set", "bbox=.."], ["resample", "voken"]],
     "seed": 5, "candidates": 16, "noise": null}                a step of edits, rendered alone

`step` is as in editing.py, `seed` decides what it drew anew, `noise` is the seed of other noise.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

import kaleido_jax
from kaleido_jax import checkpoint
from kaleido_jax.batches import MAX_SEED, check_range
from kaleido_jax.bundle import new_folder
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument, png_bytes, read_png, save_png

if TYPE_CHECKING:
    from kaleido_jax.generate import Pipeline
    from kaleido_jax.outputs import Output

FILE = "session.json"
MAX_PICTURES = 1000
MAX_FILE_BYTES = 2**23
MAX_TOGETHER = 64
DRAWN, EDITED, OPENED = "drawn", "edited", "opened"


@dataclasses.dataclass(frozen=True)
class Change:
    """How a picture came from its parent. Raises UserError if a number is out of bounds.

    Attributes:
      step: edits as editing.py has them; () where only the noise is another.
      seed: of what the step draws anew.
      candidates: draws to choose from where a kept latent follows a drawn one, 1..256.
      noise: seed of other noise; None keeps the document's.
    """

    step: tuple[tuple[str, str], ...]
    seed: int = 0
    candidates: int = 16
    noise: int | None = None

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("candidates", self.candidates, 1, 256)
        if self.noise is not None:
            check_range("noise", self.noise, 0, MAX_SEED)


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a session.

    Attributes:
      number: its place in the session, from 0.
      image: as it was made.
      document: what made it.
      parent: the picture that it was edited from.
      change: how; None unless it was edited.
      together: numbers of the pictures drawn in one batch, its own among them; () if it was not
        drawn here.
      batch_size: of that batch.
    """

    number: int
    image: UInt8[np.ndarray, "height width 3"]
    document: LatentDocument
    parent: int | None = None
    change: Change | None = None
    together: tuple[int, ...] = ()
    batch_size: int = 1

    @property
    def made(self) -> str:
        """'drawn', 'edited' or 'opened'."""
        if self.change is not None:
            return EDITED
        return DRAWN if self.together else OPENED

    @functools.cached_property
    def png(self) -> bytes:
        """The file itself: the picture with its document inside."""
        return png_bytes(self.image, self.document)

    @property
    def name(self) -> str:
        """Its file in the folder."""
        return f"{self.number:06d}.png"

    def entry(self) -> dict[str, Any]:
        """What session.json says of it."""
        if self.change is not None:
            change = dataclasses.asdict(self.change)
            change["step"] = [list(edit) for edit in self.change.step]
            return {"made": EDITED, "parent": self.parent, **change}
        if self.together:
            return {
                "made": DRAWN,
                "together": list(self.together),
                "batch_size": self.batch_size,
            }
        return {"made": OPENED}


def make_edit(
    pipe: Pipeline,
    document: LatentDocument,
    change: Change,
    on_step: Callable[[Any], None] | None = None,
    on_draw: Callable[[], None] | None = None,
) -> tuple[UInt8[np.ndarray, "height width 3"], LatentDocument]:
    """The picture and document after a change. Raises UserError if it cannot be made.

    `on_step` is as in `Pipeline.render`, `on_draw` as in `Pipeline.draw_latents`.
    """
    changed = pipe.edit_document(
        document,
        list(change.step),
        seed=change.seed,
        candidates=change.candidates,
        on_draw=on_draw,
    )
    output = pipe.render(changed, seed=change.noise, batch_size=1, on_step=on_step)
    return output.images[0], output.documents[0]


def write_session(pictures: Sequence[Picture], folder: str | os.PathLike) -> pathlib.Path:
    """Writes a session into a new folder, which appears whole.

    Raises:
      UserError: no picture, the folder exists, or it cannot be written.
    """
    if not pictures:
        raise UserError("the session has no picture yet")
    with new_folder(folder) as beside:
        for picture in pictures:
            save_png(beside / picture.name, picture.image, picture.document)
        checkpoint.write_json(
            beside / FILE,
            {
                "version": 1,
                "made_by": f"kaleido_jax {kaleido_jax.__version__}",
                "pictures": [picture.entry() for picture in pictures],
            },
        )
    return pathlib.Path(folder)


def read_session(folder: str | os.PathLike) -> list[Picture]:
    """Reads what `write_session` wrote.

    Raises:
      UserError: naming the file, and the picture that is not right.
    """
    folder = pathlib.Path(folder)
    path = folder / FILE
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path}: more than {MAX_FILE_BYTES:,} bytes")
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name a session's folder") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON") from error
    if not isinstance(data, dict) or data.get("version") != 1:
        raise UserError(f"{path}: not a session of version 1")
    entries = data.get("pictures")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_PICTURES:
        raise UserError(f"{path}: 'pictures' must list 1 to {MAX_PICTURES} pictures")
    pictures = []
    for number, entry in enumerate(entries):
        where = f"{path}: picture {number}"
        image, document = read_png(folder / f"{number:06d}.png")
        try:
            pictures.append(Picture(number, image, document, **_read_entry(entry, number)))
        except (UserError, KeyError, TypeError, ValueError) as error:
            reason = error if isinstance(error, UserError) else "an entry is not as it must be"
            raise UserError(f"{where}: {reason}") from error
    for picture in pictures:
        for other in picture.together:
            same = 0 <= other < len(pictures) and pictures[other].together == picture.together
            if not same or picture.number not in picture.together:
                raise UserError(f"{path}: picture {picture.number}: 'together' names others")
    return pictures


def _read_entry(entry: dict[str, Any], number: int) -> dict[str, Any]:
    rest = dict(entry)
    made = rest.pop("made")
    if made == OPENED and not rest:
        return {}
    if made == DRAWN:
        together, batch_size = rest.pop("together"), rest.pop("batch_size")
        check_range("batch_size", batch_size, 1, MAX_TOGETHER)
        for other in together:
            check_range("together", other, 0, MAX_PICTURES)
        if together and not rest and len(set(together)) == len(together) <= MAX_TOGETHER:
            return {"together": tuple(together), "batch_size": batch_size}
    if made == EDITED:
        parent, step = rest.pop("parent"), rest.pop("step")
        check_range("parent", parent, 0, number - 1)
        edits = tuple((verb, argument) for verb, argument in step)
        if all(isinstance(word, str) for edit in edits for word in edit):
            return {"parent": parent, "change": Change(edits, **rest)}
    raise ValueError(made)


def replay(pipe: Pipeline, folder: str | os.PathLike, out: str | os.PathLike) -> list[str]:
    """Makes every picture of a session again, into a new folder.

    Args:
      pipe: the model that the session was made with.
      folder: of the session.
      out: a new folder.

    Returns:
      Names of the pictures whose bytes differ from those in `folder`.

    Raises:
      UserError: another model, a session that cannot be read, an edit that cannot be made.
    """
    folder, out = pathlib.Path(folder), pathlib.Path(out)
    before = read_session(folder)
    after: list[Picture] = []
    drawn: dict[tuple[int, ...], Output] = {}
    for picture in before:
        if picture.made == OPENED:
            after.append(picture)
            continue
        if picture.change is not None:
            image, document = make_edit(pipe, after[picture.parent].document, picture.change)
        else:
            together = picture.together
            if together not in drawn:
                documents = [before[i].document for i in together]
                drawn[together] = pipe.render(documents, batch_size=picture.batch_size)
            place, made = together.index(picture.number), drawn[together]
            image, document = made.images[place], made.documents[place]
        if document.checkpoint_hash != picture.document.checkpoint_hash:
            raise UserError(
                f"{folder / picture.name} was made by checkpoint "
                f"{picture.document.checkpoint_hash[:16]}, this one is "
                f"{document.checkpoint_hash[:16]}"
            )
        after.append(dataclasses.replace(picture, image=image, document=document))
    write_session(after, out)
    return [p.name for p in before if (folder / p.name).read_bytes() != (out / p.name).read_bytes()]
