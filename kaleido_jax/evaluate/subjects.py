"""Whose pictures are measured: a model's, true ones, or those of a perfect guided model.

Picture i is the same whatever part, batch or host it is made in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.data import shapes, shapes_text
from kaleido_jax.data.shapes_modes import acceptance
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate.data import Data
from kaleido_jax.generate import Pipeline
from kaleido_jax.latents import LatentDocument

Drawn = tuple[UInt8[np.ndarray, "n h w 3"], list[LatentDocument]]


class Subject(Protocol):
    """Draws pictures by number.

    Attributes:
      identity: everything that shapes them, for JSON; equal ones give equal pictures.
      label: for people.
    """

    identity: dict[str, Any]
    label: str

    def draw(self, numbers: Sequence[int]) -> Drawn:
        """Pictures and their documents."""


class Model:
    """A model's pictures for held-out captions; picture i has the random numbers of index i."""

    def __init__(
        self,
        pipe: Pipeline,
        data: Data,
        settings: dict[str, Any],
        seed: int,
        per_caption: int,
        per_latent: int,
        batch_size: int,
        true_latents: bool = False,
    ):
        """Checks the settings; raises UserError where they are out of bounds.

        With `true_latents` z is that of the held-out picture, not drawn: what then is wrong is the
        painting's.
        """
        for option, asked in (("--per-latent", per_latent > 1), ("--true-latents", true_latents)):
            if asked and not pipe.names:
                raise UserError(f"{option}: this model has no latents")
        if true_latents and per_latent > 1:
            raise UserError("--true-latents: a caption has one true z; leave out --per-latent")
        if per_caption % per_latent:
            raise UserError(
                f"{per_caption} pictures of each caption cannot be {per_latent} of each latent"
                " (--per-caption must be a multiple of --per-latent)"
            )
        self._pipe, self._data, self._settings = pipe, data, settings
        self._seed, self._each, self._batch = seed, per_caption, batch_size
        self._same, self._true = per_latent, true_latents
        chosen = pipe.defaults.replace(settings)
        self._denoising = chosen.denoising()
        self.label = f"guidance {chosen.guidance_weight:g}, seed {seed}"
        self.identity = {
            "subject": "model",
            **pipe.describe(),
            "settings": dataclasses.asdict(chosen),
            "seed": seed,
            "captions": data.describe(),
            "data": data.held_out_fingerprint(),
            "per_caption": per_caption,
            "per_latent": per_latent,
            "batch_size": batch_size,
            **({"true_latents": True} if true_latents else {}),
        }

    def draw(self, numbers: Sequence[int]) -> Drawn:
        documents = self._true_documents(numbers) if self._true else self._drawn(numbers)
        output = self._pipe.render(documents, batch_size=self._batch)
        return output.images, output.documents

    def _true_documents(self, numbers: Sequence[int]) -> list[LatentDocument]:
        settings = {"seed": self._seed, **self._denoising}
        return [
            dataclasses.replace(true_document(self._data.held_out(i // self._each), i), **settings)
            for i in numbers
        ]

    def _drawn(self, numbers: Sequence[int]) -> list[LatentDocument]:
        # z has the random numbers of the first picture that it is drawn for.
        firsts = list(dict.fromkeys(i - i % self._same for i in numbers))
        drawn = self._pipe.draw_latents(
            [self._data.held_out(i // self._each)["caption"] for i in firsts],
            seed=self._seed,
            first_index=firsts,
            batch_size=self._batch,
            **self._settings,
        )
        latents = dict(zip(firsts, drawn, strict=True))
        return [dataclasses.replace(latents[i - i % self._same], sample_index=i) for i in numbers]


class Truth:
    """True pictures with their true latents: the ceiling of every metric."""

    def __init__(self, data: Data, latents: Sequence[str], seed: int):
        self._examples = data.truths(seed)
        self.label = f"true pictures, seed {seed}"
        self.identity = {
            "subject": "truth",
            # Tells them from pictures that an older version left in the same folder.
            **({"scenes": "of the seed"} if data.name == "shapes" else {}),
            "latents": list(latents),
            "seed": seed,
            "captions": data.describe(),
            "data": data.held_out_fingerprint(),
        }

    def draw(self, numbers: Sequence[int]) -> Drawn:
        examples = [self._examples(i) for i in numbers]
        documents = [true_document(x, i) for i, x in zip(numbers, examples, strict=True)]
        return np.stack([example["image"] for example in examples]), documents


def true_document(example: Mapping[str, Any], index: int) -> LatentDocument:
    """The caption of an example with the latents that it has."""
    latents = {name: string for name, string in example["latents"].items() if string}
    return LatentDocument(example["caption"], latents, sample_index=index)


class Theory:
    """What a perfect guided model without latents draws of shapes (Eq. 6).

    Scenes of held-out captions are drawn until one is accepted with probability proportional to
    (p(m | c) / p(m))^(gamma - 1), m all its modes (shapes_modes.acceptance).
    """

    def __init__(self, data: Data, weight: float, seed: int):
        """Raises UserError for other data than shapes."""
        if data.name != "shapes":
            raise UserError(f"--theory: known for shapes only, not for {data.name!r}")
        if weight < 1:
            raise UserError(f"--theory: guidance {weight:g}; it is drawn for weights of 1 and more")
        self._source, self._weight, self._seed = data.held_out_source, weight, seed
        self.label = f"theory, guidance {weight:g}, seed {seed}"
        self.identity = {
            "subject": "theory",
            "settings": {"guidance_weight": weight},
            "seed": seed,
            "captions": data.describe(),
        }

    def draw(self, numbers: Sequence[int]) -> Drawn:
        scenes = [self._scene(i) for i in numbers]
        documents = [
            LatentDocument(shapes_text.caption(scene), {}, guidance_weight=self._weight)
            for scene in scenes
        ]
        return np.stack([shapes.render(s, self._source.size) for s in scenes]), documents

    def _scene(self, number: int) -> shapes.Scene:
        source = self._source
        wanted = source.scene(number % len(source))
        draw = np.random.default_rng([self._seed, number])
        for _ in range(100_000):
            scene = shapes.make_scene(
                int(draw.integers(2**32)), 0, source.num_objects, source.semi_axis
            )
            alike = (scene.theme, len(scene.objects)) == (wanted.theme, len(wanted.objects))
            if alike and draw.random() < acceptance(scene, self._weight):
                return scene
        raise UserError(f"--theory: guidance {self._weight:g} is too strong to draw by chance")
