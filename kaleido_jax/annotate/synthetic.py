"""The oracle: true latents, from a shard's JSON or from the generator of shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from kaleido_jax.annotate.protocols import Example, Result, failure
from kaleido_jax.data import oracle, shapes, shapes_text
from kaleido_jax.data.transforms import Frame
from kaleido_jax.errors import UserError

_SHAPES_KEY = re.compile(r"(?:.*/)?shapes-(\d{1,9})-(\d{1,12})")
_SHAPES_WRITERS = {
    "text": shapes_text.description,
    "bbox": shapes_text.grounded_caption,
    "blob": shapes_text.blobs,
}
# Mean absolute difference, in levels of 255, up to which a stored picture is its scene: a JPEG of
# quality 75 stays under 6, another scene is 15 or more away.
_SAME_PICTURE = 10.0


class OracleEngine:
    """Engine `oracle` for text, bbox and blob.

    Records whose JSON has `objects` are read as data/oracle.py says. A record without, whose key
    ends in `shapes-SEED-INDEX`, is drawn again from its numbers, and its truth written.

    Args:
      stage: text, bbox or blob.
      max_objects: the largest objects that a latent names.
      num_objects, semi_axis: ranges with which the shapes were made.

    Raises:
      UserError: another stage, or a range out of bounds.
    """

    batch_size = 64

    def __init__(
        self,
        stage: str,
        max_objects: int = 6,
        num_objects: tuple[int, int] = (1, 3),
        semi_axis: tuple[int, int] = (110, 230),
    ):
        if stage not in oracle.WRITERS:
            raise UserError(
                f"engine 'oracle' gives {', '.join(oracle.WRITERS)}, not {stage}; "
                "use patch:default for vokens"
            )
        if max_objects < 1:
            raise UserError("engine 'oracle': max_objects must be at least 1")
        shapes.check_ranges(num_objects, semi_axis)
        self.stage, self.max_objects = stage, max_objects
        self._ranges = (tuple(num_objects), tuple(semi_axis))
        self.provenance: dict[str, Any] = {
            "engine": "oracle",
            "parameters": {
                "max_objects": max_objects,
                "num_objects": list(num_objects),
                "semi_axis": list(semi_axis),
            },
        }

    def setup(self) -> None:
        """Nothing to load."""

    def annotate(self, examples: Sequence[Example], seed: int) -> list[Result]:
        """True latents; `empty` where a picture shows no object, `failed` for unreadable JSON."""
        results = []
        for example in examples:
            try:
                latent = self._latent(example)
            except (oracle.AnnotationError, UserError) as error:
                results.append(failure(error))
            else:
                results.append(Result(latent, "ok" if latent else "empty"))
        return results

    def _latent(self, example: Example) -> str:
        key = _SHAPES_KEY.fullmatch(example.key)
        if key is not None and "objects" not in example.metadata:
            scene = shapes.make_scene(int(key[1]), int(key[2]), *self._ranges)
            drawn = shapes.render(scene, len(example.image)).astype(int)
            if np.abs(drawn - example.image).mean() > _SAME_PICTURE:
                raise oracle.AnnotationError(
                    f"{example.key}: the picture is not the scene of that seed and index"
                )
            return _SHAPES_WRITERS[self.stage](scene)
        height, width = example.image.shape[:2]
        frame = example.frame or Frame.square_crop(width, height)
        objects = oracle.read_objects(
            dict(example.metadata), frame, example.stored or (width, height)
        )
        return oracle.write(self.stage, objects[: self.max_objects])
