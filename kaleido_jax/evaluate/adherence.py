"""How well pictures follow their latents: what a detector sees, held against what was written.

A detector answers for the latents that it can check. What it says of true pictures with their true
latents is the ceiling.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.data import shapes_detector
from kaleido_jax.data.shapes import HUE_NAMES, SHADE_NAMES, SHAPES
from kaleido_jax.data.shapes_text import Claim, read_grounded
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument, bbox, blob, voken
from kaleido_jax.models.voken_tokenizer import PatchTokenizer

SUCCESS = 0.5  # intersection over union from which a box is hit
ROUND = 0.8  # r_minor / r_major from which an ellipse has no clear angle
_MASK = 64  # pixels of a side, for the overlap of ellipses
Images = UInt8[np.ndarray, "n h w 3"]
# Name of a measure -> (number of the picture, value) of each thing that was written and could be
# judged.
Found = dict[str, list[tuple[int, float]]]


class Detector(Protocol):
    """Judges pictures by their documents.

    Attributes:
      judges: what it judges, "objects" or "vokens": two detectors of one cannot go together.
      identity: what shapes its judgement, for JSON.
    """

    judges: str
    identity: dict[str, Any]

    def judge(self, images: Images, documents: Sequence[LatentDocument]) -> Found:
        """Values of each measure that the documents' latents allow."""


def make_detectors(specs: Sequence[str]) -> list[Detector]:
    """Those that the specs name.

    Raises:
      UserError: what `make_detector` refuses, or two whose values could not be told apart.
    """
    found = [make_detector(spec) for spec in specs]
    for number, detector in enumerate(found):
        for spec, other in zip(specs, found[:number], strict=False):
            if other.judges == detector.judges:
                raise UserError(
                    f"--detector {spec} and {specs[number]} both judge {detector.judges}; "
                    "evaluate once with each"
                )
    return found


def make_detector(spec: str) -> Detector:
    """The detector that NAME or NAME:ARGUMENT names.

    Raises:
      UserError: an unknown name, naming the nearest; whatever an engine refuses.
    """
    name = spec.partition(":")[0]
    if name not in DETECTORS:
        near = difflib.get_close_matches(name, DETECTORS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(DETECTORS)}"
        raise UserError(f"no detector {name!r}; {hint}")
    return DETECTORS[name](spec)


# ---- shapes ---------------------------------------------------------------------------------


class ShapesDetector:
    """Reads drawn shapes: `bbox` and `blob` latents, and the objects that a `text` names.

    box_iou and box_success (over SUCCESS): of each written box with the object of its hue, 0 where
    that is not seen. blob_iou: the same of ellipses. hue: whether an object of the written hue is
    seen. Of those that are seen: shade, shape, and angle (degrees, only where r_minor / r_major is
    under ROUND). background, and layout where both its objects are seen.
    """

    judges = "objects"

    def __init__(self) -> None:
        self.identity = {"name": "shapes"}

    def judge(self, images: Images, documents: Sequence[LatentDocument]) -> Found:
        found: Found = {}
        for row, (image, document) in enumerate(zip(images, documents, strict=True)):
            reading = shapes_detector.read(image)
            for name in ("bbox", "blob"):
                if name in document.latents:
                    parse = bbox.parse if name == "bbox" else blob.parse
                    self._grounded(found, row, reading, parse(document.latents[name]))
            if "text" in document.latents and not document.latents.keys() & {"bbox", "blob"}:
                for claim in named_objects(document.latents["text"]):
                    self._modes(found, row, reading.by_hue(claim.hue), claim)
        return found

    def _grounded(
        self, found: Found, row: int, reading: shapes_detector.Reading, segments: Any
    ) -> None:
        claims, layout, background = read_grounded(segments)
        if background is not None:
            _add(found, "background", row, reading.background == background)
        hues = [claim.hue for claim in claims]
        if layout is not None and len(hues) > 1 and None not in hues[:2]:
            seen = reading.layout(hues[0], hues[1])
            if seen is not None:
                _add(found, "layout", row, seen == layout)
        for claim in claims:
            item = None if claim.hue is None else reading.by_hue(claim.hue)
            self._modes(found, row, item, claim)
            if isinstance(claim.figure, bbox.Box):
                overlap = 0.0 if item is None else shapes_detector.box_iou(item.box, corners(claim))
                _add(found, "box_iou", row, overlap)
                _add(found, "box_success", row, overlap >= SUCCESS)
                continue
            figure = claim.figure
            overlap = 0.0 if item is None else _ellipse_iou(item.ellipse, figure)
            _add(found, "blob_iou", row, overlap)
            if item is not None and figure.r_minor < ROUND * figure.r_major:
                turned = shapes_detector.angle_error(item.ellipse[4], figure.theta)
                _add(found, "angle", row, turned)

    def _modes(
        self, found: Found, row: int, item: shapes_detector.Found | None, claim: Claim
    ) -> None:
        if claim.hue is not None:
            _add(found, "hue", row, item is not None)
        if item is not None:
            _add(found, "shade", row, item.shade == claim.shade)
            _add(found, "shape", row, item.shape == claim.shape)


def corners(claim: Claim) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) of a claim's box."""
    box = claim.figure
    return box.x1, box.y1, box.x2, box.y2


_NAMED = re.compile(rf"\b({'|'.join(SHADE_NAMES)}) ({'|'.join(HUE_NAMES)}) ({'|'.join(SHAPES)})\b")


def named_objects(text: str) -> list[Claim]:
    """The objects that a description names as "dark red disc", each once; without a figure."""
    names = dict.fromkeys(_NAMED.findall(text))
    return [
        Claim(HUE_NAMES.index(hue), SHADE_NAMES.index(shade), SHAPES.index(shape), None)
        for shade, hue, shape in names
    ]


