"""What annotation is made of: examples in, results out, engines between.

An engine is made from a string (`engines.make_engine`), is picklable before `setup` (it goes to
workers as its settings, without the model), loads its model in `setup` and answers batches. It
never raises for an example: what goes wrong with one is that example's Result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int, UInt8

from kaleido_jax.data.transforms import Frame
from kaleido_jax.sidecars import MAX_RAW, STATUSES

STAGES = ("text", "bbox", "blob", "voken")


@dataclass(frozen=True)
class Example:
    """One picture to annotate, as training sees it.

    Attributes:
      key: unique in the run.
      image: the training picture: turned upright, cropped to its centred square, uint8 RGB. Any
        side; coordinates of every latent are thousandths of this square.
      caption: the original caption; for a class-labelled set the label itself may be in
        `metadata["label"]` instead.
      metadata: the record's JSON object, {} where there is none.
      frame: from the stored picture's coordinates to those of `image` (the oracle reads boxes
        drawn on the stored picture); None where `image` is the stored picture.
      stored: width and height as stored; None likewise.
      bbox: the strict `bbox` string of this picture, for the stage `blob` only; None or "" where
        there is none.
    """

    key: str
    image: UInt8[np.ndarray, "side side 3"]
    caption: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    frame: Frame | None = None
    stored: tuple[int, int] | None = None
    bbox: str | None = None


@dataclass(frozen=True)
class Result:
    """What an engine says about one example.

    Attributes:
      latent: a strict canonical string of the stage's latent, or "".
      status: ok | repaired (usable after the parser's repairs) | empty (nothing to say,
        legitimately) | rejected (the output is unusable) | failed (an error). The last three have
        latent "".
      issues: what was repaired or refused, in words, in order.
      raw: the model's own output, at most MAX_RAW characters; "" where there is none to show.
    """

    latent: str
    status: str
    issues: tuple[str, ...] = ()
    raw: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is none of {', '.join(STATUSES)}")
        if bool(self.latent) != (self.status in ("ok", "repaired")):
            raise ValueError(f"latent {self.latent!r} does not go with status {self.status}")
        object.__setattr__(self, "raw", self.raw[:MAX_RAW])


def failure(error: BaseException) -> Result:
    """The result of an example that an exception ended; the issue names its type."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return Result("", "failed", (words[:500],))


def seed_of(seed: int, stream: str, key: str) -> int:
    """A 63-bit seed from the run's seed, a stream's name and an example's key, on any machine."""
    digest = hashlib.sha256(f"{seed}\n{stream}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Engine(Protocol):
    """One stage's annotator. Made by `engines.make_engine`, which raises UserError for misuse.

    Attributes:
      stage: text, bbox, blob or voken.
      provenance: JSON-able and complete without `setup`: engine, model, revision, SHA-256 of the
        prompt and of local files, parameters. Two engines with equal provenance give equal
        results, so its hash is the stage's config hash.
      batch_size: how many examples `annotate` should get at once; it takes any number.
    """

    stage: str
    provenance: dict[str, Any]
    batch_size: int

    def setup(self) -> None:
        """Load the model, once per worker. Raises UserError where it is missing or not fit."""

    def annotate(self, examples: Sequence[Example], seed: int) -> list[Result]:
        """One result per example, in order. Never raises for an example."""


@dataclass(frozen=True)
class Answer:
    """What a vision-language model said.

    Attributes:
      raw: its words, special tokens and all.
      truncated: it was stopped before it had ended.
      size: (width, height) of the picture in the units of its coordinates: (1000, 1000) for
        thousandths, the resized picture's pixels otherwise.
    """

    raw: str
    truncated: bool = False
    size: tuple[float, float] = (1000, 1000)


class Captioner(Protocol):
    """Describes pictures in words."""

    def describe(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], prompts: Sequence[str], seed: int | None
    ) -> list[Answer]:
        """Answers in order; greedy where `seed` is None, else drawn with it."""


class Grounder(Protocol):
    """Says what is where in a picture, in its own dialect."""

    def ground(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], seed: int | None
    ) -> list[Answer]:
        """Answers in order; greedy where `seed` is None, else drawn with it."""


@dataclass(frozen=True)
class Mask:
    """A segmenter's answer for one box: the mask, and the intersection over union it predicts."""

    pixels: Bool[np.ndarray, "h w"]
    score: float


class Segmenter(Protocol):
    """Masks of what boxes show."""

    def segment(
        self,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        boxes: Sequence[Sequence[tuple[float, float, float, float]]],
    ) -> list[list[Mask]]:
        """Per picture one mask per box; boxes are (x1, y1, x2, y2) in its pixels, at least one."""


class VisualTokenizer(Protocol):
    """Pictures to 32 numbers each, four rows of eight."""

    num_codes: int

    def encode(self, images: UInt8[np.ndarray, "n h w 3"]) -> Int[np.ndarray, "n 32"]:
        """Ids in 0..num_codes-1."""
