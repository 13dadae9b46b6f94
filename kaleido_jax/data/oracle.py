"""True latents from a record's JSON: what a photograph's annotators drew.

`objects: [{label, bbox_xyxy: [x1, y1, x2, y2], polygon: [x, y, x, y, ...]}]`, in thousandths of
the picture's width and height. A polygon may have several parts, each closed on its first point.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kaleido_jax.data.masks import largest_component, moments_ellipse, polygon_mask
from kaleido_jax.data.transforms import Frame
from kaleido_jax.latents import bbox, blob
from kaleido_jax.latents.bbox import Box
from kaleido_jax.latents.blob import Ellipse
from kaleido_jax.latents.characters import clean
from kaleido_jax.latents.errors import LatentError

MAX_OBJECTS = 1000
MAX_LABEL = 200  # characters
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it
_MASK_SIDE = 128  # pixels along the longer side of a polygon
_LEAST_AREA = 16 * (1000 / 512) ** 2  # thousandths squared: 16 pixels of what engines see
_MAX_WORDS = 80


class AnnotationError(ValueError):
    """A record's JSON is not what it should be."""


@dataclass(frozen=True)
class Seen:
    """An object in the training picture: its box and, where it has a mask, its ellipse."""

    label: str
    box: Box
    ellipse: Ellipse | None


def read_metadata(data: bytes) -> dict[str, Any]:
    """The JSON object of a record. Raises AnnotationError."""
    try:
        text = data.decode("utf-8")
        metadata = json.loads(text)
        if _SURROGATE.search(text):  # a whole pair is a character, half of one is not
            json.dumps(metadata, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"the JSON cannot be read: {str(error)[:200]}") from error
    if not isinstance(metadata, dict):
        raise AnnotationError("the JSON is not an object")
    return metadata


def caption(metadata: dict[str, Any]) -> str:
    """The caption of the JSON, or one made from its label. Raises AnnotationError for neither."""
    if isinstance(metadata.get("caption"), str) and metadata["caption"].strip():
        return metadata["caption"].strip()
    if isinstance(metadata.get("label"), str):
        return f"a photo of {_article(metadata['label'])} {metadata['label']}"
    raise AnnotationError("no caption: neither a .txt nor 'caption' or 'label' in the JSON")


def read_objects(metadata: dict[str, Any], frame: Frame, stored: tuple[int, int]) -> list[Seen]:
    """The objects that the training picture shows, largest box first.

    Args:
      frame: from the stored picture to the training picture.
      stored: width and height as stored. Where the JSON's own width and height are these swapped,
        its coordinates belong to the picture as shown, after the EXIF turn.

    Raises:
      AnnotationError: objects that are not as the module describes them.
    """
    objects = metadata.get("objects", [])
    if not isinstance(objects, list) or len(objects) > MAX_OBJECTS:
        raise AnnotationError(f"'objects' must be a list of at most {MAX_OBJECTS}")
    width, height = stored
    said = (metadata.get("width"), metadata.get("height"))
    if width != height and said == (height, width):
        frame = Frame.square_crop(height, width)
    seen = []
    for number, item in enumerate(objects):
        try:
            thing = _read_object(item, frame)
        except (AnnotationError, LatentError) as error:
            raise AnnotationError(f"object {number}: {error}") from error
        if thing is not None:
            seen.append(thing)
    return sorted(seen, key=lambda s: -(s.box.x2 - s.box.x1) * (s.box.y2 - s.box.y1))


def _read_object(item: Any, frame: Frame) -> Seen | None:
    if not isinstance(item, dict) or not isinstance(item.get("label"), str):
        raise AnnotationError("an object needs a 'label'")
    label = clean(item["label"])
    if not label:
        raise AnnotationError("the 'label' is empty")
    if len(label) > MAX_LABEL:
        raise AnnotationError(
            f"the 'label' has {len(label)} characters, at most {MAX_LABEL} may be"
        )
    corners = _numbers(item.get("bbox_xyxy"), "bbox_xyxy")
    if len(corners) != 4:
        raise AnnotationError(f"'bbox_xyxy' has {len(corners)} numbers, not 4")
    if corners.min() < 0 or corners.max() > 1000:
        raise AnnotationError("'bbox_xyxy' goes beyond 0..1000")
    if (corners[:2] > corners[2:]).any():
        raise AnnotationError("'bbox_xyxy' has its corners reversed")
    if (corners[2:] - corners[:2] < 1).any():
        return None  # thinner than a thousandth: nothing to see
    box = frame.box(Box.rounded(*corners))
    if box is None:
        return None
    ellipse = None
    if item.get("polygon"):
        points = _numbers(item["polygon"], "polygon")
        if len(points) % 2 or len(points) < 6:
            raise AnnotationError(f"'polygon' has {len(points)} numbers; pairs, at least 3 of them")
        ellipse = _polygon_ellipse(frame.points(points.reshape(-1, 2)))
    return Seen(label, box, ellipse)