def _ellipse_iou(seen: tuple[float, ...], written: blob.Ellipse) -> float:
    one = blob.Ellipse.rounded(*seen).mask((_MASK, _MASK))
    two = written.mask((_MASK, _MASK))
    union = (one | two).sum()
    return float((one & two).sum() / union) if union else 0.0


def _add(found: Found, name: str, row: int, value: Any) -> None:
    found.setdefault(name, []).append((row, float(value)))


# ---- visual tokens --------------------------------------------------------------------------


class VokenDetector:
    """voken: share of written ids that the picture has when it is encoded again."""

    judges = "vokens"

    def __init__(
        self, encode: Callable[[Images], list[tuple[int, ...]]], identity: Mapping[str, Any]
    ):
        self._encode, self.identity = encode, dict(identity)

    def judge(self, images: Images, documents: Sequence[LatentDocument]) -> Found:
        rows = [i for i, document in enumerate(documents) if document.latents.get("voken")]
        if not rows:
            return {}
        written = [voken.parse(documents[i].latents["voken"]) for i in rows]
        seen = self._encode(images[rows])
        found: Found = {"voken": []}
        for row, ours, theirs in zip(rows, written, seen, strict=True):
            if theirs:
                _add(found, "voken", row, np.mean(np.array(ours) == np.array(theirs)))
        return found


def _shapes(spec: str) -> Detector:
    if ":" in spec:
        raise UserError(f"detector 'shapes' takes no argument, not {spec.partition(':')[2]!r}")
    return ShapesDetector()


def _patch(spec: str) -> Detector:
    argument = spec.partition(":")[2]
    if argument in ("", "default"):
        file = importlib.resources.files("kaleido_jax") / "assets" / "shapes_vokens.npz"
        made = PatchTokenizer.default()
    else:
        file = pathlib.Path(argument)
        made = PatchTokenizer.load(argument)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return VokenDetector(
        lambda images: [tuple(row) for row in made.encode(images).tolist()],
        {"name": "patch", "sha256": digest},
    )


# ---- engines of annotation ------------------------------------------------------------------


def _engine(
    stage: str, spec: str
) -> tuple[Callable[[Images, Sequence[str]], list[str]], dict[str, Any]]:
    """An annotation engine as a function of pictures and captions to latents, "" for none.

    And its provenance.
    """
    from kaleido_jax.annotate.engines import make_engine
    from kaleido_jax.annotate.protocols import Example

    engine = make_engine(stage, spec)
    engine.setup()

    def run(images: Images, captions: Sequence[str]) -> list[str]:
        examples = [
            Example(str(i), image, caption)
            for i, (image, caption) in enumerate(zip(images, captions, strict=True))
        ]
        return [result.latent for result in engine.annotate(examples, 0)]

    return run, {"name": spec.partition(":")[0], **engine.provenance}


class GroundingDetector:
    """box_iou and box_success of written boxes with what a grounding engine sees.

    A written box is held against the best of those seen whose phrase shares a word with its own;
    found: whether there is such a phrase.
    """

    judges = "objects"

    def __init__(
        self, ground: Callable[[Images, Sequence[str]], list[str]], identity: Mapping[str, Any]
    ):
        self._ground, self.identity = ground, dict(identity)

    def judge(self, images: Images, documents: Sequence[LatentDocument]) -> Found:
        found: Found = {}
        rows = [i for i, document in enumerate(documents) if document.latents.get("bbox")]
        seen = self._ground(images[rows], [documents[i].caption for i in rows]) if rows else []
        for row, string in zip(rows, seen, strict=True):
            boxes = (
                [pair for segment in bbox.parse(string) for pair in _pairs(segment)]
                if string
                else []
            )
            for segment in bbox.parse(documents[row].latents["bbox"]):
                for words, box in _pairs(segment):
                    others = [other for theirs, other in boxes if words & theirs]
                    best = max((_box_iou(box, other) for other in others), default=0.0)
                    _add(found, "found", row, bool(others))
                    _add(found, "box_iou", row, best)
                    _add(found, "box_success", row, best >= SUCCESS)
        return found


_SMALL = frozenset("a an the of and or on in at to with by from its his her their is are".split())


def _pairs(segment: bbox.Segment) -> list[tuple[frozenset[str], bbox.Box]]:
    words = re.findall(r"\w+", segment.phrase.lower())
    return [(frozenset(words) - _SMALL, box) for box in segment.boxes]


def _box_iou(a: bbox.Box, b: bbox.Box) -> float:
    sides = [(box.x1, box.y1, box.x2, box.y2) for box in (a, b)]
    return float(shapes_detector.box_iou(*sides))


def _grounding(spec: str) -> Detector:
    return GroundingDetector(*_engine("bbox", spec))


def _vokens(spec: str) -> Detector:
    run, identity = _engine("voken", spec)

    def encode(images: Images) -> list[tuple[int, ...]]:
        return [voken.parse(s) if s else () for s in run(images, [""] * len(images))]

    return VokenDetector(encode, identity)


# Name -> maker(NAME or NAME:ARGUMENT). Engines bear the names that `kaleido annotate` knows.
DETECTORS: Mapping[str, Callable[[str], Detector]] = {
    "shapes": _shapes,
    "patch": _patch,
    **dict.fromkeys(("hf", "qwen-vl", "vllm"), _grounding),
    **dict.fromkeys(("seed", "kmeans", "fsq"), _vokens),
}


def merge(parts: Sequence[tuple[int, Found]]) -> Found:
    """Values of several parts together, each with the number of its first picture."""
    together: Found = {}
    for first, found in parts:
        for name, values in found.items():
            together.setdefault(name, []).extend((first + row, value) for row, value in values)
    return together
