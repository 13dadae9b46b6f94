"""Where examples come from: the Source protocol and the embedded shapes."""

from __future__ import annotations

from typing import Any, Protocol

from kaleido_jax.data import shapes, shapes_text
from kaleido_jax.errors import UserError


class RecordError(Exception):
    """One record cannot be used: its place (file and key) and the reason. It is skipped."""

    def __init__(self, where: str, reason: str):
        super().__init__(reason)
        self.where = where


class Source(Protocol):
    """Examples by number, in any order, the same at every reading.

    An example is {key: unique str, image: uint8 [H, W, 3] (or float points), caption: str,
    latents: {name: str}}, "" standing for a latent that is missing. Reading raises RecordError for
    a record that must be skipped.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


_WRITERS = {
    "text": shapes_text.description,
    "bbox": shapes_text.grounded_caption,
    "blob": shapes_text.blobs,
}


class ShapesSource:
    """The embedded data set (data/shapes.py) as a Source.

    Args:
      num_examples: how many examples an epoch has.
      seed: another seed is another data set; training and evaluation must differ in it.
      size: pixels of a side, at least 32.
      num_objects, semi_axis: ranges of `shapes.make_scene`.
      latents: the names to write, of text, bbox, blob, voken.

    Raises:
      UserError: a range out of bounds or an unknown latent.
    """

    def __init__(
        self,
        num_examples: int = 1_000_000,
        seed: int = 0,
        size: int = 64,
        num_objects: tuple[int, int] = (1, 3),
        semi_axis: tuple[int, int] = (110, 230),
        latents: tuple[str, ...] = ("text", "bbox", "blob"),
    ):
        shapes.check_ranges(num_objects, semi_axis)
        if num_examples < 1:
            raise UserError(f"shapes: num_examples {num_examples} must be at least 1")
        if size < 32:
            raise UserError(f"shapes: size {size} is too small, 32 is the least")
        for name in latents:
            if name not in _WRITERS and name != "voken":
                raise UserError(
                    f"shapes: no latent {name!r} (there are {', '.join(_WRITERS)}, voken)"
                )
        self.num_examples, self.seed, self.size = num_examples, seed, size
        self.num_objects, self.semi_axis = tuple(num_objects), tuple(semi_axis)
        self.latents = tuple(latents)
        self._tokenizer = None
        if "voken" in latents:
            from kaleido_jax.models.voken_tokenizer import PatchTokenizer

            self._tokenizer = PatchTokenizer.default()

    def __len__(self) -> int:
        return self.num_examples

    def scene(self, index: int) -> shapes.Scene:
        """The truth of example `index`."""
        if not 0 <= index < self.num_examples:
            raise IndexError(index)
        return shapes.make_scene(self.seed, index, self.num_objects, self.semi_axis)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        image = shapes.render(scene, self.size)
        latents = {name: _WRITERS[name](scene) for name in self.latents if name in _WRITERS}
        if self._tokenizer is not None:
            latents["voken"] = self._tokenizer.encode_string(image)
        return {
            "key": f"shapes-{self.seed}-{index}",
            "image": image,
            "caption": shapes_text.caption(scene),
            "latents": latents,
        }