def _numbers(value: Any, name: str) -> np.ndarray:
    if not isinstance(value, list) or len(value) > 100_000:
        raise AnnotationError(f"'{name}' must be a list of numbers")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise AnnotationError(f"'{name}' must be a list of numbers")
        if not abs(number) <= 10_000:  # false of NaN too
            raise AnnotationError(f"'{name}' has a number out of range")
    return np.array(value, float)


def _polygon_ellipse(points: np.ndarray) -> Ellipse | None:
    """The ellipse of a polygon's largest part, as far as the training picture shows it."""
    low, high = np.clip([points.min(0), points.max(0)], 0, 1000)
    unit = (high - low).max() / _MASK_SIDE  # thousandths: small things get as many pixels as large
    if not unit:
        return None
    mask = np.zeros((_MASK_SIDE, _MASK_SIDE), bool)
    for part in _parts(points):
        mask |= polygon_mask((points[part] - low) / unit, _MASK_SIDE)
    # The window is square, and may reach beyond the picture.
    shown_x, shown_y = (low + (np.arange(_MASK_SIDE)[:, None] + 0.5) * unit < high).T
    component, _ = largest_component(mask & shown_x & shown_y[:, None])
    if component.sum() * unit**2 < _LEAST_AREA:
        return None
    xc, yc, major, minor, theta = moments_ellipse(component)
    return Ellipse.rounded(*low + unit * np.array([xc, yc]), unit * major, unit * minor, theta)


def _parts(points: np.ndarray) -> list[slice]:
    """Each part runs until it comes back to its first point."""
    parts, start = [], 0
    while start < len(points):
        back = np.flatnonzero((points[start + 1 :] == points[start]).all(1))
        stop = start + 2 + int(back[0]) if len(back) else len(points)
        if stop - start >= 3:
            parts.append(slice(start, stop))
        start = stop
    return parts


# ---- latents ----------------------------------------------------------------------------------


def grounded_caption(objects: Sequence[Seen]) -> str:
    """The latent `bbox`: each label once, followed by its boxes, largest first."""
    groups = _grouped(objects, lambda seen: seen.box)
    return bbox.write([bbox.Segment(*group) for group in groups]) if groups else ""


def blobs(objects: Sequence[Seen]) -> str:
    """The latent `blob`: each label once, followed by its ellipses."""
    groups = _grouped(objects, lambda seen: seen.ellipse)
    return blob.write([blob.Segment(*group) for group in groups]) if groups else ""


def description(objects: Sequence[Seen]) -> str:
    """The latent `text`: where each object is and how much of the picture it takes.

    At most 80 words, largest objects first; "" without objects.
    """
    words: list[str] = []
    for seen in objects:
        x, y = (seen.box.x1 + seen.box.x2) / 2, (seen.box.y1 + seen.box.y2) / 2
        row = ("top", "middle", "bottom")[min(2, int(y * 3 / 1000))]
        column = ("left", "centre", "right")[min(2, int(x * 3 / 1000))]
        share = (seen.box.x2 - seen.box.x1) * (seen.box.y2 - seen.box.y1) / 10**6
        size = "large" if share > 0.25 else "small" if share < 0.04 else "medium"
        sentence = f"There is a {size} {seen.label} at the {row} {column}.".split()
        if len(words) + len(sentence) > _MAX_WORDS:
            break
        words += sentence
    return " ".join(words)


def _grouped(objects: Sequence[Seen], figure: Callable[[Seen], Any]) -> list[tuple[str, tuple]]:
    groups: dict[str, list] = {}
    for seen in objects:
        if figure(seen) is not None:
            groups.setdefault(seen.label, []).append(figure(seen))
    return [(label, tuple(figures)) for label, figures in groups.items()]


def _article(word: str) -> str:
    return "an" if word[:1].lower() in tuple("aeiou") else "a"


WRITERS: dict[str, Callable[[Sequence[Seen]], str]] = {
    "text": description,
    "bbox": grounded_caption,
    "blob": blobs,
}


def write(name: str, objects: Sequence[Seen]) -> str:
    """The latent `name`, one of WRITERS; "" where the objects give nothing.

    Raises:
      AnnotationError: more objects or longer labels than the latent may hold.
    """
    try:
        return WRITERS[name](objects)
    except LatentError as error:
        raise AnnotationError(str(error)) from error
