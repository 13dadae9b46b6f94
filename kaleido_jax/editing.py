"""Sequences of edits of a document (Section 3.4, Figures 8 and 14), and their contact sheet.

A step is a list of (verb, argument); its edits are made in order, then the latents that it
resamples are drawn anew. The verbs and their arguments, the same on the command line and in JSONL:

    set       NAME=STRING        a whole latent, or `caption`
    word      OLD=NEW            in every latent that holds the words
    move      OBJECT=DX,DY       in thousandths of the picture
    resize    OBJECT=FACTOR      about its centre
    place     OBJECT=NUMBERS     a box (x1,y1,x2,y2) or an ellipse (xc,yc,r_major,r_minor,theta)
    add       PHRASE=NUMBERS
    remove    OBJECT
    voken     PLACE=ID           place 0..31
    keep      NAME,NAME          draw all other latents anew
    resample  NAME,NAME          draw these anew

OBJECT is as in `latents/edit.py`. Where one latent only is meant, its name stands before the
argument: `bbox:dog=10,0`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument, LatentError, drawing, edit, panel
from kaleido_jax.outputs import Output
from kaleido_jax.prompts import clean_prompt

Step = list[tuple[str, str]]

MAX_STEPS = 64
MAX_FILE_BYTES = 2**20
SHEET_COLUMNS = 4
_GAP = 4
_GROUNDED = ("bbox", "blob")
_NUMBERS = {4: "bbox", 5: "blob"}


def apply(document: LatentDocument, step: Step) -> LatentDocument:
    """The document after the edits of a step; what it resamples is not drawn here.

    Raises:
      UserError: an unknown verb (naming the nearest), or an edit that cannot be made.
    """
    for verb, argument in step:
        change = _EDITS.get(verb)
        if change is None and verb not in ("keep", "resample"):
            raise UserError(f"unknown edit {verb!r}{nearest(verb)}")
        if change is not None:
            try:
                document = change(document, argument)
            except LatentError as error:
                raise UserError(f"--{verb} {argument}: {error}") from None
    return document


def nearest(verb: str) -> str:
    """A hint at the verb that may have been meant."""
    near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f" (there are {', '.join(VERBS)})"


def free_latents(step: Step, names: Sequence[str]) -> list[str]:
    """Which of the model's latents a step draws anew, in order.

    Raises:
      UserError: an unknown latent, both `keep` and `resample`, or nothing kept or nothing drawn.
    """
    chosen = [(v, a) for v, a in step if v in ("keep", "resample")]
    if not chosen:
        return []
    if len({verb for verb, _ in chosen}) > 1:
        raise UserError("--keep and --resample say the same thing two ways; give one of them")
    verb = chosen[0][0]
    named = [word.strip() for _, argument in chosen for word in argument.split(",")]
    for name in named:
        if name not in names:
            known = ", ".join(names) or "none"
            raise UserError(f"--{verb} {name}: the model's latents are {known}")
    free = [name for name in names if (name in named) == (verb == "resample")]
    if not free:
        raise UserError(f"--{verb} {','.join(named)}: nothing is left to draw anew")
    return free


def read_steps(path: str | os.PathLike) -> list[Step]:
    """Steps from JSONL: a line {"move": "dog=10,0", "word": ["red=blue", ..]} is one step.

    Raises:
      UserError: naming the file and the line.
    """
    path = pathlib.Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path}: more than {MAX_FILE_BYTES:,} bytes")
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{path}: {reason}") from error
    steps = [
        _read_step(line, f"{path} line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    check_steps(steps, str(path))
    return steps


def check_steps(steps: Sequence[Step], where: str) -> None:
    """Raises UserError unless there are 1..MAX_STEPS steps, none empty."""
    if not 1 <= len(steps) <= MAX_STEPS:
        raise UserError(f"{where}: {len(steps)} steps; between 1 and {MAX_STEPS} can be made")
    for number, step in enumerate(steps, start=1):
        if not step:
            raise UserError(f"{where}: step {number} has no edit")


def _read_step(line: str, where: str) -> Step:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON") from error
    if not isinstance(found, dict):
        raise UserError(f'{where}: a step is an object, such as {{"word": "red=blue"}}')
    step = []
    for verb, arguments in found.items():
        if verb not in VERBS:
            raise UserError(f"{where}: unknown edit {verb!r}{nearest(verb)}")
        for argument in arguments if isinstance(arguments, list) else [arguments]:
            if not isinstance(argument, str):
                raise UserError(f"{where}: {verb} must be a string or a list of strings")
            step.append((verb, argument))
    return step


def contact_sheet(output: Output, steps: Sequence[Step]) -> UInt8[np.ndarray, "height width 3"]:
    """Before and after side by side, the latents drawn, the edits written below.

    Args:
      output: the document as it was, then after each step.
      steps: what was done.
    """
    titles = ["before", *("; ".join(f"{v} {a}" for v, a in step) for step in steps)]
    cells = []
    for image, document, title in zip(output.images, output.documents, titles, strict=True):
        drawn = panel(image, document.latents)
        words = [drawing.Span(title[:400], drawing.GREY)]
        cells.append(drawing.below(drawn, drawing.prose(words, drawn.shape[1])))
    columns = min(SHEET_COLUMNS, len(cells))
    bands = [_band(cells[i : i + columns], columns) for i in range(0, len(cells), columns)]
    return np.concatenate(bands, axis=0)


def _band(cells: Sequence[np.ndarray], columns: int) -> np.ndarray:
    tall, wide = max(cell.shape[0] for cell in cells), cells[0].shape[1]
    band = np.full((tall + _GAP, columns * (wide + _GAP), 3), 255, np.uint8)
    for column, cell in enumerate(cells):
        left = column * (wide + _GAP)
        band[: cell.shape[0], left : left + wide] = cell
    return band


# ---- the edits, each (document, argument) -> document ------------------------------------


def _pair(argument: str, form: str, last: bool = False) -> tuple[str, str]:
    """Both sides of an equals sign: the last one where numbers follow it."""
    head, equals, tail = argument.rpartition("=") if last else argument.partition("=")
    if not equals or not head.strip():
        raise UserError(f"{argument!r} must be {form}")
    return head.strip(), tail.strip()


def _numbers(text: str, argument: str, count: int | None = None) -> tuple[int, ...]:
    words = text.strip("() ").split(",")
    try:
        numbers = tuple(int(word) for word in words)
    except ValueError:
        raise UserError(f"{argument!r}: {text!r} must be whole numbers with commas") from None
    if count is not None and len(numbers) != count:
        raise UserError(f"{argument!r}: {count} numbers are needed, not {len(numbers)}")
    return numbers


def _set(document: LatentDocument, argument: str) -> LatentDocument:
    name, string = _pair(argument, "NAME=STRING")
    if name == "caption":
        caption = clean_prompt(string, "caption")
        return dataclasses.replace(document, caption=caption, log_prob=None)
    if name not in document.latents:
        have = ", ".join(["caption", *document.latents])
        raise UserError(f"--set {name}: the document has {have}")
    return document.replace(**{name: string})


def _over(
    document: LatentDocument,
    names: Sequence[str],
    target: str,
    change: Callable[[str, str, str], str],
) -> LatentDocument:
    """Changes each of the latents that holds the target; one at least, or the first error."""
    latent, colon, rest = target.partition(":")
    if colon and latent in document.latents:
        names, target = [latent], rest.strip()
    errors: list[LatentError] = []
    changed = {}
    for name in names:
        if name in document.latents:
            try:
                changed[name] = change(name, document.latents[name], target)
            except LatentError as error:
                errors.append(error)
    if not changed:
        if errors:
            raise errors[0]
        raise UserError(f"{target!r}: the document has none of {', '.join(names)}")
    return document.replace(**changed)


def _word(document: LatentDocument, argument: str) -> LatentDocument:
    old, new = _pair(argument, "OLD=NEW")
    names = ("text", *_GROUNDED)
    return _over(document, names, old, lambda n, s, w: edit.replace_word(n, s, w, new))


def _move(document: LatentDocument, argument: str) -> LatentDocument:
    target, text = _pair(argument, "OBJECT=DX,DY", last=True)
    dx, dy = _numbers(text, argument, 2)
    return _over(document, _GROUNDED, target, lambda n, s, w: edit.move(n, s, w, dx, dy))


def _resize(document: LatentDocument, argument: str) -> LatentDocument:
    target, text = _pair(argument, "OBJECT=FACTOR", last=True)
    try:
        factor = float(text)
    except ValueError:
        raise UserError(f"{argument!r}: {text!r} must be a number") from None
    return _over(document, _GROUNDED, target, lambda n, s, w: edit.resize(n, s, w, factor))


def _place(document: LatentDocument, argument: str) -> LatentDocument:
    target, text = _pair(argument, "OBJECT=NUMBERS", last=True)
    numbers = _numbers(text, argument)
    names = _kind(numbers, argument)
    return _over(document, names, target, lambda n, s, w: edit.place(n, s, w, numbers))


def _add(document: LatentDocument, argument: str) -> LatentDocument:
    phrase, text = _pair(argument, "PHRASE=NUMBERS", last=True)
    numbers = _numbers(text, argument)
    names = _kind(numbers, argument)
    return _over(document, names, phrase, lambda n, s, w: edit.add(n, s, w, numbers))


def _kind(numbers: tuple[int, ...], argument: str) -> list[str]:
    if len(numbers) not in _NUMBERS:
        raise UserError(f"{argument!r}: a box has 4 numbers, an ellipse 5, not {len(numbers)}")
    return [_NUMBERS[len(numbers)]]


def _remove(document: LatentDocument, argument: str) -> LatentDocument:
    return _over(document, _GROUNDED, argument, edit.remove)


def _voken(document: LatentDocument, argument: str) -> LatentDocument:
    place, number = _pair(argument, "PLACE=ID")
    change = {_numbers(place, argument, 1)[0]: _numbers(number, argument, 1)[0]}
    return _over(document, ["voken"], "", lambda n, s, w: edit.replace_vokens(s, change))


_EDITS: dict[str, Callable[[LatentDocument, str], LatentDocument]] = {
    "set": _set,
    "word": _word,
    "move": _move,
    "resize": _resize,
    "place": _place,
    "add": _add,
    "remove": _remove,
    "voken": _voken,
}
VERBS = (*_EDITS, "keep", "resample")
