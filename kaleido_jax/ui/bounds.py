"""What people may ask for: every value from the page or the API is checked here, on the server.

Whatever is not in bounds raises UserError with one line, before any memory of a device is taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kaleido_jax import editing
from kaleido_jax.batches import MAX_SEED, check_range
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LATENTS, LatentDocument, LatentError, bbox, blob, read_png
from kaleido_jax.prompts import MAX_PROMPT_CHARACTERS, clean_prompt
from kaleido_jax.samplers import SAMPLERS
from kaleido_jax.session_folder import Change
from kaleido_jax.settings import Settings

MAX_NUMBER = 8
MAX_STEPS = 250
MAX_GUIDANCE = 50.0
MAX_TEMPERATURE = 5.0
MAX_WEIGHTS = 4
MAX_UPLOAD_BYTES = 8 * 2**20
MAX_SHAPES_CHARACTERS = 2**17
MAX_EDITS = 32
MAX_ARGUMENT = 20_000
# Pictures of one request are drawn in batches of this many, a single one alone: two programs.
BATCH = 4

_SHAPES = {
    "bbox": (bbox.Segment, bbox.Box, "boxes"),
    "blob": (blob.Segment, blob.Ellipse, "ellipses"),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """Pictures of a caption, all of it in bounds.

    Attributes:
      caption: cleaned.
      number: of pictures.
      seed: of their random numbers.
      settings: how to draw them.
    """

    caption: str
    number: int
    seed: int
    settings: Settings

    @property
    def batch_size(self) -> int:
        """Rows of the program that draws them."""
        return 1 if self.number == 1 else BATCH

    def options(self) -> dict[str, Any]:
        """The settings as keyword arguments of the pipeline."""
        return {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(Settings)}


def check_request(
    defaults: Settings,
    *,
    caption: Any,
    number: Any = 1,
    guidance: Any = None,
    steps: Any = None,
    sampler: Any = None,
    temperature: Any = None,
    seed: Any = 0,
) -> Request:
    """A request for pictures. None takes the model's default.

    Args:
      defaults: of the model.
      caption: 1 to 2,000 characters.
      number: pictures, 1..8.
      guidance: 0..50.
      steps: 1..250.
      sampler: a name in samplers.SAMPLERS.
      temperature: of the latents, 0..5.
      seed: 0..2**32 - 1.

    Raises:
      UserError: anything out of bounds.
    """
    changes: dict[str, Any] = {}
    if guidance is not None:
        changes["guidance_weight"] = real("the guidance weight", guidance, 0.0, MAX_GUIDANCE)
    if steps is not None:
        changes["num_steps"] = whole("the number of steps", steps, 1, MAX_STEPS)
    if sampler is not None:
        changes |= _sampler(_one_of("the sampler", sampler, SAMPLERS), defaults)
    if temperature is not None:
        changes["temperature"] = real("the temperature", temperature, 0.0, MAX_TEMPERATURE)
    settings = defaults.replace(changes)
    whole("the number of steps", settings.num_steps, 1, MAX_STEPS)
    return Request(
        _caption(caption),
        whole("the number of pictures", number, 1, MAX_NUMBER),
        whole("the seed", seed, 0, MAX_SEED),
        settings,
    )


def _sampler(name: str, defaults: Settings) -> dict[str, Any]:
    return {"sampler": name, "eta": defaults.eta if name == "ddim" else 0.0}


def check_weights(text: Any) -> tuple[float, ...]:
    """Guidance weights, each once: "1, 4, 8". Raises UserError unless there are 1..4 of them."""
    if not isinstance(text, str) or len(text) > 200:
        raise UserError("guidance weights are numbers with commas, such as 1, 4, 8")
    words = [word for word in text.replace(";", ",").split(",") if word.strip()]
    if not 1 <= len(words) <= MAX_WEIGHTS:
        raise UserError(f"{len(words)} guidance weights; 1 to {MAX_WEIGHTS} can be compared")
    found = [real("a guidance weight", word, 0.0, MAX_GUIDANCE) for word in words]
    return tuple(dict.fromkeys(found))


def check_change(
    document: LatentDocument,
    strings: dict[str, Any],
    redraw: Sequence[str],
    *,
    names: Sequence[str],
    seed: Any,
    noise: Any = None,
) -> Change:
    """The change from a document to what somebody has written.

    Args:
      document: of the picture.
      strings: by the name of a latent, or `caption`; None is as it was.
      redraw: latents to draw anew.
      names: the model's latents.
      seed: of what is drawn anew.
      noise: seed of other noise; None keeps it.

    Raises:
      UserError: nothing changes, or what changes is not valid.
    """
    step: list[list[str]] = []
    for name, string in strings.items():
        if string is None or name in redraw:
            continue
        if name == "caption":
            string, old = _caption(string), document.caption
        else:
            string, old = check_latent(name, string), document.latents.get(name)
        if string != old:
            step.append(["set", f"{name}={string}"])
    if redraw:
        step.append(["resample", ",".join(redraw)])
    return check_step(document, step, names=names, seed=seed, noise=noise)


def check_step(
    document: LatentDocument, step: Any, *, names: Sequence[str], seed: Any, noise: Any
) -> Change:
    """One step of edits, as editing.py has them, that can be made on a document.

    Args:
      step: [[verb, argument], ..], at most 32 of them.
      names, seed, noise: as `check_change`.

    Raises:
      UserError: anything else, or an edit that cannot be made or changes nothing.
    """
    if not isinstance(step, (list, tuple)) or len(step) > MAX_EDITS:
        raise UserError(f"a step is a list of at most {MAX_EDITS} edits")
    edits = []
    for edit in step:
        right = isinstance(edit, (list, tuple)) and len(edit) == 2
        if not right or not all(isinstance(w, str) and len(w) <= MAX_ARGUMENT for w in edit):
            raise UserError('an edit is a pair of texts, such as ["set", "caption=a dog"]')
        edits.append((edit[0], edit[1]))
    if noise is not None:
        noise = whole("the seed of the noise", noise, 0, MAX_SEED)
    change = Change(tuple(edits), whole("the seed", seed, 0, MAX_SEED), noise=noise)
    # Refused now rather than after waiting in the queue.
    changed = editing.apply(document, edits)
    free = editing.free_latents(edits, names)
    if changed == document and not free and noise in (None, document.seed):
        raise UserError("nothing is changed yet: edit something, or ask for other noise")
    return change


def check_list(name: str, value: Any, limit: int) -> list[str]:
    """A list of at most `limit` words, each once. Raises UserError for anything else."""
    right = isinstance(value, (list, tuple)) and len(value) <= limit
    if not right or not all(isinstance(word, str) and len(word) <= 100 for word in value):
        raise UserError(f"{name} must be a list of at most {limit} words")
    return list(dict.fromkeys(value))


def check_latent(name: Any, string: Any) -> str:
    """A latent's string, if its grammar holds it; spaces at the ends are dropped.

    Raises:
      UserError: it does not; as LatentError it says at which character.
    """
    if not isinstance(name, str) or name not in LATENTS or name == "combined":
        raise UserError(f"there is no latent {str(name)[:40]!r}")
    check_length(name, string)
    string = string.strip()
    LATENTS[name].parse(string)
    return string


def check_length(name: str, string: Any) -> None:
    """Raises UserError unless this is a text short enough for a latent, or for the `caption`."""
    most = MAX_PROMPT_CHARACTERS if name == "caption" else LATENTS[name].max_chars
    if not isinstance(string, str) or len(string) > most + 100:
        raise UserError(f"{name}: must be a text of at most {most:,} characters")


def read_shapes(name: str, parts: Any) -> str:
    """The string of a latent from its parsed parts, as documents and the editor have them.

    Args:
      name: 'bbox' or 'blob'.
      parts: [{"phrase": str, "boxes" or "ellipses": [[whole numbers], ..]}, ..].

    Raises:
      UserError: anything else, or shapes that the latent's grammar does not hold.
    """
    segment, shape, field = _SHAPES[name]
    if not isinstance(parts, list):
        raise UserError(f"{name}: must be a list of phrases with their {field}")
    segments = []
    for part in parts:
        if not isinstance(part, dict) or set(part) != {"phrase", field}:
            raise UserError(f"{name}: each entry has a phrase and {field}, nothing else")
        if not isinstance(part["phrase"], str) or not isinstance(part[field], list):
            raise UserError(f"{name}: a phrase is a text, its {field} are a list")
        shapes = []
        for numbers in part[field]:
            count = len(dataclasses.fields(shape))
            if not isinstance(numbers, list) or len(numbers) != count:
                raise UserError(f"{name}: each of the {field} has {count} numbers")
            shapes.append(shape(*numbers))
        segments.append(segment(" ".join(part["phrase"].split()), tuple(shapes)))
    return LATENTS[name].write(tuple(segments))


def read_json(text: Any) -> Any:
    """JSON from a browser: bounded, no NaN. Raises UserError for anything else."""
    if not isinstance(text, str) or len(text) > MAX_SHAPES_CHARACTERS:
        raise UserError(f"must be JSON of at most {MAX_SHAPES_CHARACTERS:,} characters")

    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise UserError("is not JSON") from None


def open_png(
    path: Any, folder: str | os.PathLike, defaults: Settings, names: Sequence[str], size: int
) -> tuple[UInt8[np.ndarray, "height width 3"], LatentDocument]:
    """One of our pictures from an upload.

    Args:
      path: where the server put it.
      folder: the only place where uploads lie.
      defaults, names: settings and latents of the model.
      size: side of its pictures.

    Raises:
      UserError: another place, too large, not one of our pictures, or not one of this model's kind.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise UserError("open one of our PNG files")
    try:
        given, folder = pathlib.Path(path).resolve(), pathlib.Path(folder).resolve()
        ours = folder in given.parents and given.is_file()
    except (OSError, RuntimeError):  # a name of 10,000 characters, a loop of links
        ours = False
    if not ours:
        raise UserError("this file was not uploaded here")
    if given.stat().st_size > MAX_UPLOAD_BYTES:
        raise UserError(f"the file is larger than {MAX_UPLOAD_BYTES // 2**20} MiB")
    try:
        image, document = read_png(given)
    except LatentError as error:
        # Where the server keeps uploads is nobody's business.
        reason = error.message.replace(str(given), "the file").removeprefix("the file: ")
        raise UserError(f"this file cannot be opened: {reason}") from None
    check_document(document, defaults, names)
    if image.shape != (size, size, 3):
        raise UserError(
            f"the picture has {image.shape[1]} x {image.shape[0]} pixels; "
            f"this model's have {size} x {size}"
        )
    return image, document


def check_document(document: LatentDocument, defaults: Settings, names: Sequence[str]) -> None:
    """Raises UserError unless this server would draw the document's picture with its settings."""
    _caption(document.caption)
    unknown = [name for name in document.latents if name not in names]
    if unknown:
        raise UserError(f"this model does not write the latent {unknown[0]}")
    check_range("the document's seed", document.seed, 0, MAX_SEED)
    settings = defaults.of_document(document)
    real("the document's guidance weight", settings.guidance_weight, 0.0, MAX_GUIDANCE)
    whole("the document's number of steps", settings.num_steps, 1, MAX_STEPS)
    # Each plan is a program of its own: no more of them than requests can ask for.
    usual = defaults.replace(
        {
            "guidance_weight": settings.guidance_weight,
            "num_steps": settings.num_steps,
            **_sampler(settings.sampler, defaults),
        }
    ).plan()
    for name, wanted in dataclasses.asdict(settings.plan()).items():
        ours = getattr(usual, name)
        if wanted != ours:
            raise UserError(
                f"the document's picture was drawn with {name} = {wanted}; this page draws with "
                f"{ours} only, `kaleido edit` with any"
            )


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in low..high, also one that a browser sent as 3.0 or "3"."""
    try:
        if isinstance(value, bool) or (isinstance(value, str) and len(value) > 40):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or number != int(number):
            raise ValueError
        number = int(number)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be a whole number between {low} and {high}") from None
    if not low <= number <= high:
        raise UserError(f"{name} is {number}; it must be between {low} and {high}")
    return number


def real(name: str, value: Any, low: float, high: float) -> float:
    """A finite number in low..high, also one that a browser sent as text."""
    try:
        if isinstance(value, bool) or (isinstance(value, str) and len(value) > 40):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be a number between {low:g} and {high:g}") from None
    if not low <= number <= high:  # NaN too
        raise UserError(f"{name} is {number:g}; it must be between {low:g} and {high:g}")
    return number


def _one_of(name: str, value: Any, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} is {str(value)[:40]!r}; one of {', '.join(known)}")
    return value


def _caption(text: Any) -> str:
    if not isinstance(text, str):
        raise UserError("the caption must be a text")
    return clean_prompt(text, "caption")
